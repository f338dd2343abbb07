"""How wide head dimensions are cut into tiles, whose sides must be powers of two."""

from __future__ import annotations

import dataclasses

from flashgen.spec import AttentionSpec, DType


def tile_widths(spec: AttentionSpec, most: int) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Return the widths of at most `most` tiles each that head_dim_qk and head_dim_v are cut into; see `head_tiles`."""
    # Products of fp8 sum over 32 columns at least.
    least = 32 if spec.dtype is DType.FP8 else 16
    return head_tiles(spec.head_dim_qk, most, least), head_tiles(spec.head_dim_v, most)


def head_tiles(head_dim: int, most: int, least: int = 16) -> tuple[int, ...]:
    """Return the widths of at most `most` tiles, widest first and none below `least`, that cover a head dimension.

    One tile is the next power of two. Two pay where they are narrower together: 80 = 64 + 16, 96 = 64 + 32,
    160 = 128 + 32, 192 = 128 + 64; not for 112, which 64 + 64 covers no tighter than 128.
    """
    whole = max(least, next_power_of_two(head_dim))
    if most < 2 or whole <= max(least, head_dim):
        return (whole,)
    rest = max(least, next_power_of_two(head_dim - whole // 2))
    return (whole,) if rest >= whole // 2 else (whole // 2, rest)


def next_power_of_two(size: int) -> int:
    """Return the narrowest tile side that holds `size` columns; matrix units take no less than 16."""
    return max(16, 1 << (size - 1).bit_length())


@dataclasses.dataclass(frozen=True, kw_only=True)
class HeadTile:
    """A tile of the head dimension, by the names it has in the source.

    Attributes:
        suffix: end of its variables' names; empty for the first.
        start: its first column.
        head_dim: how many columns are left from there on.
        block: its width.
    """

    suffix: str
    start: str
    head_dim: str
    block: str


def name_tiles(block: str, head_dim: str, widths: tuple[int, ...]) -> tuple[HeadTile, ...]:
    """Return the tiles of a head dimension with these widths."""
    first = HeadTile(suffix="", start="0", head_dim=head_dim, block=block)
    if len(widths) == 1:
        return (first,)
    return (first, HeadTile(suffix="_1", start=block, head_dim=f"{head_dim} - {block}", block=f"{block}_1"))
