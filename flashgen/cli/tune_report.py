"""The end of a tuning run, as a table and as JSON."""

from __future__ import annotations

import collections

from flashgen.cli.configs import short_config
from flashgen.cli.output import note, print_table, ratio
from flashgen.measure import Rejected
from flashgen.tuning.events import ProblemResult, TuneReport


def print_report(report: TuneReport) -> None:
    """Print a line for each problem, the notes, and where the entries were written."""
    if report.results:
        numeric = ("us", "TFLOP/s", "s")
        columns = ("problem", "winner", "us", "TFLOP/s", "origin", "beside", "trials", "s")
        print_table(columns, [_row(result) for result in report.results], numeric=numeric)
    for result in report.results:
        if result.note:
            note(f"{result.problem}: {result.note}")
    for path in report.files:
        print(f"wrote {path}")


def rejected_by_stage(result: ProblemResult) -> dict[str, int]:
    """Return how many candidates fell at each stage, in the order of their first fall."""
    stages = (trial.result.stage for trial in result.trials if isinstance(trial.result, Rejected))
    return dict(collections.Counter(stages))


def _row(result: ProblemResult) -> tuple[str, ...]:
    wall = f"{result.wall_s:.0f}"
    entry = result.entry
    if entry is None:
        return (str(result.problem), "none", "-", "-", "-", "-", trials_text(result), wall)
    performance = entry.performance
    tied = f" (tied with {len(result.tied)})" if result.tied else ""
    beside = ", ".join(
        f"{name} {us:.1f} us {ratio(us, performance.median_us)}" for name, us in result.baselines.items()
    )
    return (
        str(result.problem),
        short_config(entry.config) + tied,
        f"{performance.median_us:g}",
        entry.tflops_text,
        entry.origin,
        beside or "-",
        trials_text(result),
        wall,
    )


def trials_text(result: ProblemResult) -> str:
    """Return `40 of 312, rejected: compile 3, accuracy 1`."""
    rejected = ", ".join(f"{stage} {count}" for stage, count in rejected_by_stage(result).items())
    return f"{len(result.trials)} of {result.legal}" + (f", rejected: {rejected}" if rejected else "")


def report_document(report: TuneReport) -> dict[str, object]:
    """Return a report as plain values for JSON."""
    return {
        "device": report.target.device_name,
        "arch": report.target.arch,
        "interrupted": report.interrupted,
        "study": report.study,
        "files": [str(path) for path in report.files],
        "wall_s": round(report.wall_s, 1),
        "results": [_result_document(result) for result in report.results],
    }


def _result_document(result: ProblemResult) -> dict[str, object]:
    return {
        "problem": str(result.problem),
        "entry": result.entry.as_dict() if result.entry else None,
        "trials": len(result.trials),
        "resumed": sum(trial.resumed for trial in result.trials),
        "legal": result.legal,
        "rejected": rejected_by_stage(result),
        "baselines_us": result.baselines,
        "tied": [config.as_dict() for config in result.tied],
        "wall_s": round(result.wall_s, 1),
        "note": result.note,
    }
