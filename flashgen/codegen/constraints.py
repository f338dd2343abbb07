"""Which configs are legal for a spec on a GPU: one named predicate per limit, one table of them per template.

A predicate returns None, or the reason in one sentence with the numbers. Each refuses only what surely fails to
compile, fails to launch, is wrong or spills its accumulators: what it lets through in doubt, a real compile settles.
Search spaces name predicates; `check_config` applies them all.
"""

from __future__ import annotations

import dataclasses
import typing

from flashgen.codegen.backward_constraints import BACKWARD_CONSTRAINTS
from flashgen.codegen.config import TritonBackwardConfig, TritonDecodeConfig, TritonForwardConfig
from flashgen.codegen.decode_constraints import DECODE_CONSTRAINTS
from flashgen.codegen.forward_constraints import FORWARD_CONSTRAINTS
from flashgen.codegen.hopper_config import HopperDecodeConfig, HopperForwardConfig
from flashgen.codegen.hopper_constraints import HOPPER_CONSTRAINTS
from flashgen.codegen.hopper_decode_constraints import HOPPER_DECODE_CONSTRAINTS
from flashgen.codegen.kernel_config import KernelConfig
from flashgen.errors import ConfigError
from flashgen.spec import AttentionSpec, Phase, Shape
from flashgen.target import GpuTarget

ConfigT = typing.TypeVar("ConfigT", bound=KernelConfig)


@dataclasses.dataclass(frozen=True, kw_only=True)
class ConstraintTable(typing.Generic[ConfigT]):
    """The limits of one template.

    Attributes:
        config_type: configs of the template.
        phase: what its kernels compute.
        predicates: by name, the cheap ones first.
        of_launch: those that look at what only a launch reads, `KernelConfig.at_rest`; the others judge kernels.
    """

    config_type: type[ConfigT]
    phase: Phase
    predicates: typing.Mapping[str, typing.Callable[[ConfigT, AttentionSpec, GpuTarget], str | None]]
    of_launch: frozenset[str]

    def reason(self, name: str, config: KernelConfig, spec: AttentionSpec, target: GpuTarget) -> str | None:
        """Return why the predicate `name` refuses a config of the template, or None."""
        assert isinstance(config, self.config_type)
        return self.predicates[name](config, spec, target)

    def first_refusal(
        self, names: typing.Iterable[str], config: KernelConfig, spec: AttentionSpec, target: GpuTarget
    ) -> str | None:
        """Return the first of the predicates `names` that refuses a config of the template, or None."""
        assert isinstance(config, self.config_type)
        for name in names:
            if self.predicates[name](config, spec, target) is not None:
                return name
        return None


AnyTable = (
    ConstraintTable[TritonForwardConfig]
    | ConstraintTable[HopperForwardConfig]
    | ConstraintTable[TritonBackwardConfig]
    | ConstraintTable[TritonDecodeConfig]
    | ConstraintTable[HopperDecodeConfig]
)

_TABLES: dict[str, AnyTable] = {
    TritonForwardConfig.template: ConstraintTable(
        config_type=TritonForwardConfig,
        phase="forward",
        predicates=FORWARD_CONSTRAINTS,
        of_launch=frozenset({"launch_within_limits"}),
    ),
    HopperForwardConfig.template: ConstraintTable(
        config_type=HopperForwardConfig,
        phase="forward",
        predicates=HOPPER_CONSTRAINTS,
        of_launch=frozenset({"groups_have_heads"}),
    ),
    TritonBackwardConfig.template: ConstraintTable(
        config_type=TritonBackwardConfig,
        phase="backward",
        predicates=BACKWARD_CONSTRAINTS,
        of_launch=frozenset({"launch_within_limits"}),
    ),
    TritonDecodeConfig.template: ConstraintTable(
        config_type=TritonDecodeConfig,
        phase="decode",
        predicates=DECODE_CONSTRAINTS,
        of_launch=frozenset({"launch_within_limits"}),
    ),
    HopperDecodeConfig.template: ConstraintTable(
        config_type=HopperDecodeConfig,
        phase="decode",
        predicates=HOPPER_DECODE_CONSTRAINTS,
        of_launch=frozenset({"parts_have_tiles"}),
    ),
}


def constraints_of(template: str) -> AnyTable:
    """Return the limits of the configs of `template`.

    Raises:
        ConfigError: if there are none.
    """
    table = _TABLES.get(template)
    if table is None:
        raise ConfigError(f"no constraints for template {template!r}; known: {', '.join(_TABLES)}")
    return table


def check_config(config: KernelConfig, spec: AttentionSpec, target: GpuTarget) -> tuple[str, ...]:
    """Return every reason why `config` is illegal for `spec` on `target`; empty when it is legal.

    Raises:
        ConfigError: if the config belongs to a template without constraints.
    """
    table = constraints_of(config.template)
    if table.phase != spec.phase:
        return (f"{config.template} has no kernels of the {spec.phase} phase",)
    reasons = (table.reason(name, config, spec, target) for name in table.predicates)
    return tuple(reason for reason in reasons if reason is not None)


def interpreter_refusal(config: KernelConfig) -> str | None:
    """Return why the kernels of a config cannot run on CPU tensors, or None: Triton's interpreter knows no Gluon."""
    if not config.template.startswith("gluon/"):
        return None
    return f"{config.template} is written in Gluon, which Triton's interpreter does not run: it needs a GPU"


def shape_refusal(config: KernelConfig, shape: Shape) -> str | None:
    """Return why a config that is legal for a spec cannot compute this shape of it, or None."""
    heads = config.heads_of_tile
    if shape.group % heads:
        return f"a tile has {heads} query heads of one group, which a group of {shape.group} does not divide into"
    return None


def require_legal(config: KernelConfig, spec: AttentionSpec, target: GpuTarget) -> None:
    """Return if `config` is legal.

    Raises:
        ConfigError: listing every reason why it is not.
    """
    reasons = check_config(config, spec, target)
    if reasons:
        raise ConfigError(f"{config} is illegal for {spec} on {target}: {'; '.join(reasons)}")
