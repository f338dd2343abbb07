"""`flashgen.attention_with_kvcache`: a few queries of each sequence over its cache of keys and values."""

from __future__ import annotations

import os
import typing

import torch

from flashgen.codegen import KernelConfig
from flashgen.dispatch import Selection
from flashgen.ops.call import Layout
from flashgen.ops.decode_request import DecodeRequest, Factor, NumSplits
from flashgen.ops.kvcache_calls import call, explain_call
from flashgen.ops.request import MaskLike, ScoreModLike


@typing.overload
def attention_with_kvcache(
    q: torch.Tensor,
    k_cache: torch.Tensor,
    v_cache: torch.Tensor,
    *,
    k: torch.Tensor | None = ...,
    v: torch.Tensor | None = ...,
    cache_seqlens: torch.Tensor | int | None = ...,
    page_table: torch.Tensor | None = ...,
    cache_batch_idx: torch.Tensor | None = ...,
    cache_leftpad: torch.Tensor | None = ...,
    rotary_cos: torch.Tensor | None = ...,
    rotary_sin: torch.Tensor | None = ...,
    rotary_interleaved: bool = ...,
    causal: bool = ...,
    window: tuple[int, int] = ...,
    mask: MaskLike | None = ...,
    score_mod: ScoreModLike | None = ...,
    softmax_scale: float | None = ...,
    softcap: float = ...,
    alibi_slopes: torch.Tensor | None = ...,
    sinks: torch.Tensor | None = ...,
    k_descale: Factor = ...,
    v_descale: Factor = ...,
    num_splits: NumSplits = ...,
    layout: Layout = ...,
    return_lse: typing.Literal[False] = ...,
    check: bool = ...,
    config: KernelConfig | None = ...,
    registry: str | os.PathLike[str] | None = ...,
) -> torch.Tensor: ...


@typing.overload
def attention_with_kvcache(
    q: torch.Tensor,
    k_cache: torch.Tensor,
    v_cache: torch.Tensor,
    *,
    k: torch.Tensor | None = ...,
    v: torch.Tensor | None = ...,
    cache_seqlens: torch.Tensor | int | None = ...,
    page_table: torch.Tensor | None = ...,
    cache_batch_idx: torch.Tensor | None = ...,
    cache_leftpad: torch.Tensor | None = ...,
    rotary_cos: torch.Tensor | None = ...,
    rotary_sin: torch.Tensor | None = ...,
    rotary_interleaved: bool = ...,
    causal: bool = ...,
    window: tuple[int, int] = ...,
    mask: MaskLike | None = ...,
    score_mod: ScoreModLike | None = ...,
    softmax_scale: float | None = ...,
    softcap: float = ...,
    alibi_slopes: torch.Tensor | None = ...,
    sinks: torch.Tensor | None = ...,
    k_descale: Factor = ...,
    v_descale: Factor = ...,
    num_splits: NumSplits = ...,
    layout: Layout = ...,
    return_lse: typing.Literal[True],
    check: bool = ...,
    config: KernelConfig | None = ...,
    registry: str | os.PathLike[str] | None = ...,
) -> tuple[torch.Tensor, torch.Tensor]: ...


