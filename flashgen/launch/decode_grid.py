"""How many programs decode, and which keys of which tiles of rows each of them has."""

from __future__ import annotations

import dataclasses

from flashgen.codegen import DecodeConfig, HopperDecodeConfig, KernelConfig, KernelResources
from flashgen.errors import ConfigError, InputError
from flashgen.launch.forward import check_sizes
from flashgen.spec import Shape
from flashgen.target import GpuTarget, resident_blocks

# Of the programs that a GPU has room for, so many at least have work where keys suffice: fewer read as fast.
_BUSY_SHARE = 0.9


def num_tiles(shape: Shape, config: KernelConfig) -> int:
    """Return the number of tiles of rows of all sequences and heads.

    Raises:
        ConfigError: if the config is not one of a decode kernel.
        InputError: if there are more than 32-bit integers count.
    """
    if config.phase != "decode":
        raise ConfigError(f"template {config.template!r} has no decode kernel")
    ((block_m, _),) = config.blocks
    if isinstance(config, HopperDecodeConfig):
        tiles = -(-shape.seqlen_q // block_m) * shape.batch * (shape.nheads_q // config.heads_of_tile)
    else:
        # Rows are the queries of a whole group.
        tiles = -(-shape.seqlen_q * shape.group // block_m) * shape.batch * shape.nheads_kv
    check_sizes(shape, tiles, block_m)
    return tiles


def num_counters(shape: Shape, config: KernelConfig) -> int:
    """Return by how many counters programs learn of each other: one for all that is merged by itself."""
    merged = config.consumers if isinstance(config, HopperDecodeConfig) else 1
    return max(1, num_tiles(shape, config) * merged)


@dataclasses.dataclass(frozen=True, kw_only=True)
class DecodeGrid:
    """How the keys of a call are divided among programs.

    Attributes:
        programs: how many are launched.
        splits: into how many units each tile of rows is cut; 0: units are key tiles, and programs have as many each.
        lanes: programs of a team, which has the same keys of as many tiles of rows.
    """

    programs: int
    splits: int
    lanes: int


def decode_grid(shape: Shape, config: DecodeConfig, num_splits: int, num_sms: int) -> DecodeGrid:
    """Return how many programs are launched, and what each of them does.

    That does not depend on the lengths of the sequences, of which the device alone knows. `shape.seqlen_k` is their
    upper bound: there are no more programs than key tiles within it.

    Args:
        shape: of the call.
        config: a decode config.
        num_splits: what the caller asks for; 0 divides the keys evenly.
        num_sms: multiprocessors of the GPU.

    Raises:
        InputError: if that is more programs than can be launched.
    """
    tiles = num_tiles(shape, config)
    blocks = max(1, -(-shape.seqlen_k // config.block_n))
    if num_splits:
        units = tiles * min(num_splits, blocks)
        if units > 2**31 - 1:
            raise InputError(f"num_splits={num_splits} makes {units} programs of {tiles} tiles: give fewer, or 'auto'")
        return DecodeGrid(programs=units, splits=num_splits, lanes=1)
    if not tiles:
        return DecodeGrid(programs=0, splits=0, lanes=1)
    programs = min(num_sms * config.programs, tiles * blocks)
    lanes = _lanes(tiles // shape.batch, programs)
    teams = min(programs // lanes, shape.batch * (tiles // shape.batch // lanes) * blocks)
    return DecodeGrid(programs=teams * lanes, splits=0, lanes=lanes)


def _lanes(tiles: int, programs: int) -> int:
    """Return how many of a sequence's tiles of rows are worked on side by side: all, if that leaves few programs idle.

    Programs that read the same keys of neighbouring heads at the same time find them near each other in memory, and
    those of one head's tiles in the L2 cache.
    """
    divisors = (lanes for lanes in range(min(tiles, programs), 0, -1) if tiles % lanes == 0)
    return next(lanes for lanes in divisors if programs // lanes * lanes >= _BUSY_SHARE * programs)


def waits_for_each_other(grid: DecodeGrid, config: DecodeConfig, resources: KernelResources, target: GpuTarget) -> bool:
    """Return whether the GPU has room for all programs, which may then wait for each other."""
    blocks, _ = resident_blocks(target, config.warps_of_program, resources.registers, resources.smem_bytes)
    return target.backend == "cuda" and grid.programs <= blocks * target.num_sms
