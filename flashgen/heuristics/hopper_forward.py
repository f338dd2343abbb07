"""Configs of the forward kernel for Hopper where nobody tuned: those that won the like on an H200."""

from __future__ import annotations

import dataclasses
import itertools
import math

from flashgen.codegen import HopperForwardConfig
from flashgen.codegen.constraints import check_config, shape_refusal
from flashgen.codegen.hopper_config import Queries
from flashgen.codegen.mask_plan import plan_mask
from flashgen.spec import AttentionSpec, Problem
from flashgen.spec.masks import Causal, Full, PrefixLM
from flashgen.target import GpuTarget

# Head dimensions up to which three consumers, or two, have registers for sums beside the scores of 128 keys.
_NARROW, _MIDDLE = 64, 128
_SHORT, _LONG = 1024, 4096  # keys up to which small tiles win, and from which on large ones do
# K and V of the heads that go out together, and of those at the end, which form one group.
_GROUP_BYTES = 8 << 20
_TAIL_BYTES = 32 << 20
_MIN_GROUP, _MAX_GROUP = 4, 32
# With more keys, K and V of a group at the end would pass by the L2 cache.
_TAIL_MAX_KEYS = 8192
_NARROW_WINDOW = 512  # keys of a row up to which tiles of 64 waste less

_QUERIES: tuple[Queries, ...] = ("registers", "shared")
_TWO = HopperForwardConfig(consumers=2, block_n=128, num_warps=4, num_stages=2)
_TWO_IN_REGISTERS = dataclasses.replace(_TWO, queries="registers")
_TWO_NARROW = dataclasses.replace(_TWO_IN_REGISTERS, block_n=64)
_IN_TURNS = dataclasses.replace(_TWO_IN_REGISTERS, turns="alternate")
_OVERLAPPING = dataclasses.replace(_TWO_IN_REGISTERS, convert="late", tiles="overlap")
_OVERLAPPING_NAMED = dataclasses.replace(_OVERLAPPING, release="named")
_THREE = dataclasses.replace(_TWO, consumers=3)
_WIDE = dataclasses.replace(_TWO, block_n=64, convert="late", rescale=8, out_buffer="half")
_ONES = dataclasses.replace(_TWO_NARROW, consumers=1, programs=2)


def default_configs(problem: Problem, target: GpuTarget) -> tuple[HopperForwardConfig, ...]:
    """Return the legal ones of those configs, the most promising first; none for what the kernel does not compute."""
    group, tail = _head_groups(problem)
    configs = dict.fromkeys((*_small_grid(problem, target), *_usual(problem)))
    grouped = (dataclasses.replace(config, head_group=group, tail_heads=tail) for config in configs)
    return tuple(
        config
        for config in grouped
        if not check_config(config, problem.spec, target) and not shape_refusal(config, problem.shape)
    )


def _small_grid(problem: Problem, target: GpuTarget) -> list[HopperForwardConfig]:
    """Return programs of one consumer, where those of two would leave multiprocessors idle."""
    shape = problem.shape
    tiles, halves = (shape.batch * shape.nheads_q * math.ceil(shape.seqlen_q / rows) for rows in (128, 64))
    if tiles >= target.num_sms:
        return []
    one = dataclasses.replace(_TWO, consumers=1, programs=1 if halves <= target.num_sms else 2)
    keys = (64,) if _scores_are_busy(problem.spec) else (128, 64)
    return [
        dataclasses.replace(one, block_n=block_n, queries=queries)
        for block_n, queries in itertools.product(keys, _QUERIES)
    ]


def _usual(problem: Problem) -> list[HopperForwardConfig]:
    spec, seqlen_k = problem.spec, problem.shape.seqlen_k
    head_dim = max(spec.head_dim_qk, spec.head_dim_v)
    if _scores_are_busy(spec):
        return _usual_of_busy_scores(problem)
    if head_dim > _MIDDLE:
        return _usual_of_wide_heads(long_diagonal=has_diagonal(spec) and seqlen_k >= _LONG)
    if not has_diagonal(spec):
        return _usual_of_equal_tiles(head_dim, seqlen_k)
    return _usual_of_narrow_diagonals(seqlen_k) if head_dim <= _NARROW else _usual_of_diagonals(seqlen_k)


def _usual_of_wide_heads(*, long_diagonal: bool) -> list[HopperForwardConfig]:
    overlapping = dataclasses.replace(_WIDE, tiles="overlap")
    held = dataclasses.replace(overlapping, convert="held", release="named")
    wide = [_WIDE, held, overlapping] if long_diagonal else [held, overlapping, _WIDE]
    half = dataclasses.replace(_TWO, out_buffer="half")
    return [half, *wide, dataclasses.replace(_TWO_NARROW, queries="shared")]


