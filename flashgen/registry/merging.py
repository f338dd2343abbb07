"""Two sets of entries into one: commutative, associative, idempotent, and no key is ever lost."""

from __future__ import annotations

import typing

from flashgen.registry.entry import EntryKey, RegistryEntry


def merge(old: typing.Iterable[RegistryEntry], new: typing.Iterable[RegistryEntry]) -> tuple[RegistryEntry, ...]:
    """Return the better entry of every `key()` in `old` or `new`, sorted.

    A measured entry beats a predicted one, then the later date wins, then the smaller digest: a total order, so the
    result does not depend on who wrote first.
    """
    best: dict[EntryKey, RegistryEntry] = {}
    for entries in (old, new):
        for entry in entries:
            known = best.get(entry.key())
            best[entry.key()] = entry if known is None else _better(known, entry)
    return tuple(sorted(best.values(), key=_order))


def _better(a: RegistryEntry, b: RegistryEntry) -> RegistryEntry:
    rank_a, rank_b = ((e.origin == "measured", e.provenance.date) for e in (a, b))
    if rank_a == rank_b:
        return min(a, b, key=RegistryEntry.digest)
    return a if rank_a > rank_b else b


def _order(entry: RegistryEntry) -> tuple[object, ...]:
    spec = entry.spec
    dims = (spec.head_dim_qk, spec.head_dim_v)
    meaning = (str(spec.mask), str(spec.score_mod or ""), spec.features)
    return entry.device_name, entry.arch, spec.phase, spec.dtype.value, dims, meaning, entry.range.bounds()
