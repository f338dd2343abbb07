"""The ranking model of decode kernels: bytes of the cache, how many are under way at once, and what merging costs."""

from __future__ import annotations

import math

from flashgen.codegen.config import TritonDecodeConfig
from flashgen.codegen.head_tiles import tile_widths
from flashgen.measure.occupancy import (
    CLOCK_HZ,
    EXP_PER_CLOCK,
    L2_BYTES_PER_CLOCK,
    LANES_PER_CLOCK,
    LAUNCH_US,
    MERGE_CLOCKS,
    OPS_OF_FEATURE,
    TILE_OVERHEAD_CLOCKS,
    Prediction,
    matrix_rate,
    step_clocks,
    tile_steps,
)
from flashgen.spec import DType, Problem
from flashgen.target import GpuTarget, resident_blocks

# Of a score beside its exp2, and of 16 bytes that a thread copies: as in the model of the forward kernel.
_OPS_PER_SCORE, _OPS_PER_COPY = 5, 6
# What a stream of reads reaches of the bandwidth of the datasheet.
_REACHED_BANDWIDTH = 0.9


def predict_decode_us(
    problem: Problem, target: GpuTarget, config: TritonDecodeConfig, registers: int, smem_bytes: int
) -> Prediction:
    """Rank a compiled decode config; see `predict_us`.

    The key tiles of all tiles of rows are divided among programs as the kernel does; the longest share decides, and a
    tile of rows with several shares is merged by all who have one.
    """
    blocks, limiter = resident_blocks(target, config.num_warps, registers, smem_bytes)
    shape = problem.shape
    mask = problem.spec.mask.structure(keep_numbers=True)
    queries = max(1, config.block_m // shape.group)
    steps_of_tiles = tile_steps(mask, queries, config.block_n, shape.seqlen_q, shape.seqlen_k)
    # Tiles of rows are not whole queries; their number is exact, their steps those of the nearest queries.
    tiles = math.ceil(shape.seqlen_q * shape.group / config.block_m) * shape.batch * shape.nheads_kv
    steps = sum(steps_of_tiles) / len(steps_of_tiles) if steps_of_tiles else 0.0
    if blocks == 0 or tiles == 0 or steps == 0:
        return Prediction(us=LAUNCH_US if blocks else math.inf, occupancy_blocks=blocks, waves=0, limiter=limiter)
    share, programs = _shares(config, tiles, steps, target.num_sms)
    resident = min(blocks, math.ceil(programs / target.num_sms))
    waves = math.ceil(programs / (target.num_sms * resident))
    busy_sms = min(target.num_sms, programs)
    clocks = waves * (share * _step_clocks(problem, target, config, resident, busy_sms) + TILE_OVERHEAD_CLOCKS)
    parts = math.ceil(steps / share)
    if parts > 1:
        # All of them merge a piece of the tile each.
        sums = config.block_m * problem.spec.head_dim_v * 4
        clocks += MERGE_CLOCKS + sums / L2_BYTES_PER_CLOCK
    memory_us = problem.min_bytes() / (_REACHED_BANDWIDTH * target.bandwidth_gbs * 1e3)
    us = max(clocks / CLOCK_HZ * 1e6, memory_us) + LAUNCH_US
    return Prediction(us=us, occupancy_blocks=blocks, waves=waves, limiter=limiter)


def _shares(config: TritonDecodeConfig, tiles: int, steps: float, num_sms: int) -> tuple[int, int]:
    """Return how many steps the longest share has, and how many programs have one."""
    total = math.ceil(tiles * steps)
    share = max(math.ceil(total / (num_sms * config.programs)), config.min_blocks)
    return share, math.ceil(total / share)


def _step_clocks(
    problem: Problem, target: GpuTarget, config: TritonDecodeConfig, resident: int, busy_sms: int
) -> float:
    """Return the clocks in which one multiprocessor takes one key tile in each of its resident programs."""
    spec = problem.spec
    scores = config.block_m * config.block_n
    widths_qk, widths_v = tile_widths(spec, config.head_tiles)
    dims, read = sum(widths_qk) + sum(widths_v), spec.head_dim_qk + (0 if spec.shared_kv else spec.head_dim_v)
    tile_bytes = config.block_n * read * spec.kv_dtype.itemsize
    if spec.dtype is DType.FP32:
        matrix = scores * dims / LANES_PER_CLOCK
    else:
        # Below 64 rows the instructions of one warp, of 16 rows each, at half the rate of those of a warpgroup.
        rate = matrix_rate(spec.dtype) * (1.0 if target.has_wgmma and config.block_m >= 64 else 0.5)
        flops_per_clock = target.tflops_16bit * 1e12 / (target.num_sms * CLOCK_HZ) * rate
        matrix = 2 * scores * dims / flops_per_clock * max(1.0, 16 * config.num_warps / config.block_m)
    ops = _OPS_PER_SCORE + sum(OPS_OF_FEATURE.get(word.partition("=")[0], 0) for word in spec.features)
    copies = 0.0 if config.loads == "descriptor" and target.has_tma else tile_bytes / 16 * _OPS_PER_COPY
    widened = config.block_n * read if spec.fp8_kv else 0
    vector = max(scores / EXP_PER_CLOCK, (scores * ops + copies + widened) / LANES_PER_CLOCK)
    # Tiles of rows with the same keys find them in the L2 cache.
    sharing = math.ceil(problem.shape.seqlen_q * problem.shape.group / config.block_m)
    bytes_per_clock = sharing * _REACHED_BANDWIDTH * target.bandwidth_gbs * 1e9 / (CLOCK_HZ * busy_sms)
    return step_clocks(
        matrix=resident * matrix,
        vector=resident * vector,
        loads=resident * tile_bytes / min(bytes_per_clock, L2_BYTES_PER_CLOCK),
        blocks=resident,
        num_warps=config.num_warps,
        num_stages=config.num_stages,
        target=target,
    )
