"""What the hardware allows: the floor under any kernel, and a model that ranks configs before anything is timed."""

from __future__ import annotations

import collections
import dataclasses
import functools
import math
import typing

from flashgen.codegen.config import KernelConfig, TritonForwardConfig
from flashgen.codegen.head_tiles import head_tiles
from flashgen.errors import ConfigError, InputError
from flashgen.spec import AttentionSpec, DType, Mask, Problem
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
    """Return the floor of `problem` on `target`.

    float32 is counted at half the 16-bit rate, that of tf32, and fp8 at twice the 16-bit rate. Where only data can tell
    which keys a mask hides, every pair is counted: there the compute time is that of the unmasked problem.
    """
    compute_us = problem.flops() / (target.tflops_16bit * _matrix_rate(problem.spec.dtype) * 1e6)
    memory_us = problem.min_bytes() / (target.bandwidth_gbs * 1e3)
    return Floor(compute_us=compute_us, memory_us=memory_us, bound="compute" if compute_us >= memory_us else "memory")


def _matrix_rate(dtype: DType) -> float:
    """Return the rate of the matrix unit, in that for 16-bit types."""
    return {DType.FP32: 0.5, DType.TF32: 0.5, DType.FP8: 2.0}.get(dtype, 1.0)


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
# What features add to them: Philox gives four numbers in about 80 operations, a bias is loaded and converted.
_OPS_OF_FEATURE = {"softcap": 4, "alibi": 4, "dropout": 22, "bias": 6, "score_mod": 8}
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
    lengths = collections.Counter(problem.lengths())
    # Rows of a grid that is as wide as the longest sequence: the tiles beyond a shorter one end at once.
    tiles = math.ceil(problem.shape.seqlen_q / config.block_m) * problem.shape.batch * problem.shape.nheads_q
    if blocks == 0 or tiles == 0:
        return Prediction(us=_LAUNCH_US if blocks else math.inf, occupancy_blocks=blocks, waves=0, limiter=limiter)
    slots = target.num_sms * blocks
    waves = math.ceil(tiles / slots)
    mask = problem.spec.mask.structure(keep_numbers=True)
    counts: collections.Counter[int] = collections.Counter()
    for (seqlen_q, seqlen_k), sequences in lengths.items():
        for steps in _steps(mask, config, seqlen_q, seqlen_k):
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
    us = max(clocks / _CLOCK_HZ * 1e6, problem.min_bytes() / (target.bandwidth_gbs * 1e3)) + _LAUNCH_US
    return Prediction(us=us, occupancy_blocks=blocks, waves=waves, limiter=limiter)


@functools.lru_cache(maxsize=256)
def _steps(mask: Mask, config: TritonForwardConfig, seqlen_q: int, seqlen_k: int) -> tuple[int, ...]:
    """Return how many tiles of keys each tile of queries walks over; all of them where only data can tell."""
    steps = []
    for start in range(0, seqlen_q, config.block_m):
        rows = (start, min(start + config.block_m, seqlen_q) - 1)
        first, last = (mask.row_interval(row, seqlen_q, seqlen_k) or (0, seqlen_k) for row in rows)
        # Both ends move to the right from row to row.
        lo, hi = max(first[0], 0), min(last[1], seqlen_k)
        steps.append(max(0, math.ceil(hi / config.block_n) - lo // config.block_n))
    return tuple(steps)


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
    dims = _padded(spec.head_dim_qk, config) + _padded(spec.head_dim_v, config)
    matrix = blocks * _matrix_clocks(problem, target, config)
    vector = blocks * _vector_clocks(spec, target, config)
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
    dims = _padded(spec.head_dim_qk, config) + _padded(spec.head_dim_v, config)
    flops_per_clock = target.tflops_16bit * 1e12 / (target.num_sms * _CLOCK_HZ)
    if spec.dtype is DType.FP32:
        # ieee products run on the vector units.
        return 2 * config.block_m * config.block_n * dims / (2 * _LANES_PER_CLOCK)
    clocks = 2 * config.block_m * config.block_n * dims / (flops_per_clock * _matrix_rate(spec.dtype))
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
    ops = _OPS_PER_SCORE + sum(_OPS_OF_FEATURE.get(name, 0) for name in features)
    lanes = scores * ops + config.block_m * (_padded(spec.head_dim_v, config) + _OPS_PER_ROW)
    # tanh takes the unit of exp2.
    special = scores * (2 if spec.softcap else 1)
    # Address, predicate and issue for every 16 bytes that a thread copies; a bulk copy takes one thread.
    key_bytes = (_padded(spec.head_dim_qk, config) + _padded(spec.head_dim_v, config)) * spec.dtype.itemsize
    copies = 0.0 if _bulk_copies(target, config) else config.block_n * key_bytes / 16 * 6
    # One warp on each of the four schedulers cannot cover its own latencies.
    warps = config.num_warps * target.warp_size / 128
    latency = 1.0 + 0.25 / warps
    return (max(special / _EXP_PER_CLOCK, lanes / _LANES_PER_CLOCK) + copies / _LANES_PER_CLOCK) * latency


def _bulk_copies(target: GpuTarget, config: TritonForwardConfig) -> bool:
    return config.loads == "descriptor" and target.has_tma


def _padded(head_dim: int, config: TritonForwardConfig) -> int:
    """Return how many columns the tiles of the template have together."""
    return sum(head_tiles(head_dim, config.head_tiles))
