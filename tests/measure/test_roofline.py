"""The floor's arithmetic, and that the ranking model orders known configs as an H200 does."""

from __future__ import annotations

import dataclasses
import math
import typing

import pytest

from flashgen.codegen import config_from_dict
from flashgen.codegen.config import TritonBackwardConfig, TritonForwardConfig
from flashgen.codegen.hopper_config import HopperForwardConfig
from flashgen.codegen.hopper_constraints import shared_memory_lower_bound
from flashgen.codegen.kernel_config import KernelConfig, Loads
from flashgen.errors import ConfigError, InputError
from flashgen.measure import floor_us, predict_us, tbps, tflops
from flashgen.spec import parse_problem
from flashgen.target import named_target

H200 = named_target("NVIDIA H200")
PREFILL = {
    (d, mask): parse_problem(f"b=4 h={2048 // d} s=4096 d={d} {mask} bf16")
    for d in (64, 128)
    for mask in ("full", "causal")
}

# (block_m, block_n, num_warps, num_stages): registers and shared memory of a plain Triton forward kernel compiled for
# sm_90 by Triton 3.9; 128x64 with 8 warps at d=128 with maxnreg=128.
COMPILED = {
    64: {
        (128, 64, 4, 2): (187, 49184),
        (128, 64, 4, 3): (187, 65592),
        (128, 64, 8, 2): (108, 49184),
        (64, 64, 4, 3): (106, 57400),
        (128, 128, 8, 2): (156, 81952),
        (128, 32, 4, 2): (140, 32800),
        (32, 32, 4, 2): (72, 14360),
        (16, 64, 4, 2): (58, 20504),
    },
    128: {
        (128, 64, 4, 2): (250, 98336),
        (128, 64, 8, 2): (128, 98336),
        (64, 64, 4, 3): (138, 114744),
        (128, 32, 4, 2): (208, 65568),
        (64, 128, 4, 2): (188, 147488),
        (32, 32, 4, 2): (92, 26648),
        (16, 64, 4, 2): (71, 38936),
    },
}
WINNERS = {64: [(128, 64, 8, 2), (64, 64, 4, 3)], 128: [(128, 64, 8, 2), (128, 64, 4, 2)]}


def make_config(tile: tuple[int, int, int, int], loads: Loads = "descriptor") -> TritonForwardConfig:
    block_m, block_n, num_warps, num_stages = tile
    return TritonForwardConfig(
        block_m=block_m, block_n=block_n, num_warps=num_warps, num_stages=num_stages, loads=loads
    )


def predicted(d: int, mask: str, tile: tuple[int, int, int, int], loads: Loads = "descriptor") -> float:
    registers, smem_bytes = COMPILED[d][tile]
    return predict_us(PREFILL[d, mask], H200, make_config(tile, loads), registers, smem_bytes).us


