"""An Optuna sampler over a list of legal configs that never proposes one twice."""

from __future__ import annotations

import bisect
import dataclasses
import functools
import itertools
import math
import random
import typing

import optuna
from optuna.distributions import BaseDistribution, CategoricalDistribution
from optuna.samplers import BaseSampler
from optuna.trial import FrozenTrial, TrialState

from flashgen.codegen.config import KernelConfig, Scalar, config_from_dict
from flashgen.errors import ConfigError, FlashgenError

Values = tuple[Scalar, ...]

_MAX_SPREAD_DRAWS = 256
_MAX_BOX_DRAWS = 64  # for one legal point
_WORD_DISTANCE = 2  # another word counts as much as this many steps of a number
# Measured by benchmarks/search/replay.py: each of so many of the best is left at half the rate of the one before it,
# for a config of which one number is another, with this probability one more, and so on.
_BEST = 10
_LEAVE_BEST = math.log(2)
_CHANGE_ANOTHER = 0.5
_TEMPLATE = "template"
# The value of a number that a config's template does not have.
_ABSENT = ""
_OPEN_STATES = (TrialState.RUNNING, TrialState.WAITING)


class SpaceExhausted(FlashgenError):
    """Every legal config has been tried; `UntriedNeighbourSampler.remaining` says so before a trial is asked for."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class ConfigSpace:
    """The legal configs as Optuna sees them: one categorical for each number, and one for the template.

    Numbers that only some of several templates have are the empty text in the configs of the others. Configs of one
    template have no categorical for it.

    Attributes:
        configs: without repeats, in the order given.
        choices: the values of each number that occur, sorted, by name.
    """

    configs: tuple[KernelConfig, ...]
    choices: dict[str, Values]

    @classmethod
    def of(cls, configs: typing.Iterable[KernelConfig]) -> ConfigSpace:
        """Return the space of `configs`.

        Raises:
            ConfigError: if there are none.
        """
        unique = tuple(dict.fromkeys(configs))
        if not unique:
            raise ConfigError("a study needs legal configs, got none")
        rows = [config.as_dict() for config in unique]
        names = dict.fromkeys(name for row in _one_of_each(rows) for name in row)
        choices = {name: _sorted_values({row.get(name, _ABSENT) for row in rows}) for name in names}
        if len(choices[_TEMPLATE]) == 1:
            del choices[_TEMPLATE]
        return cls(configs=unique, choices=choices)

    @property
    def templates(self) -> tuple[str, ...]:
        """The templates that configs are of."""
        return tuple(sorted({config.template for config in self.configs}))

    def distributions(self) -> dict[str, BaseDistribution]:
        """Return what `suggest_config` suggests each number from."""
        return {name: CategoricalDistribution(values) for name, values in self.choices.items()}

    def key(self, config: KernelConfig) -> Values:
        """Return the values of `config`, in the order of `choices`."""
        numbers = {**vars(config), _TEMPLATE: config.template}
        return tuple(numbers.get(name, _ABSENT) for name in self.choices)

    def config(self, values: typing.Mapping[str, Scalar]) -> KernelConfig:
        """Return the config that has these values, by name; the inverse of `key`."""
        numbers = {name: value for name, value in values.items() if value != _ABSENT}
        return config_from_dict({_TEMPLATE: self.configs[0].template, **numbers})

    def coordinates(self, key: Values) -> tuple[int, ...]:
        """Return where each value of `key` stands, or would stand, among its choices."""
        axes = zip(self._places, self.choices.values(), key, strict=True)
        return tuple(
            place if (place := places.get(value)) is not None else _place(values, value)
            for places, values, value in axes
        )

    @functools.cached_property
    def _places(self) -> tuple[dict[Scalar, int], ...]:
        return tuple({value: place for place, value in enumerate(values)} for values in self.choices.values())


def suggest_config(trial: optuna.Trial, space: ConfigSpace) -> KernelConfig:
    """Return the config that the study's sampler proposes for `trial`."""
    numbers = {name: trial.suggest_categorical(name, values) for name, values in space.choices.items()}
    return space.config(typing.cast("dict[str, Scalar]", numbers))


