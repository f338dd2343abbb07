"""What the hardware allows: the floor under any kernel, and a model that ranks configs before anything is timed."""

from __future__ import annotations

import dataclasses
import math
import typing

from flashgen.codegen.config import KernelConfig, TritonForwardConfig
from flashgen.errors import ConfigError, InputError
from flashgen.spec import DType, Problem
from flashgen.target import GpuTarget


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


def floor_us(problem: Problem, target: GpuTarget) -> Floor:
    """Return the floor of `problem` on `target`; float32 is counted at half the 16-bit rate, that of tf32."""
    compute_us = problem.flops() / (target.tflops_16bit * (0.5 if problem.spec.dtype is DType.FP32 else 1.0) * 1e6)
    memory_us = problem.min_bytes() / (target.bandwidth_gbs * 1e3)
    return Floor(compute_us=compute_us, memory_us=memory_us, bound="compute" if compute_us >= memory_us else "memory")


def tflops(problem: Problem, us: float) -> float:
    """Return the useful TFLOP/s of a call that took `us` microseconds."""
    return problem.flops() / (_positive(us) * 1e6)


def tbps(problem: Problem, us: float) -> float:
    """Return the TB/s of a call that took `us` microseconds, each input and output counted once."""
    return problem.min_bytes() / (_positive(us) * 1e6)


def _positive(us: float) -> float:
    if not us > 0:
        raise InputError(f"a time must be positive, got {us} us")
    return us


# One model clock for all GPUs: rates per clock below are what matters, and only the order of configs is used.
_CLOCK_HZ = 1.75e9
_EXP_PER_CLOCK = 16
_LANES_PER_CLOCK = 128
_L2_BYTES_PER_CLOCK = 40
_SMEM_BYTES_PER_CLOCK = 128
_LOAD_LATENCY_CLOCKS = 800
_STEP_OVERHEAD_CLOCKS = 80
_TILE_OVERHEAD_CLOCKS = 2500
_LAUNCH_US = 3.0
# Lane operations per score beside its exp2: scale and subtract, maximum, sum, half a conversion, register moves.
_OPS_PER_SCORE = 5
# Per row: both reductions across four threads, the new maximum, the correction.
_OPS_PER_ROW = 40
# Copies by threads reach less of the L2 rate than bulk copies do.
_THREAD_COPY_FACTOR = 1.1


def predict_us(
    problem: Problem, target: GpuTarget, config: KernelConfig, registers: int, smem_bytes: int
) -> Prediction:
    """Rank a compiled forward config by occupancy and roofline, without running it.

    This is a ranking model, not a timing: its constants are round figures for one clock rate, it knows nothing of
    spills, bank conflicts or power, and its microseconds are good only to order the configs of one problem on one
    target. Counted: blocks per multiprocessor, wave quantisation, matrix, exp2 and vector work of one step over the
    keys and how much of them overlaps, K and V from L2, load latency hidden by the stages, bytes through device memory.

    Args:
        problem: what is computed.
        target: where.
        config: a `TritonForwardConfig`.
        registers: registers of one thread, as the compiler reports them.
        smem_bytes: shared memory of one block, likewise.

    Raises:
        ConfigError: if the config belongs to another template.
    """
    if not isinstance(config, TritonForwardConfig):
        raise ConfigError(f"the model knows {TritonForwardConfig.template} only, got {config.template}")
    blocks, limiter = _resident_blocks(target, config, registers, smem_bytes)
    shape, spec = problem.shape, problem.spec
    tiles = math.ceil(shape.seqlen_q / config.block_m) * shape.batch * shape.nheads_q
    if blocks == 0 or tiles == 0:
        return Prediction(us=_LAUNCH_US if blocks else math.inf, occupancy_blocks=blocks, waves=0, limiter=limiter)
    slots = target.num_sms * blocks
    waves = math.ceil(tiles / slots)
    visible = spec.mask.visible_pairs(shape.seqlen_q, shape.seqlen_k)
    uniform = visible == shape.seqlen_q * shape.seqlen_k
    # Under a mask a tile walks on to the last key of its last row, half a tile beyond the mean.
    keys = shape.seqlen_k if uniform else visible / shape.seqlen_q + config.block_m / 2
    steps = math.ceil(keys / config.block_n) if uniform else keys / config.block_n + 0.5
    if uniform:
        full_waves, rest = divmod(tiles, slots)
        clocks = full_waves * _tile_clocks(problem, target, config, blocks, steps)
        if rest:
            clocks += _tile_clocks(problem, target, config, math.ceil(rest / target.num_sms), steps)
    else:
        # Tiles of unequal length fill the gaps of each other, but none is split.
        shared = tiles / slots * _tile_clocks(problem, target, config, blocks, steps)
        longest = _tile_clocks(problem, target, config, 1, math.ceil(shape.seqlen_k / config.block_n))
        clocks = max(shared, longest)
    us = max(clocks / _CLOCK_HZ * 1e6, problem.min_bytes() / (target.bandwidth_gbs * 1e3)) + _LAUNCH_US
    return Prediction(us=us, occupancy_blocks=blocks, waves=waves, limiter=limiter)