@pytest.mark.parametrize("d", [64, 128])
@pytest.mark.parametrize("mask", ["full", "causal"])
def test_configs_that_win_on_an_h200_rank_high(d: int, mask: str) -> None:
    ranking = sorted(COMPILED[d], key=lambda tile: predicted(d, mask, tile))
    assert set(WINNERS[d]) <= set(ranking[: len(ranking) // 2])
    assert ranking[-2:] == [(32, 32, 4, 2), (16, 64, 4, 2)]


@pytest.mark.parametrize("d", [64, 128])
def test_bulk_copies_rank_above_pointers_where_there_are_any(d: int) -> None:
    for tile in COMPILED[d]:
        assert predicted(d, "full", tile) < predicted(d, "full", tile, "pointer")
    a100 = named_target("sm_80")
    tile = (64, 64, 4, 3)
    on_a100 = [
        predict_us(PREFILL[d, "full"], a100, make_config(tile, loads), *COMPILED[d][tile]).us
        for loads in ("pointer", "descriptor")
    ]
    assert on_a100[0] == on_a100[1]


@pytest.mark.parametrize(
    "text", ["b=4 h=16 s=4096 d=128", "b=1 h=16 s=16384 d=128 causal", "b=16 hq=32 hkv=8 sq=1 sk=4096 d=128"]
)
def test_a_prediction_is_never_below_the_floor(text: str) -> None:
    problem = parse_problem(text)
    for tile, (registers, smem_bytes) in COMPILED[128].items():
        floor = floor_us(problem, H200)
        assert predict_us(problem, H200, make_config(tile), registers, smem_bytes).us > floor.us


def test_occupancy_and_its_limiter() -> None:
    problem, config = PREFILL[128, "full"], make_config((128, 64, 4, 2))
    by_registers = predict_us(problem, H200, config, 250, 40_000)
    assert (by_registers.occupancy_blocks, by_registers.limiter) == (2, "registers")
    by_smem = predict_us(problem, H200, config, 128, 131_128)
    assert (by_smem.occupancy_blocks, by_smem.limiter) == (1, "shared memory")
    by_threads = predict_us(problem, H200, make_config((128, 64, 32, 2)), 16, 1_000)
    assert (by_threads.occupancy_blocks, by_threads.limiter) == (2, "threads")
    assert by_registers.waves == math.ceil(4 * 16 * 32 / (132 * 2))


def test_what_does_not_fit_ranks_last() -> None:
    problem, config = PREFILL[128, "full"], make_config((128, 64, 4, 2))
    prediction = predict_us(problem, H200, config, 128, H200.smem_bytes + 1)
    assert prediction.us == math.inf
    assert (prediction.occupancy_blocks, prediction.limiter) == (0, "shared memory")


def test_more_work_never_takes_less_time() -> None:
    config = make_config((128, 64, 8, 2))
    for mask in ("full", "causal"):
        times = [
            predict_us(parse_problem(f"b=2 h=16 s={s} d=128 {mask}"), H200, config, 128, 98336).us
            for s in (128, 512, 1000, 1024, 2048, 4096, 16384)
        ]
        assert times == sorted(times)
        assert times[-1] > 4 * times[-2]
    causal, full = (predict_us(PREFILL[128, mask], H200, config, 128, 98336).us for mask in ("causal", "full"))
    assert causal < full


def test_less_to_see_never_takes_longer() -> None:
    config = make_config((128, 64, 8, 2))
    masks = ("sliding_window(127,0)", "sliding_window(1023,0)", "causal", "full")
    problems = [parse_problem(f"b=1 h=16 s=16384 d=128 {mask}") for mask in masks]
    times = [predict_us(problem, H200, config, 128, 98336).us for problem in problems]
    assert times == sorted(times)
    assert times[0] < times[2] / 8
    floors = [floor_us(problem, H200).us for problem in problems]
    assert all(floor < time for floor, time in zip(floors, times, strict=True))


def test_a_tile_walks_over_the_keys_of_its_window() -> None:
    # 128 rows under a window of 128 keys see 255 of them: two or three tiles of 128 keys each, whatever the length.
    config = make_config((128, 128, 8, 2))
    times = [
        predict_us(parse_problem(f"b=1 h=64 s={s} d=64 sliding_window(127,0)"), H200, config, 156, 81952).us
        for s in (8192, 16384, 32768)
    ]
    assert (times[2] - times[1]) == pytest.approx(2 * (times[1] - times[0]), rel=0.1)


def test_where_only_data_can_tell_every_key_is_counted() -> None:
    config = make_config((128, 64, 8, 2))
    documents, plain = (parse_problem(f"b=2 h=16 s=2048 d=128 {mask}") for mask in ("document&causal", "full"))
    assert floor_us(documents, H200) == floor_us(plain, H200)
    assert predict_us(documents, H200, config, 128, 98336) == predict_us(plain, H200, config, 128, 98336)


def test_packed_sequences_take_less_than_as_many_of_the_longest() -> None:
    config = make_config((128, 64, 8, 2))
    for mask in ("full", "causal"):
        text = f"b=8 h=16 s=4096 d=128 {mask}"
        dense, packed = (parse_problem(f"{text} {word}") for word in ("bf16", "varlen"))
        dense_us, packed_us = (predict_us(problem, H200, config, 128, 98336).us for problem in (dense, packed))
        assert dense_us / 3 < packed_us < dense_us
        assert floor_us(packed, H200).us < packed_us


def test_features_never_make_a_tile_cheaper() -> None:
    config = make_config((128, 64, 8, 2))
    plain = predict_us(PREFILL[128, "causal"], H200, config, 128, 98336).us
    for words in ("softcap", "alibi", "dropout", "bias=input", "score_mod('return score * 0.5')"):
        assert predict_us(parse_problem(f"{PREFILL[128, 'causal']} {words}"), H200, config, 128, 98336).us > plain


def test_matrix_rates() -> None:
    us = {
        dtype: floor_us(parse_problem(f"b=4 h=16 s=4096 d=128 {dtype}"), H200).compute_us
        for dtype in ("fp16", "bf16", "fp32", "tf32", "fp8")
    }
    assert us["fp16"] == us["bf16"] == 2 * us["fp8"] == us["tf32"] / 2 == us["fp32"] / 2
    ranked = [
        predict_us(parse_problem(f"b=4 h=16 s=4096 d=128 {dtype}"), H200, make_config((128, 64, 8, 1)), 128, 90000).us
        for dtype in ("fp8", "bf16", "tf32", "fp32")
    ]
    assert ranked == sorted(ranked)
    assert len(set(ranked)) == 4


def test_one_block_too_many_costs_a_wave() -> None:
    config = make_config((128, 64, 8, 2))
    whole, over = (predict_us(parse_problem(f"b=1 h={h} s=128 d=128"), H200, config, 128, 98336) for h in (264, 265))
    assert (whole.waves, over.waves) == (1, 2)
    assert over.us > whole.us


def test_more_registers_or_shared_memory_never_help() -> None:
    config = make_config((128, 64, 4, 2))
    problem = PREFILL[128, "full"]
    by_registers = [predict_us(problem, H200, config, r, 49152).us for r in (96, 128, 168, 250)]
    by_smem = [predict_us(problem, H200, config, 128, s).us for s in (49152, 98336, 131128, 229376)]
    assert by_registers == sorted(by_registers)
    assert by_smem == sorted(by_smem)


BACKWARD = parse_problem("b=4 h=16 s=4096 d=128 causal bf16 backward")


def backward_config(tile: tuple[int, int], warps: int = 8, dq: str = "kernel") -> TritonBackwardConfig:
    own = {"block_m2": tile[1], "block_n2": tile[0], "num_warps2": warps, "num_stages2": 2} if dq == "kernel" else {}
    numbers = {"block_m1": tile[0], "block_n1": tile[1], "num_warps": warps, "num_stages": 2, **own}
    config = config_from_dict({"template": TritonBackwardConfig.template, "dq": dq, **numbers})
    assert isinstance(config, TritonBackwardConfig)
    return config


def predicted_backward(config: TritonBackwardConfig, registers: int = 200, smem_bytes: int = 98336) -> float:
    return predict_us(BACKWARD, H200, config, registers, smem_bytes).us


def test_backward_configs_of_small_tiles_rank_low() -> None:
    whole = predicted_backward(backward_config((64, 128)))
    assert floor_us(BACKWARD, H200).us < whole
    assert whole < predicted_backward(backward_config((32, 64), 4)) < predicted_backward(backward_config((16, 16), 4))


def test_adding_to_dq_in_order_takes_longer_than_in_any() -> None:
    atomic, ordered = (predicted_backward(backward_config((64, 128), dq=dq)) for dq in ("atomic", "ordered"))
    assert atomic < ordered


# Measured on an H200, b=4, s=4096, 2048 columns of heads: the best config with a kernel for dQ, and the best that adds,
# each as (block_m1, block_n1, num_warps, num_stages, registers, shared memory), and their us.
MEASURED_BACKWARD = {
    (64, "full"): ((128, 64, 4, 2, 251, 83968), 3337, (64, 64, 4, 3, 191, 91192), 4031),
    (64, "causal"): ((128, 64, 4, 2, 250, 83968), 1840, (64, 64, 4, 3, 255, 91192), 2343),
    (128, "full"): ((64, 64, 4, 2, 255, 164864), 3155, (64, 128, 8, 2, 255, 180768), 4210),
    (128, "causal"): ((64, 64, 4, 2, 255, 164864), 1816, (64, 128, 8, 2, 255, 180768), 2233),
    (256, "full"): ((64, 64, 8, 2, 248, 197152), 5094, (32, 64, 8, 3, 255, 201728), 7116),
    (256, "causal"): ((64, 64, 8, 2, 255, 197632), 2699, (64, 64, 8, 1, 255, 132096), 3917),
}
DQ_TILES = {64: (64, 64, 4, 3), 128: (128, 64, 8, 3), 256: (64, 32, 4, 3)}


@pytest.mark.parametrize(("head_dim", "mask"), MEASURED_BACKWARD)
def test_what_adds_to_dq_ranks_behind_its_own_kernel_as_measured(head_dim: int, mask: str) -> None:
    problem = parse_problem(f"b=4 h={2048 // head_dim} s=4096 d={head_dim} {mask} bf16 backward")
    own, own_us, adding, adding_us = MEASURED_BACKWARD[head_dim, mask]
    names = ("block_m1", "block_n1", "num_warps", "num_stages")
    times = []
    for tile, dq in ((own, "kernel"), (adding, "atomic")):
        numbers: dict[str, int | str] = dict(zip(names, tile[:4], strict=True))
        if dq == "kernel":
            own_names = ("block_m2", "block_n2", "num_warps2", "num_stages2")
            numbers |= dict(zip(own_names, DQ_TILES[head_dim], strict=True))
        config = config_from_dict(
            {"template": TritonBackwardConfig.template, "dq": dq, "loads": "descriptor", **numbers}
        )
        times.append(predict_us(problem, H200, config, tile[4], tile[5]).us)
    assert own_us < adding_us
    assert times[0] < times[1]


def test_a_backward_config_that_does_not_fit_ranks_last() -> None:
    prediction = predict_us(BACKWARD, H200, backward_config((64, 128)), 128, H200.smem_bytes + 1)
    assert (prediction.us, prediction.occupancy_blocks, prediction.limiter) == (math.inf, 0, "shared memory")


def test_more_backward_work_never_takes_less_time() -> None:
    config = backward_config((64, 128))
    for mask in ("full", "causal"):
        problems = [parse_problem(f"b=2 h=16 s={s} d=128 {mask} backward") for s in (0, 128, 1000, 1024, 4096, 16384)]
        times = [predict_us(problem, H200, config, 200, 98336).us for problem in problems]
        assert times == sorted(times)
        assert times[-1] > 10 * times[-2]
    plain = parse_problem("b=2 h=16 s=4096 d=128 backward")
    dropped = parse_problem("b=2 h=16 s=4096 d=128 dropout backward")
    assert predict_us(plain, H200, config, 200, 98336).us < predict_us(dropped, H200, config, 200, 98336).us


# Registers that threads start with and shared memory of kernels for Hopper, compiled by Triton 3.6.
HOPPER = {
    "two": (HopperForwardConfig(consumers=2, block_n=128, num_warps=4, num_stages=2, queries="registers"), 168),
    "three": (HopperForwardConfig(consumers=3, block_n=128, num_warps=4, num_stages=2), 128),
    "narrow": (HopperForwardConfig(consumers=2, block_n=64, num_warps=4, num_stages=2, queries="registers"), 168),
    "one": (HopperForwardConfig(consumers=1, block_n=64, num_warps=4, num_stages=2), 240),
}


def predicted_hopper(text: str, name: str, **changes: typing.Any) -> float:
    config, registers = HOPPER[name]
    config = dataclasses.replace(config, **changes)
    problem = parse_problem(f"{text} bf16")
    smem_bytes = shared_memory_lower_bound(config, problem.spec) + 100
    return predict_us(problem, H200, config, registers, smem_bytes).us


# What won on an H200 at 2048 columns of heads, and by how much against the best of plain Triton.
MEASURED_HOPPER = {
    (64, "full"): ("three", {"turns": "alternate", "head_group": 4}, 496 / 406),
    (64, "causal"): ("three", {"head_group": 8, "tail_heads": 32}, 450 / 365),
    (128, "full"): ("two", {"turns": "alternate"}, 642 / 504),
    (128, "causal"): ("two", {"diagonal": "half", "head_group": 4, "tail_heads": 16}, 592 / 429),
}


@pytest.mark.parametrize(("d", "mask"), MEASURED_HOPPER)
def test_kernels_for_hopper_rank_above_plain_triton_about_as_measured(d: int, mask: str) -> None:
    name, changes, measured = MEASURED_HOPPER[d, mask]
    us = predicted_hopper(f"b=4 h={2048 // d} s=4096 d={d} {mask}", name, **changes)
    ratio = min(predicted(d, mask, tile) for tile in COMPILED[d]) / us
    assert 0.85 * measured < ratio < 1.1 * measured
    assert us > floor_us(PREFILL[d, mask], H200).us


@pytest.mark.parametrize(("d", "mask"), MEASURED_HOPPER)
def test_winners_on_an_h200_rank_first_among_kernels_for_hopper(d: int, mask: str) -> None:
    text = f"b=4 h={2048 // d} s=4096 d={d} {mask}"
    winner, changes, _ = MEASURED_HOPPER[d, mask]
    # Three consumers of 128 keys do not fit at 128 columns.
    others = {"two", "three", "narrow", "one"} - {winner} - ({"three"} if d == 128 else set())
    best = predicted_hopper(text, winner, **changes)
    assert all(best < predicted_hopper(text, name, head_group=4) for name in others)
    assert best < predicted_hopper(text, winner, **{**changes, "out_buffer": "queries"})
    assert best < predicted_hopper(text, winner, **{**changes, "rescale": 0, "num_stages": 2, "tail_heads": 128})


def test_wide_heads_gain_by_rescaling_rarely() -> None:
    wide = {"out_buffer": "half", "queries": "shared"}
    always, rarely = (predicted_hopper("b=4 h=8 s=4096 d=256 full", "narrow", **wide, rescale=r) for r in (0, 8))
    assert rarely < always
    always, rarely = (predicted_hopper("b=4 h=32 s=4096 d=64 full", "two", rescale=r) for r in (0, 8))
    assert rarely > always


def test_causal_tails_and_groups_count_by_the_cache_they_take() -> None:
    short, long = "b=8 h=16 s=2048 d=128 causal", "b=1 h=16 s=16384 d=128 causal"
    assert predicted_hopper(short, "two", head_group=8, tail_heads=32) < predicted_hopper(short, "two", head_group=8)
    assert predicted_hopper(long, "two", head_group=4) < predicted_hopper(long, "two", head_group=16)


def test_small_grids_rank_programs_of_one_consumer_first() -> None:
    small, large = "b=1 h=16 s=512 d=128 full", "b=8 h=16 s=2048 d=128 full"
    assert predicted_hopper(small, "one") < predicted_hopper(small, "narrow")
    assert predicted_hopper(large, "one") > predicted_hopper(large, "narrow")


def test_a_program_for_hopper_that_does_not_fit_ranks_last() -> None:
    config, registers = HOPPER["two"]
    prediction = predict_us(PREFILL[128, "full"], H200, config, registers, H200.smem_bytes + 1)
    assert (prediction.us, prediction.occupancy_blocks, prediction.limiter) == (math.inf, 0, "shared memory")
    prediction = predict_us(PREFILL[128, "full"], H200, config, registers, 197088)
    assert (prediction.occupancy_blocks, prediction.waves) == (1, math.ceil(32 * 64 / 132))


def test_more_work_for_hopper_never_takes_less_time() -> None:
    for mask in ("full", "causal", "sliding_window(127,0)", "document"):
        sizes = (0, 1, 128, 512, 1000, 1024, 2048, 4096, 16384)
        times = [predicted_hopper(f"b=2 h=16 s={s} d=128 {mask}", "two") for s in sizes]
        assert times == sorted(times)
    plain = predicted_hopper("b=2 h=16 s=4096 d=128 full", "narrow")
    assert plain < predicted_hopper("b=2 h=16 s=4096 d=128 full softcap", "narrow")
    assert predicted_hopper("b=2 h=16 s=4096 d=128 varlen full", "narrow") < plain


def test_nothing_to_do_is_legal() -> None:
    config = make_config((128, 64, 4, 2))
    for text in ("b=1 h=2 sq=0 sk=64 d=64", "b=0 h=2 s=64 d=64", "b=1 h=2 sq=64 sk=0 d=64 causal"):
        assert 0 < predicted_hopper(text, "two") < 20
    for text in ("b=1 h=2 sq=0 sk=64 d=64", "b=0 h=2 s=64 d=64", "b=1 h=2 sq=64 sk=0 d=64 causal"):
        problem = parse_problem(text)
        assert 0 < predict_us(problem, H200, config, 128, 49152).us < 20
        assert floor_us(problem, H200).us < 1


def test_other_templates_are_refused() -> None:
    class OtherConfig(KernelConfig):
        template = "triton/other"

    with pytest.raises(
        ConfigError,
        match="forward, gluon/hopper_forward, triton/backward, triton/decode, gluon/hopper_decode, got triton/other",
    ):
        predict_us(PREFILL[64, "full"], H200, OtherConfig(num_warps=4, num_stages=2), 128, 0)


def test_floor_and_rates() -> None:
    prefill = PREFILL[128, "full"]
    floor = floor_us(prefill, H200)
    assert floor.bound == "compute"
    assert floor.compute_us == pytest.approx(4 * 4 * 16 * 4096**2 * 128 / 989e12 * 1e6)
    assert tflops(prefill, floor.compute_us) == pytest.approx(989)
    decode = parse_problem("b=16 hq=32 hkv=8 sq=1 sk=4096 d=128")
    floor = floor_us(decode, H200)
    assert floor.bound == "memory"
    assert floor.us == floor.memory_us
    assert tbps(decode, floor.memory_us) == pytest.approx(4.8)
    fp32 = dataclasses.replace(prefill, spec=parse_problem("b=4 h=16 s=4096 d=128 fp32").spec)
    assert floor_us(fp32, H200).compute_us == pytest.approx(2 * floor_us(prefill, H200).compute_us)
    # Five products of the size of the forward's two.
    assert floor_us(BACKWARD, H200).compute_us == pytest.approx(2.5 * floor_us(PREFILL[128, "causal"], H200).compute_us)
    with pytest.raises(InputError, match="positive"):
        tflops(prefill, 0.0)
    with pytest.raises(InputError, match="positive"):
        tbps(prefill, math.nan)
