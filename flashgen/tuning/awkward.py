"""The shapes that a config is checked at."""

from __future__ import annotations

import math

from flashgen.codegen import DecodeConfig, HopperDecodeConfig, HopperForwardConfig, KernelConfig
from flashgen.codegen.constraints import shape_refusal
from flashgen.measure import awkward_decode_shapes, awkward_shapes
from flashgen.spec import Problem, Shape

# For each program on a multiprocessor: more than one on each of 132 takes, so that programs go on to a second tile.
_MANY_TILES = 200
# More than a warp of a decode kernel looks at together, of half the longest length on average.
_MANY_SEQUENCES = 40


def awkward_for(problem: Problem, config: KernelConfig) -> tuple[Shape, ...]:
    """Return small shapes that are awkward for the tiles of any of a config's kernels, none of them without keys.

    Programs that take tile after tile, or several key tiles, get one shape of many, too.
    """
    many = []
    if isinstance(config, HopperForwardConfig):
        many.append(_many_tiles(problem, config))
    if isinstance(config, DecodeConfig):
        ((rows, block_n),) = config.blocks
        # Of one head, where rows are not those of a whole group.
        rows *= problem.shape.group if isinstance(config, HopperDecodeConfig) else 1
        found = [s for s in awkward_decode_shapes(problem, rows, block_n) if not shape_refusal(config, s)]
        many.append(_many_keys(problem, config))
    else:
        found = [shape for blocks in config.blocks for shape in awkward_shapes(problem, *blocks)]
    # Nothing is launched without keys.
    return (*dict.fromkeys(shape for shape in found if shape.seqlen_k), *many)


def _many_tiles(problem: Problem, config: HopperForwardConfig) -> Shape:
    nheads_kv = min(problem.shape.nheads_kv, 2)
    heads = nheads_kv * problem.shape.group
    return Shape(
        # Two tiles of queries, the second of a few rows, for each head or as many as a tile has, and three of keys.
        batch=math.ceil(_MANY_TILES * config.programs * config.heads_of_tile / (2 * heads)),
        seqlen_q=config.block_m + 3,
        seqlen_k=2 * config.block_n + 1,
        nheads_q=heads,
        nheads_kv=nheads_kv,
    )


def _many_keys(problem: Problem, config: DecodeConfig) -> Shape:
    nheads_kv = min(problem.shape.nheads_kv, 2)
    # Several for each program: teams of one head are twice as many as those of two.
    key_tiles = 4 // nheads_kv * _MANY_TILES * config.programs
    return Shape(
        batch=_MANY_SEQUENCES,
        # Rows of two tiles, some of which end before the last key tiles of a long part.
        seqlen_q=config.block_m + 3 if isinstance(config, HopperDecodeConfig) else 1,
        seqlen_k=math.ceil(key_tiles / _MANY_SEQUENCES) * config.block_n + 1,
        nheads_q=nheads_kv * problem.shape.group,
        nheads_kv=nheads_kv,
    )
