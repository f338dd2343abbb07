"""The kinds of masks; how each is computed lives in `templates/mods/mask_<kind>.py.jinja`.

Positions of queries are counted from the end of the keys: query i stands at key i + seqlen_k - seqlen_q (bottom right,
as in FlashAttention).
"""

from __future__ import annotations

import dataclasses
import typing

from flashgen.spec.masks.base import Mask, Positions
from flashgen.spec.mods import Capture, ModFunction, TensorLike

Align = typing.Literal["bottom_right", "top_left"]
UNBOUNDED = -1


@dataclasses.dataclass(frozen=True)
class Full(Mask):
    """Every query sees every key."""

    kind: typing.ClassVar[str] = "full"

    def sees(self, at: Positions) -> typing.Any:
        return (at.q_idx >= 0) & (at.kv_idx >= 0)

    def row_interval(self, q_idx: int, seqlen_q: int, seqlen_k: int) -> tuple[int, int]:
        return 0, seqlen_k

    def visible_pairs(self, seqlen_q: int, seqlen_k: int) -> int:
        return seqlen_q * seqlen_k

    def merged(self, other: Mask) -> Mask:
        return other

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

    def sees(self, at: Positions) -> typing.Any:
        return at.kv_idx <= at.q_idx + self.offset(at.seqlen_q, at.seqlen_k)

    def row_interval(self, q_idx: int, seqlen_q: int, seqlen_k: int) -> tuple[int, int]:
        return 0, q_idx + self.offset(seqlen_q, seqlen_k) + 1

    def visible_pairs(self, seqlen_q: int, seqlen_k: int) -> int:
        offset = self.offset(seqlen_q, seqlen_k)
        # Row i sees clamp(i + offset + 1, 0, seqlen_k) keys: nothing, then a ramp, then all of them.
        first = min(max(-offset, 0), seqlen_q)
        last = min(max(seqlen_k - offset - 1, first), seqlen_q)
        ramp = sum_range(first + offset + 1, last - first)
        return ramp + (seqlen_q - last) * seqlen_k

    def merged(self, other: Mask) -> Mask | None:
        if self.align == "top_left":
            return self if other == self else None
        return SlidingWindow(UNBOUNDED, 0).merged(other)

    def __str__(self) -> str:
        return "causal" if self.align == "bottom_right" else f"causal(align={self.align})"


@dataclasses.dataclass(frozen=True)
class SlidingWindow(Mask):
    """Query i sees the keys from `left` behind its own position to `right` ahead of it; -1 is no bound."""

    kind: typing.ClassVar[str] = "sliding_window"
    left: int
    right: int

    def sees(self, at: Positions) -> typing.Any:
        seen = at.distance == at.distance
        if self.left >= 0:
            seen = seen & (at.distance <= self.left)
        if self.right >= 0:
            seen = seen & (at.distance >= -self.right)
        return seen

    def row_interval(self, q_idx: int, seqlen_q: int, seqlen_k: int) -> tuple[int, int]:
        own = q_idx + seqlen_k - seqlen_q
        lo = own - self.left if self.left >= 0 else 0
        return lo, (own + self.right + 1 if self.right >= 0 else seqlen_k)

    @property
    def parameters(self) -> tuple[tuple[str, int], ...]:
        bounds = (("window_left", self.left), ("window_right", self.right))
        return tuple((name, value) for name, value in bounds if value >= 0)

    def structure(self, *, keep_numbers: bool = False) -> Mask:
        return self if keep_numbers else SlidingWindow(min(self.left, 0), min(self.right, 0))

    def merged(self, other: Mask) -> Mask | None:
        """Two windows are one; bottom-right causal is a window too."""
        if isinstance(other, Causal) and other.align == "bottom_right":
            other = SlidingWindow(UNBOUNDED, 0)
        if not isinstance(other, SlidingWindow):
            return None
        window = SlidingWindow(_tighter(self.left, other.left), _tighter(self.right, other.right))
        return Causal() if window == SlidingWindow(UNBOUNDED, 0) else window

    def __str__(self) -> str:
        return f"sliding_window({self.left},{self.right})"


@dataclasses.dataclass(frozen=True)
class PrefixLM(Mask):
    """Every query sees the first `length` keys; beyond them it is causal (bottom right)."""

    kind: typing.ClassVar[str] = "prefix_lm"
    length: int

    def sees(self, at: Positions) -> typing.Any:
        return (at.kv_idx < self.length) | (at.distance >= 0)

    def row_interval(self, q_idx: int, seqlen_q: int, seqlen_k: int) -> tuple[int, int]:
        return 0, max(self.length, q_idx + seqlen_k - seqlen_q + 1)

    @property
    def parameters(self) -> tuple[tuple[str, int], ...]:
        return (("prefix_length", self.length),)

    def structure(self, *, keep_numbers: bool = False) -> Mask:
        return self if keep_numbers else PrefixLM(0)

    def __str__(self) -> str:
        return f"prefix_lm({self.length})"


