"""The winner of a search and those that came close: what tells them apart, and how they fill the GPU."""

from __future__ import annotations

import itertools
import typing

from flashgen.codegen import KernelConfig
from flashgen.codegen.kernel_config import Scalar
from flashgen.heuristics import default_configs
from flashgen.measure import predict_us
from flashgen.registry import RegistryEntry
from flashgen.report.data import Finalist, Residency, Trial
from flashgen.spec import Problem
from flashgen.target import GpuTarget

# As many as the hardest search races at its end.
_COUNT = 8


def find_finalists(
    trials: typing.Sequence[Trial], entry: RegistryEntry | None, problem: Problem | None, target: GpuTarget | None
) -> tuple[Finalist, ...]:
    """Return the winner, the others of its race, and the best of the rest; without an entry, the best of the search.

    Args:
        trials: of the search.
        entry: the registry's of this search; its config is one of those that passed.
        problem: None if unknown.
        target: None if unknown.
    """
    ranked = sorted((trial for trial in trials if trial.us is not None), key=lambda t: (t.us, t.place))
    raced: dict[KernelConfig, float] = {}
    if entry is not None:
        raced = {entry.config: entry.performance.median_us}
        raced |= {runner_up.config: runner_up.median_us for runner_up in entry.runners_up}
    by_config = {trial.config: trial for trial in ranked}
    in_order = dict.fromkeys((*(config for config in raced if config in by_config), *by_config))
    chosen = [by_config[config] for config in itertools.islice(in_order, max(_COUNT, len(raced)))]
    return tuple(
        Finalist(
            trial=trial,
            raced_us=raced.get(trial.config),
            residency=_residency(trial, problem, target),
            differences=_differences(trial.config, chosen[0].config),
        )
        for trial in chosen
    )


def untuned_trial(trials: typing.Sequence[Trial], problem: Problem | None, target: GpuTarget | None) -> Trial | None:
    """Return the trial of the first of the configs that would run untuned, if any of them was tried and passed."""
    if problem is None or target is None:
        return None
    passed = {trial.config: trial for trial in trials if trial.us is not None}
    return next((passed[config] for config in default_configs(problem, target) if config in passed), None)


def _residency(trial: Trial, problem: Problem | None, target: GpuTarget | None) -> Residency | None:
    if problem is None or target is None or trial.resources is None:
        return None
    prediction = predict_us(problem, target, trial.config, trial.resources.registers, trial.resources.smem_bytes)
    return Residency(programs=prediction.occupancy_blocks, waves=prediction.waves, limiter=prediction.limiter)


def _differences(config: KernelConfig, winner: KernelConfig) -> dict[str, Scalar | None]:
    own, others = config.as_dict(), winner.as_dict()
    return {name: own.get(name) for name in dict.fromkeys((*own, *others)) if own.get(name) != others.get(name)}
