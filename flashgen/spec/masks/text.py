"""Masks from their text, the inverse of `str(mask)`; safe for text that nobody vouches for."""

from __future__ import annotations

import ast
import functools
import typing
from collections.abc import Callable

from flashgen.errors import InputError
from flashgen.spec import masks
from flashgen.spec.mods import parse_mod

_MAX_CHARACTERS = 20_000
_MAX_DEPTH = 64

_MAKERS: dict[str, Callable[..., masks.Mask]] = {
    "full": masks.full,
    "causal": masks.causal,
    "sliding_window": masks.sliding_window,
    "prefix_lm": masks.prefix_lm,
    "chunked": masks.chunked,
    "dilated_window": masks.dilated_window,
    "global_tokens": masks.global_tokens,
}
MASK_NAMES = (*_MAKERS, "document", "mask_mod")


@functools.lru_cache(maxsize=1024)
def parse_mask(text: str) -> masks.Mask:
    """Return the mask that `str(mask)` wrote as `text`, without any tensors.

    Raises:
        InputError: if no mask is written so.
    """
    refusal = InputError(
        f"unknown mask {text[:200]!r}; known: {', '.join(MASK_NAMES)}, joined by &, | and ~, for example "
        "sliding_window(127,0)&chunked(1024)"
    )
    if len(text) > _MAX_CHARACTERS:
        raise refusal
    try:
        tree = ast.parse(text, mode="eval").body
    except (SyntaxError, ValueError, RecursionError, MemoryError):
        raise refusal from None
    mask = _mask(tree, text, 0)
    if mask is None:
        raise refusal
    return mask


def _mask(node: ast.expr, text: str, depth: int) -> masks.Mask | None:
    if depth > _MAX_DEPTH:
        return None
    if isinstance(node, ast.BinOp) and isinstance(node.op, ast.BitAnd | ast.BitOr):
        left, right = _mask(node.left, text, depth + 1), _mask(node.right, text, depth + 1)
        if left is None or right is None:
            return None
        return left & right if isinstance(node.op, ast.BitAnd) else left | right
    if isinstance(node, ast.UnaryOp) and isinstance(node.op, ast.Invert):
        operand = _mask(node.operand, text, depth + 1)
        return None if operand is None else ~operand
    if isinstance(node, ast.Name):
        return _leaf(node.id, [], {})
    if isinstance(node, ast.Call) and isinstance(node.func, ast.Name):
        if node.func.id == "mask_mod":
            function = parse_mod(ast.get_source_segment(text, node) or "")
            return masks.FunctionMask(function) if function.role == "mask" else None
        values = [_value(argument) for argument in node.args]
        return _leaf(node.func.id, values, {str(word.arg): _value(word.value) for word in node.keywords})
    return None


def _leaf(name: str, values: list[typing.Any], words: dict[str, typing.Any]) -> masks.Mask | None:
    if name == "document" and not words and values in ([], ["batched"]):
        return masks.document_without_ids(bool(values))
    if name not in _MAKERS:
        return None
    try:
        return _MAKERS[name](*values, **words)
    except TypeError:
        return None


def _value(node: ast.expr) -> int | str | None:
    if isinstance(node, ast.Name):
        return node.id
    try:
        value = ast.literal_eval(node)
    except (ValueError, TypeError):
        return None
    return value if isinstance(value, int | str) else None