def attention_with_kvcache(
    q: torch.Tensor,
    k_cache: torch.Tensor,
    v_cache: torch.Tensor,
    *,
    k: torch.Tensor | None = None,
    v: torch.Tensor | None = None,
    cache_seqlens: torch.Tensor | int | None = None,
    page_table: torch.Tensor | None = None,
    cache_batch_idx: torch.Tensor | None = None,
    cache_leftpad: torch.Tensor | None = None,
    rotary_cos: torch.Tensor | None = None,
    rotary_sin: torch.Tensor | None = None,
    rotary_interleaved: bool = False,
    causal: bool = False,
    window: tuple[int, int] = (-1, -1),
    mask: MaskLike | None = None,
    score_mod: ScoreModLike | None = None,
    softmax_scale: float | None = None,
    softcap: float = 0.0,
    alibi_slopes: torch.Tensor | None = None,
    sinks: torch.Tensor | None = None,
    k_descale: Factor = None,
    v_descale: Factor = None,
    num_splits: NumSplits = "auto",
    layout: Layout = "bshd",
    return_lse: bool = False,
    check: bool = False,
    config: KernelConfig | None = None,
    registry: str | os.PathLike[str] | None = None,
) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor]:
    """Return exact attention of a few queries of each sequence over its cache, to which `k` and `v` are appended first.

    One call does all of it: `k` is rotated, `k` and `v` are written into the caches, `q` is rotated and attends to
    the cache with what is new. That is one launch, and two for chunks that are appended on Hopper. Sequence b has the
    keys in rows cache_leftpad[b] up to seqlen_k = cache_seqlens[b] + seqlen_new of its entry of the cache; `causal`,
    `window` and ALiBi align the last query with the last of them. In a CUDA graph the lengths, pages and entries are
    those in the tensors when it is replayed. Never differentiable.

    What is not said here is as in `attention`. Under autocast q, k and v are taken in the type of the cache. The caches
    are never copied: their last dimension is contiguous, their other strides are multiples of 8 elements and their
    storage is 16-byte aligned.

    Without `check` nobody looks at the numbers in cache_seqlens, page_table, cache_batch_idx and cache_leftpad, for
    they are on the device: numbers outside the caches, or positions outside the rotary tables, make the kernel read,
    and where keys are appended write, memory that is not theirs.

    Args:
        q: [batch, seqlen_q, nheads_q, head_dim_qk] (`bshd`) or [batch, nheads_q, seqlen_q, head_dim_qk] (`bhsd`);
            float16, bfloat16 or float32.
        k_cache: [entries, rows, nheads_kv, head_dim_qk] or, with `page_table`, [pages, page_size, nheads_kv,
            head_dim_qk]; heads before rows in `bhsd`. Of q's dtype, or float8_e4m3fn beside a 16-bit q.
        v_cache: the same with head_dim_v; `k_cache[..., :head_dim_v]` itself, as of absorbed multi-head latent
            attention, is found out by its address and read once.
        k, v: [batch, seqlen_new, nheads_kv, head_dim], what is appended behind the keys in use; seqlen_new need not
            equal seqlen_q. Not for float8 caches.
        cache_seqlens: int32 [batch] on q's device, the rows in use before anything is appended; or one number for all;
            None: all rows, where nothing is appended.
        page_table: int32 [batch, pages], the page of each page_size keys of a sequence; of any page size.
        cache_batch_idx: int32 [batch], the entry of the cache of each sequence, where it is not its number.
        cache_leftpad: int32 [batch], the first row that each sequence uses.
        rotary_cos, rotary_sin: [positions, rotary_dim / 2] of q's dtype or float32, rotary_dim a multiple of 16: rotate
            the first rotary_dim columns of `k`, row i at position cache_seqlens + i, and of q: row i at cache_seqlens +
            i where `causal`, `window` or `mask` let queries see different keys by their position, else at
            cache_seqlens.
        rotary_interleaved: whether columns 2 i and 2 i + 1 are rotated together; else i and i + rotary_dim / 2.
        mask: as in `attention`, one whose keys a formula bounds (causal, windows, prefixes, ... and none of tensors).
        k_descale, v_descale: factors of float8 caches: a number, or what broadcasts to [batch, nheads_kv].
        num_splits: into how many parts the keys of a query are cut, computed side by side; `auto` (or 0) by the lengths
            on the device.
        layout: order of the dimensions of q, k, v, the caches and out.
        return_lse: also return the natural-log log-sum-exp, float32 [batch, nheads_q, seqlen_q].
        check: refuse lengths beyond the caches and pages or entries that they have not, which waits for the device.

    Returns:
        out, like q with head_dim_v columns; with `return_lse`, the pair (out, lse).

    Raises:
        InputError: for tensors or options that do not fit; the message says what is allowed. With `check`, for numbers
            that do not, and inside a CUDA graph capture.
        UnsupportedError: where gradients are on and a tensor requires one.
        ConfigError: if `config` is illegal here.
        NoKernelError: if nothing can run the call; the message lists why.

    Keys are split over programs as in Flash-Decoding (Dao, Haziza, Massa, Sizov 2023).
    """
    request = DecodeRequest(
        k,
        v,
        cache_seqlens,
        page_table,
        cache_batch_idx,
        cache_leftpad,
        rotary_cos,
        rotary_sin,
        alibi_slopes,
        sinks,
        k_descale,
        v_descale,
        rotary_interleaved,
        causal,
        window,
        mask,
        score_mod,
        softmax_scale,
        softcap,
        num_splits,
        layout,
        return_lse,
        check,
        config,
        registry,
    )
    out, lse = call(q, k_cache, v_cache, request)
    return out if lse is None else (out, lse)


def explain_with_kvcache(
    q: torch.Tensor,
    k_cache: torch.Tensor,
    v_cache: torch.Tensor,
    *,
    k: torch.Tensor | None = None,
    v: torch.Tensor | None = None,
    cache_seqlens: torch.Tensor | int | None = None,
    page_table: torch.Tensor | None = None,
    cache_batch_idx: torch.Tensor | None = None,
    cache_leftpad: torch.Tensor | None = None,
    rotary_cos: torch.Tensor | None = None,
    rotary_sin: torch.Tensor | None = None,
    rotary_interleaved: bool = False,
    causal: bool = False,
    window: tuple[int, int] = (-1, -1),
    mask: MaskLike | None = None,
    score_mod: ScoreModLike | None = None,
    softmax_scale: float | None = None,
    softcap: float = 0.0,
    alibi_slopes: torch.Tensor | None = None,
    sinks: torch.Tensor | None = None,
    k_descale: Factor = None,
    v_descale: Factor = None,
    num_splits: NumSplits = "auto",
    layout: Layout = "bshd",
    return_lse: bool = False,
    check: bool = False,
    config: KernelConfig | None = None,
    registry: str | os.PathLike[str] | None = None,
) -> Selection:
    """Return which kernel `attention_with_kvcache` would run for the same call, from which entry, and why not others.

    Nothing is run or appended. For CPU tensors the answer is for `sm_90`, as in the interpreter. Arguments and errors
    are those of the function.
    """
    request = DecodeRequest(
        k,
        v,
        cache_seqlens,
        page_table,
        cache_batch_idx,
        cache_leftpad,
        rotary_cos,
        rotary_sin,
        alibi_slopes,
        sinks,
        k_descale,
        v_descale,
        rotary_interleaved,
        causal,
        window,
        mask,
        score_mod,
        softmax_scale,
        softcap,
        num_splits,
        layout,
        return_lse,
        check,
        config,
        registry,
    )
    return explain_call(q, k_cache, v_cache, request)
