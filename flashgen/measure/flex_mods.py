"""flashgen's masks and scores as the closures that FlexAttention takes, to measure beside it."""

from __future__ import annotations

import typing
from collections.abc import Callable

import torch
from torch import Tensor

from flashgen.spec import AttentionSpec, Causal, Extras, Full, Mask
from flashgen.spec.masks import (
    Chunked,
    Complement,
    DilatedWindow,
    Document,
    GlobalTokens,
    Intersection,
    PrefixLM,
    SlidingWindow,
    Union,
)

MaskMod = Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]
ScoreMod = Callable[[Tensor, Tensor, Tensor, Tensor, Tensor], Tensor]


def flex_mask_mod(mask: Mask, seqlen_q: int, seqlen_k: int) -> MaskMod | str | None:
    """Return the mask as a `mask_mod`, None for no mask, or why there is none."""
    if isinstance(mask, Full):
        return None
    if isinstance(mask, Intersection | Union):
        parts = [flex_mask_mod(operand, seqlen_q, seqlen_k) for operand in mask.operands]
        for part in parts:
            if isinstance(part, str):
                return part
        return _joined(typing.cast("list[MaskMod]", parts), isinstance(mask, Intersection))
    if isinstance(mask, Complement):
        inner = flex_mask_mod(mask.operand, seqlen_q, seqlen_k)
        return inner if isinstance(inner, str) or inner is None else _negated(inner)
    return _leaf(mask, seqlen_k - seqlen_q)


def _joined(parts: list[MaskMod], every: bool) -> MaskMod:
    def mask_mod(b: Tensor, h: Tensor, q_idx: Tensor, kv_idx: Tensor) -> Tensor:
        seen = parts[0](b, h, q_idx, kv_idx)
        for part in parts[1:]:
            other = part(b, h, q_idx, kv_idx)
            seen = seen & other if every else seen | other
        return seen

    return mask_mod


def _negated(inner: MaskMod) -> MaskMod:
    return lambda b, h, q_idx, kv_idx: ~inner(b, h, q_idx, kv_idx)


def _leaf(mask: Mask, offset: int) -> MaskMod | str:
    match mask:
        case Causal(align="top_left"):
            return lambda b, h, q_idx, kv_idx: kv_idx <= q_idx
        case Causal():
            return lambda b, h, q_idx, kv_idx: kv_idx <= q_idx + offset
        case SlidingWindow(left=left, right=right):
            # Without a bound, one that no length reaches.
            left, right = (2**30 if side < 0 else side for side in (left, right))
            return lambda b, h, q_idx, kv_idx: (q_idx + offset - kv_idx <= left) & (kv_idx - q_idx - offset <= right)
        case PrefixLM(length=length):
            return lambda b, h, q_idx, kv_idx: (kv_idx < length) | (kv_idx <= q_idx + offset)
        case Chunked(size=size):
            return lambda b, h, q_idx, kv_idx: (q_idx + offset) // size == kv_idx // size
        case DilatedWindow(left=left, right=right, dilation=dilation):
            return lambda b, h, q_idx, kv_idx: (
                (q_idx + offset - kv_idx <= left)
                & (kv_idx - q_idx - offset <= right)
                & ((q_idx + offset - kv_idx) % dilation == 0)
            )
        case GlobalTokens(count=count):
            return lambda b, h, q_idx, kv_idx: (kv_idx < count) | (q_idx + offset < count)
        case Document(batched=batched):
            q_ids, kv_ids = (typing.cast(Tensor, tensor) for tensor in mask.tensors)
            if batched:
                return lambda b, h, q_idx, kv_idx: q_ids[b, q_idx] == kv_ids[b, kv_idx]
            return lambda b, h, q_idx, kv_idx: q_ids[q_idx] == kv_ids[kv_idx]
    return f"no adapter for mask {mask}"


def flex_score_mod(spec: AttentionSpec, extras: Extras, offset: int) -> ScoreMod | str | None:
    """Return softcap, bias and ALiBi of a call as one `score_mod`, None for none, or why there is none."""
    if spec.score_mod is not None or spec.bias == "bool":
        return "no adapter for score_mod and boolean bias"
    softcap, bias, slopes = extras.softcap, extras.bias, extras.alibi_slopes
    if not spec.softcap and bias is None and slopes is None:
        return None
    per_batch = slopes is not None and slopes.dim() == 2

    def score_mod(score: Tensor, b: Tensor, h: Tensor, q_idx: Tensor, kv_idx: Tensor) -> Tensor:
        if softcap:
            score = softcap * torch.tanh(score / softcap)
        if bias is not None:
            score = score + bias[b, h, q_idx, kv_idx]
        if slopes is not None:
            slope = slopes[b, h] if per_batch else slopes[h]
            score = score - slope * (q_idx + offset - kv_idx).abs()
        return score

    return score_mod
