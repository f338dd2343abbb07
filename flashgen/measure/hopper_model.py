"""The ranking model of the forward kernel for Hopper, whose programs stay and take tile after tile."""

from __future__ import annotations

import dataclasses
import math

from flashgen.codegen.head_tiles import tile_widths
from flashgen.codegen.hopper_config import ROWS_OF_CONSUMER, HopperConfig, HopperDecodeConfig, HopperForwardConfig
from flashgen.codegen.hopper_plan import HEAD_TILES
from flashgen.measure.occupancy import (
    CLOCK_HZ,
    EXP_PER_CLOCK,
    L2_BYTES_PER_CLOCK,
    LANES_PER_CLOCK,
    LAUNCH_US,
    LOAD_LATENCY_CLOCKS,
    MERGE_CLOCKS,
    OPS_OF_FEATURE,
    Prediction,
    tile_steps,
)
from flashgen.spec import AttentionSpec, Problem
from flashgen.target import GpuTarget, resident_blocks

_SMEM_BYTES_PER_CLOCK = 128
# At full rate an H200 runs into its power limit, and lowers the clock by so much.
_POWER = 1.2
# Products of 64 columns read operands as fast as shared memory gives them.
_NARROW_PRODUCT = 1.05
# Lane operations per score beside its exp2: maximum, multiply-add, sum, half a conversion; half of them hidden by it.
_OPS_PER_SCORE = 5
_OPS_PER_ROW = 40
_LATENCY = 1.15
# Share of a consumer's shorter work, products or softmax, that neither its own nor other consumers' longer one hides.
_EXPOSED = {"free": 0.6, "alternate": 0.54}
# Where the output is rescaled only now and then; and lane operations per row of finding out.
_RESCALED_SHARE = 0.3
_OPS_PER_VOTE = 64
# Barriers of both rings, and waits for products.
_STEP_CLOCKS = 200
# Of asking in each step whether it needs the mask.
_BRANCH_CLOCKS = 30
# Asking for a tile, and writing it out.
_TILE_CLOCKS = 900
# The next queries wait for the output to leave their buffer; half a tile leaves in two rounds.
_OUT_CLOCKS = {"own": 0, "half": 300, "queries": 900}
# Queries in shared memory are copied after the tile's last product, not after its first loads.
_SHARED_QUERIES_CLOCKS = 300
# What K and V of the heads under way can fill of the L2 cache.
_L2_BYTES = 40 << 20
# Bytes cost power, and with it clock, where they are hidden, too.
_EXPOSED_TRAFFIC = 0.1


@dataclasses.dataclass(frozen=True, kw_only=True)
class _Step:
    """Clocks of one consumer and one tile of keys.

    Attributes:
        matrix: of both products.
        vector: of the softmax, and of rescaling the output.
        loads: of K and V from the L2 cache, for all consumers of a program together.
    """

    matrix: float
    vector: float
    loads: float


def predict_hopper_us(
    problem: Problem, target: GpuTarget, config: HopperForwardConfig, registers: int, smem_bytes: int
) -> Prediction:
    """Return what the ranking model says of a config; good only to order the configs of one problem.

    As for the other forward kernels, but: products run beside the softmax of the same and of other consumers, each
    consumer walks the keys of its own rows where it may, and the heads that go out together count for their traffic
    and for how evenly programs end.

    Args:
        problem: of the forward phase.
        target: where.
        config: of the kernel.
        registers: registers of one thread at the start, as the compiler reports them.
        smem_bytes: shared memory of one program, likewise.
    """
    resident, limiter = resident_blocks(target, config.warps_of_program, registers, smem_bytes)
    programs = min(resident, config.programs)
    rows = math.ceil(problem.shape.seqlen_q / config.block_m)
    heads = problem.shape.batch * problem.shape.nheads_q
    if programs == 0 or rows * heads == 0:
        return Prediction(us=LAUNCH_US if programs else math.inf, occupancy_blocks=programs, waves=0, limiter=limiter)
    tiles, slots = rows * heads, target.num_sms * programs
    beside = min(programs, math.ceil(tiles / target.num_sms))
    step = _step(problem.spec, target, config)
    round_clocks = _round_clocks(step, config, beside)
    edge = _tile_clocks(step, config)
    taken, longest, shortest = _steps(problem, config)
    if shortest < longest:
        # Tiles of unequal length fill the gaps of each other, and the last ones end at different times.
        shared = taken / (target.num_sms * beside * config.consumers) * round_clocks + tiles / slots * edge
        group = min(config.tail_heads or config.head_group, heads)
        ends = longest * round_clocks * min(1.0, slots / (group * rows)) / 2
        clocks = max(shared + ends, longest * round_clocks + edge)
    else:
        clocks = math.ceil(tiles / slots) * (longest * round_clocks + edge)
    traffic_us = _traffic_bytes(problem, config, rows, slots) / (target.bandwidth_gbs * 1e3)
    us = max(clocks / CLOCK_HZ * 1e6, traffic_us) + _EXPOSED_TRAFFIC * traffic_us + LAUNCH_US
    return Prediction(us=us, occupancy_blocks=programs, waves=math.ceil(tiles / slots), limiter=limiter)


