"""Configs for problems that nobody tuned: what usually wins on an architecture, then what runs anywhere."""

from __future__ import annotations

import dataclasses

from flashgen.codegen import KernelConfig, TritonForwardConfig
from flashgen.codegen.head_tiles import tile_widths
from flashgen.codegen.kernel_config import Loads
from flashgen.heuristics import hopper_forward
from flashgen.spec import AttentionSpec, DType, Problem
from flashgen.target import GpuTarget

_DIAGONAL_GROUP = 16


def default_configs(problem: Problem, target: GpuTarget) -> tuple[KernelConfig, ...]:
    """Return configs to try in order, the most promising first; some may break a constraint of the target.

    On Hopper the kernels written for it come before those that run anywhere, where they compute the problem at all.
    """
    return (*hopper_forward.default_configs(problem, target), *_portable_configs(problem, target))


def _portable_configs(problem: Problem, target: GpuTarget) -> tuple[TritonForwardConfig, ...]:
    spec = problem.spec
    head_dim = max(spec.head_dim_qk, spec.head_dim_v)
    if spec.dtype is DType.FP32:
        # IEEE products run on the plain cores: small tiles of many warps keep the operands in registers.
        return (_config(64 if head_dim <= 64 else 32, 32, 8, 1), *safe_configs())
    if head_dim > 256:
        wide = _config(64, 32, 8, 1)
        return (dataclasses.replace(wide, head_tiles=2), wide, *safe_configs())
    cut = any(len(widths) == 2 for widths in tile_widths(spec, 2))
    if target.has_wgmma:
        first = _hopper_cut(spec) if cut else _hopper(spec, head_dim)
        if hopper_forward.has_diagonal(spec):
            # The longest tiles of many heads first: 2 to 10% on an H200, and as much lost where tiles are all alike.
            first = tuple(dataclasses.replace(config, head_group=_DIAGONAL_GROUP) for config in first)
    elif target.backend == "hip":
        first = (_config(128, 64, 4, 1), _config(64, 64, 4, 1))
    elif target.has_tma:
        first = (_config(128, 64, 8 if head_dim > 128 else 4, 2, "descriptor"), _config(64, 64, 4, 2, "descriptor"))
    else:
        first = (_config(128, 64, 4 if head_dim <= 64 else 8, 3), _config(128, 32, 4, 3), _config(64, 32, 4, 2))
    if problem.shape.seqlen_q <= 64:
        first = (_config(64, 64, 4, 3, "descriptor" if target.has_tma else "pointer"), *first)
    if cut:
        first = (*(dataclasses.replace(config, head_tiles=2) for config in first), *first)
    pointers = tuple(dataclasses.replace(config, loads="pointer") for config in first if config.loads != "pointer")
    return (*first, *pointers, *safe_configs())


def safe_configs() -> tuple[TritonForwardConfig, ...]:
    """Return small configs that fit every GPU and every stride, for a last resort."""
    wide = (_config(64, 32, 8, 1), _config(32, 32, 4, 1), _config(16, 16, 2, 1))
    return (_config(64, 32, 4, 1), _config(32, 32, 2, 1), _config(16, 16, 1, 1), *wide)


def _hopper(spec: AttentionSpec, head_dim: int) -> tuple[TritonForwardConfig, ...]:
    if spec.dtype is DType.TF32 or spec.bias != "none" or spec.dropout or spec.score_mod is not None:
        # Wider elements, and what comes to the scores, take shared memory and registers of their own.
        return (_config(64, 64, 4, 2, "descriptor"), _config(64, 32, 4, 2, "descriptor"))
    # Two programs on a multiprocessor hide each other's softmax; at 256 columns only one fits.
    if head_dim <= 64:
        return (_config(64, 128, 4, 2, "descriptor"), _config(128, 64, 4, 2, "descriptor"))
    if head_dim <= 128:
        return (_config(128, 64, 4, 2, "descriptor"), _config(64, 64, 4, 3, "descriptor"))
    return (_config(128, 64, 8, 2, "descriptor"), _config(64, 32, 4, 2, "descriptor"))


def _hopper_cut(spec: AttentionSpec) -> tuple[TritonForwardConfig, ...]:
    # What won among two composed tiles on an H200.
    if spec.head_dim_v > 160:
        return (_config(64, 32, 4, 2, "descriptor"), _config(128, 64, 8, 2, "descriptor"))
    if 80 < spec.head_dim_v < 128:
        return (_config(128, 64, 8, 2, "descriptor"), _config(64, 64, 4, 2, "descriptor"))
    return (_config(64, 64, 4, 2, "descriptor"), _config(64, 32, 4, 2, "descriptor"))


def _config(block_m: int, block_n: int, warps: int, stages: int, loads: Loads = "pointer") -> TritonForwardConfig:
    return TritonForwardConfig(block_m=block_m, block_n=block_n, num_warps=warps, num_stages=stages, loads=loads)
