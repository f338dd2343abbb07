"""From the tensors and options of a call to a `Problem`, or a typed error before anything is launched."""

from __future__ import annotations

import functools
import math
import typing

import torch

from flashgen.errors import InputError
from flashgen.ops.call import LAYOUTS, PACKED, Layout, Options, Tensors, heads_first
from flashgen.ops.side_checks import bias_kind, check_captures, check_side_tensors
from flashgen.spec import AttentionSpec, DType, Extras, Problem, Shape, parse_dtype, parse_mask
from flashgen.spec.mods import ModFunction, parse_mod

ORDERS = {
    "bhsd": "[batch, heads, seqlen, head_dim]",
    "bshd": "[batch, seqlen, heads, head_dim]",
    PACKED: "[tokens, heads, head_dim]",
}


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


def tf32_allowed() -> bool:
    """Return whether PyTorch may round the operands of float32 products on GPUs to 10 bits of mantissa."""
    # Not allow_tf32: reading it raises where the setting was made through the newer name.
    return bool(torch.backends.cuda.matmul.fp32_precision == "tf32")


def problem_of(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, tensors: Tensors, options: Options) -> Problem:
    """Return the problem that a call poses; its mask and score mod hold no tensors.

    Raises:
        InputError: for a rank, dtype, device, batch, head count, length, head dimension or number that does not fit;
            the message says what was got and what is allowed.
    """
    if not options.packed:
        check_layout(options.layout)
    _check_qkv(q, k, v, options.layout)
    check_numbers(options.softmax_scale, options.softcap)
    if not 0 <= options.dropout_p < 1:
        raise InputError(f"dropout_p must be at least 0 and less than 1, got {options.dropout_p}")
    shape = _shape_of(q, k, v, tensors, options)
    check_side_tensors(q, shape, tensors)
    spec = AttentionSpec(
        dtype=dtype_of(q),
        head_dim_qk=q.shape[-1],
        head_dim_v=v.shape[-1],
        mask=parse_mask(options.mask),
        score_mod=score_mod_of(options.score_mod),
        softcap=options.softcap != 0,
        alibi=tensors.alibi_slopes is not None,
        sinks=tensors.sinks is not None,
        dropout=options.dropout_p > 0,
        varlen=options.packed,
        seqused="q" * (tensors.seqused_q is not None) + "k" * (tensors.seqused_k is not None),
        descale=tensors.q_descale is not None,
        lse=options.return_lse,
        **_bias_fields(q, shape, tensors.bias),
    )
    check_captures(q, spec, tensors.captures)
    return Problem(spec=spec, shape=shape)


def extras_of(problem: Problem, tensors: Tensors, options: Options) -> Extras:
    """Return the numbers and tensors of a call, the bias with all its dimensions; nothing is copied."""
    shape, bias = problem.shape, tensors.bias
    if bias is not None:
        bias = bias.expand(shape.batch, shape.nheads_q, shape.seqlen_q, shape.seqlen_k)
    scale = problem.spec.default_scale if options.softmax_scale is None else options.softmax_scale
    return Extras(
        softmax_scale=scale,
        softcap=options.softcap,
        dropout_p=options.dropout_p,
        **tensors._replace(bias=bias)._asdict(),
    )


class _BiasFields(typing.TypedDict):
    bias: typing.Literal["none", "input", "fp32", "bool"]
    bias_aligned: bool


def _bias_fields(q: torch.Tensor, shape: Shape, bias: torch.Tensor | None) -> _BiasFields:
    if bias is None:
        return {"bias": "none", "bias_aligned": True}
    kind, aligned = bias_kind(q, shape, bias)
    return {"bias": kind, "bias_aligned": aligned}


def _check_qkv(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, layout: str) -> None:
    dims = 3 if layout == PACKED else 4
    for name, tensor in (("q", q), ("k", k), ("v", v)):
        if tensor.dim() != dims:
            raise InputError(f"{name} must have {dims} dimensions {ORDERS[layout]}, got shape {tuple(tensor.shape)}")
        if tensor.device != q.device:
            raise InputError(f"q, k and v must be on one device, got q on {q.device} and {name} on {tensor.device}")
        if tensor.dtype != q.dtype:
            raise InputError(f"q, k and v must have one dtype, got q {q.dtype} and {name} {tensor.dtype}")


