"""What a report says: a study, the problems in it, and what each of their trials showed."""

from __future__ import annotations

import dataclasses
import itertools
import typing

from flashgen.codegen import KernelConfig, KernelResources
from flashgen.codegen.kernel_config import Scalar
from flashgen.measure import Rejected, Stage, Timing, floor_us, tflops
from flashgen.registry import Origin, RegistryEntry
from flashgen.spec import Problem
from flashgen.target import GpuTarget


@dataclasses.dataclass(frozen=True, kw_only=True)
class Trial:
    """One config that was tried.

    Attributes:
        place: in the order in which trials ended, from 1.
        number: of the trial in the study.
        config: what was tried.
        name: the config in a few characters.
        resources: of the compiled kernel; None if it did not compile.
        result: its time in the search, or the stage and reason of its rejection.
        max_error: largest error against the reference.
        allowed_error: what the accuracy rule allowed for it; 0 where nothing was checked.
        elapsed_s: seconds of searching until it ended, pauses between runs left out; None where the study has no times.
    """

    place: int
    number: int
    config: KernelConfig
    name: str
    resources: KernelResources | None
    result: Timing | Rejected
    max_error: float
    allowed_error: float
    elapsed_s: float | None

    @property
    def us(self) -> float | None:
        """Median microseconds in the search; None if it was rejected."""
        return self.result.median_us if isinstance(self.result, Timing) else None


@dataclasses.dataclass(frozen=True, kw_only=True)
class Residency:
    """How a kernel fills the GPU, by the ranking model.

    Attributes:
        programs: resident on one multiprocessor.
        waves: rounds of resident programs that the grid takes.
        limiter: what keeps more of them from being resident.
    """

    programs: int
    waves: int
    limiter: str


@dataclasses.dataclass(frozen=True, kw_only=True)
class Finalist:
    """The winner, or one that came close.

    Attributes:
        trial: in the search.
        raced_us: median of the final comparison, as the registry keeps it; None where it does not.
        residency: None for a GPU that this version does not know.
        differences: its numbers that are not the winner's, by name; None for one that its template does not have.
    """

    trial: Trial
    raced_us: float | None
    residency: Residency | None
    differences: dict[str, Scalar | None]

    @property
    def timing(self) -> Timing:
        """Its time in the search."""
        assert isinstance(self.trial.result, Timing)
        return self.trial.result

    @property
    def us(self) -> float:
        """Its best known time: of the final comparison if there is one."""
        return self.timing.median_us if self.raced_us is None else self.raced_us


@dataclasses.dataclass(frozen=True, kw_only=True)
class ValueSummary:
    """What became of the trials that had one value of a parameter; times are None if none passed."""

    value: Scalar
    tried: int
    passed: int
    best_us: float | None
    median_us: float | None


@dataclasses.dataclass(frozen=True, kw_only=True)
class Parameter:
    """A parameter of which several values were tried, in ascending order."""

    name: str
    values: tuple[ValueSummary, ...]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Importances:
    """How much each parameter tells the fastest trials from the rest, of 1, the largest first; or why nothing does."""

    shares: dict[str, float]
    note: str


@dataclasses.dataclass(frozen=True, kw_only=True)
class Rejection:
    """Trials that fell at one stage for the same reason, numbers aside.

    Attributes:
        stage: where they fell.
        reason: of the first of them.
        trials: their numbers.
    """

    stage: Stage
    reason: str
    trials: tuple[int, ...]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Roof:
    """What the hardware allows a problem, by the GPU's datasheet.

    Attributes:
        intensity: useful operations per byte that must cross device memory.
        peak_tflops: of the matrix unit, for the problem's dtype.
        bandwidth_tbs: of device memory.
    """

    intensity: float
    peak_tflops: float
    bandwidth_tbs: float

    @classmethod
    def of(cls, problem: Problem, target: GpuTarget) -> Roof:
        """Return the roof over a problem that computes and moves something."""
        return cls(
            intensity=problem.flops() / problem.min_bytes(),
            peak_tflops=tflops(problem, floor_us(problem, target).compute_us),
            bandwidth_tbs=target.bandwidth_gbs / 1e3,
        )

    @property
    def tflops(self) -> float:
        """What no kernel exceeds at this intensity."""
        return min(self.peak_tflops, self.intensity * self.bandwidth_tbs)

    @property
    def bound(self) -> typing.Literal["compute", "memory"]:
        """What sets that limit."""
        return "compute" if self.intensity * self.bandwidth_tbs >= self.peak_tflops else "memory"


@dataclasses.dataclass(frozen=True, kw_only=True)
class ProblemReport:
    """The search for one problem on one GPU, under one set of versions.

    Attributes:
        text: the problem, as the study has it.
        problem: None if this version cannot read the text.
        device: the GPU's name, as the study has it.
        target: None if this version does not know the GPU.
        timing: how times come about.
        origin: whether they are measured or predicted.
        versions: Triton's and the driver's, by name.
        trials: those that ended, in that order.
        unfinished: trials under way, or left so by a killed run.
        entry: what the registry holds of this search, if it does.
        entry_file: where.
        finalists: the winner, then the best of the others; empty if nothing passed.
        untuned: the trial of the config that would run without any tuning, if it was tried and passed.
        parameters: of which several values were tried, the most important first.
        fixed: the other parameters.
        importances: of the parameters.
        rejections: grouped, the most frequent first.
        roof: None where problem or GPU is unknown, or nothing is to be computed.
    """

    text: str
    problem: Problem | None
    device: str
    target: GpuTarget | None
    timing: str
    origin: Origin
    versions: dict[str, str]
    trials: tuple[Trial, ...]
    unfinished: int
    entry: RegistryEntry | None
    entry_file: str
    finalists: tuple[Finalist, ...]
    untuned: Trial | None
    parameters: tuple[Parameter, ...]
    fixed: dict[str, Scalar]
    importances: Importances
    rejections: tuple[Rejection, ...]
    roof: Roof | None

    @property
    def winner(self) -> Finalist | None:
        """The registry's entry of this search, or the fastest of it."""
        return self.finalists[0] if self.finalists else None

    @property
    def passed(self) -> tuple[Trial, ...]:
        """The trials that were not rejected."""
        return tuple(trial for trial in self.trials if trial.us is not None)

    @property
    def is_upper_bound(self) -> bool:
        """Whether only data can tell how many pairs the mask shows, so that TFLOP/s count too many."""
        return self.problem is not None and not self.problem.spec.mask.by_formula

    @property
    def baseline(self) -> tuple[str, float] | None:
        """Name and median microseconds of what was timed beside the finalists."""
        if self.entry is None or self.entry.performance.baseline_us is None:
            return None
        return self.entry.performance.baseline, self.entry.performance.baseline_us

    def tflops(self, us: float) -> float | None:
        """Return the useful TFLOP/s of so many microseconds; None if the problem is unknown."""
        return None if self.problem is None else tflops(self.problem, us)

    def best_so_far(self) -> tuple[float | None, ...]:
        """Return the best median after each trial, in microseconds; None before the first that passed."""
        return tuple(itertools.accumulate((trial.us for trial in self.trials), _faster))


@dataclasses.dataclass(frozen=True, kw_only=True)
class StudyReport:
    """A study: its place, its problems, and the names of what in it is not flashgen's."""

    place: str
    problems: tuple[ProblemReport, ...]
    foreign: tuple[str, ...]


def _faster(best: float | None, us: float | None) -> float | None:
    return us if best is None else best if us is None else min(best, us)
