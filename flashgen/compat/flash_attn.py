"""FlashAttention's functions (flash-attn 2.8): same names, arguments, defaults and results, run by flashgen's kernels.

`from flashgen.compat.flash_attn import flash_attn_func` in place of `from flash_attn import flash_attn_func`. Out is
differentiable in q, k and v, once; as there, alibi_slopes, `softmax_lse` and `S_dmask` have no gradient. What differs:
more calls are taken (float32, softcap together with dropout, value heads of another size than the queries'),
`softmax_lse` of a row that sees no key is -inf, and `S_dmask` holds probabilities without any other factor.
"""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from flashgen.compat.flash_attn_calls import Options, Output, Sequences, dense, packed, unpacked, window_bounds
from flashgen.compat.flash_attn_kvcache import flash_attn_with_kvcache
from flashgen.errors import UnsupportedError

__all__ = [
    "flash_attn_func",
    "flash_attn_kvpacked_func",
    "flash_attn_qkvpacked_func",
    "flash_attn_varlen_func",
    "flash_attn_varlen_kvpacked_func",
    "flash_attn_varlen_qkvpacked_func",
    "flash_attn_with_kvcache",
]


def flash_attn_func(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    dropout_p: float = 0.0,
    softmax_scale: float | None = None,
    causal: bool = False,
    window_size: Sequence[int] = (-1, -1),
    softcap: float = 0.0,
    alibi_slopes: Tensor | None = None,
    deterministic: bool = False,
    return_attn_probs: bool = False,
) -> Output:
    """Return attention of q over k and v; heads of k and v may each serve a group of query heads.

    Args:
        q: [batch, seqlen_q, nheads, head_dim]; a head_dim that is no multiple of 8 costs a padded copy.
        k: [batch, seqlen_k, nheads_k, head_dim].
        v: [batch, seqlen_k, nheads_k, head_dim_v].
        dropout_p: share of the probabilities that is dropped; 0.0 to evaluate a model.
        softmax_scale: factor of the scores; default head_dim ** -0.5.
        causal: query i sees keys up to i + seqlen_k - seqlen_q (bottom right).
        window_size: (left, right); query i sees keys from i + seqlen_k - seqlen_q - left to ... + right. A negative
            number is no bound.
        softcap: c of c * tanh(score / c); 0 or less is off.
        alibi_slopes: float32 [nheads] or [batch, nheads]; slope * |i + seqlen_k - seqlen_q - j| is taken off a score.
        deterministic: gradients of equal calls are equal bit for bit, as out always is.
        return_attn_probs: also return softmax_lse and S_dmask; the latter is for tests, of quadratic size.

    Returns:
        out [batch, seqlen_q, nheads, head_dim_v]. With `return_attn_probs`, (out, softmax_lse, S_dmask): softmax_lse is
        float32 [batch, nheads, seqlen_q], natural log; S_dmask holds probabilities [batch, nheads, seqlen_q, seqlen_k],
        the last two rounded up to multiples of 128, negative where they were dropped, and is empty, [0], without
        dropout.

    Raises:
        InputError: for tensors or options that do not fit.
        UnsupportedError: where a gradient is asked for of head dimensions above 256.
    """
    options = Options(
        dropout_p=dropout_p,
        softmax_scale=softmax_scale,
        causal=causal,
        window=window_bounds(window_size),
        softcap=max(softcap, 0.0),
        alibi_slopes=alibi_slopes,
        deterministic=deterministic,
        return_attn_probs=return_attn_probs,
    )
    return dense(q, k, v, options)


def flash_attn_kvpacked_func(
    q: Tensor,
    kv: Tensor,
    dropout_p: float = 0.0,
    softmax_scale: float | None = None,
    causal: bool = False,
    window_size: Sequence[int] = (-1, -1),
    softcap: float = 0.0,
    alibi_slopes: Tensor | None = None,
    deterministic: bool = False,
    return_attn_probs: bool = False,
) -> Output:
    """Return `flash_attn_func` of q and the two halves of kv [batch, seqlen_k, 2, nheads_k, head_dim]; no copy."""
    k, v = unpacked("kv", kv, 5, 2)
    return flash_attn_func(
        q,
        k,
        v,
        dropout_p,
        softmax_scale,
        causal,
        window_size,
        softcap,
        alibi_slopes,
        deterministic,
        return_attn_probs,
    )


