"""How Q, K, V and out lie in memory, and which configs can read them so."""

from __future__ import annotations

import dataclasses
import typing

import torch

from flashgen.codegen import HopperForwardConfig, KernelConfig, TritonForwardConfig
from flashgen.compile import STRIDE_ALIGNMENT
from flashgen.launch.ragged import ragged_refusal
from flashgen.spec import AttentionSpec

NAMES = ("q", "k", "v", "out")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Layout4D:
    """Sizes and strides, in elements, of a tensor seen as [batch, heads, seqlen, head_dim]; packed: batch 1."""

    size: tuple[int, ...]
    stride: tuple[int, ...]

    @classmethod
    def of(cls, tensor: torch.Tensor) -> Layout4D:
        """Return the layout of a [batch, heads, seqlen, head_dim] or a packed [tokens, heads, head_dim] tensor."""
        size, stride = tuple(tensor.shape), tuple(tensor.stride())
        if tensor.dim() == 3:
            size, stride = (1, size[1], size[0], size[2]), (size[2], stride[1], stride[0], stride[2])
        # Strides of dimensions of size 1 are never walked: any will do, and these suit every kernel.
        walked = (s if n != 1 or axis == 3 else size[3] for axis, (n, s) in enumerate(zip(size, stride, strict=True)))
        return cls(size=size, stride=tuple(walked))


@dataclasses.dataclass(frozen=True, kw_only=True)
class Operands:
    """Layouts of Q, K, V and out."""

    q: Layout4D
    k: Layout4D
    v: Layout4D
    out: Layout4D

    @classmethod
    def of(cls, tensors: typing.Mapping[str, torch.Tensor]) -> Operands:
        """Return the layouts of the tensors q, k, v and out."""
        return cls(**{name: Layout4D.of(tensors[name]) for name in NAMES})

    def refusal(self, config: KernelConfig, spec: AttentionSpec) -> str | None:
        """Return why a config cannot read these layouts, or None."""
        ragged = isinstance(config, HopperForwardConfig) and spec.varlen
        group = self.q.size[1] // self.k.size[1]
        if group % config.heads_of_tile:
            return f"a tile has {config.heads_of_tile} query heads of one group, the group has {group}"
        match config:
            case HopperForwardConfig():
                names = list(NAMES)
            case TritonForwardConfig(loads="descriptor"):
                # Packed outputs are written through pointers.
                names = [name for name in NAMES if name != "out" or not spec.varlen]
            case _:
                return None
        layouts: dict[str, Layout4D] = {name: getattr(self, name) for name in names}
        itemsizes = {name: (spec.dtype.out if name == "out" else spec.dtype).itemsize for name in names}
        reason = descriptor_refusal(layouts, itemsizes)
        if reason or not ragged:
            return reason
        reasons = (ragged_refusal(name, layout.size, layout.stride) for name, layout in layouts.items())
        return next(filter(None, reasons), None)


def descriptor_refusal(layouts: typing.Mapping[str, Layout4D], itemsizes: typing.Mapping[str, int]) -> str | None:
    """Return why tensor descriptors cannot describe the layouts that `itemsizes` names, or None."""
    for name, itemsize in itemsizes.items():
        strides = layouts[name].stride[:3]
        if any(stride <= 0 or stride * itemsize % 16 for stride in strides):
            return f"descriptor loads need positive strides of whole 16 bytes, {name} has {list(layouts[name].stride)}"
    return None


def readable(tensor: torch.Tensor) -> bool:
    """Return whether kernels can read a tensor's strides in place: 1 for the last, multiples of 8 for the others."""
    strides = tensor.stride()
    return strides[-1] == 1 and all(
        stride % STRIDE_ALIGNMENT == 0 for stride, size in zip(strides, tensor.shape[:-1], strict=False) if size != 1
    )


def as_read(capture: torch.Tensor) -> torch.Tensor:
    """Return a captured tensor as kernels read it: a bool by bytes."""
    return capture.view(torch.uint8) if capture.dtype == torch.bool else capture
