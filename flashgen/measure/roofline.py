"""What the hardware allows: the floor under any kernel, and a model that ranks configs before anything is timed."""

from __future__ import annotations

import collections
import dataclasses
import math
import typing

from flashgen.codegen.config import TritonBackwardConfig, TritonDecodeConfig, TritonForwardConfig, templates_of
from flashgen.codegen.head_tiles import head_tiles
from flashgen.codegen.hopper_config import HopperDecodeConfig, HopperForwardConfig
from flashgen.codegen.kernel_config import KernelConfig
from flashgen.errors import ConfigError
from flashgen.measure.backward_model import predict_backward_us
from flashgen.measure.decode_model import predict_decode_us
from flashgen.measure.hopper_model import predict_hopper_decode_us, predict_hopper_us
from flashgen.measure.occupancy import (
    CLOCK_HZ,
    EXP_PER_CLOCK,
    L2_BYTES_PER_CLOCK,
    LANES_PER_CLOCK,
    LAUNCH_US,
    OPS_OF_FEATURE,
    THREAD_COPY_FACTOR,
    TILE_OVERHEAD_CLOCKS,
    matrix_rate,
    step_clocks,
    tile_steps,
)
from flashgen.measure.occupancy import Prediction as Prediction
from flashgen.spec import PHASES, AttentionSpec, DType, Problem
from flashgen.target import GpuTarget, resident_blocks


@dataclasses.dataclass(frozen=True, kw_only=True)
class Floor:
    """The time that no kernel gets below.

    Attributes:
        compute_us: useful operations over the matrix rate of the datasheet.
        memory_us: every input read once and every output written once, over the bandwidth of the datasheet.
        bound: which of the two is larger.
    """

    compute_us: float
    memory_us: float
    bound: typing.Literal["compute", "memory"]

    @property
    def us(self) -> float:
        """The larger of the two."""
        return max(self.compute_us, self.memory_us)


def floor_us(problem: Problem, target: GpuTarget) -> Floor:
    """Return the floor of `problem` on `target`.

    float32 is counted at half the 16-bit rate, that of tf32, and fp8 at twice the 16-bit rate. Where only data can tell
    which keys a mask hides, every pair is counted: there the compute time is that of the unmasked problem.
    """
    compute_us = problem.flops() / (target.tflops_16bit * matrix_rate(problem.spec.dtype) * 1e6)
    memory_us = problem.min_bytes() / (target.bandwidth_gbs * 1e3)
    return Floor(compute_us=compute_us, memory_us=memory_us, bound="compute" if compute_us >= memory_us else "memory")


_SMEM_BYTES_PER_CLOCK = 128
# What the model leaves out of kernels without roles for their warps, beside those that have them: the same problems
# took an H200 so much longer.
_WITHOUT_ROLES = 1.5
# Lane operations per score beside its exp2: scale and subtract, maximum, sum, half a conversion, register moves.
_OPS_PER_SCORE = 5
# Per row: both reductions across four threads, the new maximum, the correction.
_OPS_PER_ROW = 40


def predict_us(
    problem: Problem, target: GpuTarget, config: KernelConfig, registers: int, smem_bytes: int
) -> Prediction:
    """Rank a compiled config by occupancy and roofline, without running it.

    This is a ranking model, not a timing: its constants are round figures for one clock rate, it knows nothing of
    spills, bank conflicts or power, and its microseconds are good only to order the configs of one problem on one
    target. Counted: blocks per multiprocessor, wave quantisation, matrix, exp2 and vector work of one step over the
    keys and how much of them overlaps, K and V from L2, load latency hidden by the stages, bytes through device memory.
    Of a backward config, that of each of its kernels, see `predict_backward_us`; of a forward one for Hopper, see
    `predict_hopper_us`; of a decode one, see `predict_decode_us` and
    `predict_hopper_decode_us`.

    Args:
        problem: what is computed.
        target: where.
        config: of any template that there is a model of.
        registers: registers of one thread, as the compiler reports them.
        smem_bytes: shared memory of one block, likewise.

    Raises:
        ConfigError: if the config belongs to another template.
    """
    match config:
        case TritonForwardConfig():
            return _predict_forward_us(problem, target, config, registers, smem_bytes)
        case HopperForwardConfig():
            return predict_hopper_us(problem, target, config, registers, smem_bytes)
        case TritonBackwardConfig():
            return predict_backward_us(problem, target, config, registers, smem_bytes)
        case TritonDecodeConfig():
            return predict_decode_us(problem, target, config, registers, smem_bytes)
        case HopperDecodeConfig():
            return predict_hopper_decode_us(problem, target, config, registers, smem_bytes)
    known = ", ".join(template for phase in PHASES for template in templates_of(phase))
    raise ConfigError(f"the model knows {known}, got {config.template}")


