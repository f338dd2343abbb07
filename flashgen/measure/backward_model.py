"""The ranking model of a backward config: that of a forward one, for each of the kernels that a backward pass takes."""

from __future__ import annotations

import dataclasses
import math

from flashgen.codegen.config import TritonBackwardConfig
from flashgen.codegen.head_tiles import next_power_of_two
from flashgen.measure.occupancy import (
    CLOCK_HZ,
    EXP_PER_CLOCK,
    L2_BYTES_PER_CLOCK,
    LANES_PER_CLOCK,
    LAUNCH_US,
    OPS_OF_FEATURE,
    THREAD_COPY_FACTOR,
    TILE_OVERHEAD_CLOCKS,
    Prediction,
    matrix_rate,
    step_clocks,
    tile_steps,
)
from flashgen.spec import DType, Full, Problem
from flashgen.target import GpuTarget, resident_blocks

# Lane operations per score beside its exp2: scale, subtract lse and delta, multiply, two conversions.
_OPS_PER_SCORE = 7
# Tiles of dQ that are added in float32, which nothing hides: an H200 took 10 to 44 bytes a clock, by tile. The lowest
# of them, as dQ's own kernel was faster in all problems that were measured.
_ADDED_BYTES_PER_CLOCK = 10.0
# What a float32 dQ is passed over for, a byte an element: zeroed, read again, written in 16 bits.
_PASSED_BYTES = 4 + 4 + 2
# A tile that is added in order waits for the one before.
_ORDER_CLOCKS = 1000


@dataclasses.dataclass(frozen=True, kw_only=True)
class _Kernel:
    """One kernel of the backward pass.

    Attributes:
        own: rows of one program, of keys or of queries.
        step: rows of the other side in one step of its loop.
        num_warps, num_stages: as launched.
        products_qk, products_v: matrix products of a step over head_dim_qk, and over head_dim_v.
        programs: in its grid.
        visits: steps of all of them together.
        adds: whether each step adds to dQ.
        in_order: whether it waits for its turn to do so.
    """

    own: int
    step: int
    num_warps: int
    num_stages: int
    products_qk: int
    products_v: int
    programs: int
    visits: int
    adds: bool = False
    in_order: bool = False


def predict_backward_us(
    problem: Problem, target: GpuTarget, config: TritonBackwardConfig, registers: int, smem_bytes: int
) -> Prediction:
    """Return what the ranking model says of a backward config; good only to order the configs of one problem.

    Counted for each kernel as in the forward model: resident blocks, waves, the products of a step, exp2 and vector
    work and how much of them overlaps, loads from L2, latency hidden by the stages; and what adding to dQ costs where
    it has no kernel of its own. The kernel of delta is memory traffic alone, which is the same for all configs.

    Args:
        problem: of the backward phase.
        target: where.
        config: a backward config.
        registers: registers of one thread, the most of any of the kernels.
        smem_bytes: shared memory of one block, likewise.
    """
    kernels = _kernels(problem, config)
    fits = [resident_blocks(target, kernel.num_warps, registers, smem_bytes) for kernel in kernels]
    blocks, limiter = fits[0]
    if any(resident == 0 for resident, _ in fits):
        return Prediction(us=math.inf, occupancy_blocks=0, waves=0, limiter=min(fits)[1])
    clocks = sum(
        _clocks(problem, target, config, kernel, resident)
        for kernel, (resident, _) in zip(kernels, fits, strict=True)
        if kernel.programs
    )
    busy_us = max(clocks / CLOCK_HZ * 1e6, problem.min_bytes() / (target.bandwidth_gbs * 1e3))
    if config.dq != "kernel":
        rows = sum(seqlen_q for seqlen_q, _ in problem.lengths()) * problem.shape.nheads_q
        busy_us += rows * problem.spec.head_dim_qk * _PASSED_BYTES / (target.bandwidth_gbs * 1e3)
    waves = math.ceil(kernels[0].programs / (target.num_sms * blocks))
    # The kernel of delta is launched, too.
    us = busy_us + LAUNCH_US * (1 + len(kernels))
    return Prediction(us=us, occupancy_blocks=blocks, waves=waves, limiter=limiter)


