"""Calls in FlashAttention's terms: head dimensions that no kernel has are padded, S_dmask is made where asked for."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence

from torch import Tensor
from torch.nn import functional

from flashgen.compat.dropped_probabilities import DroppedProbabilities
from flashgen.errors import InputError
from flashgen.ops import attention, attention_varlen
from flashgen.ops.rng import dropout_state
from flashgen.spec.masks import causal as causal_mask
from flashgen.spec.masks import sliding_window
from flashgen.spec.problem import MIN_HEAD_DIM

Output = Tensor | tuple[Tensor, Tensor, Tensor]
_HEAD_DIM_STEP = 8


@dataclasses.dataclass(frozen=True, kw_only=True)
class Options:
    """What every function takes besides its tensors and lengths, in flashgen's terms."""

    dropout_p: float
    softmax_scale: float | None
    causal: bool
    window: tuple[int, int]
    softcap: float
    alibi_slopes: Tensor | None
    deterministic: bool
    return_attn_probs: bool

    @property
    def slopes(self) -> Tensor | None:
        """ALiBi's slopes without the gradient that FlashAttention does not give them."""
        return None if self.alibi_slopes is None else self.alibi_slopes.detach()

    def rng_state(self, q: Tensor) -> Tensor | None:
        """Return seed and offset of this call's dropout where its pattern must be known afterwards, else None."""
        if not self.return_attn_probs or self.dropout_p <= 0:
            return None
        return dropout_state(q.device, None)

    def dropped(self, q: Tensor, rng_state: Tensor) -> DroppedProbabilities:
        """Return what S_dmask is computed by."""
        mask = sliding_window(*self.window)
        return DroppedProbabilities(
            mask=mask & causal_mask() if self.causal else mask,
            softmax_scale=1.0 / math.sqrt(q.shape[-1]) if self.softmax_scale is None else self.softmax_scale,
            softcap=self.softcap,
            alibi_slopes=self.slopes,
            dropout_p=self.dropout_p,
            rng_state=rng_state,
        )


@dataclasses.dataclass(frozen=True, kw_only=True)
class Sequences:
    """Where packed sequences lie, and how long the longest are: queries, then keys."""

    cu_seqlens: tuple[Tensor, Tensor]
    longest: tuple[int, int]


def dense(q: Tensor, k: Tensor, v: Tensor, options: Options) -> Output:
    """Return the result for [batch, seqlen, heads, head_dim] tensors: out, or (out, softmax_lse, S_dmask)."""
    rng_state = options.rng_state(q)
    # lse always: FlashAttention writes it always, and it costs next to nothing.
    out, lse = attention(
        pad_head_dim(q),
        pad_head_dim(k),
        pad_head_dim(v),
        causal=options.causal,
        window=options.window,
        softmax_scale=_scale(q, options),
        softcap=options.softcap,
        alibi_slopes=options.slopes,
        dropout_p=options.dropout_p,
        seed=rng_state,
        layout="bshd",
        return_lse=True,
        deterministic=options.deterministic,
    )
    out = cut_head_dim(out, v)
    if not options.return_attn_probs:
        return out
    lse = lse.detach()
    if rng_state is None:
        return out, lse, q.new_empty(0)
    return out, lse, options.dropped(q, rng_state).dense(q.detach(), k.detach(), lse)


def packed(q: Tensor, k: Tensor, v: Tensor, sequences: Sequences, options: Options) -> Output:
    """Return the result for packed [total, heads, head_dim] tensors: out, or (out, softmax_lse, S_dmask)."""
    rng_state = options.rng_state(q)
    out, lse = attention_varlen(
        pad_head_dim(q),
        pad_head_dim(k),
        pad_head_dim(v),
        *sequences.cu_seqlens,
        *sequences.longest,
        causal=options.causal,
        window=options.window,
        softmax_scale=_scale(q, options),
        softcap=options.softcap,
        alibi_slopes=options.slopes,
        dropout_p=options.dropout_p,
        seed=rng_state,
        return_lse=True,
        deterministic=options.deterministic,
    )
    out = cut_head_dim(out, v)
    if not options.return_attn_probs:
        return out
    lse = lse.detach()
    if rng_state is None:
        return out, lse, q.new_empty(0)
    dropped = options.dropped(q, rng_state)
    return out, lse, dropped.packed(q.detach(), k.detach(), lse, sequences.cu_seqlens, sequences.longest)


def window_bounds(window_size: Sequence[int]) -> tuple[int, int]:
    """Return (left, right) as flashgen takes it, -1 for no bound.

    Raises:
        InputError: unless there are two.
    """
    if len(window_size) != 2:
        raise InputError(f"window_size must be (left, right), got {window_size}")
    left, right = (max(int(size), -1) for size in window_size)
    return left, right


def unpacked(name: str, together: Tensor, dims: int, parts: int) -> tuple[Tensor, ...]:
    """Return the parts of a tensor [..., parts, nheads, head_dim] with `dims` dimensions: views.

    Raises:
        InputError: for another shape.
    """
    if together.dim() != dims or together.shape[-3] != parts:
        lead = "total" if dims == 4 else "batch, seqlen"
        raise InputError(f"{name} must be [{lead}, {parts}, nheads, head_dim], got {list(together.shape)}")
    return together.unbind(-3)


def _scale(q: Tensor, options: Options) -> float | None:
    if options.softmax_scale is not None or padded_size(q) == q.shape[-1]:
        return options.softmax_scale
    # The default is that of the head dimension before padding.
    return 1.0 / math.sqrt(q.shape[-1])


def padded_size(tensor: Tensor) -> int:
    """Return the head dimension that a kernel takes a tensor with."""
    return max(MIN_HEAD_DIM, -(-tensor.shape[-1] // _HEAD_DIM_STEP) * _HEAD_DIM_STEP)


def pad_head_dim(tensor: Tensor) -> Tensor:
    """Return the tensor with zeros behind its last dimension, which change neither scores nor the columns of out."""
    missing = padded_size(tensor) - tensor.shape[-1]
    return functional.pad(tensor, (0, missing)) if missing else tensor


def cut_head_dim(out: Tensor, v: Tensor) -> Tensor:
    """Return as many columns as v has."""
    return out if out.shape[-1] == v.shape[-1] else out[..., : v.shape[-1]]
