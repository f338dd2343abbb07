"""Masks as values: which key positions a query row may see; they compose with `&`, `|` and `~`.

`flashgen.masks`: the functions below make them; `causal=` and `window=` of a call are sugar for two of them.
"""

from __future__ import annotations

import dataclasses
import typing
from collections.abc import Callable

from flashgen.errors import InputError
from flashgen.spec.masks.base import Complement, Intersection, Mask, Positions, Union
from flashgen.spec.masks.kinds import (
    UNBOUNDED,
    Align,
    Causal,
    Chunked,
    DilatedWindow,
    Document,
    Full,
    FunctionMask,
    GlobalTokens,
    PrefixLM,
    SlidingWindow,
)
from flashgen.spec.mods import Capture, ModFunction, TensorLike, read_mod

__all__ = [
    "Align",
    "Causal",
    "Chunked",
    "Complement",
    "DilatedWindow",
    "Document",
    "Full",
    "FunctionMask",
    "GlobalTokens",
    "Intersection",
    "Mask",
    "Positions",
    "PrefixLM",
    "SlidingWindow",
    "Union",
    "causal",
    "chunked",
    "dilated_window",
    "document",
    "document_without_ids",
    "full",
    "function",
    "global_tokens",
    "prefix_lm",
    "sliding_window",
]

_MAX_NUMBER = 2**30


def full() -> Mask:
    """Return the mask under which every query sees every key."""
    return Full()


def causal(align: Align = "bottom_right") -> Mask:
    """Return the causal mask; `align` matters when seqlen_q != seqlen_k.

    Args:
        align: `bottom_right`, as FlashAttention does (the last query sees every key), or `top_left`, as PyTorch does.

    Raises:
        InputError: for any other alignment.
    """
    if align not in typing.get_args(Align):
        raise InputError(f"causal align must be 'bottom_right' or 'top_left', got {align!r}")
    return Causal(align)


def sliding_window(left: int, right: int) -> Mask:
    """Return the mask of keys j with i + off - left <= j <= i + off + right, off = seqlen_k - seqlen_q.

    Args:
        left: keys seen before a query's own position; -1 is no bound.
        right: keys seen after it; -1 is no bound, 0 is causal.

    Raises:
        InputError: for anything but whole numbers of at least -1.
    """
    left, right = _number("left", left, UNBOUNDED), _number("right", right, UNBOUNDED)
    if left == UNBOUNDED:
        if right == UNBOUNDED:
            return Full()
        if right == 0:
            return Causal()
    return SlidingWindow(left, right)


def prefix_lm(length: int) -> Mask:
    """Return the mask under which every row sees the first `length` keys and the rest is causal.

    Raises:
        InputError: if `length` is negative or no whole number.
    """
    return PrefixLM(_number("length", length, 0))


def chunked(size: int) -> Mask:
    """Return the mask under which a query sees the keys of its own chunk of `size` positions.

    Raises:
        InputError: if `size` is less than 1 or no whole number.
    """
    return Chunked(_number("size", size, 1))


def dilated_window(left: int, right: int, dilation: int) -> Mask:
    """Return a window of which a query sees its own position and every `dilation`-th key to both sides.

    Args:
        left: how far the window reaches back, in keys.
        right: how far it reaches ahead; 0 is causal.
        dilation: the step between seen keys.

    Raises:
        InputError: for a negative reach or a step below 1.
    """
    return DilatedWindow(_number("left", left, 0), _number("right", right, 0), _number("dilation", dilation, 1))


def global_tokens(count: int) -> Mask:
    """Return the mask of the first `count` positions, which see all and are seen by all; `|` a window for the rest.

    Raises:
        InputError: if `count` is negative or no whole number.
    """
    return GlobalTokens(_number("count", count, 0))


def function(mask_mod: Callable[..., object]) -> Mask:
    """Return the mask that a plain Python function of (b, h, q_idx, kv_idx) says, as FlexAttention's `mask_mod`.

    The function is read from its source, not called: arithmetic, comparisons, `where`, minimum and maximum, exp, log,
    tanh and the like, and captured numbers and tensors (`ids[b, q_idx]`).

    Raises:
        InputError: for anything else, pointing at the line.
    """
    return FunctionMask(read_mod(mask_mod, "mask"))


def document(ids: TensorLike, kv_ids: TensorLike | None = None) -> Mask:
    """Return the mask of packed sequences: a query sees the keys with its own id.

    Args:
        ids: integer ids [seqlen] or [batch, seqlen] of the queries, and of the keys unless `kv_ids` is given.
        kv_ids: ids of the keys, with as many dimensions.

    Raises:
        InputError: for ids with other dimensions.
    """
    keys = ids if kv_ids is None else kv_ids
    if ids.ndim not in (1, 2) or keys.ndim != ids.ndim:
        raise InputError(
            f"document ids must be [seqlen] or [batch, seqlen], queries and keys alike; got {tuple(ids.shape)} and "
            f"{tuple(keys.shape)}"
        )
    return Document(
        dataclasses.replace(_document_function(ids.ndim == 2), tensors=(_as_int32(ids), _as_int32(keys))), ids.ndim == 2
    )


def _document_function(batched: bool) -> ModFunction:
    first = ("b",) if batched else ()
    comma = "b, " if batched else ""
    return ModFunction(
        role="mask",
        source=f"return q_ids[{comma}q_idx] == kv_ids[{comma}kv_idx]",
        captures=(
            Capture(name="q_ids", dtype="int32", axes=(*first, "q_idx")),
            Capture(name="kv_ids", dtype="int32", axes=(*first, "kv_idx")),
        ),
    )


def document_without_ids(batched: bool) -> Mask:
    """Return the document mask as a kernel sees it, for a problem whose ids are made up."""
    return Document(_document_function(batched), batched)


def _number(name: str, value: object, least: int) -> int:
    if isinstance(value, bool) or not isinstance(value, int) or not least <= value <= _MAX_NUMBER:
        raise InputError(f"{name} must be a whole number from {least} to {_MAX_NUMBER}, got {value!r}")
    return value


def _as_int32(ids: TensorLike) -> TensorLike:
    # Torch is not imported here; its tensors bring the conversion along.
    return typing.cast(TensorLike, typing.cast(typing.Any, ids).int())
