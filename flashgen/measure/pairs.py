"""How many pairs of a query and a key a call looks at, where only its data can tell."""

from __future__ import annotations

import torch

from flashgen.measure.entries import batch_entries
from flashgen.measure.reference import MAX_SCORE_ELEMENTS, positions, visible
from flashgen.spec import AttentionSpec, Extras, Shape


def count_visible(spec: AttentionSpec, shape: Shape, extras: Extras) -> int:
    """Return how many (query, key) pairs the mask shows over all batch entries and query heads.

    Exact for masks of documents and functions too, of which `Problem.flops` counts every pair; a boolean bias is not
    part of the mask. Evaluated a block of rows at a time, where the captured tensors are.
    """
    mask = extras.bound_mask(spec)
    captured = extras.captures or tuple(t for t in (extras.cu_seqlens_q, extras.seqused_k) if t is not None)
    device = captured[0].device if captured else torch.device("cpu")
    # One head stands for all of them unless the mask tells them apart.
    heads = torch.arange(shape.nheads_q if "h" in mask.uses else 1, device=device)
    total = 0
    for entry in batch_entries(spec, extras, batch=shape.batch, seqlen_q=shape.seqlen_q, seqlen_k=shape.seqlen_k):
        rows = max(1, MAX_SCORE_ELEMENTS // max(1, len(heads) * entry.seqlen_k))
        for start in range(0, entry.seqlen_q, rows):
            at = positions(entry, heads, start, min(start + rows, entry.seqlen_q))
            seen = visible(mask, at)
            size = (len(heads), at.q_idx.shape[0], entry.seqlen_k)
            total += size[0] * size[1] * size[2] if seen is None else int(seen.expand(size).sum())
    return total * shape.nheads_q // len(heads)
