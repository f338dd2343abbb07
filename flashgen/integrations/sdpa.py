"""`flashgen.scaled_dot_product_attention`: PyTorch's function of that name, run by flashgen's kernels."""

from __future__ import annotations

import dataclasses
import math
import typing

import torch
from torch import Tensor
from torch.nn import functional

from flashgen.errors import InputError, UnsupportedError
from flashgen.ops import attention
from flashgen.spec import Mask, causal, full
from flashgen.spec.problem import MAX_HEAD_DIM, MIN_HEAD_DIM

_DTYPES = (torch.float16, torch.bfloat16, torch.float32)
_HEAD_DIM_STEP = 8


class SdpaInputError(InputError, RuntimeError):
    """A call that PyTorch's function refuses as well: a `RuntimeError`, as there, besides an `InputError`."""


def scaled_dot_product_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    *,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> Tensor:
    """Return what `torch.nn.functional.scaled_dot_product_attention` returns for the same arguments.

    A row that sees no key is 0. Head dimensions that no kernel has (not multiples of 8, or below 16) are padded with
    zeros, which costs a copy. Differentiable in query, key, value and an attn_mask of numbers, once.

    Args:
        query: [..., L, E] with any number of leading dimensions; the last of them is the heads. float16, bfloat16 or
            float32.
        key: [..., S, E]; leading dimensions broadcast against those of query and value.
        value: [..., S, Ev].
        attn_mask: broadcasts to [..., L, S]. Boolean: True takes part. float32 or query's type: added to the scores.
            Or a `torch.nn.attention.bias.CausalBias`.
        dropout_p: share of the probabilities that is dropped, from PyTorch's random numbers. Applies whenever it is
            above 0: pass 0.0 to evaluate a model.
        is_causal: row i sees keys up to i (top left, also where L != S).
        scale: factor of the scores; default E ** -0.5.
        enable_gqa: key and value may have fewer heads (dimension -3), of which each serves a group of query heads.

    Returns:
        [..., L, Ev] of query's type.

    Raises:
        SdpaInputError: for what PyTorch refuses as well; it is a RuntimeError, too.
        UnsupportedError: for nested tensors, other types, head dimensions above 512, or above 256 where a gradient is
            asked for.
        NoKernelError: if nothing can run the call.
    """
    _check_tensors(query, key, value)
    if not 0.0 <= dropout_p <= 1.0:
        raise SdpaInputError(f"dropout_p must be from 0 to 1, got {dropout_p}")
    if is_causal and attn_mask is not None:
        raise SdpaInputError("attn_mask and is_causal=True exclude each other; put the causal part into attn_mask")
    folded = _fold(query, key, value, enable_gqa)
    if folded.heads == 0 or dropout_p == 1:
        return _zeros(folded, value)
    mask, bias = _mask_and_bias(attn_mask, is_causal, folded)
    head_dim = query.shape[-1]
    if scale is None and head_dim != _padded_size(head_dim):
        scale = 1.0 / math.sqrt(head_dim) if head_dim else 1.0
    out = attention(
        _pad_head_dim(folded.q),
        _pad_head_dim(folded.k),
        _pad_head_dim(folded.v),
        mask=mask,
        bias=bias,
        softmax_scale=scale,
        dropout_p=dropout_p,
    )
    out = out.view(*folded.lead, *out.shape[2:])
    return out if out.shape[-1] == value.shape[-1] else out[..., : value.shape[-1]]


def _zeros(call: _Folded, value: Tensor) -> Tensor:
    """Return the result of a call without heads, or of one that drops everything."""
    kind = call.q.device.type
    dtype = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else call.q.dtype
    return call.q.new_zeros((*call.lead, call.q.shape[2], value.shape[-1]), dtype=dtype)


def _check_tensors(query: Tensor, key: Tensor, value: Tensor) -> None:
    tensors = {"query": query, "key": key, "value": value}
    for name, tensor in tensors.items():
        if not isinstance(tensor, Tensor):
            raise SdpaInputError(f"{name} must be a tensor, got {type(tensor).__name__}")
        if tensor.is_nested:
            raise UnsupportedError(f"{name} is a nested tensor; pack the sequences and call flashgen.attention_varlen")
        if tensor.dim() < 2:
            raise SdpaInputError(f"{name} must have at least 2 dimensions [..., seqlen, head_dim], got {_size(tensor)}")
    if not query.device == key.device == value.device:
        raise SdpaInputError(
            f"query, key and value must be on one device, got {[str(t.device) for t in tensors.values()]}"
        )
    if query.shape[-1] != key.shape[-1]:
        raise SdpaInputError(f"query and key must have one head_dim, got {query.shape[-1]} and {key.shape[-1]}")
    if key.shape[-2] != value.shape[-2]:
        raise SdpaInputError(f"key and value must have one seqlen, got {key.shape[-2]} and {value.shape[-2]}")
    for name, tensor in (("query and key", query), ("value", value)):
        if tensor.shape[-1] > MAX_HEAD_DIM:
            raise UnsupportedError(f"{name} have head_dim {tensor.shape[-1]}; kernels take up to {MAX_HEAD_DIM}")
    if not torch.is_autocast_enabled(query.device.type):
        _check_dtypes(query, key, value)


