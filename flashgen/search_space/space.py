"""A search space over the configs of one template, and its legal part for a spec on a GPU."""

from __future__ import annotations

import dataclasses
import itertools
import operator
import typing
from pathlib import Path

from flashgen.codegen.config import config_from_dict
from flashgen.codegen.constraints import constraints_of
from flashgen.codegen.kernel_config import KernelConfig, Scalar
from flashgen.errors import ConfigError
from flashgen.resources import resource_dir
from flashgen.search_space.schema import SpaceFile, TargetOverride, read_space_file
from flashgen.spec import AttentionSpec
from flashgen.target import GpuTarget

_KEEP_ALL = TargetOverride()


@dataclasses.dataclass(frozen=True, kw_only=True)
class LegalSpace:
    """What may be tried for one spec on one GPU.

    Attributes:
        configs: every legal config, in an order that depends on the file alone.
        seeds: the legal ones among the file's seeds, each a member of `configs`, without repeats.
        refused: how many configs each constraint refused; a config counts for the first that refuses its kernel, or
            else its launch.
    """

    configs: tuple[KernelConfig, ...]
    seeds: tuple[KernelConfig, ...]
    refused: dict[str, int]


@dataclasses.dataclass(frozen=True, kw_only=True)
class SearchSpace:
    """The content of one search-space file, checked against its template and the known constraints.

    Attributes:
        template: which kernels it is about.
        path: the file it was read from.
        content: the file's values.
    """

    template: str
    path: Path
    content: SpaceFile

    def parameters(self, target: GpuTarget) -> dict[str, tuple[Scalar, ...]]:
        """Return every value of each parameter for `target`; names in the order of `KernelConfig.as_dict`."""
        values: dict[str, dict[Scalar, None]] = {}
        for product in self._products(target):
            for name in product:
                values.setdefault(name, {}).update(dict.fromkeys(product[name]))
        return {name: tuple(values[name]) for name in sorted(values)}

    def legal(self, spec: AttentionSpec, target: GpuTarget) -> LegalSpace:
        """Return the configs that no constraint of the file refuses for `spec` on `target`."""
        table, names = constraints_of(self.template), self.content.constraints
        # Every value was checked when the file was read.
        make: typing.Callable[..., KernelConfig] = table.config_type
        refused = dict.fromkeys(names, 0)
        configs: dict[KernelConfig, None] = {}
        of_launch = [name for name in names if name in table.of_launch]
        for product in self._products(target):
            # There are many times as many configs as kernels.
            numbers_of_kernel = operator.itemgetter(
                *(place for place, name in enumerate(product) if name not in table.config_type.at_rest)
            )
            reasons: dict[object, str | None] = {}
            for values in itertools.product(*product.values()):
                kernel = numbers_of_kernel(values)
                if kernel not in reasons:
                    config = make(**dict(zip(product, values, strict=True))).kernel()
                    reasons[kernel] = table.first_refusal(names, config, spec, target)
                reason = reasons[kernel]
                if reason is None:
                    config = make(**dict(zip(product, values, strict=True)))
                    reason = table.first_refusal(of_launch, config, spec, target)
                if reason is None:
                    configs[config] = None
                else:
                    refused[reason] += 1
        seeds = dict.fromkeys(seed for seed in self._seeds(target) if seed in configs)
        return LegalSpace(configs=tuple(configs), seeds=tuple(seeds), refused=refused)

    def _products(self, target: GpuTarget) -> list[dict[str, tuple[Scalar, ...]]]:
        """Return the lists of each alternative with the general ones, by name; the space is all of their products."""
        override = self._override(target)
        general = {**self.content.parameters, **override.parameters}
        alternatives = self.content.alternatives if override.alternatives is None else override.alternatives
        products = [{**general, **own} for own in alternatives or ({},)]
        return [{name: product[name] for name in sorted(product)} for product in products]

    def _override(self, target: GpuTarget) -> TargetOverride:
        return self.content.targets.get(target.arch, _KEEP_ALL)

    def _seeds(self, target: GpuTarget) -> list[KernelConfig]:
        own = self._override(target).seeds
        return [_config(self.template, seed) for seed in (self.content.seeds if own is None else own)]


def load_space(template: str) -> SearchSpace:
    """Return the search space of `template`, for example `triton/forward`.

    Raises:
        ConfigError: if there is none, or its file is damaged; with the path and what is wrong.
    """
    root = resource_dir("search_spaces")
    path = root / f"{template}.yaml"
    if not path.is_file():
        known = sorted(str(file.relative_to(root).with_suffix("")) for file in root.rglob("*.yaml"))
        raise ConfigError(f"no search space for template {template!r} ({path}); known: {', '.join(known) or 'none'}")
    content = read_space_file(path)
    if content.template != template:
        raise ConfigError(f"{path}: template is {content.template!r}, its place in the folder says {template!r}")
    _check(content, path)
    return SearchSpace(template=template, path=path, content=content)


def _check(content: SpaceFile, path: Path) -> None:
    """Refuse names that no constraint has and values that the template's config does not take."""
    try:
        known = constraints_of(content.template).predicates
    except ConfigError as error:
        raise ConfigError(f"{path}: {error}") from error
    unknown = [name for name in content.constraints if name not in known]
    if unknown:
        raise ConfigError(f"{path}: constraints: unknown {', '.join(unknown)}; known: {', '.join(known)}")
    first = {name: values[0] for name, values in content.parameters.items()}
    _check_config(content.template, first, f"{path}: parameters")
    _check_values(content.template, first, content.parameters, f"{path}: parameters")
    _check_alternatives(content.template, first, content.alternatives, f"{path}: alternatives")
    _check_seeds(content.template, content.seeds, f"{path}: seeds")
    for arch, override in content.targets.items():
        place = f"{path}: targets.{arch}"
        extra = sorted(override.parameters.keys() - content.parameters.keys())
        if extra:
            raise ConfigError(f"{place}.parameters: {', '.join(extra)} must stand among the general parameters too")
        _check_values(content.template, first, override.parameters, f"{place}.parameters")
        _check_alternatives(content.template, first, override.alternatives or (), f"{place}.alternatives")
        _check_seeds(content.template, override.seeds or (), f"{place}.seeds")


def _check_alternatives(
    template: str,
    others: typing.Mapping[str, Scalar],
    alternatives: typing.Iterable[typing.Mapping[str, tuple[Scalar, ...]]],
    place: str,
) -> None:
    for index, alternative in enumerate(alternatives):
        _check_values(template, others, alternative, f"{place}.{index}")


def _check_values(
    template: str,
    others: typing.Mapping[str, Scalar],
    parameters: typing.Mapping[str, tuple[Scalar, ...]],
    place: str,
) -> None:
    for name, values in parameters.items():
        for value in values:
            _check_config(template, {**others, name: value}, f"{place}.{name}")


def _check_seeds(template: str, seeds: typing.Iterable[typing.Mapping[str, Scalar]], place: str) -> None:
    for index, seed in enumerate(seeds):
        _check_config(template, seed, f"{place}.{index}")


def _check_config(template: str, values: typing.Mapping[str, Scalar], place: str) -> None:
    try:
        _config(template, values)
    except ConfigError as error:
        raise ConfigError(f"{place}: {error}") from error


def _config(template: str, values: typing.Mapping[str, Scalar]) -> KernelConfig:
    return config_from_dict({**values, "template": template})
