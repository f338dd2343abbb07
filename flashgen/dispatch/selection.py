"""The answer of the dispatcher: which config, on which rung of the ladder, and why not the others."""

from __future__ import annotations

import dataclasses
import math
import typing
from pathlib import Path

from flashgen.codegen import KernelConfig
from flashgen.registry import Origin, Performance, RegistryEntry, RunnerUp, shown_path
from flashgen.spec import Problem
from flashgen.target import GpuTarget

Rung = typing.Literal[
    "explicit",
    "exact",
    "other software",
    "nearest",
    "other device",
    "other features",
    "predicted",
    "heuristic",
    "safe default",
]
RUNGS: tuple[Rung, ...] = typing.get_args(Rung)

_MEANING: dict[Rung, str] = {
    "explicit": "the config that the caller gave",
    "exact": "measured on this device and software, at these sizes",
    "other software": "measured on this device at these sizes, under other versions",
    "nearest": "measured on this device, at the nearest sizes of the same regime",
    "other device": "measured on another device of this architecture",
    "other features": "measured on this device for another mask or other features, same dtype and head dimensions",
    "predicted": "ranked by a model, and checked in the interpreter where that can run it; never timed on a GPU",
    "heuristic": "nothing tuned fits; a config that usually does well here",
    "safe default": "nothing tuned fits; a small config that runs anywhere",
}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Refusal:
    """A candidate that was not taken, and why."""

    candidate: str
    reason: str

    def __str__(self) -> str:
        return f"{self.candidate}: {self.reason}"


@dataclasses.dataclass(frozen=True, kw_only=True)
class Selection:
    """What runs for a problem, and how well founded the choice is.

    Attributes:
        problem: what was asked for.
        target: the GPU it was asked for.
        config: what runs.
        rung: how well the choice is founded, best first in `RUNGS`.
        entry: the registry entry it comes from, or None.
        path: the entry's file, or None.
        distance: how far the sizes are from what was measured, in powers of two; 0 inside the measured range.
        differences: on the rung `other features`, how the entry's spec differs from the problem's, a phrase each.
        change: how `config` differs from the entry's own where the entry was measured on other sizes, or empty.
        refused: every other registry entry for the spec, and what failed of the rest, each with the reason. Entries for
            other specs are looked at only where none for the spec can run, and only the first few are listed.
    """

    problem: Problem
    target: GpuTarget
    config: KernelConfig
    rung: Rung
    entry: RegistryEntry | None = None
    path: Path | None = None
    distance: float = 0.0
    differences: tuple[str, ...] = ()
    change: str = ""
    refused: tuple[Refusal, ...] = ()

    @property
    def origin(self) -> Origin | None:
        """`measured` or `predicted` for a registry entry, None for anything else."""
        return self.entry.origin if self.entry else None

    @property
    def runner_up(self) -> RunnerUp | None:
        """The config that came second where the entry was measured, or None."""
        return self.entry.runners_up[0] if self.entry and self.entry.runners_up else None

    @property
    def runner_up_ratio(self) -> float | None:
        """The time of the runner-up over the winner's; below 1 where both tied and the choice went by other marks."""
        if self.entry is None or self.runner_up is None or not self.entry.performance.median_us:
            return None
        ratio = self.runner_up.median_us / self.entry.performance.median_us
        return ratio if math.isfinite(ratio) else None

    def __str__(self) -> str:
        lines = [
            f"problem   {self.problem}",
            f"target    {self.target}",
            f"kernel    {self.config}",
            f"rung      {self.rung}: {_MEANING[self.rung]}",
        ]
        if self.entry:
            performance = self.entry.performance
            lines += [
                f"entry     {shown_path(self.path) if self.path else None}, digest {self.entry.digest()}",
                f"measured  {self.entry.range}, distance {self.distance:.2f}",
                f"{'timed' if self.origin == 'measured' else 'predicted':9} {performance.median_us:g} us"
                f"{_interval(performance)}, {self.entry.tflops_text} TFLOP/s"
                + (f", {self.entry.tbps_text} TB/s" if self.entry.tbps else "")
                + _baseline(performance.baseline, performance.baseline_us),
            ]
            if runner_up := self.runner_up:
                ratio = f", {self.runner_up_ratio:.3f}x the time" if self.runner_up_ratio else ""
                lines.append(f"runner-up {runner_up.config}: {runner_up.median_us:g} us{ratio}")
        lines += [f"differs   {difference}" for difference in self.differences]
        if self.change and self.entry:
            lines.append(f"adapted   {self.change}; measured was {self.entry.config}")
        lines += [f"refused   {refusal}" for refusal in self.refused]
        return "\n".join(lines)


def _interval(performance: Performance) -> str:
    if not performance.spread:
        return ""
    return f", middle half within {performance.spread_us:g} us ({100 * performance.spread:.2g}%)"


def _baseline(name: str, us: float | None) -> str:
    return f" ({name} {us:g} us beside it)" if us else ""
