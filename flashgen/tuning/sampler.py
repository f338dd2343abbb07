"""An Optuna sampler over a list of legal configs that never proposes one twice."""

from __future__ import annotations

import bisect
import dataclasses
import itertools
import random
import typing
import warnings

import optuna
from optuna.distributions import BaseDistribution, CategoricalDistribution
from optuna.samplers import BaseSampler, TPESampler
from optuna.trial import FrozenTrial, TrialState

from flashgen.codegen.config import KernelConfig, Scalar, config_from_dict
from flashgen.errors import ConfigError, FlashgenError

Values = tuple[Scalar, ...]

_MAX_SPREAD_DRAWS = 256
_MAX_BOX_DRAWS = 64  # for one legal point
_WORD_DISTANCE = 2  # another word counts as much as this many steps of a number
_OPEN_STATES = (TrialState.RUNNING, TrialState.WAITING)


class SpaceExhausted(FlashgenError):
    """Every legal config has been tried; `UntriedNeighbourSampler.remaining` says so before a trial is asked for."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class ConfigSpace:
    """The legal configs of one template as Optuna sees them: one categorical for each number.

    Attributes:
        template: template of all of them.
        configs: without repeats, in the order given.
        choices: the values of each number that occur, sorted, by name.
    """

    template: str
    configs: tuple[KernelConfig, ...]
    choices: dict[str, Values]

    @classmethod
    def of(cls, configs: typing.Iterable[KernelConfig]) -> ConfigSpace:
        """Return the space of `configs`.

        Raises:
            ConfigError: if there are none, or they belong to several templates.
        """
        unique = tuple(dict.fromkeys(configs))
        templates = sorted({config.template for config in unique})
        if len(templates) != 1:
            raise ConfigError(f"a study needs legal configs of one template, got {', '.join(templates) or 'none'}")
        rows = [_numbers(config) for config in unique]
        choices = {name: _sorted_values(row[name] for row in rows) for name in rows[0]}
        return cls(template=templates[0], configs=unique, choices=choices)

    def distributions(self) -> dict[str, BaseDistribution]:
        """Return what `suggest_config` suggests each number from."""
        return {name: CategoricalDistribution(values) for name, values in self.choices.items()}

    def key(self, config: KernelConfig) -> Values:
        """Return the values of `config`, in the order of `choices`."""
        numbers = _numbers(config)
        return tuple(numbers[name] for name in self.choices)

    def coordinates(self, key: Values) -> tuple[int, ...]:
        """Return where each value of `key` stands, or would stand, among its choices."""
        return tuple(_place(values, value) for values, value in zip(self.choices.values(), key, strict=True))


def suggest_config(trial: optuna.Trial, space: ConfigSpace) -> KernelConfig:
    """Return the config that the study's sampler proposes for `trial`."""
    numbers = {name: trial.suggest_categorical(name, values) for name, values in space.choices.items()}
    return config_from_dict({"template": space.template, **numbers})


