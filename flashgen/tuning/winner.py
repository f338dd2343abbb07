"""Who wins, and the registry entry that says so."""

from __future__ import annotations

import dataclasses
import datetime
import math
import typing

from flashgen.codegen import KernelConfig, render
from flashgen.measure import tflops
from flashgen.registry import Accuracy, MeasuredRange, Origin, Performance, Provenance, RegistryEntry, RunnerUp
from flashgen.tuning.evaluators import Final
from flashgen.tuning.task import Task
from flashgen.tuning.tried import Tried

_KEPT_RUNNERS_UP = 8
# Two that are no further apart are one to whoever runs them.
_AS_FAST = 0.01


@dataclasses.dataclass(frozen=True, kw_only=True)
class Choice:
    """The outcome of a final comparison.

    Attributes:
        winner: with the time of the comparison.
        runners_up: the others that were not refused, best first.
        tied: those of them that are within the noise of the fastest.
        baselines: median us of what was timed beside them.
    """

    winner: Tried
    runners_up: tuple[Tried, ...]
    tied: tuple[KernelConfig, ...]
    baselines: dict[str, float]


def choose_winner(finalists: typing.Sequence[Tried], final: Final, default: KernelConfig) -> Choice | None:
    """Return the choice among the finalists, or None if every one was refused.

    Who is within the noise of the fastest, or not surely slower, is tied with it. Among those that are within 1% of it
    as well the default wins, so that nothing changes without a gain; else the one with fewer spills, less shared
    memory, and the earlier config. A noisy race ties more, and what it measured is still the best guess there is.
    """
    raced = sorted(
        (
            dataclasses.replace(t, record=dataclasses.replace(t.record, result=final.timings[t.config]))
            for t in finalists
            if t.config not in final.refused
        ),
        key=by_speed,
    )
    if not raced:
        return None
    limit = raced[0].timing.median_us * (1 + final.noise)
    tied = [t for t in raced if t.timing.median_us <= limit or final.at_least.get(t.config, math.inf) <= 1]
    near = raced[0].timing.median_us * (1 + _AS_FAST)
    as_fast = [t for t in tied if t.timing.median_us <= near]
    winner = min(as_fast, key=lambda tried: (tried.config != default, _tie_break(tried)))
    return Choice(
        winner=winner,
        runners_up=tuple(tried for tried in raced if tried is not winner),
        tied=tuple(tried.config for tried in tied if tried is not winner),
        baselines=final.baselines,
    )


def by_speed(tried: Tried) -> tuple[float, str, KernelConfig]:
    """Return what passed trials are sorted by, the fastest first."""
    # Configs of different templates have no order.
    return (tried.timing.median_us, tried.config.template, tried.config)


def _tie_break(tried: Tried) -> tuple[object, ...]:
    resources = tried.record.resources
    assert resources is not None
    return (resources.spills, resources.smem_bytes, tried.config.template, tried.config)


def make_entry(task: Task, choice: Choice, *, origin: Origin, timing: str, trials: int) -> RegistryEntry:
    """Return the choice as it goes into the registry.

    Args:
        task: what was searched.
        choice: what was found.
        origin: whether times are measured or predicted.
        timing: how they come about.
        trials: how many configs were tried.
    """
    winner, software = choice.winner, task.software
    resources = winner.record.resources
    assert resources is not None
    baseline = min(choice.baselines, key=lambda name: choice.baselines[name], default="none")
    return RegistryEntry(
        device_name=task.target.device_name,
        arch=task.target.arch,
        spec=task.problem.spec,
        range=MeasuredRange.of(task.problem.shape),
        config=winner.config,
        origin=origin,
        resources=resources,
        performance=Performance(
            median_us=winner.timing.median_us,
            spread=winner.timing.spread,
            tflops=tflops(task.problem, winner.timing.median_us),
            baseline=baseline,
            baseline_us=choice.baselines.get(baseline),
            timing=timing,
        ),
        accuracy=Accuracy(max_error=winner.max_error, allowed_error=winner.allowed_error),
        runners_up=tuple(
            RunnerUp(config=tried.config, median_us=tried.timing.median_us)
            for tried in choice.runners_up[:_KEPT_RUNNERS_UP]
        ),
        provenance=Provenance(
            template_digest=render(task.problem.spec, winner.config).digest,
            flashgen=software.flashgen,
            triton=software.triton,
            torch=software.torch,
            driver=software.driver,
            date=_date_text(datetime.datetime.now(datetime.timezone.utc)),
            trials=trials,
            seed=task.seed,
        ),
    )


def dated_after(entry: RegistryEntry, old: RegistryEntry) -> RegistryEntry:
    """Return `entry`, dated later than `old`, so that it stays where both are merged.

    Both may have been made in one second, and clocks go back.
    """
    before, now = (datetime.datetime.fromisoformat(e.provenance.date.removesuffix("Z")) for e in (old, entry))
    date = _date_text(max(now, before + datetime.timedelta(seconds=1)))
    return dataclasses.replace(entry, provenance=dataclasses.replace(entry.provenance, date=date))


def _date_text(date: datetime.datetime) -> str:
    return date.strftime("%Y-%m-%dT%H:%M:%SZ")
