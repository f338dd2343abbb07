"""From a spec and a config to readable Triton source; imports neither torch nor triton."""

from flashgen.codegen.arguments import argument_kind
from flashgen.codegen.config import (
    DecodeConfig,
    TritonBackwardConfig,
    TritonDecodeConfig,
    TritonForwardConfig,
    config_from_dict,
    templates_of,
)
from flashgen.codegen.entry import EntryPlan
from flashgen.codegen.hopper_config import HopperDecodeConfig, HopperForwardConfig
from flashgen.codegen.kernel_config import KernelConfig, LaunchOptions
from flashgen.codegen.kernel_plan import KernelPlan
from flashgen.codegen.kernel_resources import KernelResources
from flashgen.codegen.plan import constant_values, make_plan
from flashgen.codegen.render import RenderedKernel, code_digest, is_current, render
from flashgen.codegen.signature import capture_pointers

__all__ = [
    "DecodeConfig",
    "EntryPlan",
    "HopperDecodeConfig",
    "HopperForwardConfig",
    "KernelConfig",
    "KernelPlan",
    "KernelResources",
    "LaunchOptions",
    "RenderedKernel",
    "TritonBackwardConfig",
    "TritonDecodeConfig",
    "TritonForwardConfig",
    "argument_kind",
    "capture_pointers",
    "code_digest",
    "config_from_dict",
    "constant_values",
    "is_current",
    "make_plan",
    "render",
    "templates_of",
]
