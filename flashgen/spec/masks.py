"""Masks as values: which key positions a query row may see.

A mask holds meaning only; how it is computed lives in `templates/mods/mask_<kind>.py.jinja`, named by `kind`.
"""

from __future__ import annotations

import abc
import dataclasses
import typing

from flashgen.errors import InputError

Align = typing.Literal["bottom_right", "top_left"]


@dataclasses.dataclass(frozen=True)
class Mask(abc.ABC):
    """Base of all masks; frozen, hashable, written back by `str` and read by `parse_mask`."""

    kind: typing.ClassVar[str]

    @abc.abstractmethod
    def visible_pairs(self, seqlen_q: int, seqlen_k: int) -> int:
        """Return how many (query, key) pairs one head sees: what the useful flops are counted from."""

    @abc.abstractmethod
    def sees(self, q_idx: int, kv_idx: int, seqlen_q: int, seqlen_k: int) -> bool:
        """Return whether query row `q_idx` sees key `kv_idx`; plain integers, or arrays element by element."""


@dataclasses.dataclass(frozen=True)
class Full(Mask):
    """Every query sees every key."""

    kind: typing.ClassVar[str] = "full"

    def visible_pairs(self, seqlen_q: int, seqlen_k: int) -> int:
        return seqlen_q * seqlen_k

    def sees(self, q_idx: int, kv_idx: int, seqlen_q: int, seqlen_k: int) -> bool:
        return (q_idx >= 0) & (kv_idx >= 0)

    def __str__(self) -> str:
        return "full"


@dataclasses.dataclass(frozen=True)
class Causal(Mask):
    """Query i sees keys j <= i + offset; offset is seqlen_k - seqlen_q for `bottom_right`, 0 for `top_left`."""

    kind: typing.ClassVar[str] = "causal"
    align: Align = "bottom_right"

    def offset(self, seqlen_q: int, seqlen_k: int) -> int:
        """Return how far the diagonal is moved to the right."""
        return seqlen_k - seqlen_q if self.align == "bottom_right" else 0

    def visible_pairs(self, seqlen_q: int, seqlen_k: int) -> int:
        offset = self.offset(seqlen_q, seqlen_k)
        # Row i sees clamp(i + offset + 1, 0, seqlen_k) keys: nothing, then a ramp, then all of them.
        first = min(max(-offset, 0), seqlen_q)
        last = min(max(seqlen_k - offset - 1, first), seqlen_q)
        ramp = sum_range(first + offset + 1, last - first)
        return ramp + (seqlen_q - last) * seqlen_k

    def sees(self, q_idx: int, kv_idx: int, seqlen_q: int, seqlen_k: int) -> bool:
        return kv_idx <= q_idx + self.offset(seqlen_q, seqlen_k)

    def __str__(self) -> str:
        return "causal" if self.align == "bottom_right" else f"causal(align={self.align})"


def sum_range(start: int, count: int) -> int:
    """Return start + (start + 1) + ... over `count` terms."""
    return count * start + count * (count - 1) // 2


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


_BY_TEXT: dict[str, Mask] = {str(m): m for m in (Full(), Causal(), Causal("top_left"))}


def parse_mask(text: str) -> Mask:
    """Return the mask that `str(mask)` wrote as `text`.

    Raises:
        InputError: if no mask is written so.
    """
    try:
        return _BY_TEXT[text]
    except KeyError:
        raise InputError(f"unknown mask {text!r}; known: {', '.join(_BY_TEXT)}") from None