class UntriedNeighbourSampler(BaseSampler):
    """Proposes seeds, then points spread over the legal list, then what a model thinks best; each config once.

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
        inner: BaseSampler | None = None,
    ) -> None:
        """Make a sampler over `configs`.

        Args:
            configs: every legal config.
            seeds: proposed first, in order; one that is not in `configs` stands for its nearest neighbour there.
            seed: makes the sequence reproducible.
            n_quasi_random: how many spread points follow the seeds.
            inner: the model, a sampler with relative sampling; multivariate TPE by default.

        Raises:
            ConfigError: if there are no configs, or they or the seeds belong to several templates.
        """
        self.space = ConfigSpace.of(configs)
        if any(config.template != self.space.template for config in seeds):
            raise ConfigError(f"every seed must be a config of {self.space.template}")
        self._keys = {self.space.key(config): index for index, config in enumerate(self.space.configs)}
        self._coordinates = [self.space.coordinates(key) for key in self._keys]
        self._is_word = [isinstance(values[0], str) for values in self.space.choices.values()]
        self._tie_break = list(range(len(self._keys)))
        rng = random.Random(seed)
        rng.shuffle(self._tie_break)
        self._shift = [rng.random() for _ in self.space.choices]
        self._boxes = _boxes(self.space)
        self._seeds = list(dict.fromkeys(self._nearest(self.space.key(s), self._keys.values()) for s in seeds))
        self._n_guided_from = len(self._seeds) + n_quasi_random
        self._inner = _multivariate_tpe(seed) if inner is None else inner
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
        raise ConfigError(f"{param_name!r} with {param_distribution} is not a number of {self.space.template} here")

    def reseed_rng(self) -> None:
        self._inner.reseed_rng()

    def before_trial(self, study: optuna.Study, trial: FrozenTrial) -> None:
        self._inner.before_trial(study, trial)

    def after_trial(
        self, study: optuna.Study, trial: FrozenTrial, state: TrialState, values: typing.Sequence[float] | None
    ) -> None:
        self._proposed.pop(trial.number, None)
        self._inner.after_trial(study, trial, state, values)

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
        if len(tried) >= self._n_guided_from and self._has_results(study):
            several = {name: CategoricalDistribution(v) for name, v in self.space.choices.items() if len(v) > 1}
            values = self._inner.sample_relative(study, trial, dict(several))
            if values.keys() >= several.keys():
                return self._nearest(tuple(values.get(n, v[0]) for n, v in self.space.choices.items()), untried)
        return self._next_spread(tried, untried)

    def _has_results(self, study: optuna.Study) -> bool:
        return bool(study.get_trials(deepcopy=False, states=(TrialState.COMPLETE,)))

    def _next_spread(self, tried: set[int], untried: list[int]) -> int:
        """Return the first untried legal point of the spread; failing that, the neighbour of the last one drawn."""
        key: Values = ()
        points = _spread_keys(self._boxes, self._shift, self._keys)
        for key in itertools.islice(points, _MAX_SPREAD_DRAWS):
            index = self._keys.get(key)
            if index is not None and index not in tried:
                return index
        return self._nearest(key, untried)

    def _nearest(self, key: Values, candidates: typing.Iterable[int]) -> int:
        place = self.space.coordinates(key)

        def distance(index: int) -> tuple[int, int]:
            axes = zip(self._is_word, place, self._coordinates[index], strict=True)
            steps = sum(_WORD_DISTANCE * (a != b) if word else abs(a - b) for word, a, b in axes)
            return steps, self._tie_break[index]

        return min(candidates, key=distance)


def _boxes(space: ConfigSpace) -> list[list[Values]]:
    """Return the values of each number that occur with each combination of words.

    Words are other kernels (`dq=kernel`, `dq=atomic`), which take other numbers: one may be a small part of the space.
    """
    words = [isinstance(values[0], str) for values in space.choices.values()]
    found: dict[Values, list[Values]] = {}
    for key in map(space.key, space.configs):
        found.setdefault(tuple(value for value, word in zip(key, words, strict=True) if word), []).append(key)
    return [[_sorted_values(axis) for axis in zip(*keys, strict=True)] for keys in found.values()]


def _spread_keys(
    boxes: typing.Sequence[typing.Sequence[Values]], shift: typing.Sequence[float], legal: typing.Container[Values]
) -> typing.Iterator[Values]:
    """Yield points that fill the boxes evenly, a legal one of each in turn, at any length of the sequence.

    Additive recurrence by powers of the generalised golden ratio, shifted at random (M. Roberts, "The unreasonable
    effectiveness of quasirandom sequences", 2018).
    """
    ratio = 2.0
    for _ in range(40):  # the root of x ** (d + 1) = x + 1 attracts
        ratio = (1.0 + ratio) ** (1.0 / (len(shift) + 1))
    steps = itertools.count(1)
    for box in itertools.cycle(boxes):
        for step in itertools.islice(steps, _MAX_BOX_DRAWS):
            position = [(start + step * ratio ** -(axis + 1)) % 1.0 for axis, start in enumerate(shift)]
            key = tuple(values[int(u * len(values))] for u, values in zip(position, box, strict=True))
            if key in legal:
                break
        yield key


def _multivariate_tpe(seed: int) -> BaseSampler:
    with warnings.catch_warnings():
        # Several of its arguments are marked experimental in some of the Optuna versions that are supported.
        warnings.simplefilter("ignore", optuna.exceptions.ExperimentalWarning)
        return TPESampler(multivariate=True, constant_liar=True, n_startup_trials=0, seed=seed)


def _numbers(config: KernelConfig) -> dict[str, Scalar]:
    numbers = config.as_dict()
    del numbers["template"]
    return numbers


def _sorted_values(values: typing.Iterable[Scalar]) -> Values:
    return tuple(sorted(set(values), key=lambda value: (isinstance(value, str), value)))


def _place(values: Values, value: Scalar) -> int:
    if isinstance(value, str):
        return values.index(value) if value in values else len(values)
    return bisect.bisect_left([v for v in values if isinstance(v, int)], value)
