"""What every mask is, and how masks are composed."""

from __future__ import annotations

import abc
import dataclasses
import functools
import typing

from flashgen.spec.mods import Capture, TensorLike


@dataclasses.dataclass(frozen=True, kw_only=True)
class Positions:
    """Where a mask is asked: plain integers, or tensors that broadcast against each other.

    Attributes:
        b, h: batch entry and query head.
        q_idx, kv_idx: query row and key.
        seqlen_q, seqlen_k: lengths of this batch entry.
        ops: the torch module where a mask holds a function or tensors, else None.
    """

    q_idx: typing.Any
    kv_idx: typing.Any
    seqlen_q: int
    seqlen_k: int
    b: typing.Any = 0
    h: typing.Any = 0
    ops: typing.Any = None

    @property
    def distance(self) -> typing.Any:
        """How far the key lies behind the query's own position; negative ahead of it."""
        return self.q_idx + (self.seqlen_k - self.seqlen_q) - self.kv_idx


@dataclasses.dataclass(frozen=True)
class Mask(abc.ABC):
    """Base of all masks; frozen, hashable, written back by `str` and read by `parse_mask`.

    Tensors that a mask captures take no part in equality: they are data of a call, not of a kernel.
    """

    kind: typing.ClassVar[str]

    @abc.abstractmethod
    def sees(self, at: Positions) -> typing.Any:
        """Return whether the query sees the key, as a bool or element by element."""

    def row_interval(self, q_idx: int, seqlen_q: int, seqlen_k: int) -> tuple[int, int] | None:
        """Return the keys [lo, hi) between the first and the last that a row sees; None if only data can tell.

        The ends may lie outside [0, seqlen_k). Where it is not None for one row it is not for any.
        """
        return None

    @property
    def by_formula(self) -> bool:
        """Whether the keys that a tile of queries sees are bounded by a formula; else a table of tiles is needed."""
        return self.row_interval(0, 1, 1) is not None

    def visible_pairs(self, seqlen_q: int, seqlen_k: int) -> int:
        """Return how many (query, key) pairs one head sees: what the useful flops are counted from.

        An upper bound, every pair, where only data can tell.
        """
        return _count_pairs(self.structure(keep_numbers=True), seqlen_q, seqlen_k)

    @property
    def parameters(self) -> tuple[tuple[str, int], ...]:
        """The numbers of the mask by name: run-time arguments of a kernel, so that one serves all their values."""
        return ()

    @property
    def captures(self) -> tuple[Capture, ...]:
        """The tensors that a kernel needs for this mask, in the order of `tensors`."""
        return ()

    @property
    def tensors(self) -> tuple[TensorLike, ...]:
        """The captured tensors of this value; empty where it was read from text."""
        return ()

    @property
    def leaves(self) -> tuple[Mask, ...]:
        """The masks that this one is composed of, itself if it is not."""
        return (self,)

    @property
    def capture_count(self) -> int:
        """How many tensors the mask needs."""
        return sum(len(leaf.captures) for leaf in self.leaves)

    def with_tensors(self, tensors: typing.Sequence[TensorLike]) -> Mask:
        """Return the mask holding these tensors, one for each capture of its leaves in order."""
        return self

    @property
    def uses(self) -> frozenset[str]:
        """Which of `b` and `h` the mask depends on."""
        return frozenset().union(*(leaf.uses for leaf in self.leaves)) if self.leaves != (self,) else frozenset()

    def structure(self, *, keep_numbers: bool = False) -> Mask:
        """Return the mask without its tensors and, unless kept, with neutral numbers: equal ones share their source."""
        return self

    def merged(self, other: Mask) -> Mask | None:
        """Return the intersection with another mask as one leaf, or None where there is none."""
        return None

    def __and__(self, other: Mask) -> Mask:
        if not isinstance(other, Mask):
            return NotImplemented
        return self.merged(other) or other.merged(self) or _compose(Intersection, self, other)

    def __or__(self, other: Mask) -> Mask:
        if not isinstance(other, Mask):
            return NotImplemented
        return _compose(Union, self, other)

    def __invert__(self) -> Mask:
        return self.operand if isinstance(self, Complement) else Complement(self)


