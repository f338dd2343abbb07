"""Tensor descriptors of packed sequences: copies that end at a sequence's own last row."""

from __future__ import annotations

RAGGED = 2**30
"""Rows that a ragged descriptor claims to have; `flashgen.primitives.hopper` has the same number for kernels."""

_SPAN = 2**34
# Indices are 32-bit and signed; of the two outermost dimensions no bound is wanted.
_UNBOUNDED = 0x7FFF0000


def ragged_view(size: tuple[int, ...], stride: tuple[int, ...]) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Return sizes and strides, in elements, of the 5-dimensional view that a ragged descriptor is made of.

    A bulk copy leaves out what lies past the sizes of its descriptor, but packed sequences follow each other inside one
    tensor. So the view has RAGGED = 2**30 rows, and a kernel that wants row `row` of a sequence of `length` rows from
    `start` asks for index (RAGGED, start + length, head, RAGGED - length + row, column): in bounds just where
    row < length. With strides (2**34 - r, r, h, r, 1), for a tensor of row stride r, that is the element

        2**30 * (2**34 - r) + (start + length) * r + head * h + (2**30 - length + row) * r + column
        = 2**64 + (start + row) * r + head * h + column,

    and the hardware adds byte addresses modulo 2**64: the first term vanishes, whatever whole number of bytes an
    element takes. The trick is that of Triton's `triton.tools.ragged_tma`.

    Args:
        size: of the packed tensor seen as [1, heads, tokens, head_dim].
        stride: of the same.
    """
    _, heads, _, head_dim = size
    _, head_stride, row_stride, _ = stride
    return (
        (_UNBOUNDED, _UNBOUNDED, heads, RAGGED, head_dim),
        (_SPAN - row_stride, row_stride, head_stride, row_stride, 1),
    )


def ragged_refusal(name: str, size: tuple[int, ...], stride: tuple[int, ...]) -> str | None:
    """Return why the packed tensor `name`, seen as [1, heads, tokens, head_dim], has no ragged view, or None."""
    if size[2] > RAGGED:
        return f"descriptors of packed sequences reach {RAGGED} tokens, {name} has {size[2]}"
    if stride[2] >= _SPAN:
        return f"descriptors of packed sequences need a row stride below {_SPAN}, {name} has {stride[2]}"
    return None
