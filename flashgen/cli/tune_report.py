"""The end of a tuning run, as a table and as JSON."""

from __future__ import annotations

import collections
import dataclasses

from flashgen.cli.configs import short_config
from flashgen.cli.output import note, print_table, ratio
from flashgen.cli.problems import training_steps
from flashgen.cli.tune import run_document
from flashgen.measure import Rejected
from flashgen.tuning.events import PortfolioResult, ProblemResult, ServedProblem, TuneReport
from flashgen.tuning.portfolio import LOSS_LIMIT


def print_report(report: TuneReport) -> None:
    """Print a line for each problem and each training step, the notes, and where the entries were written."""
    if report.results:
        in_bytes = any(result.problem.spec.phase == "decode" for result in report.results)
        rates = ("us", "TFLOP/s", *(("TB/s",) if in_bytes else ()))
        columns = ("problem", "winner", *rates, "origin", "beside", "trials", "s")
        print_table(columns, [_row(result, in_bytes) for result in report.results], numeric=(*rates, "s"))
    steps = _training_steps(report)
    if steps:
        rows = [(step.problem, f"{step.us:g}", _beside(step.baselines, step.us)) for step in steps]
        print_table(("training step", "us", "beside"), rows, numeric=("us",))
    for portfolio in report.portfolios:
        _print_portfolio(portfolio)
    for result in report.results:
        if result.note:
            note(f"{result.problem}: {result.note}")
    for path in report.files:
        print(f"wrote {path}")


def rejected_by_stage(result: ProblemResult) -> dict[str, int]:
    """Return how many candidates fell at each stage, in the order of their first fall."""
    stages = (trial.result.stage for trial in result.trials if isinstance(trial.result, Rejected))
    return dict(collections.Counter(stages))


def _row(result: ProblemResult, in_bytes: bool) -> tuple[str, ...]:
    wall = f"{result.wall_s:.0f}"
    entry = result.entry
    if entry is None:
        rates = ("-",) * (3 if in_bytes else 2)
        return (str(result.problem), "none", *rates, "-", "-", trials_text(result), wall)
    performance = entry.performance
    tied = f" (tied with {len(result.tied)})" if result.tied else ""
    return (
        str(result.problem),
        short_config(entry.config) + tied,
        f"{performance.median_us:g}",
        entry.tflops_text,
        *((entry.tbps_text,) if in_bytes else ()),
        entry.origin,
        _beside(result.baselines, performance.median_us),
        trials_text(result),
        wall,
    )


def _beside(baselines: dict[str, float], us: float) -> str:
    return ", ".join(f"{name} {beside:.1f} us {ratio(beside, us)}" for name, beside in baselines.items()) or "-"


def _print_portfolio(portfolio: PortfolioResult) -> None:
    numeric = ("kernel", "us", "best us", "loss")
    rows = [_served_row(served) for served in portfolio.problems]
    print_table(
        (f"portfolio of {len(portfolio.kernels)}: problem", "kernel", "config", *numeric[1:]), rows, numeric=numeric
    )
    limit = f"{LOSS_LIMIT:.0%}"
    reached = f"every problem is within {limit} of its best" if portfolio.within(LOSS_LIMIT) else f"{limit} not reached"
    print(f"{portfolio.spec}: {reached}; {limit} takes {portfolio.needed} kernel(s), {portfolio.asked} allowed")
    for served in portfolio.problems:
        if served.note:
            note(f"portfolio, {served.problem}: {served.note}")


def _served_row(served: ServedProblem) -> tuple[str, ...]:
    us = f"{served.entry.performance.median_us:g}"
    number, loss = "its own", "-"
    if served.kernel is not None and served.loss is not None:
        number, loss = str(served.kernel + 1), f"{100 * served.loss:.1f}%"
    return (str(served.problem), number, short_config(served.entry.config), us, f"{served.best_us:.4g}", loss)


@dataclasses.dataclass(frozen=True, kw_only=True)
class _TrainingStep:
    """The sums of the forward and the backward phase of one problem; baselines that ran both."""

    problem: str
    us: float
    baselines: dict[str, float]

    def document(self) -> dict[str, object]:
        return {"problem": self.problem, "us": self.us, "baselines_us": self.baselines}


def _training_steps(report: TuneReport) -> list[_TrainingStep]:
    """Return the training step of each problem of which both phases were tuned."""
    found = {result.problem: result for result in report.results}
    steps = []
    for forward, backward in training_steps(found):
        results = found[forward], found[backward]
        entries = [result.entry for result in results if result.entry is not None]
        if len(entries) == len(results):
            first, second = (result.baselines for result in results)
            us = sum(entry.performance.median_us for entry in entries)
            sums = {name: first[name] + second[name] for name in first if name in second}
            steps.append(_TrainingStep(problem=str(backward), us=us, baselines=sums))
    return steps


def trials_text(result: ProblemResult) -> str:
    """Return `40 of 312, rejected: compile 3, accuracy 1`."""
    rejected = ", ".join(f"{stage} {count}" for stage, count in rejected_by_stage(result).items())
    return f"{len(result.trials)} of {result.legal}" + (f", rejected: {rejected}" if rejected else "")


def report_document(report: TuneReport) -> dict[str, object]:
    """Return a report as plain values for JSON."""
    portfolios = [_portfolio_document(portfolio) for portfolio in report.portfolios]
    return {
        **run_document(report),
        "results": [_result_document(result) for result in report.results],
        "training_steps": [step.document() for step in _training_steps(report)],
        **({"portfolios": portfolios} if portfolios else {}),
    }


def _portfolio_document(portfolio: PortfolioResult) -> dict[str, object]:
    return {
        "spec": str(portfolio.spec),
        "asked": portfolio.asked,
        "loss_limit": LOSS_LIMIT,
        "reached": portfolio.within(LOSS_LIMIT),
        "needed": portfolio.needed,
        "kernels": [config.as_dict() for config in portfolio.kernels],
        "problems": [
            {
                "problem": str(served.problem),
                "kernel": served.kernel,
                "best_us": served.best_us,
                "loss": served.loss,
                "entry": served.entry.as_dict(),
                "note": served.note,
            }
            for served in portfolio.problems
        ],
    }


def _result_document(result: ProblemResult) -> dict[str, object]:
    return {
        "problem": str(result.problem),
        "entry": result.entry.as_dict() if result.entry else None,
        "tbps": result.entry.tbps if result.entry else None,
        "trials": len(result.trials),
        "resumed": sum(trial.resumed for trial in result.trials),
        "legal": result.legal,
        "rejected": rejected_by_stage(result),
        "baselines_us": result.baselines,
        "tied": [config.as_dict() for config in result.tied],
        "wall_s": round(result.wall_s, 1),
        "compile_s": round(result.compile_s, 1),
        "measure_s": round(result.measure_s, 1),
        "note": result.note,
    }
