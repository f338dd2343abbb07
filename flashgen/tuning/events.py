"""What a tuning run tells while it works: the records it makes, and who listens."""

from __future__ import annotations

import dataclasses
import typing
from pathlib import Path

from flashgen.codegen import KernelConfig, KernelResources
from flashgen.measure import Rejected, Timing
from flashgen.registry import RegistryEntry
from flashgen.spec import AttentionSpec, Problem
from flashgen.target import GpuTarget


@dataclasses.dataclass(frozen=True, kw_only=True)
class TrialRecord:
    """What became of one config.

    Attributes:
        number: of the trial in the study.
        config: what was tried.
        resources: of the compiled kernel; None if it did not compile.
        result: its time (measured, or the model's), or the stage and reason of its rejection.
        resumed: the result is an earlier run's.
    """

    number: int
    config: KernelConfig
    resources: KernelResources | None
    result: Timing | Rejected
    resumed: bool = False


@dataclasses.dataclass(frozen=True, kw_only=True)
class ProblemResult:
    """What tuning found for one problem.

    Attributes:
        problem: what was tuned.
        entry: the winner as it goes into the registry; None if no config passed.
        trials: every config tried, in order.
        legal: how many configs the search space holds for this problem.
        baselines: median us of what was timed beside it, by name; empty without a GPU.
        tied: configs that are within the noise of the winner.
        wall_s: wall-clock seconds spent.
        compile_s: of them, seconds that a compiling process worked on the average.
        measure_s: seconds that the GPU's process worked, beside the compiling; of several GPUs, on the average.
        note: why there is no entry, what cut the search short, or that nothing could check the winner; empty otherwise.
    """

    problem: Problem
    entry: RegistryEntry | None
    trials: tuple[TrialRecord, ...]
    legal: int
    baselines: dict[str, float]
    tied: tuple[KernelConfig, ...]
    wall_s: float
    compile_s: float = 0.0
    measure_s: float = 0.0
    note: str


@dataclasses.dataclass(frozen=True, kw_only=True)
class ServedProblem:
    """A problem of a portfolio.

    Attributes:
        problem: which.
        entry: as it stands in the registry: with a kernel of the portfolio or, where none is legal, its own winner.
        kernel: which kernel of the portfolio serves it, counted from 0; None where none is legal.
        best_us: the fastest of all that were raced on it.
        loss: how much longer the portfolio takes than that, as a share; None where no kernel of it is legal.
        note: what cut its race short; empty otherwise.
    """

    problem: Problem
    entry: RegistryEntry
    kernel: int | None
    best_us: float
    loss: float | None
    note: str


@dataclasses.dataclass(frozen=True, kw_only=True)
class PortfolioResult:
    """A few kernels that serve all problems of one spec.

    Attributes:
        spec: without the numbers of its mask, which kernels take at run time.
        asked: how many kernels were allowed.
        kernels: those chosen; what a launch alone decides (head_group, tail_heads) may differ from problem to problem.
        problems: how each is served.
        needed: how many kernels keep every loss within `portfolio.LOSS_LIMIT`; at most, where there were too many sets
            of kernels to try them all.
    """

    spec: AttentionSpec
    asked: int
    kernels: tuple[KernelConfig, ...]
    problems: tuple[ServedProblem, ...]
    needed: int

    def within(self, limit: float) -> bool:
        """Return whether every problem is served with a loss of at most `limit`."""
        return all(served.loss is not None and served.loss <= limit for served in self.problems)


@dataclasses.dataclass(frozen=True, kw_only=True)
class TuneReport:
    """What a whole run found.

    Attributes:
        target: the GPU it was for.
        results: one for each problem, in order; problems that an interrupt left out are missing.
        files: registry files that were written.
        study: the file or URL that holds the trials, without its password; the same command goes on from it.
        interrupted: whether Ctrl-C cut it short.
        wall_s: wall-clock seconds spent.
        portfolios: one for each spec, where they were asked for.
    """

    target: GpuTarget
    results: tuple[ProblemResult, ...]
    files: tuple[Path, ...]
    study: str
    interrupted: bool
    wall_s: float
    portfolios: tuple[PortfolioResult, ...] = ()


@dataclasses.dataclass(kw_only=True)
class JoinReport:
    """What a machine did for a run that it joined; counts of configs.

    Attributes:
        measured: timed.
        compiled: compiled for others to measure.
        rejected: that fell.
        ignored: that the run had given up on when this machine told of them.
        given_back: that were not finished when it left.
        interrupted: whether a Ctrl-C ended it, rather than the run's end.
    """

    measured: int = 0
    compiled: int = 0
    rejected: int = 0
    ignored: int = 0
    given_back: int = 0
    interrupted: bool = False


class Observer(typing.Protocol):
    """Listens to a tuning run; every method may do nothing."""

    def run_started(self, target: GpuTarget, problems: int, study: str, gpu: bool) -> None:
        """Tell that the run begins; `gpu` is False when candidates are ranked by a model."""

    def problem_started(self, index: int, problem: Problem, planned_trials: int, resumed_trials: int) -> None:
        """Tell that the search for a problem begins."""

    def stage(self, text: str) -> None:
        """Tell what the run is doing now, in a few words."""

    def trial(self, record: TrialRecord, best: TrialRecord | None, done: int, seconds_left: float | None) -> None:
        """Tell that a trial ended; `best` is the best so far, `seconds_left` an estimate for this problem."""

    def problem_finished(self, result: ProblemResult) -> None:
        """Tell what was found for a problem."""


class SilentObserver:
    """An observer that ignores everything."""

    def run_started(self, target: GpuTarget, problems: int, study: str, gpu: bool) -> None: ...

    def problem_started(self, index: int, problem: Problem, planned_trials: int, resumed_trials: int) -> None: ...

    def stage(self, text: str) -> None: ...

    def trial(self, record: TrialRecord, best: TrialRecord | None, done: int, seconds_left: float | None) -> None: ...

    def problem_finished(self, result: ProblemResult) -> None: ...