def flash_attn_qkvpacked_func(
    qkv: Tensor,
    dropout_p: float = 0.0,
    softmax_scale: float | None = None,
    causal: bool = False,
    window_size: Sequence[int] = (-1, -1),
    softcap: float = 0.0,
    alibi_slopes: Tensor | None = None,
    deterministic: bool = False,
    return_attn_probs: bool = False,
) -> Output:
    """Return `flash_attn_func` of the three parts of qkv [batch, seqlen, 3, nheads, head_dim]; no copy."""
    q, k, v = unpacked("qkv", qkv, 5, 3)
    return flash_attn_func(
        q,
        k,
        v,
        dropout_p,
        softmax_scale,
        causal,
        window_size,
        softcap,
        alibi_slopes,
        deterministic,
        return_attn_probs,
    )


def flash_attn_varlen_func(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    max_seqlen_q: int,
    max_seqlen_k: int,
    dropout_p: float = 0.0,
    softmax_scale: float | None = None,
    causal: bool = False,
    window_size: Sequence[int] = (-1, -1),
    softcap: float = 0.0,
    alibi_slopes: Tensor | None = None,
    deterministic: bool = False,
    return_attn_probs: bool = False,
    block_table: Tensor | None = None,
) -> Output:
    """Return attention of packed sequences, each over its own keys.

    Args:
        q: [total_q, nheads, head_dim].
        k: [total_k, nheads_k, head_dim].
        v: [total_k, nheads_k, head_dim_v].
        cu_seqlens_q: int32 [batch + 1], where sequences start and end in q.
        cu_seqlens_k: likewise in k and v.
        max_seqlen_q: length of the longest sequence of queries.
        max_seqlen_k: of keys.
        block_table: must be None.

    The other arguments are those of `flash_attn_func`.

    Returns:
        out [total_q, nheads, head_dim_v]. With `return_attn_probs`, (out, softmax_lse, S_dmask): softmax_lse is
        [nheads, total_q], S_dmask [batch, nheads, max_seqlen_q, max_seqlen_k], rounded as in `flash_attn_func`.

    Raises:
        InputError: for tensors or options that do not fit.
        UnsupportedError: for a block_table, and where a gradient is asked for of head dimensions above 256.
    """
    if block_table is not None:
        raise UnsupportedError("block_table: packed sequences have no pages here; flash_attn_with_kvcache has")
    options = Options(
        dropout_p=dropout_p,
        softmax_scale=softmax_scale,
        causal=causal,
        window=window_bounds(window_size),
        softcap=max(softcap, 0.0),
        alibi_slopes=alibi_slopes,
        deterministic=deterministic,
        return_attn_probs=return_attn_probs,
    )
    sequences = Sequences(cu_seqlens=(cu_seqlens_q, cu_seqlens_k), longest=(int(max_seqlen_q), int(max_seqlen_k)))
    return packed(q, k, v, sequences, options)


def flash_attn_varlen_kvpacked_func(
    q: Tensor,
    kv: Tensor,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    max_seqlen_q: int,
    max_seqlen_k: int,
    dropout_p: float = 0.0,
    softmax_scale: float | None = None,
    causal: bool = False,
    window_size: Sequence[int] = (-1, -1),
    softcap: float = 0.0,
    alibi_slopes: Tensor | None = None,
    deterministic: bool = False,
    return_attn_probs: bool = False,
) -> Output:
    """Return `flash_attn_varlen_func` of q and the two halves of kv [total_k, 2, nheads_k, head_dim]; no copy."""
    k, v = unpacked("kv", kv, 4, 2)
    return flash_attn_varlen_func(
        q,
        k,
        v,
        cu_seqlens_q,
        cu_seqlens_k,
        max_seqlen_q,
        max_seqlen_k,
        dropout_p,
        softmax_scale,
        causal,
        window_size,
        softcap,
        alibi_slopes,
        deterministic,
        return_attn_probs,
    )


def flash_attn_varlen_qkvpacked_func(
    qkv: Tensor,
    cu_seqlens: Tensor,
    max_seqlen: int,
    dropout_p: float = 0.0,
    softmax_scale: float | None = None,
    causal: bool = False,
    window_size: Sequence[int] = (-1, -1),
    softcap: float = 0.0,
    alibi_slopes: Tensor | None = None,
    deterministic: bool = False,
    return_attn_probs: bool = False,
) -> Output:
    """Return `flash_attn_varlen_func` of the three parts of qkv [total, 3, nheads, head_dim]; no copy."""
    q, k, v = unpacked("qkv", qkv, 4, 3)
    return flash_attn_varlen_func(
        q,
        k,
        v,
        cu_seqlens,
        cu_seqlens,
        max_seqlen,
        max_seqlen,
        dropout_p,
        softmax_scale,
        causal,
        window_size,
        softcap,
        alibi_slopes,
        deterministic,
        return_attn_probs,
    )
