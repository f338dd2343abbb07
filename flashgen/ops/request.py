"""What a caller asks for, in the words of the public functions, and what the operator takes for it."""

from __future__ import annotations

import dataclasses
import functools
import os
import types
import typing
from collections.abc import Callable

import torch

from flashgen.codegen import KernelConfig
from flashgen.errors import InputError
from flashgen.ops.call import PACKED, Options, Tensors, encode_config
from flashgen.ops.reading import read_once
from flashgen.ops.rng import dropout_state
from flashgen.spec import Causal, Full, Mask, causal, full
from flashgen.spec.masks import Complement, FunctionMask, Intersection, SlidingWindow, Union, sliding_window
from flashgen.spec.mods import ModFunction

MaskLike = Mask | ModFunction | Callable[..., typing.Any]
ScoreModLike = ModFunction | Callable[..., typing.Any]

PLAIN_MASKS = (Full, Causal, SlidingWindow)
"""Masks that hold no tensors, for sure."""
_FP8 = torch.float8_e4m3fn
_HALF = (torch.float16, torch.bfloat16)


class Request(typing.NamedTuple):
    """The options of `flashgen.attention` and `flashgen.attention_varlen`, which say what each means.

    A tuple, as one is made in every call: a frozen dataclass takes five times as long.
    """

    causal: bool = False
    window: tuple[int, int] = (-1, -1)
    mask: MaskLike | None = None
    score_mod: ScoreModLike | None = None
    bias: torch.Tensor | None = None
    softmax_scale: float | None = None
    softcap: float = 0.0
    alibi_slopes: torch.Tensor | None = None
    sinks: torch.Tensor | None = None
    dropout_p: float = 0.0
    seed: int | torch.Tensor | None = None
    layout: str = "bhsd"
    return_lse: bool = False
    deterministic: bool = False
    config: KernelConfig | None = None
    registry: str | os.PathLike[str] | None = None
    q_descale: torch.Tensor | float | None = None
    k_descale: torch.Tensor | float | None = None
    v_descale: torch.Tensor | float | None = None
    cu_seqlens_q: torch.Tensor | None = None
    cu_seqlens_k: torch.Tensor | None = None
    max_seqlen_q: int = 0
    max_seqlen_k: int = 0
    seqused_q: torch.Tensor | None = None
    seqused_k: torch.Tensor | None = None


def arguments_of(q: torch.Tensor, k: torch.Tensor, request: Request) -> tuple[Tensors, Options]:
    """Return what the operator takes beside Q, K and V.

    Raises:
        InputError: for a mask, function, window or number that cannot be read; tensors are checked later.
    """
    mask = combine_masks(request.causal, request.window, request.mask)
    score_mod = score_mod_value(request.score_mod)
    captures = (*held("mask", mask, mask.tensors, mask.capture_count), *score_tensors(score_mod))
    check_number("softcap", request.softcap)
    check_number("dropout_p", request.dropout_p)
    packed = request.layout == PACKED
    tensors = Tensors(
        bias=check_tensor("bias", request.bias),
        alibi_slopes=as_float("alibi_slopes", request.alibi_slopes),
        sinks=as_float("sinks", request.sinks),
        rng_state=dropout_state(q.device, request.seed) if request.dropout_p > 0 else None,
        cu_seqlens_q=dense("cu_seqlens_q", request.cu_seqlens_q),
        cu_seqlens_k=dense("cu_seqlens_k", request.cu_seqlens_k),
        seqused_q=dense("seqused_q", request.seqused_q),
        seqused_k=dense("seqused_k", request.seqused_k),
        captures=tuple(tensor.contiguous() for tensor in captures),
        **_descales(q, k, request),
    )
    options = Options(
        max_seqlen_q=request.max_seqlen_q if packed else 0,
        max_seqlen_k=request.max_seqlen_k if packed else 0,
        mask=str(mask),
        score_mod="" if score_mod is None else str(score_mod),
        softmax_scale=request.softmax_scale,
        softcap=float(request.softcap),
        dropout_p=float(request.dropout_p),
        layout=request.layout,
        return_lse=request.return_lse,
        deterministic=bool(request.deterministic),
        config=encode_config(request.config),
        registry="" if request.registry is None else os.fspath(request.registry),
    )
    return tensors, options


