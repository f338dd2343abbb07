"""The legal configs of a problem as Optuna sees them."""

from __future__ import annotations

import bisect
import dataclasses
import functools
import itertools
import typing

import numpy as np
import numpy.typing as npt
import optuna
from optuna.distributions import BaseDistribution, CategoricalDistribution

from flashgen.codegen.config import config_from_dict
from flashgen.codegen.kernel_config import KernelConfig, Scalar
from flashgen.errors import ConfigError

Values = tuple[Scalar, ...]

TEMPLATE = "template"
ABSENT = ""
"""The value of a number that a config's template does not have."""


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
        return _space_of(tuple(configs))

    @property
    def templates(self) -> tuple[str, ...]:
        """The templates that configs are of."""
        return tuple(sorted({config.template for config in self.configs}))

    def distributions(self) -> dict[str, BaseDistribution]:
        """Return what `suggest_config` suggests each number from."""
        return {name: CategoricalDistribution(values) for name, values in self.choices.items()}

    @functools.cached_property
    def keys(self) -> tuple[Values, ...]:
        """The key of each config, in their order."""
        return tuple(map(self.key, self.configs))

    @functools.cached_property
    def places(self) -> dict[Values, int]:
        """The place of each config, by its key."""
        return {key: place for place, key in enumerate(self.keys)}

    def key(self, config: KernelConfig) -> Values:
        """Return the values of `config`, in the order of `choices`."""
        numbers = {**vars(config), TEMPLATE: config.template}
        return tuple([numbers.get(name, ABSENT) for name in self.choices])

    def config(self, values: typing.Mapping[str, Scalar]) -> KernelConfig:
        """Return the config that has these values, by name; the inverse of `key`."""
        numbers = {name: value for name, value in values.items() if value != ABSENT}
        return config_from_dict({TEMPLATE: self.configs[0].template, **numbers})

    def coordinates(self, key: Values) -> tuple[int, ...]:
        """Return where each value of `key` stands, or would stand, among its choices."""
        axes = zip(self._places_of_values, self.choices.values(), key, strict=True)
        return tuple(
            place if (place := places.get(value)) is not None else _place(values, value)
            for places, values, value in axes
        )

    @functools.cached_property
    def all_coordinates(self) -> npt.NDArray[np.int64]:
        """The coordinates of each config, a row each, in their order."""
        columns = zip(self._places_of_values, zip(*self.keys, strict=True), strict=True)
        coordinates = np.array([[places[value] for value in values] for places, values in columns]).T
        coordinates.setflags(write=False)
        return coordinates

    @functools.cached_property
    def boxes(self) -> tuple[tuple[tuple[Values, ...], ...], ...]:
        """For each template, the values of each number that occur with each combination of words.

        Words are other kernels (`dq=kernel`, `dq=atomic`), which take other numbers: one may be a small part of the
        space.
        """
        words = are_words(self)
        found: dict[str, dict[Values, list[Values]]] = {}
        for config, key in zip(self.configs, self.keys, strict=True):
            keys_of = found.setdefault(config.template, {})
            keys_of.setdefault(tuple(itertools.compress(key, words)), []).append(key)
        return tuple(
            tuple(tuple(sorted_values(set(axis)) for axis in zip(*keys, strict=True)) for keys in keys_of.values())
            for keys_of in found.values()
        )

    @functools.cached_property
    def _places_of_values(self) -> tuple[dict[Scalar, int], ...]:
        return tuple({value: place for place, value in enumerate(values)} for values in self.choices.values())


# A second's work; lengths of one spec follow each other.
@functools.lru_cache(maxsize=4)
def _space_of(configs: tuple[KernelConfig, ...]) -> ConfigSpace:
    unique = tuple(dict.fromkeys(configs))
    if not unique:
        raise ConfigError("a study needs legal configs, got none")
    # One of each template says what there is: a dictionary of each config takes a second where there are many.
    one_of_each = {config.template: config for config in unique}
    names = dict.fromkeys(name for config in one_of_each.values() for name in config.as_dict())
    rows = [vars(config) for config in unique]
    choices = {name: sorted_values({row.get(name, ABSENT) for row in rows}) for name in names}
    choices[TEMPLATE] = sorted_values(one_of_each.keys())
    if len(one_of_each) == 1:
        del choices[TEMPLATE]
    return ConfigSpace(configs=unique, choices=choices)


def suggest_config(trial: optuna.Trial, space: ConfigSpace) -> KernelConfig:
    """Return the config that the study's sampler proposes for `trial`."""
    numbers = {name: trial.suggest_categorical(name, values) for name, values in space.choices.items()}
    return space.config(typing.cast("dict[str, Scalar]", numbers))


def are_words(space: ConfigSpace) -> list[bool]:
    """Return which of the choices are words; numbers stand before the empty text of templates without them."""
    return [isinstance(values[0], str) for values in space.choices.values()]


def sorted_values(values: typing.AbstractSet[Scalar]) -> Values:
    """Return numbers in order, then words."""
    return tuple(sorted(values, key=lambda value: (isinstance(value, str), value)))


def _place(values: Values, value: Scalar) -> int:
    if isinstance(value, str):
        return values.index(value) if value in values else len(values)
    return bisect.bisect_left([v for v in values if isinstance(v, int)], value)
