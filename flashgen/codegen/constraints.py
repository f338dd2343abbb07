"""Which configs are legal for a spec on a GPU: one named predicate per limit.

A predicate returns None, or the reason in one sentence with the numbers. Each refuses only what surely fails to
compile, fails to launch or spills its accumulators: what it lets through in doubt, a real compile settles.
Search spaces name predicates; `check_config` applies them all.
"""

from __future__ import annotations

import typing

from flashgen.codegen.config import KernelConfig, TritonForwardConfig
from flashgen.codegen.head_tiles import tile_widths
from flashgen.codegen.mask_plan import plan_mask
from flashgen.errors import ConfigError
from flashgen.spec import AttentionSpec, DType
from flashgen.target import GpuTarget

Constraint = typing.Callable[[TritonForwardConfig, AttentionSpec, GpuTarget], "str | None"]

_MAX_COLUMNS_PER_WARP = 256  # of the output, with its 16 rows in registers beside the scores
_LEAST_KEYS_OF_BYTES = 32  # of a tile, for one lane of a matrix operand to hold 8
_BYTES = frozenset({"bool", "int8", "uint8"})
_ROWS_PER_WARP = 16  # rows of the smallest matrix-unit tile, NVIDIA's mma and AMD's mfma alike
_MAX_THREADS = 1024  # of one program
_MAX_DESCRIPTOR_BOX = 256  # elements along one axis of a bulk copy
_MAX_FP32_TILE = 128 * 64  # scores of one tile; ieee float32 products are unrolled FMAs
_MAX_REGISTERS = {"cuda": 255, "hip": 512}  # of one thread; 512 counts AMD's accumulation registers
_SPARE_REGISTERS = 16  # for addresses, row maxima and sums; what else the loop holds can be spilled cheaply


def block_power_of_two(config: TritonForwardConfig, spec: AttentionSpec, target: GpuTarget) -> str | None:
    """Tiles have power-of-two sides of at least 16, as `tl.dot` needs; products of fp8 sum over 32 keys at least."""
    keys = 32 if spec.dtype is DType.FP8 else 16
    for name, size, least in (("block_m", config.block_m, 16), ("block_n", config.block_n, keys)):
        if size < least or size & (size - 1):
            return f"{name}={size} is not a power of two of at least {least}"
    return None


def keys_fill_operands(config: TritonForwardConfig, spec: AttentionSpec, target: GpuTarget) -> str | None:
    """Tiles have 32 keys at least where bytes are loaded into the scores.

    Triton 3.6 lays the operands of the second product out by the narrowest load behind them: with a boolean bias and
    dropout in 8 elements of a lane, which 16 keys do not fill, and the products are wrong (seen on an H200).
    """
    if config.block_n < _LEAST_KEYS_OF_BYTES and _loads_bytes(spec):
        return f"block_n={config.block_n} is less than {_LEAST_KEYS_OF_BYTES}, with bytes loaded into the scores"
    return None


def _loads_bytes(spec: AttentionSpec) -> bool:
    captures = [capture for leaf in spec.mask.leaves for capture in leaf.captures]
    captures += spec.score_mod.captures if spec.score_mod else ()
    return spec.bias == "bool" or any(capture.dtype in _BYTES for capture in captures)


def launch_within_limits(config: TritonForwardConfig, spec: AttentionSpec, target: GpuTarget) -> str | None:
    """A program has a power of two of warps and at most 1024 threads; pipeline and head group hold at least one."""
    if config.num_warps < 1 or config.num_warps & (config.num_warps - 1):
        return f"num_warps={config.num_warps} is not a power of two"
    threads = config.num_warps * target.warp_size
    if threads > _MAX_THREADS:
        return f"{config.num_warps} warps of {target.warp_size} are {threads} threads, more than {_MAX_THREADS}"
    if config.num_stages < 1:
        return f"num_stages={config.num_stages} is less than 1"
    if config.head_group < 1:
        return f"head_group={config.head_group} is less than 1"
    return None


def warps_fit_tile(config: TritonForwardConfig, spec: AttentionSpec, target: GpuTarget) -> str | None:
    """Every warp owns 16 query rows of its own, so that a row's softmax never crosses warps.

    Not so for fp32, whose products run on the plain cores: there many warps are what keeps a tile in registers. Heads
    of more than 256 columns need two warps for the output of 16 rows.
    """
    rows = _ROWS_PER_WARP * config.num_warps // (2 if spec.head_dim_v > _MAX_COLUMNS_PER_WARP else 1)
    if config.block_m < rows and spec.dtype is not DType.FP32:
        return f"block_m={config.block_m} gives {config.num_warps} warps fewer than {_ROWS_PER_WARP} rows each"
    return None


def shared_memory_fits(config: TritonForwardConfig, spec: AttentionSpec, target: GpuTarget) -> str | None:
    """The K and V tiles in flight, and Q where the matrix unit reads it there, fit one program's shared memory."""
    needed = shared_memory_lower_bound(config, spec, target)
    if needed > target.smem_bytes:
        return f"needs at least {needed} bytes of shared memory, {target.device_name} has {target.smem_bytes}"
    return None


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
    return whole_warpgroups and spec.dtype is not DType.FP32 and (target.has_wgmma or _has_tensor_memory(target))