def combine_masks(is_causal: bool, window: tuple[int, int], mask: MaskLike | None) -> Mask:
    """Return the mask that `causal=`, `window=` and `mask=` mean together.

    Raises:
        InputError: if `mask` is neither a mask nor a function that can be read, or `window` is not two bounds.
    """
    combined = full() if mask is None else mask_value(mask)
    if torch.compiler.is_compiling():
        combined = _static(combined)
    if is_causal:
        combined = combined & causal()
    if not isinstance(window, (tuple, list)) or len(window) != 2:
        raise InputError(f"window must be two whole numbers (left, right), -1 for no bound; got {window!r}")
    left, right = window
    if torch.compiler.is_compiling():
        left, right = _constant(left), _constant(right)
    return combined if (left, right) == (-1, -1) else combined & sliding_window(left, right)


def plain_mask_text(is_causal: bool, window: tuple[int, int], mask: MaskLike | None) -> str:
    """Return the text of what `combine_masks` makes of one of `PLAIN_MASKS`, or of none; kept for the next call.

    Raises:
        InputError: as `combine_masks`.
    """
    known = type(window) is tuple and len(window) == 2 and type(window[0]) is int and type(window[1]) is int
    if not known or torch.compiler.is_compiling():
        return str(combine_masks(is_causal, window, mask))
    return _plain_mask_text(bool(is_causal), window, mask)


@functools.lru_cache(maxsize=1024)
def _plain_mask_text(is_causal: bool, window: tuple[int, int], mask: MaskLike | None) -> str:
    return str(combine_masks(is_causal, window, mask))


def _static(mask: Mask) -> Mask:
    """Return the mask with numbers that a traced program is guarded on: they go into its text."""
    if isinstance(mask, (Intersection, Union)):
        return dataclasses.replace(mask, operands=tuple([_static(operand) for operand in mask.operands]))
    if isinstance(mask, Complement):
        return Complement(_static(mask.operand))
    names = [field.name for field in dataclasses.fields(mask) if type(getattr(mask, field.name)) is int]
    return dataclasses.replace(mask, **{name: _constant(getattr(mask, name)) for name in names}) if names else mask


def _constant(number: int) -> int:
    # The bound of a range is what torch.compile takes as a constant, whatever the number was to it.
    return range(number).stop if isinstance(number, int) else number


def mask_value(mask: MaskLike) -> Mask:
    """Return a mask, or the mask that a plain Python function says.

    Raises:
        InputError: for anything else.
    """
    if isinstance(mask, Mask):
        return mask
    if isinstance(mask, types.FunctionType):
        _refuse_reading("mask", "masks")
        return FunctionMask(read_once(mask, "mask"))
    if isinstance(mask, ModFunction):
        if mask.role != "mask":
            raise InputError(f"mask must be a function of (b, h, q_idx, kv_idx), got a {mask.role} mod")
        return FunctionMask(mask)
    if isinstance(mask, torch.Tensor):
        raise InputError(
            f"mask must be a value of flashgen.masks or a plain function, got a tensor {list(mask.shape)} of "
            f"{mask.dtype}; pass it as bias= (bool: True is seen)"
        )
    raise InputError(
        f"mask must be a value of flashgen.masks (causal(), document(ids), ...) or a plain Python function of "
        f"(b, h, q_idx, kv_idx), got {type(mask).__name__}"
    )


def score_mod_value(score_mod: ScoreModLike | None) -> ModFunction | None:
    """Return what a score mod says.

    Raises:
        InputError: if it is no function that can be read.
    """
    if score_mod is None:
        return None
    if isinstance(score_mod, types.FunctionType):
        _refuse_reading("score_mod", "score_mods")
        return read_once(score_mod, "score")
    if not isinstance(score_mod, ModFunction) or score_mod.role != "score":
        raise InputError(
            f"score_mod must be a plain Python function of (score, b, h, q_idx, kv_idx), got {type(score_mod).__name__}"
        )
    return score_mod


def autocast(kind: str, *tensors: torch.Tensor) -> tuple[torch.Tensor, ...]:
    """Return float32 and 16-bit tensors in the autocast dtype of a kind of device, as PyTorch's attention does."""
    dtype = torch.get_autocast_dtype(kind)
    casted = (torch.float32, *_HALF)
    return tuple(t.to(dtype) if t.dtype in casted else t for t in tensors)


def autocast_bias(kind: str, bias: torch.Tensor) -> torch.Tensor:
    """Return a 16-bit bias in the autocast dtype; float32 is more exact, and fits any dtype."""
    return bias.to(torch.get_autocast_dtype(kind)) if bias.dtype in _HALF else bias


