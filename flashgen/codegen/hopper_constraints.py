"""What a config of the forward kernel for Hopper must keep to, see `flashgen.codegen.constraints`."""

from __future__ import annotations

import typing

from flashgen.codegen.head_tiles import tile_widths
from flashgen.codegen.hopper_config import ROWS_OF_CONSUMER, HopperConfig, HopperForwardConfig
from flashgen.codegen.hopper_plan import HEAD_TILES
from flashgen.codegen.limits import alignment_reason, shared_memory_reason, side_reason
from flashgen.spec import AttentionSpec, DType
from flashgen.spec.masks import Causal, Full, PrefixLM
from flashgen.target import GpuTarget

Constraint = typing.Callable[[HopperForwardConfig, AttentionSpec, GpuTarget], "str | None"]

_WARPS_OF_WARPGROUP = 4
_MAX_CONSUMERS = 3
_STAGES = (2, 4)  # with one, the copy of a tile would wait for the products of the one before
_KEYS = (32, 256)
_MAX_HEAD_DIM = 256  # columns of one product
_MAX_RESCALE = 8  # probabilities may reach 2**8, well inside float16's range
_HALF_DIAGONAL_KEYS = 128
_LEAST_HALF = 32  # columns of V, so that half of them are a whole product
# A thread's registers beside sums, scores and probabilities. Triton 3.6 spills 64 to 104 bytes where no more than these
# are left, outside of the loop over whole tiles, and 88 to 160 bytes with 16.
_SPARE_REGISTERS = 24
# What ptxas wants beside the sums of one product (C7602), its left operand in shared memory or in registers.
_SPARE_OF_PRODUCT = {"shared": 26, "registers": 30}
# Barriers, tile numbers and what the roles are handed: 428 bytes or more.
_LEAST_OTHER_BYTES = 400
_RESERVED_BYTES = 1024  # of each program, by CUDA


def runs_on_hopper(config: HopperConfig, spec: AttentionSpec, target: GpuTarget) -> str | None:
    """The kernel is written for the warpgroup products and bulk copies of sm_90, which no other GPU has."""
    if not target.has_wgmma:
        return f"the kernel is written for sm_90, {target.device_name} is {target.arch}"
    return None


def elements_of_16_bits(config: HopperConfig, spec: AttentionSpec, target: GpuTarget) -> str | None:
    """Q, K and V are of 16 bits an element."""
    if spec.dtype not in (DType.FP16, DType.BF16):
        return f"the kernel has products of fp16 and bf16, not of {spec.dtype}"
    return None


def features_known(config: HopperForwardConfig, spec: AttentionSpec, target: GpuTarget) -> str | None:
    """The template has no bias, dropout, used lengths or descale factors."""
    missing = [word for word in spec.features if word.startswith(("bias", "dropout", "seqused", "descale"))]
    return f"the kernel does not know {', '.join(missing)}" if missing else None


def head_dims_fit_product(config: HopperConfig, spec: AttentionSpec, target: GpuTarget) -> str | None:
    """One product has 256 columns at most."""
    widest = max(spec.head_dim_qk, spec.head_dim_v)
    return f"a head dimension of {widest} is more than {_MAX_HEAD_DIM}" if widest > _MAX_HEAD_DIM else None


def roles_within_limits(config: HopperConfig, spec: AttentionSpec, target: GpuTarget) -> str | None:
    """A consumer is a warpgroup, there are one to three of them, and registers are shared out by role."""
    if config.num_warps != _WARPS_OF_WARPGROUP:
        return f"num_warps={config.num_warps} is not {_WARPS_OF_WARPGROUP}, the warps of one consumer"
    if not 1 <= config.consumers <= _MAX_CONSUMERS:
        return f"consumers={config.consumers} is not from 1 to {_MAX_CONSUMERS}"
    if config.programs < 1:
        return f"programs={config.programs} is less than 1"
    if config.maxnreg:
        return f"maxnreg={config.maxnreg} is not 0: the roles of warps say how many registers they have"
    return None


