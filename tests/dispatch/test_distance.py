"""How far a shape is from what was measured."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from flashgen.dispatch.distance import regime, shape_distance
from flashgen.registry import RegistryEntry
from flashgen.spec import Shape

MakeEntry = Callable[..., RegistryEntry]


def shape(batch: int = 4, sq: int = 4096, sk: int = 4096, hq: int = 32, hkv: int = 8) -> Shape:
    return Shape(batch=batch, seqlen_q=sq, seqlen_k=sk, nheads_q=hq, nheads_kv=hkv)


def test_nothing_inside(make_entry: MakeEntry) -> None:
    entry = make_entry((1024, 4096), batch=(1, 8))
    for batch, seqlen in ((1, 1024), (8, 4096), (3, 3000)):
        assert shape_distance(entry, shape(batch, seqlen, seqlen)) == 0


@pytest.mark.parametrize(
    ("asked", "distance"),
    [
        (shape(sq=8192), 1.0),
        (shape(sq=2048), 1.0),
        (shape(sk=16384), 2.0),
        (shape(sq=8192, sk=8192), 2.0),
        # Twice the heads in flight, by batch or by heads.
        (shape(batch=8), 0.5),
        (shape(hq=64, hkv=16), 0.5),
        # Groups of 8 for 4, the same heads.
        (shape(hkv=4), 0.25),
        (shape(sq=0), 12.0),
    ],
)
def test_powers_of_two(make_entry: MakeEntry, asked: Shape, distance: float) -> None:
    assert shape_distance(make_entry(), asked) == pytest.approx(distance)


def test_farther_is_never_nearer(make_entry: MakeEntry) -> None:
    entry = make_entry()
    lengths = [4096 * 2**i for i in range(6)]
    distances = [shape_distance(entry, shape(sq=n, sk=n)) for n in lengths]
    assert distances == sorted(distances)
    assert len(set(distances)) == len(distances)


@pytest.mark.parametrize(
    ("seqlen_q", "seqlen_k", "name"),
    [
        (0, 0, "decode"),
        (1, 100_000, "decode"),
        (16, 16, "decode"),
        (17, 17, "short"),
        (512, 512, "short"),
        (17, 513, "long"),
        (513, 1, "long"),
        (4096, 4096, "long"),
    ],
)
def test_regimes(seqlen_q: int, seqlen_k: int, name: str) -> None:
    assert regime(seqlen_q, seqlen_k) == name
