"""How the tensors of a decode call lie in memory, and which configs can read them so."""

from __future__ import annotations

import dataclasses
import typing

import torch

from flashgen.codegen import HopperDecodeConfig, KernelConfig, TritonDecodeConfig
from flashgen.launch.operands import Layout4D, descriptor_refusal
from flashgen.launch.ragged import ragged_refusal
from flashgen.spec import AttentionSpec, Extras


@dataclasses.dataclass(frozen=True, kw_only=True)
class DecodeOperands:
    """Layouts of Q, out, the caches and what is appended to them, seen as [batch, heads, rows, head_dim].

    Attributes:
        q, out: of [batch, nheads_q, seqlen_q, ...].
        k, v: of the caches, [entries or pages, nheads_kv, rows, ...].
        k_new, v_new: of [batch, nheads_kv, seqlen_new, ...], where keys are appended.
        step_pages: elements from one sequence's row of the page table to the next.
        step_rotary: elements from one position's row of cosines to the next.
        rotary_dim: columns that are rotated.
    """

    q: Layout4D
    k: Layout4D
    v: Layout4D
    out: Layout4D
    k_new: Layout4D | None = None
    v_new: Layout4D | None = None
    step_pages: int = 0
    step_rotary: int = 0
    rotary_dim: int = 0

    @classmethod
    def of(cls, tensors: typing.Mapping[str, torch.Tensor], extras: Extras) -> DecodeOperands:
        """Return the layouts of the tensors q, k, v and out, and of those of the extras."""
        table, cos = extras.page_table, extras.rotary_cos
        return cls(
            **{name: Layout4D.of(tensors[name]) for name in ("q", "k", "v", "out")},
            k_new=None if extras.k_new is None else Layout4D.of(extras.k_new),
            v_new=None if extras.v_new is None else Layout4D.of(extras.v_new),
            step_pages=0 if table is None else table.stride(0),
            step_rotary=0 if cos is None else cos.stride(0),
            rotary_dim=0 if cos is None else 2 * cos.shape[1],
        )

    @property
    def layouts(self) -> dict[str, Layout4D]:
        """Of what descriptors may describe, by name."""
        return {"q": self.q, "k": self.k, "v": self.v}

    def refusal(self, config: KernelConfig, spec: AttentionSpec) -> str | None:
        """Return why a config cannot read these layouts, or None."""
        if isinstance(config, HopperDecodeConfig):
            return self._bulk_refusal(config, spec)
        if not isinstance(config, TritonDecodeConfig) or config.loads != "descriptor":
            return None
        itemsize = spec.kv_dtype.itemsize
        return descriptor_refusal({"k": self.k, "v": self.v}, {"k": itemsize, "v": itemsize})

    def _bulk_refusal(self, config: HopperDecodeConfig, spec: AttentionSpec) -> str | None:
        group = self.q.size[1] // self.k.size[1]
        if group % config.heads_of_tile:
            return f"a tile has {config.heads_of_tile} query heads of one group, the group has {group}"
        reason = descriptor_refusal(self.layouts, dict.fromkeys("qkv", spec.dtype.itemsize))
        if reason:
            return reason
        for name, layout in (("k", self.k), ("v", self.v)):
            entry, _, row, _ = layout.stride
            if entry % row:
                return f"the {name} cache has {entry} elements an entry, no multiple of the {row} from row to row"
            rows = layout.size[0] * (entry // row)
            reason = ragged_refusal(name, (1, layout.size[1], rows, layout.size[3]), layout.stride)
            if reason:
                return reason
        return None