def _resident_blocks(
    target: GpuTarget, config: TritonForwardConfig, registers: int, smem_bytes: int
) -> tuple[int, str]:
    """Return how many blocks one multiprocessor holds at a time, and what keeps it from holding more."""
    # Registers are handed out per warp in units of 256; CUDA keeps 1 KiB of shared memory of each block for itself.
    warp_registers = math.ceil(max(registers, 1) * target.warp_size / 256) * 256
    block_smem = smem_bytes + (1024 if target.backend == "cuda" else 0)
    limits = {
        "registers": target.registers_per_sm // (warp_registers * config.num_warps),
        "shared memory": target.smem_per_sm_bytes // block_smem if block_smem else 32,
        "threads": target.max_threads_per_sm // (config.num_warps * target.warp_size),
    }
    if smem_bytes > target.smem_bytes:
        limits["shared memory"] = 0
    limiter = min(limits, key=limits.__getitem__)
    return limits[limiter], limiter


def _tile_clocks(problem: Problem, target: GpuTarget, config: TritonForwardConfig, blocks: int, steps: float) -> float:
    """Return the clocks in which one multiprocessor finishes `blocks` resident tiles of `steps` key steps."""
    spec = problem.spec
    dims = _padded(spec.head_dim_qk) + _padded(spec.head_dim_v)
    matrix = blocks * _matrix_clocks(problem, target, config)
    vector = blocks * _vector_clocks(target, config, _padded(spec.head_dim_v), dims * spec.dtype.itemsize)
    # One chain of product, softmax, product overlaps with nothing; other blocks fill its gaps fully, the other
    # warpgroups of a block, which meet at its barriers, in part.
    chains = blocks * (1 + 0.5 * (max(1, config.num_warps * target.warp_size // 128) - 1))
    compute = max(matrix, vector) + min(matrix, vector) / chains + _STEP_OVERHEAD_CLOCKS
    loads = blocks * config.block_n * dims * spec.dtype.itemsize / _L2_BYTES_PER_CLOCK
    if not _bulk_copies(target, config):
        loads *= _THREAD_COPY_FACTOR
    if config.num_stages < 2:
        step = compute + (loads + _LOAD_LATENCY_CLOCKS) / blocks
    else:
        exposed = max(0.0, _LOAD_LATENCY_CLOCKS - (config.num_stages - 1) * compute) / blocks
        step = max(compute, loads) + exposed
    edges = blocks * config.block_m * dims * spec.dtype.itemsize / _L2_BYTES_PER_CLOCK + _TILE_OVERHEAD_CLOCKS
    return steps * step + edges / blocks


def _matrix_clocks(problem: Problem, target: GpuTarget, config: TritonForwardConfig) -> float:
    """Return the clocks of both products of one step at the rate that the tile's shape reaches."""
    spec = problem.spec
    dims = _padded(spec.head_dim_qk) + _padded(spec.head_dim_v)
    flops_per_clock = target.tflops_16bit * 1e12 / (target.num_sms * _CLOCK_HZ)
    if spec.dtype is DType.FP32:
        # ieee products run on the vector units.
        return 2 * config.block_m * config.block_n * dims / (2 * _LANES_PER_CLOCK)
    clocks = 2 * config.block_m * config.block_n * dims / flops_per_clock
    if target.capability < 90 or target.capability >= 120:
        # A warp's product has 16 rows at least.
        return clocks * max(1.0, 16 * config.num_warps / config.block_m)
    if config.block_m < 64:
        # Too few rows for the unit of a warpgroup: the older instructions, at about half its rate, 16 rows a warp.
        return 2 * clocks * max(1.0, 16 * config.num_warps / config.block_m)
    rows_of_warpgroup = config.block_m / max(1.0, config.num_warps / 4)
    waste = max(1.0, math.sqrt(64 / rows_of_warpgroup))
    # S = Q K^T reads both operands from shared memory for every 64 rows.
    operand_bytes = (config.block_m / 64) * (64 + config.block_n) * _padded(spec.head_dim_qk) * spec.dtype.itemsize
    return max(clocks * waste, operand_bytes / _SMEM_BYTES_PER_CLOCK + clocks * waste / 2)


def _vector_clocks(target: GpuTarget, config: TritonForwardConfig, head_dim_v: int, key_bytes: int) -> float:
    """Return the clocks of the softmax of one step, of rescaling out, and of computing addresses."""
    scores = config.block_m * config.block_n
    lanes = scores * _OPS_PER_SCORE + config.block_m * (head_dim_v + _OPS_PER_ROW)
    # Address, predicate and issue for every 16 bytes that a thread copies; a bulk copy takes one thread.
    copies = 0.0 if _bulk_copies(target, config) else config.block_n * key_bytes / 16 * 6
    # One warp on each of the four schedulers cannot cover its own latencies.
    warps = config.num_warps * target.warp_size / 128
    latency = 1.0 + 0.25 / warps
    return (max(scores / _EXP_PER_CLOCK, lanes / _LANES_PER_CLOCK) + copies / _LANES_PER_CLOCK) * latency


def _bulk_copies(target: GpuTarget, config: TritonForwardConfig) -> bool:
    return config.loads == "descriptor" and target.has_tma


def _padded(head_dim: int) -> int:
    """Return the width that a tile of the template has: the next power of two."""
    return 1 << (head_dim - 1).bit_length()
