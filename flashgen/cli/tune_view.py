"""A tuning run as it goes, on stderr: a live table in a terminal, a line now and then elsewhere."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

from rich.console import Console, Group
from rich.live import Live
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn
from rich.table import Table

from flashgen.cli.configs import short_config
from flashgen.cli.output import console, make_table, note
from flashgen.cli.tune_report import trials_text
from flashgen.measure import Timing, tbps, tflops
from flashgen.spec import Problem
from flashgen.target import GpuTarget
from flashgen.tuning.events import Observer, ProblemResult, SilentObserver, TrialRecord

_SHOWN = 8


@contextlib.contextmanager
def watching(verb: str = "tuning") -> Iterator[Observer]:
    """Give an observer that shows a run, what it does called `verb`, until the block ends."""
    screen = console(stderr=True)
    if not screen.is_terminal:
        yield LineObserver(verb)
        return
    observer = LiveObserver(screen, verb)
    with observer.live:
        yield observer


def headline(verb: str, target: GpuTarget, problems: int, study: str, gpu: bool) -> str:
    """Return what a run is about to do, in one line."""
    how = "" if gpu else "; no GPU in use: a model ranks the candidates, entries are marked predicted"
    return f"{verb} {problems} problem(s) for {target}; trials in {study}{how}"


def summary(result: ProblemResult) -> str:
    """Return what was found for a problem, in one line."""
    if result.entry is None:
        return f"{result.problem}: no config found: {result.note}"
    found = f"{short_config(result.entry.config)} {result.entry.performance.median_us:g} us"
    return f"{result.problem}: {found} in {result.wall_s:.0f} s; trials: {trials_text(result)}"


class LineObserver(SilentObserver):
    """Prints a line for each problem and for each stage that ended."""

    def __init__(self, verb: str = "tuning") -> None:
        self._verb = verb
        self._problems = 0
        self._stage = ""

    def run_started(self, target: GpuTarget, problems: int, study: str, gpu: bool) -> None:
        self._problems = problems
        note(headline(self._verb, target, problems, study, gpu))

    def problem_started(self, index: int, problem: Problem, planned_trials: int, resumed_trials: int) -> None:
        resumed = f", {resumed_trials} of them from an earlier run" if resumed_trials else ""
        note(f"[{index + 1}/{self._problems}] {problem}: {planned_trials} trials{resumed}")

    def stage(self, text: str) -> None:
        if self._stage and text != self._stage:
            note(f"  done: {self._stage}")
        self._stage = text

    def problem_finished(self, result: ProblemResult) -> None:
        self.stage("")
        note(f"  {summary(result)}")


class LiveObserver:
    """Keeps the best candidates so far and the progress on the screen."""

    def __init__(self, screen: Console, verb: str = "tuning") -> None:
        self._screen = screen
        self._verb = verb
        self._problems = 0
        self._problem: Problem | None = None
        self._best: list[tuple[float, TrialRecord]] = []
        self._progress = Progress(
            TextColumn("{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TextColumn("{task.fields[left]}"),
            console=screen,
        )
        self._task = self._progress.add_task("", total=None, left="")
        self.live = Live(self._progress, console=screen, transient=True, refresh_per_second=4)

    def run_started(self, target: GpuTarget, problems: int, study: str, gpu: bool) -> None:
        self._problems = problems
        self._screen.print(headline(self._verb, target, problems, study, gpu))

    def problem_started(self, index: int, problem: Problem, planned_trials: int, resumed_trials: int) -> None:
        self._problem, self._best = problem, []
        self._screen.print(f"[{index + 1}/{self._problems}] {problem}")
        self._progress.update(self._task, total=planned_trials, completed=resumed_trials, description="", left="")
        self._refresh()

    def stage(self, text: str) -> None:
        self._progress.update(self._task, description=text)

    def trial(self, record: TrialRecord, best: TrialRecord | None, done: int, seconds_left: float | None) -> None:
        if isinstance(record.result, Timing):
            self._best.append((record.result.median_us, record))
            self._best = sorted(self._best, key=lambda pair: pair[0])[:_SHOWN]
        self._progress.update(self._task, completed=done, left=_time_left(seconds_left))
        self._refresh()

    def problem_finished(self, result: ProblemResult) -> None:
        self._screen.print(f"  {summary(result)}")

    def _refresh(self) -> None:
        self.live.update(Group(self._table(), self._progress))

    def _table(self) -> Table:
        in_bytes = ("TB/s",) if self._in_bytes else ()
        numeric = ("trial", "us", "TFLOP/s", *in_bytes, "registers", "spill bytes", "smem bytes")
        return make_table(("config", *numeric), [self._row(us, record) for us, record in self._best], numeric=numeric)

    def _row(self, us: float, record: TrialRecord) -> tuple[str, ...]:
        used = record.resources
        resources = (used.registers, used.spills, used.smem_bytes) if used else ("-", "-", "-")
        rates = [f"{tflops(self._problem, us):.1f}" if self._problem and us > 0 else "-"]
        if self._in_bytes:
            rates.append(f"{tbps(self._problem, us):.2f}" if self._problem and us > 0 else "-")
        return (short_config(record.config), str(record.number), f"{us:.1f}", *rates, *map(str, resources))

    @property
    def _in_bytes(self) -> bool:
        return self._problem is not None and self._problem.spec.phase == "decode"


def _time_left(seconds: float | None) -> str:
    if seconds is None:
        return ""
    minutes, rest = divmod(round(seconds), 60)
    return f"about {minutes}:{rest:02d} left"
