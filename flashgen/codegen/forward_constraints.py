"""What a forward config must keep to, see `flashgen.codegen.constraints`: one named predicate per limit."""

from __future__ import annotations

import typing

from flashgen.codegen.config import TritonForwardConfig
from flashgen.codegen.head_tiles import tile_widths
from flashgen.codegen.limits import (
    LEAST_KEYS_OF_BYTES,
    ROWS_PER_WARP,
    accumulator_reason,
    alignment_reason,
    has_tensor_memory,
    head_tiles_reason,
    launch_reason,
    loads_bytes,
    maxnreg_reason,
    shared_memory_reason,
    side_reason,
    tma_reason,
)
from flashgen.codegen.mask_plan import plan_mask
from flashgen.spec import AttentionSpec, DType
from flashgen.target import GpuTarget

Constraint = typing.Callable[[TritonForwardConfig, AttentionSpec, GpuTarget], "str | None"]

_MAX_COLUMNS_PER_WARP = 256  # of the output, with its 16 rows in registers beside the scores
_MAX_FP32_TILE = 128 * 64  # scores of one tile; ieee float32 products are unrolled FMAs


def block_power_of_two(config: TritonForwardConfig, spec: AttentionSpec, target: GpuTarget) -> str | None:
    """Tiles have power-of-two sides of at least 16, as `tl.dot` needs; products of fp8 sum over 32 keys at least."""
    keys = 32 if spec.dtype is DType.FP8 else 16
    return side_reason("block_m", config.block_m) or side_reason("block_n", config.block_n, keys)


def keys_fill_operands(config: TritonForwardConfig, spec: AttentionSpec, target: GpuTarget) -> str | None:
    """Tiles have 32 keys at least where bytes are loaded into the scores, see `loads_bytes`."""
    if config.block_n < LEAST_KEYS_OF_BYTES and loads_bytes(spec):
        return f"block_n={config.block_n} is less than {LEAST_KEYS_OF_BYTES}, with bytes loaded into the scores"
    return None


def launch_within_limits(config: TritonForwardConfig, spec: AttentionSpec, target: GpuTarget) -> str | None:
    """A program has a power of two of warps and at most 1024 threads; pipeline and head group hold at least one."""
    reason = launch_reason(config.num_warps, config.num_stages, target)
    if reason is not None:
        return reason
    if config.head_group < 1:
        return f"head_group={config.head_group} is less than 1"
    return None


def warps_fit_tile(config: TritonForwardConfig, spec: AttentionSpec, target: GpuTarget) -> str | None:
    """Every warp owns 16 query rows of its own, so that a row's softmax never crosses warps.

    Not so for fp32, whose products run on the plain cores: there many warps are what keeps a tile in registers. Heads
    of more than 256 columns need two warps for the output of 16 rows.
    """
    rows = ROWS_PER_WARP * config.num_warps // (2 if spec.head_dim_v > _MAX_COLUMNS_PER_WARP else 1)
    if config.block_m < rows and spec.dtype is not DType.FP32:
        return f"block_m={config.block_m} gives {config.num_warps} warps fewer than {ROWS_PER_WARP} rows each"
    return None


def shared_memory_fits(config: TritonForwardConfig, spec: AttentionSpec, target: GpuTarget) -> str | None:
    """The K and V tiles in flight, and Q where the matrix unit reads it there, fit one program's shared memory."""
    return shared_memory_reason(shared_memory_lower_bound(config, spec, target), target)


def shared_memory_lower_bound(config: TritonForwardConfig, spec: AttentionSpec, target: GpuTarget) -> int:
    """Return the fewest bytes of shared memory that Triton's software pipeline can take for this config.

    An asynchronous product (Hopper, Blackwell) reads a stage while the next ones fill, and reads Q from shared memory:
    `num_stages` tiles each of K and V, and Q; unpipelined, K and V take turns in one buffer. A synchronous product has
    moved its tile to registers: one stage less, and Q need not stay.
    """
    itemsize = spec.dtype.itemsize
    width_qk, width_v = map(sum, tile_widths(spec, config.head_tiles))
    k_tile = config.block_n * width_qk * itemsize
    v_tile = config.block_n * width_v * itemsize
    if not _product_is_async(config, spec, target):
        return (config.num_stages - 1) * (k_tile + v_tile)
    q_tile = config.block_m * width_qk * itemsize
    return q_tile + (max(k_tile, v_tile) if config.num_stages == 1 else config.num_stages * (k_tile + v_tile))