@dataclasses.dataclass(frozen=True)
class Chunked(Mask):
    """Positions are cut into chunks of `size`, and a query sees the keys of its own chunk."""

    kind: typing.ClassVar[str] = "chunked"
    size: int

    def sees(self, at: Positions) -> typing.Any:
        own = at.q_idx + (at.seqlen_k - at.seqlen_q)
        return (own // self.size) == (at.kv_idx // self.size)

    def row_interval(self, q_idx: int, seqlen_q: int, seqlen_k: int) -> tuple[int, int]:
        start = (q_idx + seqlen_k - seqlen_q) // self.size * self.size
        return start, start + self.size

    @property
    def parameters(self) -> tuple[tuple[str, int], ...]:
        return (("chunk_size", self.size),)

    def structure(self, *, keep_numbers: bool = False) -> Mask:
        return self if keep_numbers else Chunked(1)

    def __str__(self) -> str:
        return f"chunked({self.size})"


@dataclasses.dataclass(frozen=True)
class DilatedWindow(Mask):
    """Of a window of `left` keys behind to `right` ahead, a query sees every `dilation`-th, counted from its own."""

    kind: typing.ClassVar[str] = "dilated_window"
    left: int
    right: int
    dilation: int

    def sees(self, at: Positions) -> typing.Any:
        near = (at.distance <= self.left) & (at.distance >= -self.right)
        return near & (at.distance % self.dilation == 0)

    def row_interval(self, q_idx: int, seqlen_q: int, seqlen_k: int) -> tuple[int, int]:
        own = q_idx + seqlen_k - seqlen_q
        return own - self.left, own + self.right + 1

    def visible_pairs(self, seqlen_q: int, seqlen_k: int) -> int:
        offset, step = seqlen_k - seqlen_q, self.dilation
        total = 0
        for own in range(offset, offset + seqlen_q):
            lo, hi = max(own - self.left, 0), min(own + self.right, seqlen_k - 1)
            # Keys own - n * dilation inside [lo, hi].
            total += max(0, (own - lo) // step - -(-(own - hi) // step) + 1) if lo <= hi else 0
        return total

    @property
    def parameters(self) -> tuple[tuple[str, int], ...]:
        return (("dilated_left", self.left), ("dilated_right", self.right), ("dilation", self.dilation))

    def structure(self, *, keep_numbers: bool = False) -> Mask:
        return self if keep_numbers else DilatedWindow(0, 0, 1)

    def __str__(self) -> str:
        return f"dilated_window({self.left},{self.right},{self.dilation})"


@dataclasses.dataclass(frozen=True)
class GlobalTokens(Mask):
    """The first `count` positions see every key and are seen by every query; nothing else is."""

    kind: typing.ClassVar[str] = "global_tokens"
    count: int

    def sees(self, at: Positions) -> typing.Any:
        return (at.kv_idx < self.count) | (at.q_idx + (at.seqlen_k - at.seqlen_q) < self.count)

    @property
    def parameters(self) -> tuple[tuple[str, int], ...]:
        return (("global_count", self.count),)

    def structure(self, *, keep_numbers: bool = False) -> Mask:
        return self if keep_numbers else GlobalTokens(0)

    def __str__(self) -> str:
        return f"global_tokens({self.count})"


@dataclasses.dataclass(frozen=True)
class FunctionMask(Mask):
    """A mask written as a function of (b, h, q_idx, kv_idx)."""

    kind: typing.ClassVar[str] = "function"
    function: ModFunction

    def sees(self, at: Positions) -> typing.Any:
        return self.function.evaluate(at.ops, b=at.b, h=at.h, q_idx=at.q_idx, kv_idx=at.kv_idx)

    @property
    def captures(self) -> tuple[Capture, ...]:
        return self.function.captures

    @property
    def tensors(self) -> tuple[TensorLike, ...]:
        return self.function.tensors

    @property
    def uses(self) -> frozenset[str]:
        return self.function.uses & {"b", "h"}

    def with_tensors(self, tensors: typing.Sequence[TensorLike]) -> Mask:
        return dataclasses.replace(self, function=dataclasses.replace(self.function, tensors=tuple(tensors)))

    def structure(self, *, keep_numbers: bool = False) -> Mask:
        return dataclasses.replace(self, function=self.function.without_tensors())

    def __str__(self) -> str:
        return str(self.function)


@dataclasses.dataclass(frozen=True)
class Document(FunctionMask):
    """Query and key must have the same document id; see `document`."""

    batched: bool = False

    def __str__(self) -> str:
        return "document(batched)" if self.batched else "document"


def _tighter(a: int, b: int) -> int:
    return max(a, b) if UNBOUNDED in (a, b) else min(a, b)


def sum_range(start: int, count: int) -> int:
    """Return start + (start + 1) + ... over `count` terms."""
    return count * start + count * (count - 1) // 2