def _has_tensor_memory(target: GpuTarget) -> bool:
    return target.capability // 10 == 10


def accumulator_fits_registers(config: TritonForwardConfig, spec: AttentionSpec, target: GpuTarget) -> str | None:
    """The float32 scores and output of a tile fit the registers of its threads."""
    threads = max(config.num_warps, 1) * target.warp_size
    dims = sum(tile_widths(spec, config.head_tiles)[1])
    # Tensor memory holds both; registers see one at a time, for the softmax or the rescale.
    in_tensor_memory = _has_tensor_memory(target) and _product_is_async(config, spec, target)
    columns = max(dims, config.block_n) if in_tensor_memory else dims + config.block_n
    needed = config.block_m * columns // threads + _SPARE_REGISTERS
    limit = min(_MAX_REGISTERS[target.backend], target.registers_per_sm // threads)
    limit = min(limit, config.maxnreg or limit)
    if needed > limit:
        return f"accumulators of {config.block_m}x{columns} need about {needed} registers a thread of {limit}"
    return None


def descriptor_needs_tma(config: TritonForwardConfig, spec: AttentionSpec, target: GpuTarget) -> str | None:
    """Descriptors pay only where they are hardware bulk copies."""
    if config.loads == "descriptor" and not target.has_tma:
        return f"loads=descriptor needs bulk copies (sm_90 and later), {target.arch} has none"
    return None


def descriptor_alignment(config: TritonForwardConfig, spec: AttentionSpec, target: GpuTarget) -> str | None:
    """A bulk copy moves rows of a multiple of 16 bytes in boxes of at most 256 a side."""
    if config.loads != "descriptor":
        return None
    for name, dims in (("head_dim_qk", spec.head_dim_qk), ("head_dim_v", spec.head_dim_v)):
        if dims * spec.dtype.itemsize % 16:
            return f"rows of {name}={dims} {spec.dtype} are not a multiple of 16 bytes, as loads=descriptor needs"
    widths = [widths[0] for widths in tile_widths(spec, config.head_tiles)]
    box = max(config.block_m, config.block_n, *widths)
    if box > _MAX_DESCRIPTOR_BOX:
        return f"a tile side of {box} is more than the {_MAX_DESCRIPTOR_BOX} that loads=descriptor moves at once"
    return None


def maxnreg_legal(config: TritonForwardConfig, spec: AttentionSpec, target: GpuTarget) -> str | None:
    """A register limit is one that ptxas takes and that leaves room for one program on a multiprocessor."""
    if config.maxnreg == 0:
        return None
    if target.backend == "hip":
        return f"maxnreg={config.maxnreg} has no meaning on {target.arch}; only 0 is allowed"
    if not 64 <= config.maxnreg <= 255 or config.maxnreg % 8:
        return f"maxnreg={config.maxnreg} is neither 0 nor a multiple of 8 from 64 to 248"
    threads = target.warp_size * config.num_warps
    registers = threads * config.maxnreg
    if registers > target.registers_per_sm:
        return (
            f"maxnreg={config.maxnreg} takes {registers} registers for {threads} threads of {target.registers_per_sm}"
        )
    return None


def head_tiles_matter(config: TritonForwardConfig, spec: AttentionSpec, target: GpuTarget) -> str | None:
    """A head dimension is cut into two tiles only where that is narrower than one."""
    if config.head_tiles not in (1, 2):
        return f"head_tiles={config.head_tiles} is neither 1 nor 2"
    cut = any(len(widths) == 2 for widths in tile_widths(spec, 2))
    if config.head_tiles == 2 and not cut:
        return f"head dimensions {spec.head_dim_qk} and {spec.head_dim_v} are no narrower as two tiles"
    return None


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


CONSTRAINTS: dict[str, Constraint] = {
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


def check_config(config: KernelConfig, spec: AttentionSpec, target: GpuTarget) -> tuple[str, ...]:
    """Return every reason why `config` is illegal for `spec` on `target`; empty when it is legal.

    Raises:
        ConfigError: if the config belongs to a template without constraints.
    """
    if not isinstance(config, TritonForwardConfig):
        raise ConfigError(f"no constraints for template {config.template!r}; known: {TritonForwardConfig.template}")
    reasons = (predicate(config, spec, target) for predicate in CONSTRAINTS.values())
    return tuple(reason for reason in reasons if reason is not None)


def require_legal(config: KernelConfig, spec: AttentionSpec, target: GpuTarget) -> None:
    """Return if `config` is legal.

    Raises:
        ConfigError: listing every reason why it is not.
    """
    reasons = check_config(config, spec, target)
    if reasons:
        raise ConfigError(f"{config} is illegal for {spec} on {target}: {'; '.join(reasons)}")
