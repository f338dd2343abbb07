"""The structure of a rendered kernel: what a spec and a config add to or leave out of the source.

Numbers stay out of here: they reach the kernel as `tl.constexpr`, so that one source serves many configs.
"""

from __future__ import annotations

import dataclasses
import typing

from flashgen.codegen.config import KernelConfig, TritonForwardConfig
from flashgen.errors import ConfigError
from flashgen.spec import AttentionSpec, Causal

_STRIDES = {"q": ("qz", "qh", "qm"), "k": ("kz", "kh", "kn"), "v": ("vz", "vh", "vn"), "out": ("oz", "oh", "om")}
_SIZES = ("qk_scale", "num_heads_total", "nheads_q", "group", "SEQLEN_Q", "SEQLEN_K", "head_group")
_CONSTANTS = ("HEAD_DIM_QK", "HEAD_DIM_V", "BLOCK_DQK", "BLOCK_DV", "BLOCK_M", "BLOCK_N")


@dataclasses.dataclass(frozen=True, kw_only=True)
class ForwardPlan:
    """Structure of `templates/triton/forward.py.jinja`; equal plans of one spec render to the same source.

    Attributes:
        title: first line of the module's docstring.
        template: template name without its suffixes.
        entry_point: name of the kernel in the source.
        descriptor: tiles come through tensor descriptors, not pointers.
        lse: the log-sum-exp of each row is written.
        longest_first: query tiles are walked from the last, which sees most keys.
        arguments: run-time arguments of the kernel, in order.
        constants: compile-time arguments, after them.
    """

    title: str
    template: str
    entry_point: str
    descriptor: bool
    lse: bool
    longest_first: bool
    arguments: tuple[str, ...]
    constants: tuple[str, ...]

    @property
    def kv_arguments(self) -> tuple[str, ...]:
        """What the loop over the keys needs to reach K and V."""
        return ("k_desc", "v_desc") if self.descriptor else ("k_ptr", "v_ptr", "stride_kn", "stride_vn")

    @property
    def order_note(self) -> str:
        """The end of the comment on tile order."""
        return ",\n    # longest tiles first" if self.longest_first else ""


def make_plan(spec: AttentionSpec, config: KernelConfig) -> ForwardPlan:
    """Return the structure that `spec` and `config` ask for.

    Raises:
        ConfigError: if the config belongs to a template that this function does not know.
    """
    if not isinstance(config, TritonForwardConfig):
        raise ConfigError(f"no plan for template {config.template!r}; known: {TritonForwardConfig.template}")
    descriptor = config.loads == "descriptor"
    return ForwardPlan(
        title=f"attn_fwd: {_structure(spec)}, {config.loads} loads.",
        template=config.template,
        entry_point="attn_fwd",
        descriptor=descriptor,
        lse=spec.lse,
        longest_first=isinstance(spec.mask, Causal),
        arguments=_arguments(descriptor, spec.lse),
        constants=_CONSTANTS,
    )


def _structure(spec: AttentionSpec) -> str:
    return f"{spec.mask} mask" + (" with lse" if spec.lse else "")


def _arguments(descriptor: bool, lse: bool) -> tuple[str, ...]:
    if descriptor:
        tensors = tuple(f"{name}_desc" for name in _STRIDES) + ("lse_ptr",) * lse
        return tensors + _SIZES
    tensors = tuple(f"{name}_ptr" for name in _STRIDES) + ("lse_ptr",) * lse
    strides = tuple(f"stride_{axis}" for axes in _STRIDES.values() for axis in axes)
    return tensors + strides + _SIZES


def block_head_dim(head_dim: int) -> int:
    """Return the tile width for a head dimension: the next power of two, as Triton's tiles must be."""
    return max(16, 1 << (head_dim - 1).bit_length())


def constant_values(spec: AttentionSpec, config: KernelConfig) -> dict[str, int]:
    """Return the value of every compile-time argument, by name."""
    if not isinstance(config, TritonForwardConfig):
        raise ConfigError(f"no constants for template {config.template!r}; known: {TritonForwardConfig.template}")
    return {
        "HEAD_DIM_QK": spec.head_dim_qk,
        "HEAD_DIM_V": spec.head_dim_v,
        "BLOCK_DQK": block_head_dim(spec.head_dim_qk),
        "BLOCK_DV": block_head_dim(spec.head_dim_v),
        "BLOCK_M": config.block_m,
        "BLOCK_N": config.block_n,
    }


ArgumentKind = typing.Literal["pointer", "descriptor", "stride", "float", "int"]


def argument_kind(name: str) -> ArgumentKind:
    """Return what a run-time argument is, read off its name: the glossary is the rule."""
    if name.endswith("_ptr"):
        return "pointer"
    if name.endswith("_desc"):
        return "descriptor"
    if name.startswith("stride_"):
        return "stride"
    return "float" if name == "qk_scale" else "int"
