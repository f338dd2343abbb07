"""What may be tried: every template of a phase, those written for the GPU first, the portable ones among them."""

from __future__ import annotations

import dataclasses

import pytest

from flashgen.codegen import (
    HopperForwardConfig,
    KernelConfig,
    TritonBackwardConfig,
    TritonDecodeConfig,
    TritonForwardConfig,
    templates_of,
)
from flashgen.codegen.constraints import check_config, shape_refusal
from flashgen.errors import NoKernelError
from flashgen.heuristics import default_configs
from flashgen.launch import grid_size
from flashgen.launch.decode_grid import decode_grid
from flashgen.search_space import load_space
from flashgen.spec import Problem, parse_problem
from flashgen.target import known_targets, named_target
from flashgen.tuning import choices
from flashgen.tuning.awkward import awkward_for
from flashgen.tuning.choices import find_choices
from flashgen.tuning.effort import EFFORTS, Effort
from flashgen.tuning.variants import confirmed_variant

H200 = named_target("H200")
CAUSAL = parse_problem("b=4 h=16 s=4096 d=128 causal bf16")
TRITON = TritonForwardConfig(block_m=128, block_n=64, num_warps=4, num_stages=2, loads="descriptor")
PACKED = HopperForwardConfig(
    consumers=2, block_n=64, num_warps=4, num_stages=3, pack="heads", queries="registers", head_group=1000
)
GUESSES = 6


def is_own(config: KernelConfig) -> bool:
    return isinstance(config, HopperForwardConfig)


def guesses(problem: Problem) -> list[KernelConfig]:
    """What would run untuned, and the next best guesses."""
    defaults = [config for config in default_configs(problem, H200) if not check_config(config, problem.spec, H200)]
    pointers = [config for config in defaults if "loads=pointer" in str(config)]
    return [config for config in defaults if config not in pointers][:GUESSES]


@pytest.mark.parametrize("words", ["d=64 full", "d=128 causal", "d=256 causal", "d=192 dv=128 causal", "d=96 document"])
def test_both_templates_are_searched_together(words):
    problem = parse_problem(f"b=4 hq=16 hkv=4 s=4096 {words} bf16")
    found = find_choices(problem, H200, EFFORTS["full"])
    assert len(guesses(problem)) >= 3
    for template in ("triton/forward", "gluon/hopper_forward"):
        assert set(load_space(template).legal(problem.spec, H200).configs) <= set(found.configs)
    assert set(guesses(problem)) <= set(found.configs)
    assert len(set(found.configs)) == len(found.configs)
    assert set(found.seeds) <= set(found.configs)
    assert found.default == found.seeds[0] == default_configs(problem, H200)[0]
    assert is_own(found.default)


@pytest.mark.parametrize("words", ["d=64 full", "d=128 causal", "d=256 causal"])
def test_the_shortest_search_tries_both_and_more_of_those_for_the_gpu(words):
    seeds = find_choices(parse_problem(f"b=4 h=16 s=4096 {words} bf16"), H200, EFFORTS["check"]).seeds
    own = sum(map(is_own, seeds))
    assert len(seeds) == EFFORTS["check"].trials
    assert own >= 5
    assert len(seeds) - own >= 1