def _check_dtypes(query: Tensor, key: Tensor, value: Tensor) -> None:
    if not query.dtype == key.dtype == value.dtype:
        got = f"{query.dtype}, {key.dtype} and {value.dtype}"
        raise SdpaInputError(f"query, key and value must have one dtype, got {got}")
    if query.dtype not in _DTYPES:
        message = f"query, key and value must be one of {', '.join(map(str, _DTYPES))}, got {query.dtype}"
        if query.is_floating_point() or query.is_complex():
            raise UnsupportedError(f"{message}; use torch.nn.functional.scaled_dot_product_attention")
        raise SdpaInputError(message)


@dataclasses.dataclass(frozen=True, kw_only=True)
class _Folded:
    """A call as `flashgen.attention` takes it.

    Attributes:
        q, k, v: [batch, heads, seqlen, head_dim], k and v with fewer heads where they are shared.
        lead: leading dimensions of the result; empty for a call without heads, [seqlen, head_dim].
        batch: the batch dimensions that were folded into one.
        heads: query heads.
    """

    q: Tensor
    k: Tensor
    v: Tensor
    lead: tuple[int, ...]
    batch: tuple[int, ...]
    heads: int

    @property
    def scores(self) -> tuple[int, ...]:
        """The size of the scores as the caller sees them, [..., L, S]."""
        return (*self.lead, self.q.shape[2], self.k.shape[2])


def _fold(query: Tensor, key: Tensor, value: Tensor, enable_gqa: bool) -> _Folded:
    lead_dims = max(query.dim(), key.dim(), value.dim()) - 2
    if enable_gqa and min(query.dim(), key.dim(), value.dim()) < 3:
        raise SdpaInputError("enable_gqa needs heads: query, key and value must be [..., heads, seqlen, head_dim]")
    q, k, v = (_with_dims(t, 3) for t in (query, key, value))
    batch = _broadcast("batch dimensions", query, key, value, tuple(t.shape[:-3] for t in (q, k, v)))
    if enable_gqa:
        k, v = _grouped(q, k, v)
        heads = q.shape[-3]
    else:
        (heads,) = _broadcast("heads", query, key, value, tuple(t.shape[-3:-2] for t in (q, k, v)))
        q = _with_heads(q, heads)
        if k.shape[-3] != v.shape[-3]:
            k, v = _with_heads(k, heads), _with_heads(v, heads)
    lead = (*batch, heads) if lead_dims else ()
    q, k, v = (_fold_batch(t, batch) for t in (q, k, v))
    return _Folded(q=q, k=k, v=v, lead=lead, batch=batch, heads=heads)


def _with_dims(tensor: Tensor, least: int) -> Tensor:
    """Return the tensor with dimensions of size 1 put in front until it has `least`."""
    return tensor if tensor.dim() >= least else tensor[(None,) * (least - tensor.dim())]


def _with_heads(tensor: Tensor, heads: int) -> Tensor:
    """Return the tensor with its one head expanded: a view."""
    return tensor if tensor.shape[-3] == heads else tensor.expand(*tensor.shape[:-3], heads, *tensor.shape[-2:])


def _fold_batch(tensor: Tensor, batch: tuple[int, ...]) -> Tensor:
    """Return [*batch, ...] with one batch dimension: a view, unless several dimensions were broadcast in part."""
    if tensor.shape[:-3] != batch:
        tensor = tensor.expand(*batch, *tensor.shape[-3:])
    return tensor if len(batch) == 1 else tensor.reshape(math.prod(batch), *tensor.shape[-3:])


