"""FlashAttention's function over a cache of keys and values (flash-attn 2.8), run by flashgen's kernels."""

from __future__ import annotations

import math
from collections.abc import Sequence

from torch import Tensor

from flashgen.compat.flash_attn_calls import cut_head_dim, pad_head_dim, padded_size, window_bounds
from flashgen.ops.decode_request import DecodeRequest
from flashgen.ops.kvcache_calls import call

CacheOutput = Tensor | tuple[Tensor, Tensor]


def flash_attn_with_kvcache(
    q: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    k: Tensor | None = None,
    v: Tensor | None = None,
    rotary_cos: Tensor | None = None,
    rotary_sin: Tensor | None = None,
    cache_seqlens: int | Tensor | None = None,
    cache_batch_idx: Tensor | None = None,
    cache_leftpad: Tensor | None = None,
    block_table: Tensor | None = None,
    softmax_scale: float | None = None,
    causal: bool = False,
    window_size: Sequence[int] = (-1, -1),
    softcap: float = 0.0,
    rotary_interleaved: bool = True,
    alibi_slopes: Tensor | None = None,
    num_splits: int = 0,
    return_softmax_lse: bool = False,
) -> CacheOutput:
    """Return attention of q over each sequence's cache, to which k and v, rotated, are appended first; no gradient.

    Args:
        q: [batch, seqlen_q, nheads, head_dim].
        k_cache: [batch_cache, seqlen_cache, nheads_k, head_dim] or, with block_table, [num_blocks, block_size,
            nheads_k, head_dim], of any block_size. A head_dim that is no multiple of 8, or below 16, costs padded
            copies of both caches in every call, and where keys are appended copies back.
        v_cache: likewise.
        k, v: [batch, seqlen_new, nheads_k, head_dim], what is appended behind cache_seqlens; or None.
        rotary_cos, rotary_sin: [positions, rotary_dim / 2]: turn k, row i at position cache_seqlens + i, and q: row i
            at cache_seqlens + i where causal or window_size is given, else at cache_seqlens.
        cache_seqlens: int32 [batch], or one number: rows of the cache in use.
        cache_batch_idx: int32 [batch], the entry of the cache of each sequence.
        cache_leftpad: int32 [batch], the first row that each sequence uses.
        block_table: int32 [batch, blocks of a sequence].
        softmax_scale: factor of the scores; default head_dim ** -0.5.
        causal: query i sees keys up to i + seqlen_k - seqlen_q, where seqlen_k is cache_seqlens + seqlen_new.
        window_size: (left, right), around i + seqlen_k - seqlen_q; a negative number is no bound.
        softcap: c of c * tanh(score / c); 0 or less is off.
        rotary_interleaved: whether columns 2 i and 2 i + 1 are turned together, else i and i + rotary_dim / 2.
        alibi_slopes: float32 [nheads] or [batch, nheads].
        num_splits: into how many parts the keys are cut; 0 leaves it to the kernel's configuration.
        return_softmax_lse: also return softmax_lse.

    Returns:
        out [batch, seqlen_q, nheads, head_dim]; with `return_softmax_lse`, the pair (out, softmax_lse), which is
        float32 [batch, nheads, seqlen_q], natural log, -inf of a row that sees no key.

    Raises:
        InputError: for tensors or options that do not fit.
    """
    if softmax_scale is None and padded_size(q) != q.shape[-1]:
        # The default is that of the head dimension before padding.
        softmax_scale = 1.0 / math.sqrt(q.shape[-1])
    caches = _plain(k_cache), _plain(v_cache)
    request = DecodeRequest(
        k=None if k is None else _plain(k),
        v=None if v is None else _plain(v),
        cache_seqlens=cache_seqlens,
        page_table=block_table,
        cache_batch_idx=cache_batch_idx,
        cache_leftpad=cache_leftpad,
        rotary_cos=_detached(rotary_cos),
        rotary_sin=_detached(rotary_sin),
        alibi_slopes=_detached(alibi_slopes),
        rotary_interleaved=rotary_interleaved,
        causal=causal,
        window=window_bounds(window_size),
        softmax_scale=softmax_scale,
        softcap=max(softcap, 0.0),
        num_splits=num_splits,
        return_lse=return_softmax_lse,
    )
    out, lse = call(_plain(q), *caches, request)
    if k is not None:
        for cache, padded in zip((k_cache, v_cache), caches, strict=True):
            if padded.shape[-1] != cache.shape[-1]:
                cache.detach().copy_(cut_head_dim(padded, cache))
    out = cut_head_dim(out, v_cache)
    return out if lse is None else (out, lse)


def _plain(tensor: Tensor) -> Tensor:
    """Return a tensor without gradient, of a head dimension that kernels take: in the same memory where it can be."""
    return pad_head_dim(tensor.detach() if tensor.requires_grad else tensor)


def _detached(tensor: Tensor | None) -> Tensor | None:
    return tensor.detach() if tensor is not None and tensor.requires_grad else tensor
