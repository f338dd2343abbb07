"""Which entry decodes: regimes by the number of queries, neighbours by rows and caches, pages by pointers."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

import pytest

from flashgen.codegen import TritonDecodeConfig
from flashgen.dispatch import select
from flashgen.heuristics import default_configs
from flashgen.heuristics.decode import gathering
from flashgen.registry import Registry, RegistryEntry
from flashgen.spec import Problem, parse_problem
from flashgen.target import Software, named_target

MakeEntry = Callable[..., RegistryEntry]
MakeRegistry = Callable[..., Registry]

H200 = named_target("H200")
CONFIG = TritonDecodeConfig(block_m=16, block_n=128, num_warps=4, num_stages=2, loads="descriptor", programs=3)


def problem(words: str = "", sizes: str = "b=1 hq=32 hkv=8 sq=1 sk=4096") -> Problem:
    return parse_problem(f"{sizes} d=128 {words} decode")


def entry_of(make_entry: MakeEntry, asked: Problem, config: TritonDecodeConfig = CONFIG) -> RegistryEntry:
    shape = asked.shape
    return make_entry(
        shape.seqlen_k,
        seqlen_q=shape.seqlen_q,
        batch=shape.batch,
        nheads_q=shape.nheads_q,
        nheads_kv=shape.nheads_kv,
        spec=asked.spec.tuning_key(),
        config=config,
    )


@pytest.mark.parametrize("words", ["", "lse sinks", "append rotary=halves leftpad batch_idx", "descale"])
def test_features_that_move_no_winner_find_the_entry(
    make_entry: MakeEntry, make_registry: MakeRegistry, software: Software, words: str
) -> None:
    registry = make_registry(entry_of(make_entry, problem()))
    selection = select(problem(words), H200, registry=registry, software=software)
    assert (selection.rung, selection.config) == ("exact", CONFIG)


@pytest.mark.parametrize(("queries", "found"), [(1, 1), (2, 16), (16, 16), (17, None), (64, None), (65, 256)])
def test_regimes_do_not_cross(
    make_entry: MakeEntry, make_registry: MakeRegistry, software: Software, queries: int, found: int | None
) -> None:
    sizes = "b=1 hq=32 hkv=8 sq={} sk=4096"
    registry = make_registry(*(entry_of(make_entry, problem("causal", sizes.format(n))) for n in (1, 16, 256)))
    selection = select(problem("causal", sizes.format(queries)), H200, registry=registry, software=software)
    assert (selection.entry and selection.entry.range.seqlen_q.lo) == found
    if found is None:
        assert "another regime (one query, few queries, many queries, chunk)" in selection.refused[0].reason


def test_caches_count_before_their_lengths(
    make_entry: MakeEntry, make_registry: MakeRegistry, software: Software
) -> None:
    sizes = ("b=1 hq=32 hkv=8 sq=1 sk=4096", "b=16 hq=32 hkv=8 sq=1 sk=32768")
    registry = make_registry(*(entry_of(make_entry, problem(sizes=text)) for text in sizes))

    def batch_for(text: str) -> int:
        selection = select(problem(sizes=text), H200, registry=registry, software=software)
        assert selection.rung == "nearest"
        assert selection.entry is not None
        return selection.entry.range.batch.lo

    # A capacity says little of what is used of it.
    assert batch_for("b=1 hq=32 hkv=8 sq=1 sk=32768") == 1
    assert batch_for("b=12 hq=32 hkv=8 sq=1 sk=4096") == 16
    # One of eight shards of a batch of 16 is as much as two sequences of the whole.
    assert batch_for("b=16 hq=4 hkv=1 sq=1 sk=4096") == 1


def test_a_neighbour_carries_over_where_the_default_is_one_kernel(
    make_entry: MakeEntry, make_registry: MakeRegistry, software: Software
) -> None:
    registry = make_registry(entry_of(make_entry, problem()))
    near = select(problem(sizes="b=2 hq=32 hkv=8 sq=1 sk=100000"), H200, registry=registry, software=software)
    assert (near.config, near.change) == (CONFIG, "")
    # More rows than its tile has.
    asked = problem(sizes="b=1 hq=32 hkv=1 sq=1 sk=4096")
    wide = select(asked, H200, registry=registry, software=software)
    assert wide.config == default_configs(asked, H200)[0] != CONFIG
    assert "another kernel than the default" in wide.change


@pytest.mark.parametrize("words", ["page=16", "page=192"])
def test_pages_of_less_than_a_tile_are_read_by_pointers(
    make_entry: MakeEntry, make_registry: MakeRegistry, software: Software, words: str
) -> None:
    registry = make_registry(entry_of(make_entry, problem()))
    selection = select(problem(words), H200, registry=registry, software=software)
    assert selection.config == gathering(dataclasses.replace(CONFIG, loads="pointer"))
    assert selection.rung == "exact"
    assert "cannot read these caches" in selection.change
    whole = select(problem("page=256"), H200, registry=registry, software=software)
    assert (whole.config, whole.change) == (CONFIG, "")


def test_strides_that_descriptors_do_not_take_are_read_by_pointers(
    make_entry: MakeEntry, make_registry: MakeRegistry, software: Software
) -> None:
    registry = make_registry(entry_of(make_entry, problem()))
    selection = select(
        problem(),
        H200,
        registry=registry,
        software=software,
        usable=lambda config: "strides" if getattr(config, "loads", "") == "descriptor" else None,
    )
    assert selection.config == dataclasses.replace(CONFIG, loads="pointer")


@pytest.mark.parametrize(("measured", "asked"), [("", "fp8_kv"), ("fp8_kv", ""), ("", "shared_kv"), ("shared_kv", "")])
def test_other_caches_are_another_kernel(
    make_entry: MakeEntry, make_registry: MakeRegistry, software: Software, measured: str, asked: str
) -> None:
    config = dataclasses.replace(CONFIG, loads="pointer")
    registry = make_registry(entry_of(make_entry, problem(measured), config))
    selection = select(problem(asked), H200, registry=registry, software=software)
    assert (selection.rung, selection.entry) == ("heuristic", None)


def test_a_causal_mask_is_near_enough_to_none(
    make_entry: MakeEntry, make_registry: MakeRegistry, software: Software
) -> None:
    registry = make_registry(entry_of(make_entry, problem()))
    selection = select(problem("causal"), H200, registry=registry, software=software)
    assert (selection.rung, selection.config) == ("other features", CONFIG)


def test_a_forward_entry_says_nothing_of_decoding(
    make_entry: MakeEntry, make_registry: MakeRegistry, software: Software
) -> None:
    registry = make_registry(make_entry(4096, seqlen_q=1, batch=1, spec=parse_problem("h=1 s=1 d=128").spec))
    assert select(problem(), H200, registry=registry, software=software).entry is None
