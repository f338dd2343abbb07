"""How far a problem is from what an entry was measured on."""

from __future__ import annotations

import math
import typing

from flashgen.registry import Interval, RegistryEntry
from flashgen.spec import Shape

Regime = typing.Literal["decode", "short", "long"]
_REGIMES: tuple[Regime, ...] = typing.get_args(Regime)

_DECODE_MAX_SEQLEN_Q = 16
_SHORT_MAX_SEQLEN = 512


def regime(seqlen_q: int, seqlen_k: int) -> Regime:
    """Return the regime of a length: kernels that win in one say nothing about another, so none crosses over."""
    if seqlen_q <= _DECODE_MAX_SEQLEN_Q:
        return "decode"
    return "short" if max(seqlen_q, seqlen_k) <= _SHORT_MAX_SEQLEN else "long"


def same_regime(entry: RegistryEntry, shape: Shape) -> bool:
    """Return whether an entry was measured in the regime of `shape`, or on both sides of it."""
    measured = entry.range
    ends = ((measured.seqlen_q.lo, measured.seqlen_k.lo), (measured.seqlen_q.hi, measured.seqlen_k.hi))
    low, high = (_REGIMES.index(regime(*lengths)) for lengths in ends)
    return low <= _REGIMES.index(regime(shape.seqlen_q, shape.seqlen_k)) <= high


def shape_distance(entry: RegistryEntry, shape: Shape) -> float:
    """Return the distance in powers of two: 0 inside the measured range; lengths count most, the GQA group least."""
    measured = entry.range
    heads = Interval(lo=measured.batch.lo * measured.nheads_q.lo, hi=measured.batch.hi * measured.nheads_q.hi)
    group = Interval(
        lo=max(1, measured.nheads_q.lo // measured.nheads_kv.hi),
        hi=max(1, measured.nheads_q.hi // measured.nheads_kv.lo),
    )
    return (
        _outside(measured.seqlen_q, shape.seqlen_q)
        + _outside(measured.seqlen_k, shape.seqlen_k)
        + 0.5 * _outside(heads, shape.batch * shape.nheads_q)
        + 0.25 * _outside(group, shape.group)
    )


def _outside(interval: Interval, value: int) -> float:
    nearest = min(max(value, interval.lo), interval.hi)
    return abs(math.log2(max(value, 1)) - math.log2(max(nearest, 1)))
