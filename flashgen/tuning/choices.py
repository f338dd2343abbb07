"""What may be tried for a problem: the legal configs of every template of its phase, and which of them come first."""

from __future__ import annotations

import dataclasses
import functools
import itertools
import typing

from flashgen.codegen import (
    HopperDecodeConfig,
    KernelConfig,
    TritonBackwardConfig,
    TritonDecodeConfig,
    TritonForwardConfig,
    templates_of,
)
from flashgen.codegen.constraints import check_config, shape_refusal
from flashgen.codegen.head_tiles import next_power_of_two
from flashgen.errors import NoKernelError
from flashgen.heuristics import default_configs, safe_configs
from flashgen.heuristics.decode import rows_of_tile
from flashgen.search_space import LegalSpace, load_space
from flashgen.spec import AttentionSpec, Problem
from flashgen.target import GpuTarget
from flashgen.tuning.effort import Effort

_MAX_NEIGHBOURS = 4
_MAX_GUESSES = 5
# Of rows, one tile of which does for a whole group: over what holds them.
_MOST_SPARE_ROWS = 2
# Of seeds: so many of a template that is written for the GPU, before one of a template that runs anywhere.
_OWN_FOR_ONE_PORTABLE = 3


@dataclasses.dataclass(frozen=True, kw_only=True)
class Choices:
    """What may be tried for one problem.

    Attributes:
        configs: every legal config, of all templates.
        seeds: those that are tried first, in order.
        default: what would run untuned.
    """

    configs: tuple[KernelConfig, ...]
    seeds: tuple[KernelConfig, ...]
    default: KernelConfig


def find_choices(
    problem: Problem, target: GpuTarget, effort: Effort, winners: typing.Iterable[KernelConfig] = ()
) -> Choices:
    """Return what may be tried for `problem` on `target`.

    Args:
        problem: what is tuned.
        target: for which GPU.
        effort: how many of the seeds there is time for.
        winners: of like problems; the first few that are legal are tried before all else.

    Raises:
        NoKernelError: if no default config is legal.
    """
    spec = problem.spec
    default, *others = _default_configs(problem, target)
    guesses = _guesses(default, others)
    spaces = {template: _legal_space(template, spec, target) for template in templates_of(spec.phase)}
    winners = dict.fromkeys(_fitting(winners, problem))
    legal = [config for config in winners if not check_config(config, spec, target)]
    seeds: tuple[KernelConfig, ...] = ()
    for template, space in spaces.items():
        # What the shape at hand suggests, before what is good for any.
        suggested = [config for config in guesses if config.template == template]
        general = (_merging_as(default, seed) for seed in space.seeds)
        seeds = _in_turns(tuple(dict.fromkeys((*suggested, *general))), seeds)
    everything = itertools.chain.from_iterable(space.configs for space in reversed(spaces.values()))
    first = dict.fromkeys((*legal[:_MAX_NEIGHBOURS], default, *seeds))
    return Choices(
        configs=tuple(dict.fromkeys((*_fitting(everything, problem), default, *guesses))),
        seeds=tuple(_fitting(first, problem))[: effort.seeds],
        default=default,
    )


# A second, which every other problem of the spec is spared.
def kept_choices(problem: Problem, target: GpuTarget, kept: typing.Iterable[KernelConfig]) -> Choices:
    """Return the choice among configs of earlier searches that are legal today, and what would run untuned.

    Args:
        problem: what is computed.
        target: on which GPU.
        kept: the configs, the most promising first: they are tried in this order.

    Raises:
        NoKernelError: if none of them is legal; the message says why the first is not.
    """
    reasons = {config: _reasons(config, problem, target) for config in kept}
    legal = [config for config in reasons if not reasons[config]]
    if not legal:
        first = next(iter(reasons))
        raise NoKernelError(
            f"none of {len(reasons)} kept configs is legal any more; the first, {first}: {'; '.join(reasons[first])}"
        )
    default = _default_configs(problem, target)[0]
    seeds = tuple(dict.fromkeys((*legal, default)))
    # Sorted: whoever was faster the last time, it is the same study.
    configs = sorted(seeds, key=lambda config: (config.template, config))
    return Choices(configs=tuple(configs), seeds=seeds, default=default)


@functools.lru_cache(maxsize=4)
def _legal_space(template: str, spec: AttentionSpec, target: GpuTarget) -> LegalSpace:
    # Tens of thousands of configs, a second's work; lengths of one spec follow each other.
    return load_space(template).legal(spec, target)


def _fitting(configs: typing.Iterable[KernelConfig], problem: Problem) -> typing.Iterator[KernelConfig]:
    """Return those of configs that are legal for the spec which can compute the problem's shape, too, and not in vain.

    Rows of a tile that no query fills cost as much as those of queries.
    """
    most = _MOST_SPARE_ROWS * rows_of_tile(problem.shape)
    most_queries = _MOST_SPARE_ROWS * next_power_of_two(max(1, problem.shape.seqlen_q))
    return (
        config
        for config in configs
        if not shape_refusal(config, problem.shape)
        and not (isinstance(config, TritonDecodeConfig) and config.block_m > most)
        and not (isinstance(config, HopperDecodeConfig) and config.block_m > most_queries)
    )


def _merging_as(default: KernelConfig, seed: KernelConfig) -> KernelConfig:
    """Return a seed that merges as many parts at once as the default, which knows the shape, as a seed does not."""
    if not isinstance(seed, TritonDecodeConfig) or not isinstance(default, TritonDecodeConfig):
        return seed
    return dataclasses.replace(seed, merge_parts=default.merge_parts)


def _in_turns(own: tuple[KernelConfig, ...], portable: tuple[KernelConfig, ...]) -> tuple[KernelConfig, ...]:
    """Return both in order, with one of `portable` after every few of `own`."""
    merged: list[KernelConfig] = []
    rest = iter(portable)
    for count, config in enumerate(own, 1):
        merged.append(config)
        if count % _OWN_FOR_ONE_PORTABLE == 0:
            merged += itertools.islice(rest, 1)
    return (*merged, *rest)


def _default_configs(problem: Problem, target: GpuTarget) -> list[KernelConfig]:
    """Return what would run untuned, first of all, and what would run in its place.

    Raises:
        NoKernelError: if no default config is legal.
    """
    found: list[KernelConfig] = []
    refused: list[str] = []
    for config in default_configs(problem, target):
        reasons = _reasons(config, problem, target)
        if reasons:
            refused.append(f"{config}: {'; '.join(reasons)}")
        else:
            found.append(config)
    if not found:
        raise NoKernelError(f"no config is legal for {problem} on {target}: {' | '.join(refused)}")
    return found


def _reasons(config: KernelConfig, problem: Problem, target: GpuTarget) -> tuple[str, ...]:
    """Return every reason why a config cannot compute a problem."""
    shape = shape_refusal(config, problem.shape)
    return (*check_config(config, problem.spec, target), *((shape,) if shape else ()))


def _guesses(default: KernelConfig, others: typing.Sequence[KernelConfig]) -> list[KernelConfig]:
    """Return the next best guesses, without those that are there for GPUs or strides that better ones do not fit."""
    better = {default, *others}
    safe = safe_configs(default.phase)
    return [config for config in others if config not in safe and _described(config) not in better][:_MAX_GUESSES]


def _described(config: KernelConfig) -> KernelConfig | None:
    """Return the same config with descriptors in place of pointers, or None where it has none."""
    if (
        isinstance(config, TritonForwardConfig | TritonBackwardConfig | TritonDecodeConfig)
        and config.loads == "pointer"
    ):
        return dataclasses.replace(config, loads="descriptor")
    return None
