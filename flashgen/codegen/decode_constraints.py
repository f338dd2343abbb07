"""What a decode config must keep to, see `flashgen.codegen.constraints`: one named predicate per limit.

Rows are the queries of a whole group, so tiles are narrow: warps share the rows of a tile and split its columns.
"""

from __future__ import annotations

import typing

from flashgen.codegen.config import TritonDecodeConfig
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
from flashgen.spec import AttentionSpec, DType
from flashgen.target import GpuTarget

Constraint = typing.Callable[[TritonDecodeConfig, AttentionSpec, GpuTarget], "str | None"]

_SCORES_PER_WARP = ROWS_PER_WARP * 8  # of the smallest product
_MAX_FP32_TILE = 64 * 64  # scores of one tile; ieee float32 products are unrolled FMAs


def block_power_of_two(config: TritonDecodeConfig, spec: AttentionSpec, target: GpuTarget) -> str | None:
    """Tiles have power-of-two sides of at least 16, as `tl.dot` needs."""
    return side_reason("block_m", config.block_m) or side_reason("block_n", config.block_n)


def launch_within_limits(config: TritonDecodeConfig, spec: AttentionSpec, target: GpuTarget) -> str | None:
    """A program has a power of two of warps and at most 1024 threads; what is counted is there at least once."""
    reason = launch_reason(config.num_warps, config.num_stages, target)
    if reason is not None:
        return reason
    for name, count in (("programs", config.programs), ("min_blocks", config.min_blocks)):
        if count < 1:
            return f"{name}={count} is less than 1"
    if config.merge_parts < 1 or config.merge_parts & (config.merge_parts - 1):
        return f"merge_parts={config.merge_parts} is not a power of two"
    return None


def keys_fill_operands(config: TritonDecodeConfig, spec: AttentionSpec, target: GpuTarget) -> str | None:
    """Tiles have 32 keys at least where bytes are loaded into the scores, or are K and V; see `loads_bytes`."""
    if config.block_n < LEAST_KEYS_OF_BYTES and (spec.fp8_kv or loads_bytes(spec)):
        what = "K and V of 8 bits" if spec.fp8_kv else "bytes loaded into the scores"
        return f"block_n={config.block_n} is less than {LEAST_KEYS_OF_BYTES}, with {what}"
    return None


def head_tiles_matter(config: TritonDecodeConfig, spec: AttentionSpec, target: GpuTarget) -> str | None:
    """A head dimension is cut into two tiles only where that is narrower than one."""
    return head_tiles_reason(config.head_tiles, spec)


def shared_tiles_match(config: TritonDecodeConfig, spec: AttentionSpec, target: GpuTarget) -> str | None:
    """Tiles of K are those of V, too, where V is the first columns of K."""
    widths_qk, widths_v = tile_widths(spec, config.head_tiles)
    if spec.shared_kv and widths_qk[: len(widths_v)] != widths_v:
        found = " + ".join(map(str, widths_qk))
        return f"head_tiles={config.head_tiles} cuts K into {found} columns, V is the first {spec.head_dim_v} of them"
    return None


def warps_split_tile(config: TritonDecodeConfig, spec: AttentionSpec, target: GpuTarget) -> str | None:
    """Every warp has 16 x 8 scores of its own; not so for fp32, where many warps keep a tile in registers."""
    if spec.dtype is not DType.FP32 and config.block_m * config.block_n < _SCORES_PER_WARP * config.num_warps:
        tile = f"{config.block_m}x{config.block_n}"
        return f"a tile of {tile} gives {config.num_warps} warps fewer than {_SCORES_PER_WARP} scores each"
    return None


def fp32_tile_limited(config: TritonDecodeConfig, spec: AttentionSpec, target: GpuTarget) -> str | None:
    """Tiles of float32 stay small: beyond 64x64 scores they compile for minutes and spill."""
    tile = config.block_m * config.block_n
    if spec.dtype is DType.FP32 and tile > _MAX_FP32_TILE:
        return f"a {config.block_m}x{config.block_n} tile of fp32 has {tile} scores, more than {_MAX_FP32_TILE}"
    return None