def predict_hopper_decode_us(
    problem: Problem, target: GpuTarget, config: HopperDecodeConfig, registers: int, smem_bytes: int
) -> Prediction:
    """Return what the ranking model says of a decode config; as `predict_hopper_us`, but keys are divided evenly.

    The longest share decides, and a tile of rows with several shares is merged by all who have one, a piece each.
    """
    resident, limiter = resident_blocks(target, config.warps_of_program, registers, smem_bytes)
    programs, shape = min(resident, config.programs), problem.shape
    mask = problem.spec.mask.structure(keep_numbers=True)
    steps = tile_steps(mask, config.block_m, config.block_n, shape.seqlen_q, shape.seqlen_k)
    total = sum(steps) * shape.batch * shape.nheads_q // config.heads_of_tile
    if programs == 0 or total == 0:
        return Prediction(us=LAUNCH_US if programs else math.inf, occupancy_blocks=programs, waves=0, limiter=limiter)
    step = _step(problem.spec, target, config)
    share = max(math.ceil(total / (target.num_sms * programs)), config.min_blocks)
    parts = math.ceil(max(steps) / share)
    left = ROWS_OF_CONSUMER * config.consumers * problem.spec.head_dim_v * 4
    clocks = share * _round_clocks(step, config, programs) + step.vector + step.matrix / 2 + _TILE_CLOCKS
    clocks += MERGE_CLOCKS + left / L2_BYTES_PER_CLOCK if parts > 1 else 0.0
    us = max(clocks / CLOCK_HZ * 1e6, problem.min_bytes() / (target.bandwidth_gbs * 1e3)) + LAUNCH_US
    return Prediction(us=us, occupancy_blocks=programs, waves=1, limiter=limiter)


def _step(spec: AttentionSpec, target: GpuTarget, config: HopperConfig) -> _Step:
    width_qk, width_v = map(sum, tile_widths(spec, HEAD_TILES))
    rows, keys, itemsize = ROWS_OF_CONSUMER, config.block_n, spec.dtype.itemsize
    scores = rows * keys
    flops_per_clock = target.tflops_16bit * 1e12 / (target.num_sms * CLOCK_HZ) / _POWER
    narrow = _NARROW_PRODUCT if keys < 128 else 1.0
    operands = keys * width_qk + (rows * width_qk if config.queries == "shared" else 0)
    product_qk = max(
        2 * scores * width_qk / flops_per_clock * narrow, operands * itemsize / _SMEM_BYTES_PER_CLOCK * _POWER
    )
    features = {word.partition("=")[0] for word in spec.features} | ({"score_mod"} if spec.score_mod else set())
    ops = _OPS_PER_SCORE + sum(OPS_OF_FEATURE.get(name, 0) for name in features)
    # tanh takes the unit of exp2.
    special = scores * (2 if spec.softcap else 1) / EXP_PER_CLOCK
    rescaled = rows * (width_v * _RESCALED_SHARE + _OPS_PER_VOTE if config.rescale else width_v)
    return _Step(
        matrix=product_qk + 2 * scores * width_v / flops_per_clock,
        vector=(special + scores * ops / LANES_PER_CLOCK / 2) * _LATENCY
        + (rescaled + rows * _OPS_PER_ROW) / LANES_PER_CLOCK,
        loads=keys * (width_qk + width_v) * itemsize / L2_BYTES_PER_CLOCK,
    )


def _round_clocks(step: _Step, config: HopperConfig, beside: int) -> float:
    """Return the clocks in which each consumer of the programs on one multiprocessor takes one step."""
    consumers = beside * config.consumers
    hidden, longer = sorted((step.matrix, step.vector))
    compute = consumers * longer + hidden * _EXPOSED[config.turns] + _STEP_CLOCKS
    compute += _BRANCH_CLOCKS if config.loops == "single" else 0
    late = max(0.0, LOAD_LATENCY_CLOCKS - (config.num_stages - 1) * compute) / beside
    return max(compute, beside * step.loads) + late


def _tile_clocks(step: _Step, config: HopperForwardConfig) -> float:
    """Return the clocks of a tile beyond its steps: a softmax before the first sum, a product after the last."""
    last = 0.0 if config.tiles == "overlap" else step.matrix / 2
    queries = _SHARED_QUERIES_CLOCKS if config.queries == "shared" else 0
    return step.vector + last + _TILE_CLOCKS + _OUT_CLOCKS[config.out_buffer] + queries


def _steps(problem: Problem, config: HopperForwardConfig) -> tuple[float, int, int]:
    """Return the steps of all consumers together, those of the longest tile, and those of the shortest."""
    mask = problem.spec.mask.structure(keep_numbers=True)
    in_step = config.turns == "alternate" or not mask.by_formula
    taken, longest, shortest = 0.0, 0, problem.shape.seqlen_k
    for lengths in problem.lengths():
        tiles = tile_steps(mask, config.block_m, config.block_n, *lengths)
        longest, shortest = max((longest, *tiles)), min((shortest, *tiles))
        if in_step:
            taken += config.consumers * sum(tiles)
        elif config.diagonal == "half":
            taken += sum(tile_steps(mask, ROWS_OF_CONSUMER, config.block_n // 2, *lengths)) / 2
        else:
            taken += sum(tile_steps(mask, ROWS_OF_CONSUMER, config.block_n, *lengths))
    return taken * problem.shape.nheads_q, longest, shortest


def _traffic_bytes(problem: Problem, config: HopperForwardConfig, rows: int, slots: int) -> float:
    """Return the bytes through device memory: K and V again and again where the heads under way overfill the cache."""
    shape, spec = problem.shape, problem.spec
    head_bytes = shape.seqlen_k * (spec.head_dim_qk + spec.head_dim_v) * spec.dtype.itemsize
    heads = shape.batch * shape.nheads_q
    tail = min(config.tail_heads, heads)
    again = 0.0
    for group, count in ((config.head_group, heads - tail), (tail, tail)):
        under_way = min(max(group, math.ceil(slots / rows)), count)
        if math.ceil(under_way / shape.group) * head_bytes > _L2_BYTES:
            again += count / shape.group * head_bytes * (math.ceil(group * rows / slots) - 1)
    return problem.min_bytes() + again
