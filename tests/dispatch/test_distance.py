"""How far a shape is from what was measured."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from flashgen.codegen import TritonDecodeConfig
from flashgen.dispatch.distance import regime, same_occupancy, same_regime, shape_distance
from flashgen.registry import RegistryEntry
from flashgen.spec import Shape, parse_problem

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
        (0, 0, "few queries"),
        (1, 100_000, "few queries"),
        (16, 16, "few queries"),
        (17, 17, "short"),
        (512, 512, "short"),
        (17, 513, "long"),
        (513, 1, "long"),
        (4096, 4096, "long"),
    ],
)
def test_regimes(seqlen_q: int, seqlen_k: int, name: str) -> None:
    assert regime("forward", seqlen_q, seqlen_k) == name


DECODE = parse_problem("h=1 s=1 d=128 decode").spec
DECODE_CONFIG = TritonDecodeConfig(block_m=16, block_n=64, num_warps=4, num_stages=3)


def decode_entry(make_entry: MakeEntry, seqlen_k: int = 4096, seqlen_q: int | tuple[int, int] = 1) -> RegistryEntry:
    return make_entry(seqlen_k, seqlen_q=seqlen_q, spec=DECODE, config=DECODE_CONFIG, digest="0" * 16)


@pytest.mark.parametrize(
    ("seqlen_q", "name"),
    [
        (0, "one query"),
        (1, "one query"),
        (2, "few queries"),
        (16, "few queries"),
        (17, "many queries"),
        (64, "many queries"),
        (65, "chunk"),
        (4096, "chunk"),
    ],
)
def test_regimes_of_decoding_are_those_of_the_queries(seqlen_q: int, name: str) -> None:
    assert [regime("decode", seqlen_q, seqlen_k) for seqlen_k in (1, 512, 131072)] == [name] * 3


def test_an_entry_of_decoding_is_of_its_own_regime_or_of_several(make_entry: MakeEntry) -> None:
    one, several = decode_entry(make_entry), decode_entry(make_entry, seqlen_q=(1, 16))
    assert [same_regime(one, shape(sq=n, sk=131072)) for n in (1, 2, 16, 17, 65)] == [True, *[False] * 4]
    assert [same_regime(several, shape(sq=n)) for n in (1, 2, 16, 17, 65)] == [*[True] * 3, False, False]


def test_decoding_fills_the_gpu_whatever_the_sizes(make_entry: MakeEntry) -> None:
    assert same_occupancy(decode_entry(make_entry), shape(batch=64, sq=1), 132)


@pytest.mark.parametrize(
    ("asked", "distance"),
    [
        (shape(sq=1), 0.0),
        # What a call says of the keys is the capacity of its cache.
        (shape(sq=1, sk=65536), 1.0),
        (shape(sq=2), 1.0),
        # As many rows: twice the queries of half the group.
        (shape(sq=2, hq=16), 0.0),
        (shape(sq=1, batch=1), 1.0),
        # A shard of the heads is a smaller batch.
        (shape(sq=1, hq=16, hkv=4), 0.5),
        (shape(sq=1, batch=8, hq=16, hkv=4), 0.0),
    ],
)
def test_distance_of_decoding(make_entry: MakeEntry, asked: Shape, distance: float) -> None:
    assert shape_distance(decode_entry(make_entry), asked) == pytest.approx(distance)
