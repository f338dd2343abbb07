"""A search space over the configs of one template, and its legal part for a spec on a GPU."""

from __future__ import annotations

import dataclasses
import itertools
import typing
from pathlib import Path

from flashgen.codegen.config import KernelConfig, Scalar, TritonForwardConfig, config_from_dict
from flashgen.codegen.constraints import CONSTRAINTS
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
        refused: how many configs each constraint refused; a config counts for the first that refuses it.
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
        """Return the values of each parameter for `target`; names in the order of `KernelConfig.as_dict`."""
        values = {**self.content.parameters, **self._override(target).parameters}
        return {name: values[name] for name in sorted(values)}

    def legal(self, spec: AttentionSpec, target: GpuTarget) -> LegalSpace:
        """Return the configs that no constraint of the file refuses for `spec` on `target`."""
        parameters = self.parameters(target)
        predicates = [(name, CONSTRAINTS[name]) for name in self.content.constraints]
        refused = dict.fromkeys(self.content.constraints, 0)
        configs: list[KernelConfig] = []
        for values in itertools.product(*parameters.values()):
            config = _config(self.template, dict(zip(parameters, values, strict=True)))
            reason = next((name for name, legal in predicates if legal(config, spec, target) is not None), None)
            if reason is None:
                configs.append(config)
            else:
                refused[reason] += 1
        legal_configs = set(configs)
        seeds = dict.fromkeys(seed for seed in self._seeds(target) if seed in legal_configs)
        return LegalSpace(configs=tuple(configs), seeds=tuple(seeds), refused=refused)

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
    unknown = [name for name in content.constraints if name not in CONSTRAINTS]
    if unknown:
        raise ConfigError(f"{path}: constraints: unknown {', '.join(unknown)}; known: {', '.join(CONSTRAINTS)}")
    first = {name: values[0] for name, values in content.parameters.items()}
    _check_config(content.template, first, f"{path}: parameters")
    _check_values(content.template, first, content.parameters, f"{path}: parameters")
    _check_seeds(content.template, content.seeds, f"{path}: seeds")
    for arch, override in content.targets.items():
        place = f"{path}: targets.{arch}"
        extra = sorted(override.parameters.keys() - content.parameters.keys())
        if extra:
            raise ConfigError(f"{place}.parameters: {', '.join(extra)} must stand among the general parameters too")
        _check_values(content.template, first, override.parameters, f"{place}.parameters")
        _check_seeds(content.template, override.seeds or (), f"{place}.seeds")


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


def _config(template: str, values: typing.Mapping[str, Scalar]) -> TritonForwardConfig:
    config = config_from_dict({**values, "template": template})
    if not isinstance(config, TritonForwardConfig):
        raise ConfigError(f"no constraints for template {template!r}; known: {TritonForwardConfig.template}")
    return config