def _usual_of_equal_tiles(head_dim: int, seqlen_k: int) -> list[HopperForwardConfig]:
    held = dataclasses.replace(_THREE, convert="held")
    threes = [
        dataclasses.replace(held, turns="alternate"),
        dataclasses.replace(_THREE, convert="late", release="named"),
        dataclasses.replace(held, tiles="overlap"),
    ]
    threes = threes if head_dim <= _NARROW else []
    if seqlen_k <= _SHORT:
        return [_IN_TURNS, *threes[:1], _TWO_NARROW]
    twos = [_OVERLAPPING_NAMED, dataclasses.replace(_OVERLAPPING_NAMED, convert="held"), _OVERLAPPING]
    return [*threes, *twos, _IN_TURNS, _TWO_NARROW]


def _usual_of_narrow_diagonals(seqlen_k: int) -> list[HopperForwardConfig]:
    ones = dataclasses.replace(_ONES, programs=3)
    if seqlen_k <= _SHORT:
        return [ones, dataclasses.replace(ones, queries="shared"), _IN_TURNS]
    halved = dataclasses.replace(_TWO_IN_REGISTERS, diagonal="half")
    if seqlen_k < _LONG:
        return [ones, _IN_TURNS, _OVERLAPPING_NAMED, halved]
    three = dataclasses.replace(_THREE, tiles="overlap")
    return [three, _OVERLAPPING_NAMED, dataclasses.replace(three, release="named"), halved, _IN_TURNS]


def _usual_of_diagonals(seqlen_k: int) -> list[HopperForwardConfig]:
    longer = [
        dataclasses.replace(_TWO, convert="late", release="named"),
        dataclasses.replace(_OVERLAPPING, convert="held"),
        dataclasses.replace(_TWO_IN_REGISTERS, loops="single", tiles="overlap"),
    ]
    first = [_ONES] if seqlen_k <= _SHORT else longer
    halved = dataclasses.replace(_TWO_IN_REGISTERS, diagonal="half")
    return [*first, _IN_TURNS, _TWO, _TWO_IN_REGISTERS, halved, _TWO_NARROW]


def _usual_of_busy_scores(problem: Problem) -> list[HopperForwardConfig]:
    spec = problem.spec
    # One loop has less code, which spills fewer registers.
    single = dataclasses.replace(_ONES, loops="single")
    packed = dataclasses.replace(_TWO_NARROW, pack="heads", num_stages=3)
    two = _TWO if plan_mask(spec.mask.structure()).two_edges else _TWO_IN_REGISTERS
    rest = [dataclasses.replace(config, loops="single") for config in (_TWO_NARROW, _WIDE)]
    rest.append(dataclasses.replace(_TWO_NARROW, queries="shared", loops="single"))
    if not _has_narrow_window(problem):
        return [single, dataclasses.replace(two, loops="single"), *rest]
    if max(spec.head_dim_qk, spec.head_dim_v) > _NARROW:
        return [packed, single, *rest]
    many = dataclasses.replace(single, queries="shared", programs=3)
    return [many, dataclasses.replace(many, programs=4), packed, single, *rest]


def _scores_are_busy(spec: AttentionSpec) -> bool:
    """Return whether scores, or a mask's second edge, take registers of their own."""
    two_edges = plan_mask(spec.mask.structure()).two_edges
    return two_edges or ((spec.alibi or spec.score_mod is not None) and not isinstance(spec.mask, Full))


def _has_narrow_window(problem: Problem) -> bool:
    """Return whether a row in the middle sees few keys."""
    seqlen_q, seqlen_k = problem.shape.seqlen_q, problem.shape.seqlen_k
    mask = problem.spec.mask.structure(keep_numbers=True)
    interval = mask.row_interval(seqlen_q // 2, seqlen_q, seqlen_k)
    return interval is not None and min(interval[1], seqlen_k) - max(interval[0], 0) <= _NARROW_WINDOW


def has_diagonal(spec: AttentionSpec) -> bool:
    """Return whether rows see more keys the later they come."""
    return any(isinstance(leaf, Causal | PrefixLM) for leaf in spec.mask.leaves)


def _head_groups(problem: Problem) -> tuple[int, int]:
    """Return how many heads go out together, and how many form one group at the end."""
    spec, shape = problem.spec, problem.shape
    head_dims = spec.head_dim_qk + spec.head_dim_v
    if not has_diagonal(spec):
        # Tiles are all alike: one head after the other has the smallest part of K and V in use.
        return (4 if head_dims <= 2 * _NARROW else 1), 0
    head_bytes = max(1, shape.seqlen_k * head_dims * spec.dtype.itemsize // shape.group)
    group = min(max(_GROUP_BYTES // head_bytes, _MIN_GROUP), _MAX_GROUP)
    tail = min(_TAIL_BYTES // head_bytes, shape.batch * shape.nheads_q) if shape.seqlen_k <= _TAIL_MAX_KEYS else 0
    # Powers of two: few different numbers, and so few configs, for all the lengths of one kind of call.
    return _power_of_two_below(group), _power_of_two_below(tail)


def _power_of_two_below(number: int) -> int:
    return 1 << (number.bit_length() - 1) if number else 0
