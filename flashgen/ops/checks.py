"""From the tensors and options of a call to a `Problem`, or a typed error before anything is launched."""

from __future__ import annotations

import typing

import torch

from flashgen.errors import InputError, UnsupportedError
from flashgen.spec import AttentionSpec, Causal, DType, Mask, Problem, Shape, causal, full, parse_dtype

Layout = typing.Literal["bhsd", "bshd"]
LAYOUTS: tuple[Layout, ...] = typing.get_args(Layout)


def check_layout(layout: str) -> Layout:
    """Return `layout` if it is one.

    Raises:
        InputError: otherwise.
    """
    if layout not in LAYOUTS:
        raise InputError(
            f"layout must be 'bhsd' [batch, heads, seqlen, head_dim] or 'bshd' [batch, seqlen, heads, head_dim], "
            f"got {layout!r}"
        )
    return layout


def combine_mask(is_causal: bool, mask: Mask | None) -> Mask:
    """Return the mask that `causal=` and `mask=` mean together.

    Raises:
        InputError: if `mask` is not a mask value.
        UnsupportedError: if the two differ: masks do not compose in this version.
    """
    if mask is not None and not isinstance(mask, Mask):
        raise InputError(
            f"mask must be a value of flashgen.masks (full(), causal()), got {type(mask).__name__}; "
            "boolean tensors and functions are not taken"
        )
    if not is_causal:
        return mask or full()
    if isinstance(mask, Causal) and mask.align == "top_left":
        raise UnsupportedError(
            "causal=True means bottom-right alignment and cannot be combined with mask=causal('top_left')"
        )
    return causal()


def heads_first(tensor: torch.Tensor, layout: Layout) -> torch.Tensor:
    """Return the tensor as a [batch, heads, seqlen, head_dim] view."""
    return tensor if layout == "bhsd" else tensor.transpose(1, 2)


def autocast(kind: str, *tensors: torch.Tensor) -> tuple[torch.Tensor, ...]:
    """Return float32 and 16-bit tensors in the autocast dtype of a kind of device, as PyTorch's attention does."""
    dtype = torch.get_autocast_dtype(kind)
    return tuple(t.to(dtype) if t.is_floating_point() and t.dtype != torch.float64 else t for t in tensors)


def problem_of(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, *, mask: Mask, layout: Layout, lse: bool) -> Problem:
    """Return the problem that three tensors pose.

    Raises:
        InputError: for a rank, dtype, device, batch, head count, length or head dimension that does not fit; the
            message says what was got and what is allowed.
    """
    for name, tensor in (("q", q), ("k", k), ("v", v)):
        if tensor.dim() != 4:
            order = "[batch, heads, seqlen, head_dim]" if layout == "bhsd" else "[batch, seqlen, heads, head_dim]"
            raise InputError(f"{name} must have 4 dimensions {order}, got shape {tuple(tensor.shape)}")
        if tensor.device != q.device:
            raise InputError(f"q, k and v must be on one device, got q on {q.device} and {name} on {tensor.device}")
        if tensor.dtype != q.dtype:
            raise InputError(f"q, k and v must have one dtype, got q {q.dtype} and {name} {tensor.dtype}")
    dtype = _dtype(q.dtype)
    q, k, v = (heads_first(t, layout) for t in (q, k, v))
    if not q.shape[0] == k.shape[0] == v.shape[0]:
        raise InputError(f"q, k and v must have one batch size, got {q.shape[0]}, {k.shape[0]} and {v.shape[0]}")
    if k.shape[1] != v.shape[1] or k.shape[2] != v.shape[2]:
        raise InputError(
            f"k and v must have the same heads and seqlen, got k {k.shape[1]} heads x {k.shape[2]} and "
            f"v {v.shape[1]} heads x {v.shape[2]} (layout {layout!r})"
        )
    if q.shape[3] != k.shape[3]:
        raise InputError(f"q and k must have one head_dim, got {q.shape[3]} and {k.shape[3]}")
    spec = AttentionSpec(dtype=dtype, head_dim_qk=q.shape[3], head_dim_v=v.shape[3], lse=lse, mask=mask)
    shape = Shape(batch=q.shape[0], seqlen_q=q.shape[2], seqlen_k=k.shape[2], nheads_q=q.shape[1], nheads_kv=k.shape[1])
    return Problem(spec=spec, shape=shape)


def _dtype(dtype: torch.dtype) -> DType:
    try:
        return parse_dtype(str(dtype))
    except InputError:
        allowed = ", ".join(f"torch.{d.torch_name}" for d in DType)
        raise InputError(f"q, k and v must be one of {allowed}, got {dtype}; convert them first") from None