@functools.lru_cache(maxsize=512)
def _count_pairs(mask: Mask, seqlen_q: int, seqlen_k: int) -> int:
    total = 0
    for row in range(seqlen_q):
        interval = mask.row_interval(row, seqlen_q, seqlen_k)
        if interval is None:
            return seqlen_q * seqlen_k
        total += max(0, min(interval[1], seqlen_k) - max(interval[0], 0))
    return total


@dataclasses.dataclass(frozen=True)
class _Composed(Mask):
    """Masks joined by one operator; flat, without repeats, in the order of their text."""

    operator: typing.ClassVar[str]
    operands: tuple[Mask, ...]

    @property
    def tensors(self) -> tuple[TensorLike, ...]:
        return tuple(tensor for operand in self.operands for tensor in operand.tensors)

    @property
    def leaves(self) -> tuple[Mask, ...]:
        return tuple(leaf for operand in self.operands for leaf in operand.leaves)

    def with_tensors(self, tensors: typing.Sequence[TensorLike]) -> Mask:
        rest = iter(tensors)
        parts = (part.with_tensors([next(rest) for _ in range(part.capture_count)]) for part in self.operands)
        return type(self)(tuple(parts))

    def structure(self, *, keep_numbers: bool = False) -> Mask:
        return type(self)(tuple(operand.structure(keep_numbers=keep_numbers) for operand in self.operands))

    def __str__(self) -> str:
        return self.operator.join([_in_brackets(part) for part in self.operands])


@dataclasses.dataclass(frozen=True)
class Intersection(_Composed):
    """A key is seen where every operand sees it."""

    kind: typing.ClassVar[str] = "intersection"
    operator: typing.ClassVar[str] = "&"

    def sees(self, at: Positions) -> typing.Any:
        return functools.reduce(lambda a, b: a & b, (operand.sees(at) for operand in self.operands))

    def row_interval(self, q_idx: int, seqlen_q: int, seqlen_k: int) -> tuple[int, int] | None:
        intervals = [operand.row_interval(q_idx, seqlen_q, seqlen_k) for operand in self.operands]
        known = [interval for interval in intervals if interval is not None]
        if len(known) < len(intervals):
            return None
        return max(lo for lo, _ in known), min(hi for _, hi in known)


@dataclasses.dataclass(frozen=True)
class Union(_Composed):
    """A key is seen where any operand sees it."""

    kind: typing.ClassVar[str] = "union"
    operator: typing.ClassVar[str] = "|"

    def sees(self, at: Positions) -> typing.Any:
        return functools.reduce(lambda a, b: a | b, (operand.sees(at) for operand in self.operands))


@dataclasses.dataclass(frozen=True)
class Complement(Mask):
    """A key is seen where the operand does not see it."""

    kind: typing.ClassVar[str] = "complement"
    operand: Mask

    def sees(self, at: Positions) -> typing.Any:
        seen = self.operand.sees(at)
        return not seen if isinstance(seen, bool) else ~seen

    @property
    def tensors(self) -> tuple[TensorLike, ...]:
        return self.operand.tensors

    @property
    def leaves(self) -> tuple[Mask, ...]:
        return self.operand.leaves

    def with_tensors(self, tensors: typing.Sequence[TensorLike]) -> Mask:
        return Complement(self.operand.with_tensors(tensors))

    def structure(self, *, keep_numbers: bool = False) -> Mask:
        return Complement(self.operand.structure(keep_numbers=keep_numbers))

    def __str__(self) -> str:
        return "~" + _in_brackets(self.operand)


def _in_brackets(mask: Mask) -> str:
    # No f-string: torch.compile traces this, and formats none of them.
    return "(" + str(mask) + ")" if isinstance(mask, _Composed) else str(mask)


def _compose(operator: type[_Composed], first: Mask, second: Mask) -> Mask:
    parts = [part for mask in (first, second) for part in (mask.operands if isinstance(mask, operator) else (mask,))]
    unique: list[Mask] = []
    for part in sorted(parts, key=str):
        # Tensors take no part in equality: masks that hold any are never merged.
        if part not in unique or part.capture_count:
            unique.append(part)
    return unique[0] if len(unique) == 1 else operator(tuple(unique))
