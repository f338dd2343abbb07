"""Tune one problem several times, each from nothing: what a run takes, how its parts overlap, and whether one wins.

    python benchmarks/tuning_runs.py --runs 10 --shape "b=4 hq=32 hkv=8 s=4096 d=128 causal bf16"

Every run has a seed, a study and a registry of its own, and does not know what ships for the GPU. `overlap` is its wall
clock over the longer of its two kinds of work: compiling (the mean of the processes) and measuring (of the GPUs). What
won is compared at the end in one interleaved race: who is within its noise of the fastest is tied with it. Trials a
second are counted from the first result to the last: starts and the final comparison cost the same on any number of
GPUs.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import tempfile
import time
import typing
from pathlib import Path

import flashgen.resources
from flashgen.codegen import KernelConfig
from flashgen.measure import Timing
from flashgen.registry import RegistryEntry
from flashgen.spec import parse_problem
from flashgen.tuning import EFFORTS, SilentObserver, TrialRecord, tune
from flashgen.tuning.gpu_evaluator import GpuEvaluator
from flashgen.tuning.jobs import Jobs
from flashgen.tuning.tried import Tried

_RACE_MS = 100.0


@dataclasses.dataclass(frozen=True, kw_only=True)
class Run:
    """What one run took.

    Attributes:
        seed: of the search.
        winner: its config.
        us: the winner's median device time.
        trials: how many configs were tried.
        search_s: from the first result of a trial to the last.
        wall_s: from the call to the report.
        compile_s: that a compiling process worked, on the average.
        measure_s: that a GPU's process worked, on the average.
    """

    seed: int
    winner: KernelConfig
    us: float
    trials: int
    search_s: float
    wall_s: float
    compile_s: float
    measure_s: float

    @property
    def overlap(self) -> float:
        """The wall clock over the longer of the two."""
        return self.wall_s / max(self.compile_s, self.measure_s)

    def row(self) -> dict[str, object]:
        """Return it as plain values."""
        told = {name: round(value, 2) for name, value in dataclasses.asdict(self).items() if name != "winner"}
        rate = round((self.trials - 1) / max(self.search_s, 1e-9), 2)
        return {**told, "overlap": round(self.overlap, 2), "trials_per_s": rate, "winner": self.winner.as_dict()}


class _Watch(SilentObserver):
    """Keeps when results came."""

    def __init__(self) -> None:
        self.times: list[float] = []

    def trial(self, record: TrialRecord, best: TrialRecord | None, done: int, seconds_left: float | None) -> None:
        self.times.append(time.monotonic())


def main() -> None:
    """Print a line for each run, and how many of the winners are the same or tied; see the module."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--shape", default="b=4 hq=32 hkv=8 s=4096 d=128 causal bf16", help="the problem")
    parser.add_argument("--runs", type=int, default=10, help="how many, with the seeds 0, 1, ...")
    parser.add_argument("--effort", choices=EFFORTS, default="quick")
    parser.add_argument("--device", default="cuda:0", help="as of flashgen tune")
    parser.add_argument("--workers", type=int, help="compiling processes; default: as flashgen tune")
    parser.add_argument("--warm", action="store_true", help="keep what was compiled, from run to run and before")
    parser.add_argument("--json", action="store_true", help="print each run as a line of JSON")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        empty = folder / "empty"
        empty.mkdir()
        flashgen.resources.shipped_registry_dir = lambda: empty
        entries, runs = [], []
        for seed in range(arguments.runs):
            if not arguments.warm:
                # The workers inherit it: what an earlier run compiled would cost this one nothing.
                os.environ["TRITON_CACHE_DIR"] = str(folder / f"triton{seed}")
            entry, run = _tuned(arguments, seed, folder / str(seed))
            entries.append(entry)
            runs.append(run)
            told = run.row()
            print(json.dumps(told) if arguments.json else "  ".join(f"{k} {v}" for k, v in told.items()), flush=True)
        tied = _tied(arguments, entries)
    verdict = {"runs": len(runs), "winners": len({run.winner for run in runs}), "same_or_tied": tied}
    print(json.dumps(verdict) if arguments.json else f"{tied} of {len(runs)} runs found the same winner or a tied one")


def _tuned(arguments: argparse.Namespace, seed: int, folder: Path) -> tuple[RegistryEntry, Run]:
    watch = _Watch()
    report = tune(
        [arguments.shape],
        device=arguments.device,
        effort=arguments.effort,
        workers=arguments.workers,
        seed=seed,
        registry=folder,
        study=str(folder / "study.journal"),
        observer=watch,
    )
    (result,) = report.results
    if result.entry is None:
        raise SystemExit(f"seed {seed}: {result.note}")
    run = Run(
        seed=seed,
        winner=result.entry.config,
        us=result.entry.performance.median_us,
        trials=len(result.trials),
        search_s=watch.times[-1] - watch.times[0],
        wall_s=report.wall_s,
        compile_s=result.compile_s,
        measure_s=result.measure_s,
    )
    return result.entry, run


def _tied(arguments: argparse.Namespace, entries: typing.Sequence[RegistryEntry]) -> int:
    """Return how many of the winners are within the noise of the fastest, when all are raced together."""
    winners = {entry.config: entry for entry in entries}
    if len(winners) == 1:
        return len(entries)
    finalists = [_as_tried(entry) for entry in winners.values()]
    evaluator = GpuEvaluator([arguments.device.split(",")[0].replace("all", "cuda:0")], Jobs())
    try:
        final = evaluator.final(parse_problem(arguments.shape), finalists, _RACE_MS, 0)
    finally:
        evaluator.close()
    limit = min(timing.median_us for timing in final.timings.values()) * (1 + final.noise)
    for config, timing in final.timings.items():
        print(f"raced: {timing.median_us:.2f} us, {config}")
    print(f"noise: {final.noise:.4f}")
    return sum(final.timings[entry.config].median_us <= limit for entry in entries)


def _as_tried(entry: RegistryEntry) -> Tried:
    timing = Timing(median_us=entry.performance.median_us, spread=entry.performance.spread, samples=0)
    return Tried(record=TrialRecord(number=0, config=entry.config, resources=entry.resources, result=timing))


if __name__ == "__main__":
    main()
