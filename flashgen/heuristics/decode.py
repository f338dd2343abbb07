"""Configs for decoding that nobody tuned: what usually wins on an architecture, then what runs anywhere.

None of it depends on how long the cache is: the host knows its capacity at most, and the kernel divides what is used.
"""

from __future__ import annotations

import dataclasses

from flashgen.codegen import HopperDecodeConfig, KernelConfig, TritonDecodeConfig
from flashgen.codegen.constraints import check_config
from flashgen.codegen.head_tiles import next_power_of_two, tile_widths
from flashgen.spec import AttentionSpec, DType, Problem, Shape
from flashgen.target import GpuTarget

_MOST_ROWS = 64  # of one program
_CHUNK = 64  # queries of a sequence from which on tiles of rows are many: a prefill in chunks
_WIDE = 256  # columns of V whose sums take the registers of eight warps
_DEEPEST = 4  # tiles on their way to a program
_FEW_PARTS, _MANY_PARTS = (4, 16), 32  # of a tile of rows
_SPARE_BYTES = 4096  # of shared memory, for what no tile takes


def default_configs(problem: Problem, target: GpuTarget) -> tuple[KernelConfig, ...]:
    """Return configs to try in order, the most promising first; some may break a constraint of the target.

    The numbers are what won on an H200 at D=128. Few rows leave the matrix units idle: one program with long steps and
    deep buffers reads as fast as several, and there is less to merge.
    """
    spec, shape = problem.spec, problem.shape
    if spec.dtype is DType.FP32:
        # IEEE products run on the plain cores: small tiles of many warps keep the operands in registers.
        return (_config(16, 32, 8, 1), *safe_configs())
    rows = rows_of_tile(shape)
    chunks = shape.seqlen_q >= _CHUNK and rows >= _MOST_ROWS
    programs = 2 if chunks and spec.head_dim_v < _WIDE else 1
    num_warps = 8 if rows == _MOST_ROWS and spec.head_dim_v >= _WIDE else 4
    # A wide head's tile of 128 keys leaves no room for another beside it.
    keys = 128 if rows < _MOST_ROWS and _stages(spec, target, 128, programs) > 1 else 64
    first = []
    for block_n in (keys, keys // 2):
        config = TritonDecodeConfig(
            block_m=rows,
            block_n=block_n,
            num_warps=num_warps,
            num_stages=_stages(spec, target, block_n, programs),
            programs=programs,
            launch="dependent" if target.has_tma else "plain",
            merge_parts=_merge_parts(shape, rows, programs, target),
        )
        first.append(dataclasses.replace(config, head_tiles=2) if _is_cut(spec) else config)
    if spec.page_size % first[0].block_n:
        first = [gathering(config) for config in first]
    if target.has_tma:
        first = [*(dataclasses.replace(config, loads="descriptor") for config in first), *first]
    return (*(_of_chunks(problem, target) if chunks else ()), *first, *safe_configs())


def _of_chunks(problem: Problem, target: GpuTarget) -> list[HopperDecodeConfig]:
    """Return what the kernel for Hopper can compute of a prefill in chunks: the deepest buffers that fit, Q beside."""
    base = HopperDecodeConfig(
        consumers=2, block_n=128, num_warps=4, num_stages=3, queries="registers", release="named", rescale=8
    )
    usual = [base, dataclasses.replace(base, num_stages=2), dataclasses.replace(base, num_stages=2, queries="shared")]
    narrow = dataclasses.replace(base, block_n=64, num_stages=2, queries="shared", convert="late")
    return [config for config in (*usual, narrow) if not check_config(config, problem.spec, target)]


def safe_configs() -> tuple[KernelConfig, ...]:
    """Return small configs that fit every GPU, every stride and every page size, for a last resort."""
    small = (_config(16, 32, 4, 1), _config(16, 32, 8, 1), _config(16, 16, 1, 1), _config(16, 16, 2, 1))
    return (*small, *(dataclasses.replace(config, head_tiles=2) for config in small))


def rows_of_tile(shape: Shape) -> int:
    """Return the rows of the narrowest tile that holds the queries of a group, or of the widest that is any good."""
    return min(_MOST_ROWS, next_power_of_two(max(1, shape.seqlen_q * shape.group)))


def gathering(config: TritonDecodeConfig) -> TritonDecodeConfig:
    """Return a config that gathers keys one by one: more warps of a narrow tile share the work of their addresses.

    On an H200, b=16 of 4096 keys in pages of 16: 69.1 us against 80.4 with four warps, 65.5 over caches in one piece.
    """
    return dataclasses.replace(config, num_warps=8) if config.block_m < _MOST_ROWS else config


def _merge_parts(shape: Shape, rows: int, programs: int, target: GpuTarget) -> int:
    """Return how many parts of a tile to merge at once: about as many as equal sequences are cut into."""
    tiles = shape.batch * shape.nheads_kv * -(-shape.seqlen_q * shape.group // rows)
    parts = target.num_sms * programs // max(1, tiles)
    return next((few for few in _FEW_PARTS if parts <= few), _MANY_PARTS)


def _stages(spec: AttentionSpec, target: GpuTarget, block_n: int, programs: int) -> int:
    """Return how many tiles of K and V so many programs have room for on one multiprocessor."""
    width_qk, width_v = map(sum, tile_widths(spec, 2))
    tile = block_n * (width_qk if spec.shared_kv else width_qk + width_v) * spec.kv_dtype.itemsize
    return max(1, min(_DEEPEST, (target.smem_bytes // programs - _SPARE_BYTES) // tile))


def _is_cut(spec: AttentionSpec) -> bool:
    return any(len(widths) == 2 for widths in tile_widths(spec, 2))


def _config(block_m: int, block_n: int, num_warps: int, num_stages: int) -> TritonDecodeConfig:
    return TritonDecodeConfig(block_m=block_m, block_n=block_n, num_warps=num_warps, num_stages=num_stages)
