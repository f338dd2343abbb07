"""Where each batch entry lies in Q, K, V, out and lse, packed or not, and how much of it counts."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Sequence

import torch
from torch import Tensor

from flashgen.errors import InputError
from flashgen.spec import AttentionSpec, Extras


@dataclasses.dataclass(frozen=True, kw_only=True)
class Entry:
    """One batch entry.

    Attributes:
        b: its number.
        rows_q, rows_k: where its rows are in Q and in K: of the packed tensors, or of entry b where nothing is packed.
        seqlen_q, seqlen_k: how many of them count: those that are used.
        varlen: whether the tensors are packed.
        first_k: the first key that any query may see: those before it are padding, and have their positions.
    """

    b: int
    rows_q: slice
    rows_k: slice
    seqlen_q: int
    seqlen_k: int
    varlen: bool
    first_k: int = 0

    @property
    def rows(self) -> int:
        """How many rows of out are the entry's own, used or not."""
        return int(self.rows_q.stop) - int(self.rows_q.start)

    def queries(self, tensor: Tensor) -> Tensor:
        """Return the entry's rows of Q or out as a [nheads_q, rows, head_dim] view."""
        return tensor[self.rows_q].transpose(0, 1) if self.varlen else tensor[self.b]

    def keys(self, tensor: Tensor) -> Tensor:
        """Return the entry's used rows of K or V as a [nheads_kv, seqlen_k, head_dim] view."""
        rows = tensor[self.rows_k].transpose(0, 1) if self.varlen else tensor[self.b]
        return rows[:, : self.seqlen_k]

    def statistics(self, tensor: Tensor) -> Tensor:
        """Return the entry's rows of lse as a [nheads_q, rows] view."""
        return tensor[:, self.rows_q] if self.varlen else tensor[self.b]


def batch_entries(
    spec: AttentionSpec, extras: Extras, *, batch: int, seqlen_q: int, seqlen_k: int
) -> tuple[Entry, ...]:
    """Return the entries of a call; batch and lengths are those of tensors that are not packed.

    Raises:
        InputError: if the spec asks for cu_seqlens or seqused that the call does not give.
    """
    if spec.varlen:
        bounds_q = _cuts("cu_seqlens_q", extras.cu_seqlens_q)
        bounds_k = _cuts("cu_seqlens_k", extras.cu_seqlens_k)
    else:
        bounds_q, bounds_k = [slice(0, seqlen_q)] * batch, [slice(0, seqlen_k)] * batch
    used_q = _lengths("seqused_q", extras.seqused_q, bounds_q) if "q" in spec.seqused else _sizes(bounds_q)
    used_k = _lengths("seqused_k", extras.seqused_k, bounds_k) if "k" in spec.seqused else _sizes(bounds_k)
    return tuple(
        Entry(b=b, rows_q=rows_q, rows_k=rows_k, seqlen_q=used_q[b], seqlen_k=used_k[b], varlen=spec.varlen)
        for b, (rows_q, rows_k) in enumerate(zip(bounds_q, bounds_k, strict=True))
    )


def pick_heads(
    out: Tensor, lse: Tensor | None, heads: Sequence[tuple[int, int]], entries: Sequence[Entry]
) -> tuple[Tensor, Tensor | None]:
    """Return copies of the rows of some (batch entry, query head) pairs.

    Returns:
        out [pairs, seqlen_q, head_dim_v] and lse [pairs, seqlen_q]; for packed sequences, whose lengths differ, their
        rows one after the other: [rows, head_dim_v] and [rows].
    """
    taken_out = join_heads([entries[b].queries(out)[h] for b, h in heads], entries)
    if lse is None:
        return taken_out, None
    return taken_out, join_heads([entries[b].statistics(lse)[h] for b, h in heads], entries)


def join_heads(parts: Sequence[Tensor], entries: Sequence[Entry]) -> Tensor:
    """Return the rows of several heads as one tensor: stacked, or one after the other where they are packed."""
    return torch.cat(list(parts)) if any(entry.varlen for entry in entries) else torch.stack(list(parts))


def _cuts(name: str, cu_seqlens: Tensor | None) -> list[slice]:
    if cu_seqlens is None:
        raise InputError(f"the spec is varlen: {name} [batch + 1] is needed")
    starts = [int(start) for start in cu_seqlens.tolist()]
    return [slice(first, last) for first, last in itertools.pairwise(starts)]


def _sizes(bounds: Sequence[slice]) -> list[int]:
    return [int(bound.stop) - int(bound.start) for bound in bounds]


def _lengths(name: str, used: Tensor | None, bounds: Sequence[slice]) -> list[int]:
    """Return how many rows of each entry count; never more than there are."""
    if used is None or used.numel() != len(bounds):
        got = "none" if used is None else f"{used.numel()}"
        raise InputError(f"{name} must have one length per batch entry, {len(bounds)}; got {got}")
    return [min(int(length), most) for length, most in zip(used.tolist(), _sizes(bounds), strict=True)]
