"""How far a problem is from what an entry was measured on."""

from __future__ import annotations

import math

from flashgen.registry import Interval, MeasuredRange, RegistryEntry
from flashgen.spec import Phase, Shape

# Kernels that win in one say nothing about another, so none crosses over.
_REGIMES = ("few queries", "short", "long")
_DECODE_REGIMES = ("one query", "few queries", "many queries", "chunk")

_MAX_FEW_QUERIES, _MAX_MANY_QUERIES = 16, 64
_SHORT_MAX_SEQLEN = 512
_TILE_ROWS = 128  # query rows of one program, as usual


def regimes(phase: Phase) -> tuple[str, ...]:
    """Return the regimes of a phase, from short lengths to long ones."""
    return _DECODE_REGIMES if phase == "decode" else _REGIMES


def regime(phase: Phase, seqlen_q: int, seqlen_k: int) -> str:
    """Return the regime of a length; of decoding keys say nothing, which are divided among programs on the device."""
    if phase == "decode":
        return _DECODE_REGIMES[sum(seqlen_q > most for most in (1, _MAX_FEW_QUERIES, _MAX_MANY_QUERIES))]
    if seqlen_q <= _MAX_FEW_QUERIES:
        return "few queries"
    return "short" if max(seqlen_q, seqlen_k) <= _SHORT_MAX_SEQLEN else "long"


def same_regime(entry: RegistryEntry, shape: Shape) -> bool:
    """Return whether an entry was measured in the regime of `shape`, or on both sides of it."""
    measured, phase = entry.range, entry.spec.phase
    low, asked, high = (
        regimes(phase).index(regime(phase, *lengths))
        for lengths in (
            (measured.seqlen_q.lo, measured.seqlen_k.lo),
            (shape.seqlen_q, shape.seqlen_k),
            (measured.seqlen_q.hi, measured.seqlen_k.hi),
        )
    )
    return low <= asked <= high


def same_occupancy(entry: RegistryEntry, shape: Shape, num_sms: int) -> bool:
    """Return whether an entry was measured where tiles fill the multiprocessors, or do not, as those of `shape`.

    Where there are fewer tiles than multiprocessors, small tiles win that lose wherever there are enough. Decoding
    divides the keys of as few tiles as there are among them all.
    """
    if entry.spec.phase == "decode":
        return True
    measured = entry.range
    heads = _heads(measured)
    low = _fills(heads.lo, measured.seqlen_q.lo, num_sms)
    high = _fills(heads.hi, measured.seqlen_q.hi, num_sms)
    return low <= _fills(shape.batch * shape.nheads_q, shape.seqlen_q, num_sms) <= high


def shape_distance(entry: RegistryEntry, shape: Shape) -> float:
    """Return the distance in powers of two: 0 inside the measured range; lengths count most, the GQA group least.

    Of decoding, keys count least: what a call says of them is the capacity of its cache.
    """
    measured = entry.range
    if entry.spec.phase == "decode":
        return _decode_distance(measured, shape)
    return (
        _outside(measured.seqlen_q, shape.seqlen_q)
        + _outside(measured.seqlen_k, shape.seqlen_k)
        + 0.5 * _outside(_heads(measured), shape.batch * shape.nheads_q)
        + 0.25 * _outside(_group(measured), shape.group)
    )


def _decode_distance(measured: MeasuredRange, shape: Shape) -> float:
    group = _group(measured)
    rows = Interval(lo=measured.seqlen_q.lo * group.lo, hi=measured.seqlen_q.hi * group.hi)
    caches = Interval(lo=measured.batch.lo * measured.nheads_kv.lo, hi=measured.batch.hi * measured.nheads_kv.hi)
    return (
        _outside(rows, shape.seqlen_q * shape.group)
        + 0.5 * _outside(caches, shape.batch * shape.nheads_kv)
        + 0.25 * _outside(measured.seqlen_k, shape.seqlen_k)
    )


def _group(measured: MeasuredRange) -> Interval:
    return Interval(
        lo=max(1, measured.nheads_q.lo // measured.nheads_kv.hi),
        hi=max(1, measured.nheads_q.hi // measured.nheads_kv.lo),
    )


def _heads(measured: MeasuredRange) -> Interval:
    return Interval(lo=measured.batch.lo * measured.nheads_q.lo, hi=measured.batch.hi * measured.nheads_q.hi)


def _fills(heads: int, seqlen_q: int, num_sms: int) -> bool:
    return heads * math.ceil(seqlen_q / _TILE_ROWS) >= num_sms


def _outside(interval: Interval, value: int) -> float:
    nearest = min(max(value, interval.lo), interval.hi)
    return abs(math.log2(max(value, 1)) - math.log2(max(nearest, 1)))
