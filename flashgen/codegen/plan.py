"""What a spec and a config add to or leave out of the source: one plan per template.

Numbers stay out of plans: they reach kernels as `tl.constexpr` or at run time, so that one source serves many.
"""

from __future__ import annotations

from flashgen.codegen.backward_entries import backward_constants
from flashgen.codegen.backward_plan import make_backward_plan
from flashgen.codegen.config import TritonBackwardConfig, TritonDecodeConfig, TritonForwardConfig, templates_of
from flashgen.codegen.decode_plan import decode_constants, make_decode_plan
from flashgen.codegen.forward_plan import forward_constants, make_forward_plan
from flashgen.codegen.hopper_config import HopperDecodeConfig, HopperForwardConfig
from flashgen.codegen.hopper_decode_plan import make_hopper_decode_plan
from flashgen.codegen.hopper_plan import hopper_constants, make_hopper_plan
from flashgen.codegen.kernel_config import KernelConfig
from flashgen.codegen.kernel_plan import KernelPlan
from flashgen.errors import ConfigError
from flashgen.spec import AttentionSpec


def make_plan(spec: AttentionSpec, config: KernelConfig) -> KernelPlan:
    """Return the structure that `spec` and `config` ask for; numbers of the mask do not matter.

    Raises:
        ConfigError: if the config belongs to a template of another phase.
    """
    match spec.phase, config:
        case "forward", TritonForwardConfig():
            return make_forward_plan(spec, config)
        case "forward", HopperForwardConfig():
            return make_hopper_plan(spec, config)
        case "backward", TritonBackwardConfig():
            return make_backward_plan(spec, config)
        case "decode", TritonDecodeConfig():
            return make_decode_plan(spec, config)
        case "decode", HopperDecodeConfig():
            return make_hopper_decode_plan(spec, config)
    raise ConfigError(_wrong_phase(spec, config))


def constant_values(spec: AttentionSpec, config: KernelConfig) -> dict[str, int]:
    """Return the value of every compile-time argument, by name.

    Raises:
        ConfigError: as `make_plan`.
    """
    match spec.phase, config:
        case "forward", TritonForwardConfig():
            return forward_constants(spec, config)
        case "forward", HopperForwardConfig():
            return hopper_constants(spec, config, make_hopper_plan(spec, config))
        case "backward", TritonBackwardConfig():
            return backward_constants(spec, config)
        case "decode", TritonDecodeConfig():
            return decode_constants(spec, config)
        case "decode", HopperDecodeConfig():
            return hopper_constants(spec, config, make_hopper_decode_plan(spec, config))
    raise ConfigError(_wrong_phase(spec, config))


def _wrong_phase(spec: AttentionSpec, config: KernelConfig) -> str:
    known = ", ".join(templates_of(spec.phase))
    return f"template {config.template!r} has no kernels of the {spec.phase} phase; known: {known}"
