"""How far a problem is from what an entry was measured on."""

from __future__ import annotations

import math
import typing

from flashgen.registry import Interval, MeasuredRange, RegistryEntry
from flashgen.spec import Shape

Regime = typing.Literal["decode", "short", "long"]
_REGIMES: tuple[Regime, ...] = typing.get_args(Regime)

_DECODE_MAX_SEQLEN_Q = 16
_SHORT_MAX_SEQLEN = 512
_TILE_ROWS = 128  # query rows of one program, as usual


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


def same_occupancy(entry: RegistryEntry, shape: Shape, num_sms: int) -> bool:
    """Return whether an entry was measured where tiles fill the multiprocessors, or do not, as those of `shape`.

    Where there are fewer tiles than multiprocessors, small tiles win that lose wherever there are enough.
    """
    measured = entry.range
    heads = _heads(measured)
    low = _fills(heads.lo, measured.seqlen_q.lo, num_sms)
    high = _fills(heads.hi, measured.seqlen_q.hi, num_sms)
    return low <= _fills(shape.batch * shape.nheads_q, shape.seqlen_q, num_sms) <= high


def shape_distance(entry: RegistryEntry, shape: Shape) -> float:
    """Return the distance in powers of two: 0 inside the measured range; lengths count most, the GQA group least."""
    measured = entry.range
    group = Interval(
        lo=max(1, measured.nheads_q.lo // measured.nheads_kv.hi),
        hi=max(1, measured.nheads_q.hi // measured.nheads_kv.lo),
    )
    return (
        _outside(measured.seqlen_q, shape.seqlen_q)
        + _outside(measured.seqlen_k, shape.seqlen_k)
        + 0.5 * _outside(_heads(measured), shape.batch * shape.nheads_q)
        + 0.25 * _outside(group, shape.group)
    )


def _heads(measured: MeasuredRange) -> Interval:
    return Interval(lo=measured.batch.lo * measured.nheads_q.lo, hi=measured.batch.hi * measured.nheads_q.hi)


def _fills(heads: int, seqlen_q: int, num_sms: int) -> bool:
    return heads * math.ceil(seqlen_q / _TILE_ROWS) >= num_sms


def _outside(interval: Interval, value: int) -> float:
    nearest = min(max(value, interval.lo), interval.hi)
    return abs(math.log2(max(value, 1)) - math.log2(max(nearest, 1)))