class UntriedNeighbourSampler(BaseSampler):
    """Proposes seeds, then points spread over the legal list, then neighbours of the best; each config once.

    Local search from several of the best beats a model here: at 200 evaluations of tables with up to 13,176 configs it
    came within 0.2% of the optimum, multivariate TPE within 0.5%.

    A proposal that is illegal or tried becomes the nearest untried legal config. Tried is what the study holds in any
    state but FAIL, so batches asked before any is told, and a study resumed in another process, never repeat. Tell a
    config that cannot run as a large finite value: one told as FAIL will be proposed again.

    One sampler serves one study. Its proposals depend on `seed` and the study's trials alone.
    """

    def __init__(
        self,
        configs: typing.Sequence[KernelConfig],
        *,
        seeds: typing.Sequence[KernelConfig] = (),
        seed: int = 0,
        n_quasi_random: int = 20,
    ) -> None:
        """Make a sampler over `configs`.

        Args:
            configs: every legal config.
            seeds: proposed first, in order; one that is not in `configs` stands for its nearest neighbour there.
            seed: makes the sequence reproducible.
            n_quasi_random: how many spread points follow the seeds.

        Raises:
            ConfigError: if there are no configs, or none of a seed's template.
        """
        self.space = ConfigSpace.of(configs)
        templates = self.space.templates
        if any(config.template not in templates for config in seeds):
            raise ConfigError(f"every seed must be a config of {' or '.join(templates)}")
        self._keys = {self.space.key(config): index for index, config in enumerate(self.space.configs)}
        self._coordinates = [self.space.coordinates(key) for key in self._keys]
        self._is_word = _are_words(self.space)
        self._template = list(self.space.choices).index(_TEMPLATE) if _TEMPLATE in self.space.choices else None
        self._tie_break = list(range(len(self._keys)))
        rng = random.Random(seed)
        rng.shuffle(self._tie_break)
        self._shift = [rng.random() for _ in self.space.choices]
        self._boxes = _boxes(self.space, rng)
        self._seeds = list(dict.fromkeys(self._index_of(self.space.key(seed)) for seed in seeds))
        self._n_guided_from = len(self._seeds) + n_quasi_random
        self._seed = seed
        # What was proposed to trials whose parameters the study does not show yet, by trial number.
        self._proposed: dict[int, int] = {}

    def remaining(self, study: optuna.Study) -> int:
        """Return how many legal configs the study has not tried."""
        return len(self._keys) - len(self._tried(study))

    def infer_relative_search_space(self, study: optuna.Study, trial: FrozenTrial) -> dict[str, BaseDistribution]:
        return self.space.distributions()

    def sample_relative(
        self, study: optuna.Study, trial: FrozenTrial, search_space: dict[str, BaseDistribution]
    ) -> dict[str, object]:
        """Return the values of an untried legal config.

        Raises:
            SpaceExhausted: if there is none left.
        """
        tried = self._tried(study)
        untried = [index for index in range(len(self._keys)) if index not in tried]
        if not untried:
            raise SpaceExhausted(f"all {len(self._keys)} legal configs have been tried; stop, or widen the space")
        index = self._propose(study, trial, tried, untried)
        self._proposed[trial.number] = index
        return dict(zip(self.space.choices, self.space.key(self.space.configs[index]), strict=True))

    def sample_independent(
        self, study: optuna.Study, trial: FrozenTrial, param_name: str, param_distribution: BaseDistribution
    ) -> typing.NoReturn:
        known = " or ".join(self.space.templates)
        raise ConfigError(f"{param_name!r} with {param_distribution} is not a number of {known} here")

    def after_trial(
        self, study: optuna.Study, trial: FrozenTrial, state: TrialState, values: typing.Sequence[float] | None
    ) -> None:
        self._proposed.pop(trial.number, None)

    def _tried(self, study: optuna.Study) -> set[int]:
        tried = set()
        for trial in study.get_trials(deepcopy=False):
            if trial.state == TrialState.FAIL:
                continue
            index = self._keys.get(tuple(trial.params.get(name, "") for name in self.space.choices))
            if index is None and trial.state in _OPEN_STATES:
                index = self._proposed.get(trial.number)
            if index is not None:
                tried.add(index)
        return tried

    def _propose(self, study: optuna.Study, trial: FrozenTrial, tried: set[int], untried: list[int]) -> int:
        for index in self._seeds:
            if index not in tried:
                return index
        if len(tried) >= self._n_guided_from and (best := self._best_trials(study)):
            # Of trials asked for before any is told, each goes its own way; a resumed study goes the same.
            rng = random.Random(f"{self._seed} {trial.number}")
            return self._nearest(self._neighbour(best, rng), untried)
        return self._next_spread(tried, untried)

    def _best_trials(self, study: optuna.Study) -> list[FrozenTrial]:
        done = study.get_trials(deepcopy=False, states=(TrialState.COMPLETE,))
        return sorted(done, key=lambda trial: (trial.value, trial.number))[:_BEST]

    def _neighbour(self, best: typing.Sequence[FrozenTrial], rng: random.Random) -> Values:
        """Return the values of one of the best, rather the first of them, with one number changed or a few."""
        start = best[min(int(rng.expovariate(_LEAVE_BEST)), len(best) - 1)]
        key = [start.params[name] for name in self.space.choices]
        # Another template is another kernel; a number that this one lacks stays so.
        others = {
            axis: [other for other in values if other not in (key[axis], _ABSENT)]
            for axis, values in enumerate(self.space.choices.values())
            if axis != self._template and key[axis] != _ABSENT
        }
        axes = [axis for axis, values in others.items() if values]
        changed = 1
        while changed < len(axes) and rng.random() < _CHANGE_ANOTHER:
            changed += 1
        for axis in rng.sample(axes, min(changed, len(axes))):
            key[axis] = rng.choice(others[axis])
        return tuple(key)

    def _next_spread(self, tried: set[int], untried: list[int]) -> int:
        """Return the first untried legal point of the spread; failing that, the neighbour of the last one drawn."""
        key: Values = ()
        points = _spread_keys(self._boxes, self._shift, self._keys)
        for key in itertools.islice(points, _MAX_SPREAD_DRAWS):
            index = self._keys.get(key)
            if index is not None and index not in tried:
                return index
        return self._nearest(key, untried)

    def _index_of(self, key: Values) -> int:
        index = self._keys.get(key)
        return self._nearest(key, self._keys.values()) if index is None else index

    def _nearest(self, key: Values, candidates: typing.Iterable[int]) -> int:
        place = self.space.coordinates(key)

        def distance(index: int) -> tuple[bool, int, int]:
            axes = zip(self._is_word, place, self._coordinates[index], strict=True)
            steps = sum(_WORD_DISTANCE * (a != b) if word else abs(a - b) for word, a, b in axes)
            # Numbers of one template say little of another's.
            other_template = (
                self._template is not None and place[self._template] != (self._coordinates[index][self._template])
            )
            return other_template, steps, self._tie_break[index]

        return min(candidates, key=distance)


