"""What a caller of `attention_with_kvcache` asks for, and what the operator takes for it."""

from __future__ import annotations

import os
import typing

import torch

from flashgen.codegen import KernelConfig
from flashgen.errors import InputError, UnsupportedError
from flashgen.ops.call import encode_config, heads_first
from flashgen.ops.checks import check_layout
from flashgen.ops.decode_call import DecodeOptions, DecodeTensors
from flashgen.ops.request import (
    MaskLike,
    ScoreModLike,
    as_float,
    check_number,
    check_tensor,
    combine_masks,
    dense,
    descale,
    held,
    score_mod_value,
    score_tensors,
)

NumSplits = int | typing.Literal["auto"]
Factor = torch.Tensor | float | None
_NUM_TENSORS = len(DecodeTensors._fields) - 1


class DecodeRequest(typing.NamedTuple):
    """The options of `flashgen.attention_with_kvcache`, which says what each means.

    What may be tensors comes first, in the order of `DecodeTensors`.
    """

    k: torch.Tensor | None = None
    v: torch.Tensor | None = None
    cache_seqlens: torch.Tensor | int | None = None
    page_table: torch.Tensor | None = None
    cache_batch_idx: torch.Tensor | None = None
    cache_leftpad: torch.Tensor | None = None
    rotary_cos: torch.Tensor | None = None
    rotary_sin: torch.Tensor | None = None
    alibi_slopes: torch.Tensor | None = None
    sinks: torch.Tensor | None = None
    k_descale: Factor = None
    v_descale: Factor = None
    rotary_interleaved: bool = False
    causal: bool = False
    window: tuple[int, int] = (-1, -1)
    mask: MaskLike | None = None
    score_mod: ScoreModLike | None = None
    softmax_scale: float | None = None
    softcap: float = 0.0
    num_splits: NumSplits = "auto"
    layout: str = "bshd"
    return_lse: bool = False
    check: bool = False
    config: KernelConfig | None = None
    registry: str | os.PathLike[str] | None = None

    @property
    def given(self) -> tuple[typing.Any, ...]:
        """What may be tensors."""
        return self[:_NUM_TENSORS]

    @property
    def asked(self) -> tuple[typing.Any, ...]:
        """All the rest."""
        return self[_NUM_TENSORS:]


def decode_arguments(
    q: torch.Tensor, k_cache: torch.Tensor, v_cache: torch.Tensor, request: DecodeRequest
) -> tuple[DecodeTensors, DecodeOptions]:
    """Return what the operator takes beside Q and the caches.

    Raises:
        InputError: for a mask, function, window or number that cannot be read, and for what is no tensor; tensors are
            checked later.
    """
    for name, tensor in (("q", q), ("k_cache", k_cache), ("v_cache", v_cache)):
        if not isinstance(tensor, torch.Tensor) or tensor.dim() != 4:
            got = f"shape {tuple(tensor.shape)}" if isinstance(tensor, torch.Tensor) else type(tensor).__name__
            raise InputError(f"{name} must be a tensor with 4 dimensions, got {got}")
    check_layout(request.layout)
    mask = combine_masks(request.causal, request.window, request.mask)
    score_mod = score_mod_value(request.score_mod)
    captures = (*held("mask", mask, mask.tensors, mask.capture_count), *score_tensors(score_mod))
    check_number("softcap", request.softcap)
    sizes = q.shape[0], heads_first(k_cache, request.layout).shape[1]
    factors = (request.k_descale, request.v_descale)
    k_descale, v_descale = None, None
    if any(factor is not None for factor in factors):
        k_descale, v_descale = (
            descale(f"{name}_descale", factor, sizes, q.device) for name, factor in zip("kv", factors, strict=True)
        )
    tensors = DecodeTensors(
        k_new=check_tensor("k", request.k),
        v_new=check_tensor("v", request.v),
        cache_seqlens=_lengths(q, k_cache, request),
        page_table=_rows("page_table", request.page_table),
        cache_batch_idx=dense("cache_batch_idx", request.cache_batch_idx),
        cache_leftpad=dense("cache_leftpad", request.cache_leftpad),
        rotary_cos=dense("rotary_cos", request.rotary_cos),
        rotary_sin=dense("rotary_sin", request.rotary_sin),
        alibi_slopes=as_float("alibi_slopes", request.alibi_slopes),
        sinks=as_float("sinks", request.sinks),
        k_descale=k_descale,
        v_descale=v_descale,
        captures=tuple(tensor.contiguous() for tensor in captures),
    )
    options = DecodeOptions(
        num_splits=_splits(request.num_splits),
        mask=str(mask),
        score_mod="" if score_mod is None else str(score_mod),
        softmax_scale=request.softmax_scale,
        softcap=float(request.softcap),
        rotary_interleaved=bool(request.rotary_interleaved),
        layout=request.layout,
        return_lse=bool(request.return_lse),
        check=bool(request.check),
        config=encode_config(request.config),
        registry="" if request.registry is None else os.fspath(request.registry),
    )
    return tensors, options


def refuse_gradients(q: torch.Tensor, k_cache: torch.Tensor, v_cache: torch.Tensor, request: DecodeRequest) -> None:
    """Refuse to leave out a gradient that is asked for.

    Raises:
        UnsupportedError: if gradients are on and a tensor requires one.
    """
    if not torch.is_grad_enabled():
        return
    named: dict[str, object] = {"q": q, "k_cache": k_cache, "v_cache": v_cache, **request._asdict()}
    asked = [name for name, t in named.items() if isinstance(t, torch.Tensor) and t.requires_grad]
    if asked:
        raise UnsupportedError(
            f"{', '.join(asked)} requires a gradient, and attention over a cache has none: call under torch.no_grad() "
            "or torch.inference_mode(), or take flashgen.attention for training"
        )


def _rows(name: str, value: torch.Tensor | None) -> torch.Tensor | None:
    """Return a table whose rows are contiguous, however far they lie apart."""
    tensor = check_tensor(name, value)
    return tensor if tensor is None or tensor.dim() == 0 or tensor.stride(-1) == 1 else tensor.contiguous()


def _lengths(q: torch.Tensor, k_cache: torch.Tensor, request: DecodeRequest) -> torch.Tensor:
    given = request.cache_seqlens
    if isinstance(given, torch.Tensor):
        return given.contiguous()
    rows = heads_first(k_cache, request.layout).shape[2]
    if isinstance(request.page_table, torch.Tensor) and request.page_table.dim() == 2:
        rows *= request.page_table.shape[1]
    if given is None:
        if request.k is not None or request.v is not None:
            raise InputError("k and v are appended behind the keys in use: give cache_seqlens, which says where")
        given = rows
    if isinstance(given, bool) or not isinstance(given, (int, torch.SymInt)):
        raise InputError(f"cache_seqlens must be an int32 tensor [batch] or a whole number, got {given!r}")
    if not 0 <= given <= rows:
        raise InputError(f"cache_seqlens must be from 0 to {rows}, what the cache of a sequence holds; got {given}")
    return torch.full((q.shape[0],), given, dtype=torch.int32, device=q.device)


def _splits(given: NumSplits) -> int:
    if given == "auto":
        return 0
    if isinstance(given, bool) or not isinstance(given, (int, torch.SymInt)):
        raise InputError(f"num_splits must be 'auto' or a whole number, got {given!r}")
    return given