def _refuse_reading(name: str, module: str) -> None:
    if torch.compiler.is_compiling():
        raise InputError(
            f"{name} is a Python function, which cannot be read inside torch.compile (nobody would notice when "
            f"a value that it uses changes); outside, {name} = flashgen.{module}.function(...) reads it: pass that"
        )


def held(name: str, value: object, tensors: typing.Sequence[typing.Any], count: int) -> tuple[torch.Tensor, ...]:
    """Return the tensors that a mask or a score mod holds.

    Raises:
        InputError: if it was made from text, which holds none.
    """
    if len(tensors) != count:
        raise InputError(
            f"{name} {value} needs {count} tensors and holds {len(tensors)}: make it from tensors, not text"
        )
    return tuple(tensors)


def score_tensors(score_mod: ModFunction | None) -> tuple[torch.Tensor, ...]:
    """Return the tensors that a score mod holds; as `held`."""
    if score_mod is None:
        return ()
    return held("score_mod", score_mod, score_mod.tensors, len(score_mod.captures))


def check_number(name: str, value: object) -> None:
    """Refuse what is no number.

    Raises:
        InputError: for anything but an int or a float.
    """
    if isinstance(value, (bool, torch.Tensor)) or not isinstance(value, (int, float, torch.SymFloat)):
        raise InputError(f"{name} must be a number, got {type(value).__name__}")


def check_tensor(name: str, value: object) -> torch.Tensor | None:
    """Return a tensor or None.

    Raises:
        InputError: for anything else.
    """
    if value is None or isinstance(value, torch.Tensor):
        return value
    raise InputError(f"{name} must be a tensor, got {type(value).__name__}")


def as_float(name: str, value: torch.Tensor | None) -> torch.Tensor | None:
    """Return a tensor of floats as dense float32; other tensors as they are, for a later check; as `check_tensor`."""
    tensor = check_tensor(name, value)
    if tensor is None or not tensor.is_floating_point():
        return tensor
    return tensor.float().contiguous()


def dense(name: str, value: torch.Tensor | None) -> torch.Tensor | None:
    """Return a tensor, contiguous; as `check_tensor`."""
    tensor = check_tensor(name, value)
    return None if tensor is None else tensor.contiguous()


class _Descales(typing.TypedDict):
    q_descale: torch.Tensor | None
    k_descale: torch.Tensor | None
    v_descale: torch.Tensor | None


def _descales(q: torch.Tensor, k: torch.Tensor, request: Request) -> _Descales:
    """Return the factors as float32 [batch, nheads_kv]; those that were not given beside others are 1."""
    given = (request.q_descale, request.k_descale, request.v_descale)
    if all(factor is None for factor in given):
        return {"q_descale": None, "k_descale": None, "v_descale": None}
    if q.dtype != _FP8:
        raise InputError(f"q_descale, k_descale and v_descale belong to {_FP8}, got q of {q.dtype}")
    if request.layout == PACKED:
        batch = 0 if request.cu_seqlens_q is None else request.cu_seqlens_q.shape[0] - 1
        sizes = (batch, k.shape[1] if k.dim() == 3 else 0)
    else:
        sizes = (q.shape[0], k.shape[2 if request.layout == "bshd" else 1]) if k.dim() == 4 else (0, 0)
    q_descale, k_descale, v_descale = (
        descale(f"{name}_descale", factor, sizes, q.device) for name, factor in zip("qkv", given, strict=True)
    )
    return {"q_descale": q_descale, "k_descale": k_descale, "v_descale": v_descale}


def descale(
    name: str, factor: torch.Tensor | float | None, sizes: tuple[int, int], device: torch.device
) -> torch.Tensor:
    """Return a factor as float32 [batch, nheads_kv] = `sizes`; one that is not given is 1.

    Raises:
        InputError: if it does not broadcast to that.
    """
    if factor is None or isinstance(factor, (int, float)):
        return torch.full(sizes, 1.0 if factor is None else float(factor), device=device)
    tensor = check_tensor(name, factor)
    assert tensor is not None
    padded = (1,) * (2 - tensor.dim()) + tuple(tensor.shape)
    fits = len(padded) == 2 and all(size in (1, whole) for size, whole in zip(padded, sizes, strict=True))
    if not tensor.is_floating_point() or not fits:
        raise InputError(
            f"{name} must be a number or a float32 tensor that broadcasts to [batch, nheads_kv] = {list(sizes)}, got "
            f"{tensor.dtype} {list(tensor.shape)}"
        )
    return tensor.float().expand(sizes).contiguous()
