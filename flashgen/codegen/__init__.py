"""From a spec and a config to readable Triton source; imports neither torch nor triton."""

from flashgen.codegen.config import KernelConfig, TritonForwardConfig, config_from_dict
from flashgen.codegen.plan import ForwardPlan, argument_kind, block_head_dim, constant_values, make_plan
from flashgen.codegen.render import RenderedKernel, code_digest, render

__all__ = [
    "ForwardPlan",
    "KernelConfig",
    "RenderedKernel",
    "TritonForwardConfig",
    "argument_kind",
    "block_head_dim",
    "code_digest",
    "config_from_dict",
    "constant_values",
    "make_plan",
    "render",
]