def _predict_forward_us(
    problem: Problem, target: GpuTarget, config: TritonForwardConfig, registers: int, smem_bytes: int
) -> Prediction:
    blocks, limiter = resident_blocks(target, config.num_warps, registers, smem_bytes)
    lengths = collections.Counter(problem.lengths())
    # Rows of a grid that is as wide as the longest sequence: the tiles beyond a shorter one end at once.
    tiles = math.ceil(problem.shape.seqlen_q / config.block_m) * problem.shape.batch * problem.shape.nheads_q
    if blocks == 0 or tiles == 0:
        return Prediction(us=LAUNCH_US if blocks else math.inf, occupancy_blocks=blocks, waves=0, limiter=limiter)
    slots = target.num_sms * blocks
    waves = math.ceil(tiles / slots)
    mask = problem.spec.mask.structure(keep_numbers=True)
    counts: collections.Counter[int] = collections.Counter()
    for (seqlen_q, seqlen_k), sequences in lengths.items():
        for steps in tile_steps(mask, config.block_m, config.block_n, seqlen_q, seqlen_k):
            counts[steps] += sequences * problem.shape.nheads_q
    if len(counts) == 1:
        (steps,) = counts
        full_waves, rest = divmod(tiles, slots)
        clocks = full_waves * _tile_clocks(problem, target, config, blocks, steps)
        if rest:
            clocks += _tile_clocks(problem, target, config, math.ceil(rest / target.num_sms), steps)
    else:
        # Tiles of unequal length fill the gaps of each other, but none is split.
        mean = sum(steps * count for steps, count in counts.items()) / counts.total()
        shared = counts.total() / slots * _tile_clocks(problem, target, config, blocks, mean)
        longest = _tile_clocks(problem, target, config, 1, max(counts))
        clocks = max(shared, longest)
    if target.has_wgmma:
        clocks *= _WITHOUT_ROLES
    us = max(clocks / CLOCK_HZ * 1e6, problem.min_bytes() / (target.bandwidth_gbs * 1e3)) + LAUNCH_US
    return Prediction(us=us, occupancy_blocks=blocks, waves=waves, limiter=limiter)


def _tile_clocks(problem: Problem, target: GpuTarget, config: TritonForwardConfig, blocks: int, steps: float) -> float:
    """Return the clocks in which one multiprocessor finishes `blocks` resident tiles of `steps` key steps."""
    spec = problem.spec
    dims = _padded(spec.head_dim_qk, config) + _padded(spec.head_dim_v, config)
    matrix = blocks * _matrix_clocks(problem, target, config)
    vector = blocks * _vector_clocks(spec, target, config)
    loads = blocks * config.block_n * dims * spec.dtype.itemsize / L2_BYTES_PER_CLOCK
    if not _bulk_copies(target, config):
        loads *= THREAD_COPY_FACTOR
    step = step_clocks(
        matrix=matrix,
        vector=vector,
        loads=loads,
        blocks=blocks,
        num_warps=config.num_warps,
        num_stages=config.num_stages,
        target=target,
    )
    edges = blocks * config.block_m * dims * spec.dtype.itemsize / L2_BYTES_PER_CLOCK + TILE_OVERHEAD_CLOCKS
    return steps * step + edges / blocks


def _matrix_clocks(problem: Problem, target: GpuTarget, config: TritonForwardConfig) -> float:
    """Return the clocks of both products of one step at the rate that the tile's shape reaches."""
    spec = problem.spec
    dims = _padded(spec.head_dim_qk, config) + _padded(spec.head_dim_v, config)
    flops_per_clock = target.tflops_16bit * 1e12 / (target.num_sms * CLOCK_HZ)
    if spec.dtype is DType.FP32:
        # ieee products run on the vector units.
        return 2 * config.block_m * config.block_n * dims / (2 * LANES_PER_CLOCK)
    clocks = 2 * config.block_m * config.block_n * dims / (flops_per_clock * matrix_rate(spec.dtype))
    if target.capability < 90 or target.capability >= 120:
        # A warp's product has 16 rows at least.
        return clocks * max(1.0, 16 * config.num_warps / config.block_m)
    if config.block_m < 64:
        # Too few rows for the unit of a warpgroup: the older instructions, at about half its rate, 16 rows a warp.
        return 2 * clocks * max(1.0, 16 * config.num_warps / config.block_m)
    rows_of_warpgroup = config.block_m / max(1.0, config.num_warps / 4)
    waste = max(1.0, math.sqrt(64 / rows_of_warpgroup))
    # S = Q K^T reads both operands from shared memory for every 64 rows.
    operand_bytes = (
        (config.block_m / 64) * (64 + config.block_n) * _padded(spec.head_dim_qk, config) * spec.dtype.itemsize
    )
    return max(clocks * waste, operand_bytes / _SMEM_BYTES_PER_CLOCK + clocks * waste / 2)


def _vector_clocks(spec: AttentionSpec, target: GpuTarget, config: TritonForwardConfig) -> float:
    """Return the clocks of the softmax of one step, of rescaling out, and of computing addresses."""
    scores = config.block_m * config.block_n
    features = {word.partition("=")[0] for word in spec.features} | ({"score_mod"} if spec.score_mod else set())
    ops = _OPS_PER_SCORE + sum(OPS_OF_FEATURE.get(name, 0) for name in features)
    lanes = scores * ops + config.block_m * (_padded(spec.head_dim_v, config) + _OPS_PER_ROW)
    # tanh takes the unit of exp2.
    special = scores * (2 if spec.softcap else 1)
    # Address, predicate and issue for every 16 bytes that a thread copies; a bulk copy takes one thread.
    key_bytes = (_padded(spec.head_dim_qk, config) + _padded(spec.head_dim_v, config)) * spec.dtype.itemsize
    copies = 0.0 if _bulk_copies(target, config) else config.block_n * key_bytes / 16 * 6
    # One warp on each of the four schedulers cannot cover its own latencies.
    warps = config.num_warps * target.warp_size / 128
    latency = 1.0 + 0.25 / warps
    return (max(special / EXP_PER_CLOCK, lanes / LANES_PER_CLOCK) + copies / LANES_PER_CLOCK) * latency


def _bulk_copies(target: GpuTarget, config: TritonForwardConfig) -> bool:
    return config.loads == "descriptor" and target.has_tma


def _padded(head_dim: int, config: TritonForwardConfig) -> int:
    """Return how many columns the tiles of the template have together."""
    return sum(head_tiles(head_dim, config.head_tiles))