def _boxes(space: ConfigSpace, rng: random.Random) -> list[list[Values]]:
    """Return the values of each number that occur with each combination of words; shuffled, of each template in turn.

    Words are other kernels (`dq=kernel`, `dq=atomic`), which take other numbers: one may be a small part of the space.
    """
    words = _are_words(space)
    found: dict[str, dict[Values, list[Values]]] = {}
    for config in space.configs:
        key = space.key(config)
        boxes = found.setdefault(config.template, {})
        boxes.setdefault(tuple(value for value, word in zip(key, words, strict=True) if word), []).append(key)
    shuffled = [rng.sample(list(boxes.values()), len(boxes)) for boxes in found.values()]
    in_turn = itertools.chain.from_iterable(itertools.zip_longest(*shuffled))
    return [[_sorted_values(set(axis)) for axis in zip(*keys, strict=True)] for keys in in_turn if keys]


def _are_words(space: ConfigSpace) -> list[bool]:
    """Return which of the choices are words; numbers stand before the empty text of templates without them."""
    return [isinstance(values[0], str) for values in space.choices.values()]


def _one_of_each(rows: typing.Iterable[dict[str, Scalar]]) -> list[dict[str, Scalar]]:
    """Return one row of each template."""
    return list({row[_TEMPLATE]: row for row in rows}.values())


def _spread_keys(
    boxes: typing.Sequence[typing.Sequence[Values]], shift: typing.Sequence[float], legal: typing.Container[Values]
) -> typing.Iterator[Values]:
    """Yield points that fill the boxes evenly, a legal one of each in turn, at any length of the sequence.

    Additive recurrence by powers of the generalised golden ratio, shifted at random (M. Roberts, "The unreasonable
    effectiveness of quasirandom sequences", 2018).
    """
    # An axis with one value needs no share of the dimensions: the more there are, the more even neighbours are alike.
    varied = [[axis for axis, values in enumerate(box) if len(values) > 1] for box in boxes]
    ratios = {len(axes): _golden_ratio(len(axes)) for axes in varied}
    steps = itertools.count(1)
    for box, axes in itertools.cycle(zip(boxes, varied, strict=True)):
        for step in itertools.islice(steps, _MAX_BOX_DRAWS):
            position = dict.fromkeys(range(len(box)), 0.0)
            position |= {
                axis: (shift[axis] + step * ratios[len(axes)] ** -power) % 1.0 for power, axis in enumerate(axes, 1)
            }
            key = tuple(values[int(position[axis] * len(values))] for axis, values in enumerate(box))
            if key in legal:
                break
        yield key


def _golden_ratio(dimensions: int) -> float:
    ratio = 2.0
    for _ in range(40):  # the root of x ** (d + 1) = x + 1 attracts
        ratio = (1.0 + ratio) ** (1.0 / (dimensions + 1))
    return ratio


def _sorted_values(values: typing.AbstractSet[Scalar]) -> Values:
    return tuple(sorted(values, key=lambda value: (isinstance(value, str), value)))


def _place(values: Values, value: Scalar) -> int:
    if isinstance(value, str):
        return values.index(value) if value in values else len(values)
    return bisect.bisect_left([v for v in values if isinstance(v, int)], value)