def numbers_within_limits(config: HopperConfig, spec: AttentionSpec, target: GpuTarget) -> str | None:
    """Rings hold two to four tiles, and rescaling waits for a growth of at most 2**8."""
    least, most = _STAGES
    if not least <= config.num_stages <= most:
        return f"num_stages={config.num_stages} is not from {least} to {most}"
    if config.rescale > _MAX_RESCALE:
        return f"rescale={config.rescale} is more than {_MAX_RESCALE}"
    return None


def groups_have_heads(config: HopperForwardConfig, spec: AttentionSpec, target: GpuTarget) -> str | None:
    """Groups of heads whose tiles go out together have one head or more."""
    return f"head_group={config.head_group} is less than 1" if config.head_group < 1 else None


def block_power_of_two(config: HopperConfig, spec: AttentionSpec, target: GpuTarget) -> str | None:
    """Key tiles have a power of two of keys, as many as one product has columns."""
    least, most = _KEYS
    if config.block_n > most:
        return f"block_n={config.block_n} is more than {most}"
    return side_reason("block_n", config.block_n, least)


def table_rows_power_of_two(config: HopperForwardConfig, spec: AttentionSpec, target: GpuTarget) -> str | None:
    """Tables of tiles have a power of two of query rows to a tile, which three consumers do not have."""
    if config.block_m & (config.block_m - 1) and not spec.mask.by_formula:
        return f"{config.consumers} consumers have {config.block_m} rows, the tiles of the mask's table a power of two"
    return None


def heads_share_keys(config: HopperConfig, spec: AttentionSpec, target: GpuTarget) -> str | None:
    """Heads that are packed into one tile walk the same keys, which a table that differs by head does not give."""
    if config.pack == "rows":
        return None
    if config.consumers < 2:
        return f"pack=heads needs 2 consumers or more, got {config.consumers}"
    if "h" in spec.mask.uses and not spec.mask.by_formula:
        return f"pack=heads needs the same key tiles for all heads of a group, the mask {spec.mask} differs by head"
    return None


def turns_need_others(config: HopperConfig, spec: AttentionSpec, target: GpuTarget) -> str | None:
    """One consumer has nobody to take turns with."""
    if config.turns == "alternate" and config.consumers < 2:
        return f"turns=alternate needs 2 consumers or more, got {config.consumers}"
    return None


def half_diagonal_exists(config: HopperForwardConfig, spec: AttentionSpec, target: GpuTarget) -> str | None:
    """Half of a tile of 128 keys is skipped where a formula says that 64 rows do not see it, by each consumer alone."""
    if config.diagonal == "whole":
        return None
    if config.block_n != _HALF_DIAGONAL_KEYS:
        return f"diagonal=half needs block_n={_HALF_DIAGONAL_KEYS}, got {config.block_n}"
    if config.turns == "alternate":
        return "diagonal=half gives consumers unequal steps, turns=alternate needs equal ones"
    diagonal = any(isinstance(leaf, Causal | PrefixLM) for leaf in spec.mask.leaves)
    if not (diagonal and spec.mask.by_formula):
        return f"diagonal=half needs a causal or prefix mask by formula, got {spec.mask}"
    return None


def single_loop_matters(config: HopperConfig, spec: AttentionSpec, target: GpuTarget) -> str | None:
    """One loop instead of several is another kernel only where some tile of keys needs a mask."""
    if config.loops == "single" and isinstance(spec.mask, Full):
        return f"loops=single is the same kernel as split under the mask {spec.mask}"
    return None


def out_buffer_fits(config: HopperForwardConfig, spec: AttentionSpec, target: GpuTarget) -> str | None:
    """Q's buffer takes outputs of its own shape, once its products are over; half a tile is a whole product wide."""
    widths_qk, widths_v = tile_widths(spec, HEAD_TILES)
    if config.out_buffer == "queries":
        if widths_qk != widths_v:
            return f"out_buffer=queries needs equal tiles, those of Q are {widths_qk} wide, of the output {widths_v}"
        if config.tiles == "overlap":
            return "out_buffer=queries holds the output while tiles=overlap needs the next Q there"
    if config.out_buffer == "half" and min(widths_v) < _LEAST_HALF:
        return f"out_buffer=half halves a tile {min(widths_v)} columns wide, less than {_LEAST_HALF}"
    return None