def descriptor_needs_tma(config: TritonDecodeConfig, spec: AttentionSpec, target: GpuTarget) -> str | None:
    """Descriptors pay only where they are hardware bulk copies."""
    return tma_reason(target) if config.loads == "descriptor" else None


def descriptor_needs_whole_tiles(config: TritonDecodeConfig, spec: AttentionSpec, target: GpuTarget) -> str | None:
    """A bulk copy moves rows that follow each other: those of one page."""
    if config.loads != "descriptor":
        return None
    if spec.page_size % config.block_n:
        return f"loads=descriptor takes tiles from one page each, of {spec.page_size} keys, not {config.block_n}"
    return None


def descriptor_alignment(config: TritonDecodeConfig, spec: AttentionSpec, target: GpuTarget) -> str | None:
    """A bulk copy moves rows of a multiple of 16 bytes, at most 256 of them; wide rows go in several copies."""
    return alignment_reason(spec, config.block_n) if config.loads == "descriptor" else None


def launch_supported(config: TritonDecodeConfig, spec: AttentionSpec, target: GpuTarget) -> str | None:
    """Only Hopper and later start a kernel while the one before it ends."""
    if config.launch == "dependent" and not target.has_tma:
        return f"launch=dependent needs programmatic dependent launch (sm_90 and later), {target.arch} has none"
    return None


def maxnreg_legal(config: TritonDecodeConfig, spec: AttentionSpec, target: GpuTarget) -> str | None:
    """A register limit is one that ptxas takes and that leaves room for one program on a multiprocessor."""
    return maxnreg_reason(config.maxnreg, config.num_warps, target)


def shared_memory_fits(config: TritonDecodeConfig, spec: AttentionSpec, target: GpuTarget) -> str | None:
    """The K and V tiles in flight fit one program's shared memory."""
    return shared_memory_reason(shared_memory_lower_bound(config, spec, target), target)


def shared_memory_lower_bound(config: TritonDecodeConfig, spec: AttentionSpec, target: GpuTarget) -> int:
    """Return the fewest bytes of shared memory that Triton's software pipeline can take for this config.

    Tiles in flight are of the cache's type. A product that reads registers has moved its tile there: one stage less.
    """
    width_qk, width_v = map(sum, tile_widths(spec, config.head_tiles))
    row = (width_qk if spec.shared_kv else width_qk + width_v) * spec.kv_dtype.itemsize
    in_flight = config.num_stages - (0 if _product_is_async(config, spec, target) else 1)
    return in_flight * config.block_n * row


def _product_is_async(config: TritonDecodeConfig, spec: AttentionSpec, target: GpuTarget) -> bool:
    """Return whether Triton picks the matrix instructions that whole warpgroups issue from shared memory."""
    whole_warpgroups = config.block_m >= 64 and config.num_warps >= 4
    as_stored = spec.dtype.itemsize == 2 and not spec.fp8_kv
    return whole_warpgroups and as_stored and (target.has_wgmma or has_tensor_memory(target))


def accumulator_fits_registers(config: TritonDecodeConfig, spec: AttentionSpec, target: GpuTarget) -> str | None:
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


DECODE_CONSTRAINTS: dict[str, Constraint] = {
    predicate.__name__: predicate
    for predicate in (
        block_power_of_two,
        launch_within_limits,
        keys_fill_operands,
        head_tiles_matter,
        shared_tiles_match,
        warps_split_tile,
        fp32_tile_limited,
        descriptor_needs_tma,
        descriptor_needs_whole_tiles,
        descriptor_alignment,
        launch_supported,
        maxnreg_legal,
        shared_memory_fits,
        accumulator_fits_registers,
    )
}
