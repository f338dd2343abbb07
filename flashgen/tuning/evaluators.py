"""How a compiled candidate gets its number: what the search asks of a GPU, or of the model that stands in for one."""

from __future__ import annotations

import dataclasses
import typing
from multiprocessing.connection import Connection

from flashgen.codegen import KernelConfig, KernelResources
from flashgen.compile import CompileReport
from flashgen.errors import FlashgenError
from flashgen.measure import Outcome, Rejected, Timing
from flashgen.registry import Origin
from flashgen.spec import AttentionSpec, Phase, Problem
from flashgen.target import GpuTarget
from flashgen.tuning.full_disk import says_disk_is_full
from flashgen.tuning.tried import Tried
from flashgen.tuning.workers import Outcome as WorkerOutcome
from flashgen.tuning.workers import WorkerFailure

USUAL_FINALISTS = 10
"""How many configs a final comparison has at most, but where all of a given list go there."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Final:
    """What the last comparison said.

    Attributes:
        timings: of each finalist that was not refused; those of the search where there was no race.
        baselines: median us of what was timed beside them.
        noise: relative difference below which two timings are a tie.
        at_least: how many times the time of the fastest each takes at least, as far as is known; who may take less than
            it is tied as well.
        refused: finalists that failed in it, with the reason.
    """

    timings: dict[KernelConfig, Timing]
    baselines: dict[str, float]
    noise: float
    at_least: dict[KernelConfig, float] = dataclasses.field(default_factory=dict)
    refused: dict[KernelConfig, str]


class Evaluator(typing.Protocol):
    """Gives candidates their numbers, beside the compiling of others.

    Attributes:
        origin: what entries say of their numbers.
        reserve_s: about how long `final` with up to `USUAL_FINALISTS`, and `confirm`, take.
    """

    origin: Origin
    reserve_s: float

    def timing(self, phase: Phase) -> str:
        """Return how the numbers of a phase come about."""

    @property
    def connections(self) -> list[Connection]:
        """Readable when `collect` has something to do."""

    @property
    def busy_s(self) -> float:
        """Seconds that it has worked so far; where several GPUs did, their mean."""

    def start(self) -> None:
        """Begin to get ready, beside the compiling of the first candidates; never waits."""

    def submit(self, number: int, problem: Problem, config: KernelConfig, report: CompileReport) -> None:
        """Queue a compiled candidate."""

    def collect(self) -> list[tuple[int, Outcome]]:
        """Return what finished since the last call; never waits.

        Raises:
            FlashgenError: if nothing can be evaluated at all.
        """

    def cancel(self) -> None:
        """Forget what is queued or running; what is running may come to its end first."""

    def final(self, problem: Problem, finalists: typing.Sequence[Tried], target_ms: float, seed: int) -> Final:
        """Compare the best once more, with care."""

    def confirmed_as(self, spec: AttentionSpec) -> AttentionSpec | None:
        """Return the spec whose code `confirm` will need compiled, or None."""

    def confirm(self, problem: Problem, tried: Tried) -> Tried | Rejected:
        """Return a config that is to win, with its accuracy, or why it must not."""

    def close(self) -> None:
        """Stop at once."""


def times_longer(finalists: int) -> float:
    """Return how many times as long as usual so many finalists take."""
    return max(1.0, finalists / USUAL_FINALISTS)


def failure_reason(failure: WorkerFailure) -> str:
    """Return the reason of a rejection, short enough to keep.

    Raises:
        FlashgenError: if the candidate is not to blame: the process failed before it met it, or a disk is full.
    """
    if failure.at_start or says_disk_is_full(failure.detail):
        raise FlashgenError(f"{failure.detail}; the trials are kept: mend it, then run the same command again")
    return f"{failure.kind}: {failure.detail}"[:1000]


def compile_report(outcome: WorkerOutcome) -> CompileReport | Rejected:
    """Return what a compiling process said of a candidate, or why there is no binary.

    Raises:
        FlashgenError: if the process failed before it met the candidate.
    """
    if isinstance(outcome, WorkerFailure):
        return Rejected(stage="compile", reason=failure_reason(outcome))
    if not isinstance(outcome.value, CompileReport):
        return Rejected(stage="compile", reason=f"the compiler returned {outcome.value!r}"[:1000])
    return outcome.value


def shared_memory_refusal(resources: KernelResources, target: GpuTarget) -> Rejected | None:
    """Return why a compiled candidate cannot run at all, or None."""
    if resources.smem_bytes <= target.smem_bytes:
        return None
    return Rejected(stage="resources", reason=f"{resources.smem_bytes} bytes of shared memory of {target.smem_bytes}")