def descriptor_alignment(config: HopperConfig, spec: AttentionSpec, target: GpuTarget) -> str | None:
    """A bulk copy moves rows of a multiple of 16 bytes in boxes of at most 256 a side."""
    widest = max(max(widths) for widths in tile_widths(spec, HEAD_TILES))
    return alignment_reason(spec, max(config.block_n, ROWS_OF_CONSUMER, widest), "a bulk copy")


def product_fits_registers(config: HopperConfig, spec: AttentionSpec, target: GpuTarget) -> str | None:
    """The sums of one product fit the registers that a thread starts with, which is what the assembler goes by."""
    if not _has_roles(config):
        return None
    start = config.launch_options("").maxnreg
    widest_v = max(tile_widths(spec, HEAD_TILES)[1])
    needed = max(
        config.block_n // 2 + _SPARE_OF_PRODUCT[config.queries],
        # Probabilities are always in registers.
        widest_v // 2 + _SPARE_OF_PRODUCT["registers"],
    )
    if needed > start:
        widest = max(widest_v, config.block_n)
        return f"a product of {widest} columns needs {needed} registers, a thread starts with {start}"
    return None


def shared_memory_fits(config: HopperConfig, spec: AttentionSpec, target: GpuTarget) -> str | None:
    """Q, the rings of K and V and the output's buffer fit one program, and all programs one multiprocessor."""
    needed = shared_memory_lower_bound(config, spec)
    if config.programs > 1:
        total = config.programs * (needed + _RESERVED_BYTES)
        if total > target.smem_per_sm_bytes:
            return (
                f"{config.programs} programs need at least {total} bytes of shared memory, a multiprocessor of "
                f"{target.device_name} has {target.smem_per_sm_bytes}"
            )
    return shared_memory_reason(needed, target)


def shared_memory_lower_bound(config: HopperConfig, spec: AttentionSpec) -> int:
    """Return the fewest bytes of shared memory that one program takes."""
    width_qk, width_v = map(sum, tile_widths(spec, HEAD_TILES))
    # Of decoding, outputs are written from registers.
    out_buffer = config.out_buffer if isinstance(config, HopperForwardConfig) else "none"
    width_out = {"own": width_v, "half": width_v // 2}.get(out_buffer, 0)
    rows = ROWS_OF_CONSUMER * config.consumers
    columns = rows * (width_qk + width_out) + config.num_stages * config.block_n * (width_qk + width_v)
    return columns * spec.dtype.itemsize + _LEAST_OTHER_BYTES


def accumulators_fit_registers(config: HopperConfig, spec: AttentionSpec, target: GpuTarget) -> str | None:
    """Sums, scores, probabilities and Q, where it is there, fit the registers of a consumer's threads."""
    if not _has_roles(config):
        return None
    width_qk, width_v = map(sum, tile_widths(spec, HEAD_TILES))
    # 64 rows over 128 threads: float32 sums and scores, 16-bit probabilities and Q.
    held = width_v // 2 + config.block_n // 2 + config.block_n // 4
    held += width_qk // 4 if config.queries == "registers" else 0
    needed, limit = held + _SPARE_REGISTERS, config.role_registers[0]
    if needed > limit:
        return (
            f"{width_v} columns of sums beside {config.block_n} of scores, queries={config.queries}, need about "
            f"{needed} registers a thread, a consumer's have {limit}"
        )
    return None


def _has_roles(config: HopperConfig) -> bool:
    """Return whether the numbers that registers are shared out by are in their limits."""
    return 1 <= config.consumers <= _MAX_CONSUMERS and config.programs >= 1


HOPPER_CONSTRAINTS: dict[str, Constraint] = {
    predicate.__name__: predicate
    for predicate in (
        runs_on_hopper,
        elements_of_16_bits,
        features_known,
        head_dims_fit_product,
        roles_within_limits,
        numbers_within_limits,
        groups_have_heads,
        block_power_of_two,
        table_rows_power_of_two,
        heads_share_keys,
        turns_need_others,
        half_diagonal_exists,
        single_loop_matters,
        out_buffer_fits,
        descriptor_alignment,
        product_fits_registers,
        shared_memory_fits,
        accumulators_fit_registers,
    )
}
