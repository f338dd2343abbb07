"""`flashgen.attention_varlen`: packed sequences."""

from __future__ import annotations

import os
import typing

import torch

from flashgen.codegen import KernelConfig
from flashgen.ops.call import PACKED
from flashgen.ops.functional import call
from flashgen.ops.request import MaskLike, Request, ScoreModLike


@typing.overload
def attention_varlen(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    cu_seqlens_q: torch.Tensor,
    cu_seqlens_k: torch.Tensor,
    max_seqlen_q: int,
    max_seqlen_k: int,
    *,
    causal: bool = ...,
    window: tuple[int, int] = ...,
    mask: MaskLike | None = ...,
    score_mod: ScoreModLike | None = ...,
    bias: torch.Tensor | None = ...,
    softmax_scale: float | None = ...,
    softcap: float = ...,
    alibi_slopes: torch.Tensor | None = ...,
    sinks: torch.Tensor | None = ...,
    dropout_p: float = ...,
    seed: int | torch.Tensor | None = ...,
    return_lse: typing.Literal[False] = ...,
    deterministic: bool = ...,
    config: KernelConfig | None = ...,
    registry: str | os.PathLike[str] | None = ...,
    q_descale: torch.Tensor | float | None = ...,
    k_descale: torch.Tensor | float | None = ...,
    v_descale: torch.Tensor | float | None = ...,
    seqused_q: torch.Tensor | None = ...,
    seqused_k: torch.Tensor | None = ...,
) -> torch.Tensor: ...


@typing.overload
def attention_varlen(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    cu_seqlens_q: torch.Tensor,
    cu_seqlens_k: torch.Tensor,
    max_seqlen_q: int,
    max_seqlen_k: int,
    *,
    causal: bool = ...,
    window: tuple[int, int] = ...,
    mask: MaskLike | None = ...,
    score_mod: ScoreModLike | None = ...,
    bias: torch.Tensor | None = ...,
    softmax_scale: float | None = ...,
    softcap: float = ...,
    alibi_slopes: torch.Tensor | None = ...,
    sinks: torch.Tensor | None = ...,
    dropout_p: float = ...,
    seed: int | torch.Tensor | None = ...,
    return_lse: typing.Literal[True],
    deterministic: bool = ...,
    config: KernelConfig | None = ...,
    registry: str | os.PathLike[str] | None = ...,
    q_descale: torch.Tensor | float | None = ...,
    k_descale: torch.Tensor | float | None = ...,
    v_descale: torch.Tensor | float | None = ...,
    seqused_q: torch.Tensor | None = ...,
    seqused_k: torch.Tensor | None = ...,
) -> tuple[torch.Tensor, torch.Tensor]: ...


def attention_varlen(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    cu_seqlens_q: torch.Tensor,
    cu_seqlens_k: torch.Tensor,
    max_seqlen_q: int,
    max_seqlen_k: int,
    *,
    causal: bool = False,
    window: tuple[int, int] = (-1, -1),
    mask: MaskLike | None = None,
    score_mod: ScoreModLike | None = None,
    bias: torch.Tensor | None = None,
    softmax_scale: float | None = None,
    softcap: float = 0.0,
    alibi_slopes: torch.Tensor | None = None,
    sinks: torch.Tensor | None = None,
    dropout_p: float = 0.0,
    seed: int | torch.Tensor | None = None,
    return_lse: bool = False,
    deterministic: bool = False,
    config: KernelConfig | None = None,
    registry: str | os.PathLike[str] | None = None,
    q_descale: torch.Tensor | float | None = None,
    k_descale: torch.Tensor | float | None = None,
    v_descale: torch.Tensor | float | None = None,
    seqused_q: torch.Tensor | None = None,
    seqused_k: torch.Tensor | None = None,
) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor]:
    """Return attention over packed sequences of unequal lengths; see `attention` for all that is not said here.

    Sequence n has the queries cu_seqlens_q[n] to cu_seqlens_q[n + 1] and likewise the keys; positions, and the bottom
    right of `causal`, are its own. Rows that belong to no sequence give 0 and lse -inf. The boundaries are checked once
    for each tensor (in-place changes count as another), which waits for the GPU; never inside a CUDA graph capture.

    Args:
        q: [tokens_q, nheads_q, head_dim_qk].
        k: [tokens_k, nheads_kv, head_dim_qk].
        v: [tokens_k, nheads_kv, head_dim_v].
        cu_seqlens_q, cu_seqlens_k: int32 [batch + 1] on q's device: running totals of the lengths, 0 first.
        max_seqlen_q, max_seqlen_k: the longest sequence, or more.
        bias: broadcast to [batch, nheads_q, max_seqlen_q, max_seqlen_k].
        seqused_q, seqused_k: int32 [batch]: only so many first rows of each sequence count.
        return_lse: also return lse, float32 [nheads_q, tokens_q].

    Returns:
        out [tokens_q, nheads_q, head_dim_v]; with `return_lse`, the pair (out, lse).

    Raises:
        InputError, UnsupportedError, ConfigError, NoKernelError: as `attention`.
    """
    request = Request(
        causal=causal,
        window=window,
        mask=mask,
        score_mod=score_mod,
        bias=bias,
        softmax_scale=softmax_scale,
        softcap=softcap,
        alibi_slopes=alibi_slopes,
        sinks=sinks,
        dropout_p=dropout_p,
        seed=seed,
        layout=PACKED,
        return_lse=return_lse,
        deterministic=deterministic,
        config=config,
        registry=registry,
        q_descale=q_descale,
        k_descale=k_descale,
        v_descale=v_descale,
        cu_seqlens_q=cu_seqlens_q,
        cu_seqlens_k=cu_seqlens_k,
        max_seqlen_q=max_seqlen_q,
        max_seqlen_k=max_seqlen_k,
        seqused_q=seqused_q,
        seqused_k=seqused_k,
    )
    return call(q, k, v, request)