def _grouped(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    """Return key and value with the same heads, which divide those of the query."""
    heads, of_key, of_value = q.shape[-3], k.shape[-3], v.shape[-3]
    if heads and (not of_key or not of_value or heads % of_key or heads % of_value):
        raise SdpaInputError(f"heads of key and value must divide those of query, got {heads}, {of_key} and {of_value}")
    if of_key != of_value:
        # Kernels have one number of key/value heads.
        k, v = k.repeat_interleave(heads // of_key, -3), v.repeat_interleave(heads // of_value, -3)
    return k, v


def _broadcast(
    what: str, query: Tensor, key: Tensor, value: Tensor, sizes: tuple[tuple[int, ...], ...]
) -> tuple[int, ...]:
    try:
        return tuple(torch.broadcast_shapes(*sizes))
    except RuntimeError:
        advice = "; pass enable_gqa=True for grouped heads" if what == "heads" else ""
        got = f"{_size(query)}, {_size(key)} and {_size(value)}"
        raise SdpaInputError(f"the {what} of query, key and value do not broadcast, got {got}{advice}") from None


def _mask_and_bias(attn_mask: Tensor | None, is_causal: bool, call: _Folded) -> tuple[Mask, Tensor | None]:
    seqlen_q, seqlen_k = call.scores[-2:]
    if attn_mask is None:
        return _top_left(seqlen_q, seqlen_k) if is_causal else full(), None
    # By name: importing the class loads PyTorch's compiler, a second for every process.
    if type(attn_mask).__name__ == "CausalBias":
        return _causal_bias(attn_mask, seqlen_q, seqlen_k), None
    return full(), _bias(attn_mask, call)


def _causal_bias(attn_mask: typing.Any, seqlen_q: int, seqlen_k: int) -> Mask:
    """Return what a `torch.nn.attention.bias.CausalBias` says; the numbers that it holds as a tensor mean nothing."""
    if (attn_mask.seq_len_q, attn_mask.seq_len_kv) != (seqlen_q, seqlen_k):
        made_for = f"{attn_mask.seq_len_q} x {attn_mask.seq_len_kv}"
        raise SdpaInputError(f"attn_mask is a CausalBias for {made_for} scores, not {seqlen_q} x {seqlen_k}")
    return _top_left(seqlen_q, seqlen_k) if attn_mask.variant.name == "UPPER_LEFT" else causal()


def _top_left(seqlen_q: int, seqlen_k: int) -> Mask:
    # Where both alignments are the same, by the name under which kernels are tuned.
    return causal() if seqlen_q == seqlen_k else causal("top_left")


def _bias(attn_mask: Tensor, call: _Folded) -> Tensor:
    """Return attn_mask with 4 dimensions, full or 1: a view, unless several batch dimensions broadcast in part."""
    if not isinstance(attn_mask, Tensor):
        raise SdpaInputError(f"attn_mask must be a tensor, got {type(attn_mask).__name__}")
    if attn_mask.is_nested:
        raise UnsupportedError("attn_mask is a nested tensor; give a dense one")
    if attn_mask.device != call.q.device:
        raise SdpaInputError(f"attn_mask must be on {call.q.device} like query, got {attn_mask.device}")
    allowed = dict.fromkeys((torch.bool, torch.float32, call.q.dtype))
    if attn_mask.dtype not in allowed:
        if not (attn_mask.is_floating_point() and torch.is_autocast_enabled(call.q.device.type)):
            raise SdpaInputError(f"attn_mask must be one of {list(allowed)}, got {attn_mask.dtype}")
        attn_mask = attn_mask.float()
    scores = call.scores
    sizes = attn_mask.shape
    fits = len(sizes) <= len(scores) and all(
        got in (1, wanted) for got, wanted in zip(reversed(sizes), reversed(scores), strict=False)
    )
    if not fits:
        raise SdpaInputError(f"attn_mask must broadcast to {list(scores)}, got {list(sizes)}")
    bias = _with_dims(attn_mask, len(call.batch) + 3)
    shared = math.prod(bias.shape[:-3]) == 1
    return bias.reshape(1, *bias.shape[-3:]) if shared else _fold_batch(bias, call.batch)


def _padded_size(head_dim: int) -> int:
    return max(MIN_HEAD_DIM, -(-head_dim // _HEAD_DIM_STEP) * _HEAD_DIM_STEP)


def _pad_head_dim(tensor: Tensor) -> Tensor:
    """Return the tensor with zeros behind its last dimension, which change neither scores nor the columns of out."""
    missing = _padded_size(tensor.shape[-1]) - tensor.shape[-1]
    return functional.pad(tensor, (0, missing)) if missing else tensor


def _size(tensor: Tensor) -> list[int]:
    return list(tensor.shape)