def _product_is_async(config: TritonForwardConfig, spec: AttentionSpec, target: GpuTarget) -> bool:
    """Return whether Triton picks the matrix instructions that whole warpgroups issue from shared memory."""
    whole_warpgroups = config.block_m >= 64 and config.num_warps >= 4
    return whole_warpgroups and spec.dtype is not DType.FP32 and (target.has_wgmma or has_tensor_memory(target))


def accumulator_fits_registers(config: TritonForwardConfig, spec: AttentionSpec, target: GpuTarget) -> str | None:
    """The float32 scores and output of a tile fit the registers of its threads."""
    return accumulator_reason(
        config.block_m,
        config.block_n,
        sum(tile_widths(spec, config.head_tiles)[1]),
        config.num_warps,
        config.maxnreg,
        target,
        in_tensor_memory=has_tensor_memory(target) and _product_is_async(config, spec, target),
    )


def descriptor_needs_tma(config: TritonForwardConfig, spec: AttentionSpec, target: GpuTarget) -> str | None:
    """Descriptors pay only where they are hardware bulk copies."""
    return tma_reason(target) if config.loads == "descriptor" else None


def descriptor_alignment(config: TritonForwardConfig, spec: AttentionSpec, target: GpuTarget) -> str | None:
    """A bulk copy moves rows of a multiple of 16 bytes in boxes of at most 256 a side."""
    if config.loads != "descriptor":
        return None
    widths = [widths[0] for widths in tile_widths(spec, config.head_tiles)]
    return alignment_reason(spec, max(config.block_m, config.block_n, *widths))


def maxnreg_legal(config: TritonForwardConfig, spec: AttentionSpec, target: GpuTarget) -> str | None:
    """A register limit is one that ptxas takes and that leaves room for one program on a multiprocessor."""
    return maxnreg_reason(config.maxnreg, config.num_warps, target)


def head_tiles_matter(config: TritonForwardConfig, spec: AttentionSpec, target: GpuTarget) -> str | None:
    """A head dimension is cut into two tiles only where that is narrower than one."""
    return head_tiles_reason(config.head_tiles, spec)


def single_loop_matters(config: TritonForwardConfig, spec: AttentionSpec, target: GpuTarget) -> str | None:
    """One loop instead of three is another kernel only where a tile's keys have two edges."""
    if config.loops == "single" and not plan_mask(spec.mask.structure()).two_edges:
        return f"loops=single is the same kernel as split, or no better, under the mask {spec.mask}"
    return None


def fp32_tile_limited(config: TritonForwardConfig, spec: AttentionSpec, target: GpuTarget) -> str | None:
    """Tiles of float32 stay small: beyond 128x64 scores they compile for minutes and spill."""
    tile = config.block_m * config.block_n
    if spec.dtype is DType.FP32 and tile > _MAX_FP32_TILE:
        return f"a {config.block_m}x{config.block_n} tile of fp32 has {tile} scores, more than {_MAX_FP32_TILE}"
    return None


FORWARD_CONSTRAINTS: dict[str, Constraint] = {
    predicate.__name__: predicate
    for predicate in (
        block_power_of_two,
        keys_fill_operands,
        launch_within_limits,
        warps_fit_tile,
        fp32_tile_limited,
        head_tiles_matter,
        single_loop_matters,
        descriptor_needs_tma,
        descriptor_alignment,
        maxnreg_legal,
        shared_memory_fits,
        accumulator_fits_registers,
    )
}
