"""Attention in plain PyTorch: the oracle in float64, and the same computation at the inputs' own precision."""

from __future__ import annotations

import typing
from collections.abc import Callable

import torch
from torch import Tensor

from flashgen.errors import InputError
from flashgen.spec import Full, Mask

Precision = typing.Literal["float64", "input"]

# Scores alive at a time: 256 MiB in float64, and a handful of buffers of that size.
MAX_SCORE_ELEMENTS = 2**25


def attention_reference(
    q: Tensor, k: Tensor, v: Tensor, *, mask: Mask, softmax_scale: float, precision: Precision
) -> tuple[Tensor, Tensor]:
    """Return exact attention and its log-sum-exp, a block of query rows at a time so that memory stays bounded.

    Args:
        q: [batch, nheads_q, seqlen_q, head_dim_qk], any strides.
        k: [batch, nheads_kv, seqlen_k, head_dim_qk]; nheads_kv divides nheads_q.
        v: [batch, nheads_kv, seqlen_k, head_dim_v].
        mask: which keys a row sees. A row that sees none gets out = 0 and lse = -inf.
        softmax_scale: factor of the scores.
        precision: `float64` is the oracle. `input` rounds scores, probabilities and out to the inputs' dtype and keeps
            the softmax in float32, as plain PyTorch does: the yardstick of the accuracy rule.

    Returns:
        out [batch, nheads_q, seqlen_q, head_dim_v] in float64 or the inputs' dtype, and lse [batch, nheads_q,
        seqlen_q], natural log, in float64 or float32.

    Raises:
        InputError: if the shapes do not belong together.
    """
    _check_shapes(q, k, v)
    batch, nheads_q, seqlen_q, _ = q.shape
    nheads_kv, seqlen_k = k.shape[1], k.shape[2]
    value_type = torch.float64 if precision == "float64" else q.dtype
    softmax_type = torch.float64 if precision == "float64" else torch.float32
    out = torch.zeros(batch, nheads_q, seqlen_q, v.shape[3], dtype=value_type, device=q.device)
    lse = torch.full((batch, nheads_q, seqlen_q), float("-inf"), dtype=softmax_type, device=q.device)
    if seqlen_k == 0 or out.shape[:3].numel() == 0:
        return out, lse
    rows = max(1, MAX_SCORE_ELEMENTS // (nheads_q * seqlen_k))
    for b in range(batch):
        keys, values = k[b].to(value_type), v[b].to(value_type)
        for start in range(0, seqlen_q, rows):
            stop = min(start + rows, seqlen_q)
            # One product per key/value head: the query heads of a group are stacked as rows, K and V never repeated.
            queries = q[b, :, start:stop].to(value_type).reshape(nheads_kv, -1, q.shape[3])
            scores = (queries @ keys.transpose(1, 2)).to(softmax_type).mul_(softmax_scale)
            seen = _visible(mask, start, stop, seqlen_q, seqlen_k, q.device)
            if seen is not None:
                scores.view(nheads_q, -1, seqlen_k).masked_fill_(~seen, float("-inf"))
            row_lse = scores.logsumexp(dim=-1)
            dead = row_lse == float("-inf")
            probabilities = scores.softmax(dim=-1).masked_fill_(dead.unsqueeze(-1), 0.0).to(value_type)
            out[b, :, start:stop] = (probabilities @ values).view(nheads_q, stop - start, -1)
            lse[b, :, start:stop] = row_lse.view(nheads_q, stop - start)
    return out, lse


def _visible(mask: Mask, start: int, stop: int, seqlen_q: int, seqlen_k: int, device: torch.device) -> Tensor | None:
    """Return the [stop - start, seqlen_k] part of the mask, or None where everything is seen."""
    if isinstance(mask, Full):
        return None
    # `Mask.sees` is written for integers and works element by element on tensors too.
    sees = typing.cast("Callable[[Tensor, Tensor, int, int], Tensor]", mask.sees)
    q_idx = torch.arange(start, stop, device=device)[:, None]
    kv_idx = torch.arange(seqlen_k, device=device)[None, :]
    return sees(q_idx, kv_idx, seqlen_q, seqlen_k)


def _check_shapes(q: Tensor, k: Tensor, v: Tensor) -> None:
    got = f"got q {list(q.shape)}, k {list(k.shape)}, v {list(v.shape)}"
    if q.dim() != 4 or k.dim() != 4 or v.dim() != 4:
        raise InputError(f"q, k and v must be [batch, heads, seqlen, head_dim]; {got}")
    if k.shape[:3] != v.shape[:3] or q.shape[0] != k.shape[0] or q.shape[3] != k.shape[3]:
        raise InputError(f"batch, key length, key/value heads or head_dim_qk differ; {got}")
    if k.shape[1] == 0 or q.shape[1] % k.shape[1]:
        raise InputError(f"nheads_q must be a multiple of nheads_kv; {got}")