def _kernels(problem: Problem, config: TritonBackwardConfig) -> list[_Kernel]:
    shape, own_dq = problem.shape, config.dq == "kernel"
    dkdv = _Kernel(
        own=config.block_n1,
        step=config.block_m1,
        num_warps=config.num_warps,
        num_stages=config.num_stages,
        products_qk=2 if own_dq else 3,
        products_v=2,
        programs=math.ceil(shape.seqlen_k / config.block_n1) * shape.batch * shape.nheads_kv,
        visits=_visits(problem, config.block_m1, config.block_n1),
        adds=not own_dq,
        in_order=config.dq == "ordered",
    )
    if not own_dq:
        return [dkdv]
    dq = _Kernel(
        own=config.block_m2,
        step=config.block_n2,
        num_warps=config.num_warps2,
        num_stages=config.num_stages2,
        products_qk=2,
        products_v=1,
        programs=math.ceil(shape.seqlen_q / config.block_m2) * shape.batch * shape.nheads_q,
        visits=_visits(problem, config.block_m2, config.block_n2),
    )
    return [dkdv, dq]


def _visits(problem: Problem, block_m: int, block_n: int) -> int:
    """Return how many tiles of scores all heads have together."""
    mask = problem.spec.mask.structure(keep_numbers=True)
    tiles = sum(sum(tile_steps(mask, block_m, block_n, *lengths)) for lengths in problem.lengths())
    return tiles * problem.shape.nheads_q


def _clocks(problem: Problem, target: GpuTarget, config: TritonBackwardConfig, kernel: _Kernel, resident: int) -> float:
    """Return the clocks of one kernel on the whole GPU."""
    spec = problem.spec
    width_qk, width_v = next_power_of_two(spec.head_dim_qk), next_power_of_two(spec.head_dim_v)
    blocks = min(resident, math.ceil(kernel.programs / target.num_sms))
    scores = kernel.own * kernel.step
    flops = 2 * scores * (kernel.products_qk * width_qk + kernel.products_v * width_v)
    copied = float(kernel.step * (width_qk + width_v) * spec.dtype.itemsize)
    if config.loads != "descriptor" or not target.has_tma:
        copied *= THREAD_COPY_FACTOR
    step = step_clocks(
        matrix=blocks * flops / _flops_per_clock(spec.dtype, target) * _waste(kernel, target),
        vector=blocks * _vector_clocks(problem, kernel, target),
        loads=blocks * copied / L2_BYTES_PER_CLOCK,
        blocks=blocks,
        num_warps=kernel.num_warps,
        num_stages=kernel.num_stages,
        target=target,
    )
    if kernel.adds:
        step += blocks * kernel.step * width_qk * 4 / _ADDED_BYTES_PER_CLOCK
    step += _ORDER_CLOCKS if kernel.in_order else 0
    # What a program reads once and writes once.
    edges = 2 * kernel.own * (width_qk + width_v) * spec.dtype.itemsize / L2_BYTES_PER_CLOCK + TILE_OVERHEAD_CLOCKS
    rounds = kernel.programs / (target.num_sms * blocks)
    if isinstance(spec.mask, Full) and not spec.varlen:
        # Programs of unequal length fill the gaps of each other; equal ones end together.
        rounds = math.ceil(rounds)
    return rounds * (kernel.visits / kernel.programs * step + edges)


def _flops_per_clock(dtype: DType, target: GpuTarget) -> float:
    if dtype is DType.FP32:
        # ieee products run on the vector units.
        return 2 * LANES_PER_CLOCK
    return target.tflops_16bit * 1e12 / (target.num_sms * CLOCK_HZ) * matrix_rate(dtype)


def _waste(kernel: _Kernel, target: GpuTarget) -> float:
    """Return how far the products of a step stay below the rate of the matrix unit, by the rows of a warp."""
    rows = min(kernel.own, kernel.step)
    if target.capability < 90 or target.capability >= 120:
        return max(1.0, 16 * kernel.num_warps / max(kernel.own, kernel.step))
    # Some products of a step have the rows of its own side, some of the other.
    return max(1.0, math.sqrt(64 / rows)) * max(1.0, math.sqrt(kernel.num_warps * 16 / (2 * rows)))


def _vector_clocks(problem: Problem, kernel: _Kernel, target: GpuTarget) -> float:
    spec, scores = problem.spec, kernel.own * kernel.step
    features = {word.partition("=")[0] for word in spec.features} | ({"score_mod"} if spec.score_mod else set())
    ops = _OPS_PER_SCORE + sum(OPS_OF_FEATURE.get(name, 0) for name in features)
    # tanh takes the unit of exp2.
    special = scores * (2 if spec.softcap else 1)
    # One warp on each of the four schedulers cannot cover its own latencies.
    latency = 1.0 + 0.25 / (kernel.num_warps * target.warp_size / 128)
    return max(special / EXP_PER_CLOCK, scores * ops / LANES_PER_CLOCK) * latency
