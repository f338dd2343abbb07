"""What a config of the decode kernel for Hopper must keep to, see `flashgen.codegen.constraints`."""

from __future__ import annotations

import typing

from flashgen.codegen.hopper_config import HopperDecodeConfig
from flashgen.codegen.hopper_constraints import (
    accumulators_fit_registers,
    block_power_of_two,
    descriptor_alignment,
    elements_of_16_bits,
    head_dims_fit_product,
    heads_share_keys,
    numbers_within_limits,
    product_fits_registers,
    roles_within_limits,
    runs_on_hopper,
    shared_memory_fits,
    single_loop_matters,
    turns_need_others,
)
from flashgen.spec import AttentionSpec
from flashgen.target import GpuTarget

Constraint = typing.Callable[[HopperDecodeConfig, AttentionSpec, GpuTarget], "str | None"]

# Shared memory is swizzled in groups of so many.
_ROWS_OF_COPY = 8

_UNKNOWN = ("leftpad", "descale", "fp8_kv", "shared_kv")


def features_known(config: HopperDecodeConfig, spec: AttentionSpec, target: GpuTarget) -> str | None:
    """The template reads caches of Q's type from their first row on."""
    missing = [word for word in spec.features if word.partition("=")[0] in _UNKNOWN]
    return f"the kernel does not know {', '.join(missing)}" if missing else None


def parts_have_tiles(config: HopperDecodeConfig, spec: AttentionSpec, target: GpuTarget) -> str | None:
    """A part of a tile of rows has one key tile or more."""
    return f"min_blocks={config.min_blocks} is less than 1" if config.min_blocks < 1 else None


def pages_hold_tiles(config: HopperDecodeConfig, spec: AttentionSpec, target: GpuTarget) -> str | None:
    """A bulk copy moves rows that follow each other, those of one page, and fills whole groups of rows of a buffer."""
    size, keys = spec.page_size, config.block_n
    if size % keys and (size < _ROWS_OF_COPY or keys % size):
        return (
            f"bulk copies take tiles of {keys} keys from one page, or from several whole ones of {_ROWS_OF_COPY} keys "
            f"or more, not from pages of {size}"
        )
    return None


HOPPER_DECODE_CONSTRAINTS: dict[str, Constraint] = {
    predicate.__name__: predicate
    for predicate in (
        runs_on_hopper,
        elements_of_16_bits,
        features_known,
        head_dims_fit_product,
        roles_within_limits,
        numbers_within_limits,
        parts_have_tiles,
        block_power_of_two,
        pages_hold_tiles,
        heads_share_keys,
        turns_need_others,
        single_loop_matters,
        descriptor_alignment,
        product_fits_registers,
        shared_memory_fits,
        accumulators_fit_registers,
    )
}
