"""Configs for gradients that nobody tuned: what usually wins on an architecture, then what runs anywhere.

dQ has a kernel of its own in all of them: they serve every mask, and give the same bits every time.
"""

from __future__ import annotations

import dataclasses

from flashgen.codegen import KernelConfig, TritonBackwardConfig
from flashgen.spec import AttentionSpec, DType, Problem
from flashgen.target import GpuTarget

_Tile = tuple[int, int, int, int]  # block_m, block_n, num_warps, num_stages


def default_configs(problem: Problem, target: GpuTarget) -> tuple[KernelConfig, ...]:
    """Return configs to try in order, the most promising first; some may break a constraint of the target."""
    spec = problem.spec
    head_dim = max(spec.head_dim_qk, spec.head_dim_v)
    if spec.dtype is DType.FP32:
        # IEEE products run on the plain cores: small tiles of many warps keep the operands in registers.
        side = 32 if head_dim <= 128 else 16
        return (_config((side, side, 8, 1), (side, side, 8, 1)), *safe_configs())
    if target.has_wgmma or target.capability // 10 == 10:
        first = _of_warpgroups(spec, head_dim)
        if not (spec.varlen or spec.seqused):
            first = (*(dataclasses.replace(config, loads="descriptor") for config in first), *first)
    elif target.backend == "hip":
        first = _of_cdna(head_dim)
    else:
        first = _of_warps(head_dim * spec.dtype.itemsize // 2, target)
    return (*first, *safe_configs())


def safe_configs() -> tuple[KernelConfig, ...]:
    """Return small configs that fit every GPU and every stride, for a last resort."""
    return (
        _config((32, 64, 4, 1), (64, 32, 4, 1)),
        _config((32, 32, 4, 1), (32, 32, 4, 1)),
        _config((32, 32, 8, 1), (32, 32, 8, 1)),
        _config((16, 16, 1, 1), (16, 16, 1, 1)),
        _config((16, 16, 4, 1), (16, 16, 4, 1)),
    )


def _of_warpgroups(spec: AttentionSpec, head_dim: int) -> tuple[TritonBackwardConfig, ...]:
    """Return what suits products that read shared memory."""
    if spec.dtype is DType.TF32 or spec.bias != "none" or spec.dropout or spec.score_mod is not None:
        # Wider elements, and what comes to the scores, take shared memory and registers of their own.
        if head_dim <= 64:
            return (_config((64, 64, 4, 2), (64, 64, 4, 2)),)
        return (_config((32, 64, 8, 2), (64, 32, 4 if head_dim > 128 else 8, 2)),)
    # Two programs on a multiprocessor hide each other's exponentials; at 256 columns only one fits.
    if head_dim <= 64:
        return (_config((128, 64, 4, 2), (64, 64, 4, 3)), _config((64, 64, 4, 2), (64, 64, 4, 2)))
    if head_dim <= 128:
        # Copies by threads need more registers: there tiles of more warps.
        fast, slim = _config((64, 64, 4, 2), (128, 64, 8, 3)), _config((32, 128, 8, 2), (128, 64, 8, 2))
        fast = dataclasses.replace(fast, head_group=4)
        return (slim, fast) if spec.varlen or spec.seqused else (fast, slim)
    fast = _config((64, 64, 8, 2), (64, 32, 4, 3))
    single = () if not spec.mask.by_formula else (dataclasses.replace(fast, head_group=4, loops="single"),)
    return (*single, _config((32, 64, 8, 2), (128, 32, 8, 2)), _config((32, 64, 8, 1), (64, 32, 4, 2)))


def _of_warps(head_dim: int, target: GpuTarget) -> tuple[TritonBackwardConfig, ...]:
    """Return what suits products that take their operands from registers; head_dim in 16-bit elements."""
    if head_dim <= 64:
        return (_config((64, 64, 4, 2), (64, 64, 4, 2)),)
    if head_dim <= 128:
        return (_config((64, 64, 8, 2), (64, 64, 8, 2)), _config((64, 64, 8, 1), (64, 64, 8, 1)))
    if target.smem_bytes > 128 * 1024:
        return (_config((32, 64, 8, 1), (64, 32, 8, 1)),)
    return (_config((32, 32, 8, 1), (32, 32, 8, 1)),)


def _of_cdna(head_dim: int) -> tuple[TritonBackwardConfig, ...]:
    """Return what suits 64 KB of shared memory."""
    if head_dim <= 128:
        return (_config((32, 64, 4, 1), (64, 32, 4, 2)),)
    return (_config((32, 32, 4, 1), (32, 32, 4, 2)),)


def _config(dkdv: _Tile, dq: _Tile) -> TritonBackwardConfig:
    block_m1, block_n1, num_warps, num_stages = dkdv
    block_m2, block_n2, num_warps2, num_stages2 = dq
    return TritonBackwardConfig(
        block_m1=block_m1,
        block_n1=block_n1,
        num_warps=num_warps,
        num_stages=num_stages,
        block_m2=block_m2,
        block_n2=block_n2,
        num_warps2=num_warps2,
        num_stages2=num_stages2,
    )
