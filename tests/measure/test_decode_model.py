"""That the model of decode kernels knows bytes, waves and merging."""

from __future__ import annotations

import dataclasses
import math

import pytest

from flashgen.codegen import HopperDecodeConfig
from flashgen.codegen.config import TritonDecodeConfig
from flashgen.measure import floor_us, predict_us
from flashgen.spec import Problem, parse_problem
from flashgen.target import named_target

H200 = named_target("NVIDIA H200")
CONFIG = TritonDecodeConfig(block_m=16, block_n=64, num_warps=4, num_stages=3)
HOPPER = HopperDecodeConfig(consumers=2, block_n=128, num_warps=4, num_stages=2)
REGISTERS, SMEM_BYTES = 128, 3 * 64 * 256 * 2


def decode(batch: int, seqlen_k: int, words: str = "bf16", seqlen_q: int = 1) -> Problem:
    return parse_problem(f"b={batch} hq=32 hkv=8 sq={seqlen_q} sk={seqlen_k} d=128 causal decode {words}")


def predicted_us(problem: Problem, config: TritonDecodeConfig = CONFIG, **numbers: object) -> float:
    changed = dataclasses.replace(config, **numbers)  # type: ignore[arg-type]
    return predict_us(problem, H200, changed, REGISTERS, SMEM_BYTES).us


@pytest.mark.parametrize(("batch", "seqlen_k"), [(1, 4096), (1, 32768), (16, 4096), (64, 4096), (16, 32768)])
def test_a_large_cache_is_bound_by_its_bytes(batch: int, seqlen_k: int) -> None:
    problem = decode(batch, seqlen_k)
    floor = floor_us(problem, H200)
    assert floor.bound == "memory"
    us = predicted_us(problem)
    assert us > floor.us
    if problem.min_bytes() > 1e9:
        assert us < 1.5 * floor.us


def test_splitting_pays_where_there_are_few_sequences_and_merging_costs() -> None:
    alone = decode(1, 32768)
    whole = predicted_us(alone, min_blocks=512)
    assert predicted_us(alone) < whole / 4
    short = decode(1, 256)
    assert predicted_us(short, min_blocks=4) < predicted_us(short) + 1


def test_a_cache_of_half_the_bytes_takes_less() -> None:
    assert predicted_us(decode(64, 8192, "bf16 fp8_kv")) < 0.7 * predicted_us(decode(64, 8192))


def test_what_does_not_fit_is_infinite_and_nothing_is_a_launch() -> None:
    assert math.isinf(predict_us(decode(1, 64), H200, CONFIG, REGISTERS, 10**9).us)
    assert predicted_us(decode(0, 64)) < 10


def test_deeper_pipelines_and_more_programs_hide_latency() -> None:
    problem = decode(4, 8192)
    assert predicted_us(problem, num_stages=1) > predicted_us(problem, num_stages=3)
    assert predicted_us(problem, programs=1, num_stages=1) > predicted_us(problem, programs=2, num_stages=1)


def hopper_us(problem: Problem, **numbers: object) -> float:
    changed = dataclasses.replace(HOPPER, **numbers)  # type: ignore[arg-type]
    return predict_us(problem, H200, changed, 168, 4 * 128 * 128 * 2 + 2 * 64 * 128 * 2).us


def test_chunks_are_for_the_kernel_with_roles() -> None:
    chunk = parse_problem("b=1 hq=32 hkv=8 sq=256 sk=131072 d=128 causal decode bf16")
    assert floor_us(chunk, H200).us < hopper_us(chunk) < predicted_us(chunk, block_m=64, num_warps=4)
    # Twice the heads take twice the time, and one consumer leaves its multiprocessor's other registers idle.
    twice = dataclasses.replace(chunk, shape=dataclasses.replace(chunk.shape, nheads_q=64))
    assert 1.8 < hopper_us(twice) / hopper_us(chunk) < 2.1
    assert hopper_us(chunk, consumers=1) > hopper_us(chunk)


def test_parts_of_hopper_cost_their_merging() -> None:
    short = parse_problem("b=1 hq=8 hkv=8 sq=128 sk=2048 d=128 causal decode bf16")
    whole, halves = hopper_us(short, min_blocks=16), hopper_us(short, min_blocks=8)
    assert whole / 2 + 2 < halves < whole
    assert math.isinf(predict_us(short, H200, HOPPER, 168, 10**9).us)
