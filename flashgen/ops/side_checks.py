"""Whether the tensors besides Q, K and V fit a call; typed errors that name them."""

from __future__ import annotations

import typing

import torch

from flashgen.errors import InputError
from flashgen.ops.call import Tensors
from flashgen.spec import AttentionSpec, Shape
from flashgen.spec.mods import Capture

_FP8 = torch.float8_e4m3fn
_ALIGNMENT_BYTES = 16


def check_side_tensors(q: torch.Tensor, shape: Shape, tensors: Tensors) -> None:
    """Check devices, dtypes and shapes of all but the bias's dtype, cu_seqlens and what functions capture.

    Raises:
        InputError: for the first that does not fit.
    """
    nheads_q, nheads_kv = (shape.nheads_q,), (shape.batch, shape.nheads_kv)
    allowed: dict[str, tuple[torch.dtype, tuple[tuple[int, ...], ...], str]] = {
        "alibi_slopes": (torch.float32, (nheads_q, (shape.batch, shape.nheads_q)), "[nheads_q] or [batch, nheads_q]"),
        "sinks": (torch.float32, (nheads_q,), "[nheads_q]"),
        "rng_state": (torch.int64, ((2,),), "[seed and offset]"),
        "seqused_q": (torch.int32, ((shape.batch,),), "[batch]"),
        "seqused_k": (torch.int32, ((shape.batch,),), "[batch]"),
        **{f"{name}_descale": (torch.float32, (nheads_kv,), "[batch, nheads_kv]") for name in "qkv"},
    }
    for name, (dtype, shapes, meaning) in allowed.items():
        tensor = getattr(tensors, name)
        if tensor is None:
            continue
        check_device(name, tensor, q)
        if tensor.dtype != dtype or tuple(tensor.shape) not in shapes:
            wanted = " or ".join(map(str, map(list, shapes)))
            raise InputError(
                f"{name} must be {dtype} {meaning}, here {wanted}; got {tensor.dtype} {list(tensor.shape)}"
            )
    descales = (tensors.q_descale, tensors.k_descale, tensors.v_descale)
    if any(t is not None for t in descales) and q.dtype != _FP8:
        raise InputError(f"q_descale, k_descale and v_descale belong to {_FP8}, got q of {q.dtype}")
    if any((t is None) != (descales[0] is None) for t in descales):
        raise InputError("q_descale, k_descale and v_descale are given together or not at all")
    if tensors.bias is not None:
        check_device("bias", tensors.bias, q)


def bias_kind(
    q: torch.Tensor, shape: Shape, bias: torch.Tensor
) -> tuple[typing.Literal["input", "fp32", "bool"], bool]:
    """Return what a bias is to the kernel, and whether its rows can be read 16 bytes at a time.

    Raises:
        InputError: for another dtype, or a shape that cannot be broadcast.
    """
    sizes = (shape.batch, shape.nheads_q, shape.seqlen_q, shape.seqlen_k)
    padded = (1,) * (4 - bias.dim()) + tuple(bias.shape)
    if len(padded) != 4 or any(size not in (1, full) for size, full in zip(padded, sizes, strict=True)):
        raise InputError(
            f"bias must broadcast to [batch, nheads_q, seqlen_q, seqlen_k] = {list(sizes)}, got {list(bias.shape)}"
        )
    own = torch.bfloat16 if q.dtype == _FP8 else q.dtype
    if bias.dtype not in (own, torch.float32, torch.bool):
        kinds = " or ".join(dict.fromkeys(map(str, (own, torch.float32, torch.bool))))
        raise InputError(f"bias must be {kinds} (True: seen) beside q of {q.dtype}, got {bias.dtype}")
    rows = 16 if bias.dtype == torch.bool else 8
    aligned = (
        bias.dim() > 0
        and bias.shape[-1] == shape.seqlen_k
        and bias.stride(-1) == 1
        and all(step % rows == 0 for step, size in zip(bias.stride()[:-1], bias.shape[:-1], strict=True) if size > 1)
        and bias.data_ptr() % _ALIGNMENT_BYTES == 0
    )
    return ("input" if bias.dtype == own else "fp32" if bias.dtype == torch.float32 else "bool"), aligned


def check_captures(q: torch.Tensor, spec: AttentionSpec, tensors: tuple[torch.Tensor, ...]) -> None:
    """Check the tensors that the mask's functions and then score_mod capture.

    Raises:
        InputError: if there are too few or too many, or one has another dtype, rank or device than its function says.
    """
    captures = [capture for leaf in spec.mask.leaves for capture in leaf.captures]
    captures += spec.score_mod.captures if spec.score_mod else ()
    if len(captures) != len(tensors):
        names = ", ".join(capture.name for capture in captures) or "none"
        raise InputError(
            f"the mask and score_mod need {len(captures)} tensors ({names}), the call gives {len(tensors)}; masks that "
            "are read from text hold none"
        )
    for capture, tensor in zip(captures, tensors, strict=True):
        _check_capture(capture, tensor, q)


def _check_capture(capture: Capture, tensor: torch.Tensor, q: torch.Tensor) -> None:
    check_device(f"the captured tensor {capture.name!r}", tensor, q)
    if str(tensor.dtype) != f"torch.{capture.dtype}" or tensor.dim() != len(capture.axes):
        raise InputError(
            f"the captured tensor {capture.name!r} must be torch.{capture.dtype} with {len(capture.axes)} dimensions, "
            f"got {tensor.dtype} {list(tensor.shape)}"
        )


def check_device(name: str, tensor: torch.Tensor, q: torch.Tensor) -> None:
    """Refuse a tensor that is not where q is.

    Raises:
        InputError: then.
    """
    if tensor.device != q.device:
        raise InputError(f"{name} must be on the device of q, {q.device}, got {tensor.device}; move it there once")
