"""What entries say for problems that they were not measured on."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

import pytest

from flashgen.codegen import HopperForwardConfig, TritonForwardConfig
from flashgen.dispatch import select
from flashgen.dispatch.carrying import carried
from flashgen.heuristics import default_configs
from flashgen.registry import Registry, RegistryEntry
from flashgen.spec import Problem, parse_problem
from flashgen.target import Software, named_target

MakeEntry = Callable[..., RegistryEntry]
MakeRegistry = Callable[..., Registry]

H200 = named_target("H200")
TUNED = TritonForwardConfig(block_m=128, block_n=32, num_warps=8, num_stages=1)


def at(seqlen: int, words: str = "causal", batch: int = 4, heads: str = "hq=32 hkv=8") -> Problem:
    return parse_problem(f"b={batch} {heads} s={seqlen} d=128 {words} bf16")


def default(problem: Problem) -> HopperForwardConfig:
    config = default_configs(problem, H200)[0]
    assert isinstance(config, HopperForwardConfig)
    return config


def test_where_an_entry_was_measured_it_says_its_own_config(make_entry: MakeEntry) -> None:
    entry = make_entry((2048, 8192), config=TUNED)
    for problem in (at(2048), at(4096), at(8192, "causal lse")):
        assert (carried(entry, problem, H200).config, carried(entry, problem, H200).change) == (TUNED, "")


def test_where_the_default_won_the_default_carries_over(make_entry: MakeEntry) -> None:
    entry = make_entry(8192, config=default(at(8192)))
    found = carried(entry, at(2048), H200)
    assert found.config == default(at(2048)) != entry.config
    assert "as the default for its own won there" in found.change
    # The same numbers: nothing to tell.
    near = carried(make_entry(4096, config=default(at(4096))), at(4000), H200)
    assert (near.config, near.change) == (default(at(4096)), "")


def test_where_another_won_it_carries_over_as_far_as_the_default_is_the_same_kernel(make_entry: MakeEntry) -> None:
    entry = make_entry(4096, config=TUNED)
    assert default(at(2048)).kernel() == default(at(4096)).kernel() != default(at(1024)).kernel()
    assert carried(entry, at(2048), H200).config == TUNED
    found = carried(entry, at(1024), H200)
    assert found.config == default(at(1024))
    assert "another kernel than the default that was beaten there" in found.change
    # GPUs whose default is one for all lengths.
    a100 = named_target("A100")
    assert carried(entry, at(1024), a100).config == TUNED


def test_between_lengths_that_disagree_it_is_the_default(make_entry: MakeEntry) -> None:
    near, right = make_entry(4096, config=TUNED), make_entry(16384, config=default(at(16384)))
    wrong = make_entry(16384, config=dataclasses.replace(TUNED, num_stages=2))
    assert carried(near, at(6000), H200).config == TUNED
    assert carried(near, at(6000), H200, wrong).config == TUNED
    found = carried(near, at(6000), H200, right)
    assert found.config == default(at(6000))
    assert "whose kernel won at [b=4 hq=32 hkv=8 sq=16384 sk=16384], on the other side" in found.change


def test_the_ladder_asks_both_sides(make_entry: MakeEntry, make_registry: MakeRegistry, software: Software) -> None:
    near, far = make_entry(4096, config=TUNED), make_entry(16384, config=default(at(16384)))
    registry = make_registry(near, far)
    for seqlen, config in ((6000, default(at(6000))), (3000, TUNED), (4096, TUNED)):
        selection = select(at(seqlen), H200, registry=registry, software=software)
        assert (selection.entry, selection.config) == (near, config)
    assert "adapted   the default for this problem" in str(select(at(6000), H200, registry=registry, software=software))
    # Heads alone are no length: there is no other side.
    assert select(at(4096, batch=2), H200, registry=registry, software=software).config == TUNED


def test_numbers_of_the_launch_follow_the_sizes(make_entry: MakeEntry) -> None:
    kernel = dataclasses.replace(default(at(2048)), queries="registers", head_group=3, tail_heads=5)
    entry = make_entry(2048, config=kernel)
    near = carried(entry, at(4096), H200)
    assert (near.config, near.change) == (kernel, "")
    far = default(at(16384))
    found = carried(entry, at(16384), H200)
    assert found.config == dataclasses.replace(kernel, head_group=far.head_group, tail_heads=far.tail_heads)
    assert found.change.startswith(f"head_group {far.head_group} for 3, tail_heads {far.tail_heads} for 5")
    # More query heads on the keys of one: fewer keys for each.
    few = carried(entry, at(2048, heads="hq=32 hkv=1"), H200)
    assert few.config.kernel() == kernel.kernel()
    assert few.change


def test_other_masks_have_other_numbers_of_the_launch(make_entry: MakeEntry) -> None:
    small = [at(1024, words, batch=1, heads="hq=16") for words in ("causal", "full")]
    there, here = map(default, small)
    assert there.kernel() == here.kernel() or there.block_n != here.block_n
    kernel = dataclasses.replace(there, consumers=2, head_group=9)
    entry = make_entry(1024, batch=1, nheads_q=16, nheads_kv=16, spec=small[0].spec, config=kernel)
    found = carried(entry, small[1], H200)
    assert found.config == dataclasses.replace(kernel, head_group=here.head_group, tail_heads=here.tail_heads)


def test_a_default_that_cannot_run_gives_way_to_the_entry_itself(
    make_entry: MakeEntry, make_registry: MakeRegistry, software: Software
) -> None:
    registry = make_registry(make_entry(4096, config=TUNED))
    selection = select(
        at(1024),
        H200,
        registry=registry,
        software=software,
        usable=lambda config: "strides" if isinstance(config, HopperForwardConfig) else None,
    )
    assert (selection.rung, selection.config, selection.change) == ("nearest", TUNED, "")


@pytest.mark.parametrize(("batch", "heads", "rung"), [(1, "hq=16", "heuristic"), (2, "hq=16", "nearest")])
def test_grids_that_fill_the_gpu_say_nothing_of_those_that_do_not(
    make_entry: MakeEntry, make_registry: MakeRegistry, software: Software, batch: int, heads: str, rung: str
) -> None:
    # 16 heads of 1024 rows are 128 tiles, for 132 multiprocessors.
    registry = make_registry(make_entry(2048, nheads_q=16, nheads_kv=16, config=TUNED))
    selection = select(at(1024, batch=batch, heads=heads), H200, registry=registry, software=software)
    assert selection.rung == rung
    if rung == "heuristic":
        assert "fills 132 multiprocessors otherwise" in selection.refused[0].reason
