"""Rates of a multiprocessor: what the ranking models of all kernels have in common."""

from __future__ import annotations

import dataclasses
import functools
import math

from flashgen.spec import DType, Mask
from flashgen.target import GpuTarget

# One model clock for all GPUs: rates per clock below are what matters, and only the order of configs is used.
CLOCK_HZ = 1.75e9
EXP_PER_CLOCK = 16
LANES_PER_CLOCK = 128
L2_BYTES_PER_CLOCK = 40
LOAD_LATENCY_CLOCKS = 800
STEP_OVERHEAD_CLOCKS = 80
TILE_OVERHEAD_CLOCKS = 2500
LAUNCH_US = 3.0
# Of programs that share a tile: leaving an output, arriving at a counter, waiting for the others, and reading a piece
# of what they left.
MERGE_CLOCKS = 4000
# What features add to the lane operations of a score: Philox gives four numbers in about 80, a bias is loaded and
# converted.
OPS_OF_FEATURE = {"softcap": 4, "alibi": 4, "dropout": 22, "bias": 6, "score_mod": 8}
# Copies by threads reach less of the L2 rate than bulk copies do.
THREAD_COPY_FACTOR = 1.1


@dataclasses.dataclass(frozen=True, kw_only=True)
class Prediction:
    """What the ranking model says of a config; see `predict_us`.

    Attributes:
        us: figure to rank by; infinite if no block fits.
        occupancy_blocks: blocks resident on one multiprocessor.
        waves: rounds of resident blocks that the grid takes.
        limiter: what keeps more blocks from being resident: `registers`, `shared memory` or `threads`.
    """

    us: float
    occupancy_blocks: int
    waves: int
    limiter: str


def matrix_rate(dtype: DType) -> float:
    """Return the rate of the matrix unit, in that for 16-bit types."""
    return {DType.FP32: 0.5, DType.TF32: 0.5, DType.FP8: 2.0}.get(dtype, 1.0)


@functools.lru_cache(maxsize=256)
def tile_steps(mask: Mask, block_m: int, block_n: int, seqlen_q: int, seqlen_k: int) -> tuple[int, ...]:
    """Return how many tiles of keys each tile of queries walks over; all of them where only data can tell."""
    steps = []
    for start in range(0, seqlen_q, block_m):
        rows = (start, min(start + block_m, seqlen_q) - 1)
        first, last = (mask.row_interval(row, seqlen_q, seqlen_k) or (0, seqlen_k) for row in rows)
        # Both ends move to the right from row to row.
        lo, hi = max(first[0], 0), min(last[1], seqlen_k)
        steps.append(max(0, math.ceil(hi / block_n) - lo // block_n))
    return tuple(steps)


def step_clocks(
    *, matrix: float, vector: float, loads: float, blocks: int, num_warps: int, num_stages: int, target: GpuTarget
) -> float:
    """Return the clocks of one step of `blocks` resident tiles.

    Args:
        matrix: clocks of the matrix unit for all of them.
        vector: clocks of the other units.
        loads: clocks of what comes from the L2 cache.
        blocks: tiles resident on one multiprocessor.
        num_warps: of one block.
        num_stages: depth of its pipeline.
        target: the GPU.
    """
    # One chain of product, softmax, product overlaps with nothing; other blocks fill its gaps fully, the other
    # warpgroups of a block, which meet at its barriers, in part.
    chains = blocks * (1 + 0.5 * (max(1, num_warps * target.warp_size // 128) - 1))
    compute = max(matrix, vector) + min(matrix, vector) / chains + STEP_OVERHEAD_CLOCKS
    if num_stages < 2:
        return compute + (loads + LOAD_LATENCY_CLOCKS) / blocks
    exposed = max(0.0, LOAD_LATENCY_CLOCKS - (num_stages - 1) * compute) / blocks
    return max(compute, loads) + exposed