def check_numbers(softmax_scale: float | None, softcap: float) -> None:
    """Check the numbers of the scores.

    Raises:
        InputError: if one is not finite, or softcap is negative.
    """
    if softmax_scale is not None and not math.isfinite(softmax_scale):
        raise InputError(f"softmax_scale must be a finite number, got {softmax_scale}")
    if not (softcap >= 0 and math.isfinite(softcap)):
        raise InputError(f"softcap must be a finite number of at least 0 (0 is off), got {softcap}")


def _shape_of(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, tensors: Tensors, options: Options) -> Shape:
    q, k, v = (heads_first(t, options.layout) for t in (q, k, v))
    if q.shape[-1] != k.shape[-1]:
        raise InputError(f"q and k must have one head_dim, got {q.shape[-1]} and {k.shape[-1]}")
    if options.packed:
        if k.shape[:2] != v.shape[:2]:
            raise InputError(
                f"k and v must have the same tokens and heads, got k {k.shape[0]} tokens x {k.shape[1]} heads and "
                f"v {v.shape[0]} tokens x {v.shape[1]} heads"
            )
        return Shape(
            batch=_check_starts(q, tensors),
            seqlen_q=_longest("max_seqlen_q", options.max_seqlen_q),
            seqlen_k=_longest("max_seqlen_k", options.max_seqlen_k),
            nheads_q=q.shape[1],
            nheads_kv=k.shape[1],
        )
    if not q.shape[0] == k.shape[0] == v.shape[0]:
        raise InputError(f"q, k and v must have one batch size, got {q.shape[0]}, {k.shape[0]} and {v.shape[0]}")
    if k.shape[1] != v.shape[1] or k.shape[2] != v.shape[2]:
        raise InputError(
            f"k and v must have the same heads and seqlen, got k {k.shape[1]} heads x {k.shape[2]} and "
            f"v {v.shape[1]} heads x {v.shape[2]} (layout {options.layout!r})"
        )
    return Shape(batch=q.shape[0], seqlen_q=q.shape[2], seqlen_k=k.shape[2], nheads_q=q.shape[1], nheads_kv=k.shape[1])


def _check_starts(q: torch.Tensor, tensors: Tensors) -> int:
    """Return the batch size that cu_seqlens say."""
    sizes = []
    for name in ("cu_seqlens_q", "cu_seqlens_k"):
        starts = getattr(tensors, name)
        if not isinstance(starts, torch.Tensor) or starts.dim() != 1 or starts.dtype != torch.int32 or not len(starts):
            got = f"{starts.dtype} {list(starts.shape)}" if isinstance(starts, torch.Tensor) else type(starts).__name__
            raise InputError(f"{name} must be an int32 tensor [batch + 1], 0 first, of running totals; got {got}")
        if starts.device != q.device:
            raise InputError(f"{name} must be on the device of q, {q.device}, got {starts.device}")
        sizes.append(len(starts) - 1)
    if sizes[0] != sizes[1]:
        raise InputError(f"cu_seqlens_q and cu_seqlens_k must cut one batch, got {sizes[0]} and {sizes[1]} sequences")
    return sizes[0]


def _longest(name: str, value: int) -> int:
    if isinstance(value, bool) or not isinstance(value, int) or value < 0:
        raise InputError(f"{name} must be a whole number of at least 0, got {value!r}")
    return value


@functools.lru_cache(maxsize=256)
def score_mod_of(text: str) -> ModFunction | None:
    """Return the score mod that a text is; None for an empty one.

    Raises:
        InputError: if it is none.
    """
    if not text:
        return None
    score_mod = parse_mod(text)
    if score_mod.role != "score":
        raise InputError(f"score_mod must be a function of (score, b, h, q_idx, kv_idx), got {text[:80]}")
    return score_mod


def dtype_of(q: torch.Tensor) -> DType:
    """Return the type of q, and how its products are computed.

    Raises:
        InputError: for a dtype that no kernel takes.
    """
    try:
        dtype = parse_dtype(str(q.dtype))
    except InputError:
        allowed = ", ".join(dict.fromkeys(f"torch.{d.torch_name}" for d in DType))
        raise InputError(f"q, k and v must be one of {allowed}, got {q.dtype}; convert them first") from None
    return DType.TF32 if dtype is DType.FP32 and q.is_cuda and tf32_allowed() else dtype