@pytest.mark.parametrize("effort", EFFORTS.values(), ids=EFFORTS)
def test_seeds_leave_the_search_its_share_of_the_trials(effort):
    seeds = find_choices(CAUSAL, H200, effort).seeds
    assert len(seeds) <= (effort.trials if effort.seeds_only else effort.trials * 2 // 3)
    assert sum(not is_own(seed) for seed in seeds) >= len(seeds) // 8
    assert len(set(seeds)) == len(seeds)
    # What the shape suggests comes before what is good for any, in the order of each file.
    default, *others = guesses(CAUSAL)
    assert seeds[0] == default
    for template, kind in (("gluon/hopper_forward", True), ("triton/forward", False)):
        in_file = load_space(template).legal(CAUSAL.spec, H200).seeds
        expected = dict.fromkeys((*(guess for guess in others if is_own(guess) is kind), *in_file))
        listed = [seed for seed in seeds[1:] if is_own(seed) is kind]
        assert listed
        assert listed == [seed for seed in expected if seed != default][: len(listed)]


@pytest.mark.parametrize("words", ["d=128 causal", "d=64 causal", "d=256 full", "d=64 sliding_window(127,0)"])
def test_the_shortest_search_tries_what_the_shape_suggests(words):
    problem = parse_problem(f"b=4 hq=32 hkv=8 s=4096 {words} bf16")
    own = list(filter(is_own, guesses(problem)))
    assert len(own) >= 2
    # The portable one takes every fourth place.
    tried = list(filter(is_own, find_choices(problem, H200, EFFORTS["check"]).seeds))
    assert tried[: len(own)] == own[: len(tried)]


@pytest.mark.parametrize(
    "words", ["dropout", "d=256 causal dropout", "causal backward", "deterministic backward", "bias=input backward"]
)
def test_what_is_there_for_other_strides_and_gpus_takes_no_winners_place(words):
    problem = parse_problem(f"b=4 h=16 s=4096 {words if 'd=' in words else f'd=128 {words}'} bf16")
    (template,) = (t for t in templates_of(problem.spec.phase) if t.startswith("triton/"))
    default, *others = guesses(problem)
    in_file = load_space(template).legal(problem.spec, H200).seeds
    assert len(others) <= 2
    assert find_choices(problem, H200, EFFORTS["full"]).seeds == tuple(dict.fromkeys((default, *others, *in_file)))


@pytest.mark.parametrize(("heads", "fits"), [("h=16", False), ("hq=24 hkv=8", False), ("hq=32 hkv=8", True)])
def test_heads_are_packed_where_their_number_divides_the_group(heads, fits):
    problem = parse_problem(f"b=4 {heads} s=4096 d=128 sliding_window(127,0) bf16")
    assert not check_config(PACKED, problem.spec, H200)
    others = [TritonForwardConfig(block_m=64, block_n=32, num_warps=4, num_stages=s) for s in (1, 2, 3, 4)]
    more = [dataclasses.replace(PACKED, head_group=2000 + number) for number in range(4)]
    found = find_choices(problem, H200, EFFORTS["full"], [PACKED, *more, *others])
    packed = [config for config in found.configs if config.heads_of_tile > 1]
    assert bool(packed) is fits
    assert (found.default.heads_of_tile > 1) is fits
    assert all(shape_refusal(config, problem.shape) is None for config in (*found.configs, *found.seeds))
    # Winners that do not fit take no other's place.
    assert found.seeds[:5] == (*((PACKED, *more[:3]) if fits else others), found.default)
    legal = load_space("gluon/hopper_forward").legal(problem.spec, H200).configs
    assert {config for config in legal if config.heads_of_tile == 1} <= set(found.configs)


@pytest.mark.parametrize("target", [t for t in known_targets() if t.arch != "sm_90"], ids=str)
def test_elsewhere_the_portable_ones_are_alone(target):
    assert not any(map(is_own, find_choices(CAUSAL, target, EFFORTS["full"]).configs))


def test_what_no_kernel_for_the_gpu_computes_is_left_to_the_portable_ones():
    problem = parse_problem("b=4 h=16 s=4096 d=128 causal bias=input bf16")
    assert all(
        isinstance(config, TritonForwardConfig) for config in find_choices(problem, H200, EFFORTS["full"]).configs
    )
    gradients = find_choices(parse_problem("b=4 h=16 s=4096 d=128 causal bf16 backward"), H200, EFFORTS["quick"])
    assert all(isinstance(config, TritonBackwardConfig) for config in gradients.configs)


def test_legal_winners_of_like_problems_come_before_all_else():
    illegal = HopperForwardConfig(consumers=2, block_n=128, num_warps=4, num_stages=4)
    assert check_config(illegal, CAUSAL.spec, H200)
    more = [TritonForwardConfig(block_m=64, block_n=32, num_warps=4, num_stages=s) for s in (1, 2, 3, 4)]
    found = find_choices(CAUSAL, H200, EFFORTS["quick"], [illegal, TRITON, TRITON, *more])
    assert found.seeds[:5] == (TRITON, *more[:3], found.default)
    assert illegal not in found.configs


def test_no_legal_default_is_no_kernel(monkeypatch):
    huge = TritonForwardConfig(block_m=4096, block_n=64, num_warps=4, num_stages=2)
    monkeypatch.setattr(choices, "default_configs", lambda *args: (huge,))
    with pytest.raises(NoKernelError, match=r"no config is legal for .*block_m=4096"):
        find_choices(CAUSAL, H200, Effort(trials=4, finalists=2, final_ms=1.0, seconds=1.0))


def test_programs_that_take_tile_after_tile_are_checked_beyond_the_first():
    one = HopperForwardConfig(consumers=1, block_n=64, num_warps=4, num_stages=2)
    two = dataclasses.replace(one, consumers=2, block_n=128)
    packed = dataclasses.replace(two, pack="heads")
    for config in (one, dataclasses.replace(one, programs=4), two, packed):
        for words in ("hq=8 hkv=2", "hq=16 hkv=1", "hq=3 hkv=3"):
            problem = parse_problem(f"b=4 {words} s=4096 d=128 bf16")
            if shape_refusal(config, problem.shape):
                continue
            shapes = awkward_for(problem, config)
            assert all(shape.seqlen_k for shape in shapes)
            assert all(shape_refusal(config, shape) is None for shape in shapes)
            tiles = [grid_size(shape, config) for shape in shapes]
            # On each of 132 multiprocessors.
            assert sum(count > 132 * config.programs for count in tiles) == 1
            assert max(tiles) < 132 * config.programs * 2
    assert len(awkward_for(CAUSAL, TRITON)) == len(shapes) - 1


@pytest.mark.parametrize("programs", [1, 4])
@pytest.mark.parametrize("words", ["hq=32 hkv=8", "hq=8 hkv=1"])
def test_programs_that_decode_several_key_tiles_are_checked(words, programs):
    problem = parse_problem(f"b=1 {words} sq=1 sk=4096 d=128 bf16 decode")
    config = TritonDecodeConfig(block_m=16, block_n=128, num_warps=4, num_stages=3, programs=programs)
    shape = awkward_for(problem, config)[-1]
    grid = decode_grid(shape, config, 0, 132)
    # Lengths are half of the longest on average.
    tiles = shape.batch * shape.seqlen_k / config.block_n / 2
    assert tiles > 2 * grid.programs / grid.lanes
    # More than are looked at together.
    assert shape.batch > 32


@pytest.mark.parametrize(
    ("sizes", "most"),
    [
        ("b=1 hq=32 hkv=8 sq=1 sk=4096", 32),
        ("b=1 hq=32 hkv=8 sq=8 sk=4096", 64),
        ("b=1 hq=128 hkv=1 sq=1 sk=4096", 128),
    ],
)
def test_tiles_of_decoding_are_not_mostly_empty(sizes, most):
    problem = parse_problem(f"{sizes} d=128 bf16 decode")
    found = find_choices(problem, H200, EFFORTS["quick"])
    assert max(config.block_m for config in found.configs) == most
    assert {config.template for config in found.configs} == {"triton/decode"}
    assert found.default == found.seeds[0] == default_configs(problem, H200)[0]
    assert set(found.seeds) <= set(found.configs)
    assert len(set(found.configs)) == len(found.configs)


@pytest.mark.parametrize("template", ["triton/decode", "gluon/hopper_decode"])
def test_kernels_of_decoding_are_confirmed_appending(template):
    problem = parse_problem("b=1 hq=8 hkv=2 sq=64 sk=4096 d=64 causal bf16 decode")
    config = next(config for config in default_configs(problem, H200) if config.template == template)
    spec = confirmed_variant(problem.spec)
    assert (spec.append, spec.rotary, spec.lse, spec.page_size) == (True, "halves", True, 256)
    assert not check_config(config, spec, H200)


def test_hopper_decodes_shapes_that_its_tiles_divide_and_parts_that_end_inside():
    problem = parse_problem("b=1 hq=32 hkv=8 sq=256 sk=4096 d=64 causal bf16 decode")
    hopper = next(config for config in default_configs(problem, H200) if config.template == "gluon/hopper_decode")
    packed = dataclasses.replace(hopper, pack="heads")
    shapes, of_packed = awkward_for(problem, hopper), awkward_for(problem, packed)
    # Tiles of 128 queries of a head, whatever the group, and of two heads groups that two divides.
    assert any(shape.seqlen_q == 129 for shape in shapes)
    assert {shape.group for shape in shapes} >= {1, 3, 4, 6, 8}
    assert {shape.group % 2 for shape in of_packed} == {0}
    assert shapes[-1].seqlen_q > hopper.block_m
    assert shapes[-1].batch > 32


@pytest.mark.parametrize(("queries", "rows"), [(16, set()), (31, {64}), (64, {64, 128}), (256, {64, 128, 192})])
def test_hopper_decodes_where_queries_fill_its_tiles(queries, rows):
    problem = parse_problem(f"b=1 hq=32 hkv=8 sq={queries} sk=131072 d=128 causal bf16 decode")
    found = find_choices(problem, H200, EFFORTS["quick"])
    of_hopper = [config for config in found.configs if config.template == "gluon/hopper_decode"]
    assert {config.block_m for config in of_hopper} == rows
    assert found.default == found.seeds[0] == default_configs(problem, H200)[0]
    assert (found.default in of_hopper) == (queries >= 64)
    # Both kinds are among the first that are tried.
    assert {config.template for config in found.seeds} == {"triton/decode", *(["gluon/hopper_decode"] if rows else [])}
