"""How a compiled candidate gets its number: timed on a GPU in a worker that may be killed, or ranked by a model."""

from __future__ import annotations

import collections
import dataclasses
import functools
import typing

from flashgen.codegen import KernelConfig
from flashgen.compile import CompileReport
from flashgen.errors import FlashgenError
from flashgen.measure import Measurement, Outcome, Rejected, Timing, predict_us
from flashgen.registry import Origin
from flashgen.spec import Problem
from flashgen.target import GpuTarget
from flashgen.tuning import gpu_jobs
from flashgen.tuning.cpu_jobs import check_interpreted
from flashgen.tuning.study import Tried
from flashgen.tuning.workers import Finished, Pool, WorkerFailure, WorkerResult

_EVALUATE_TIMEOUT_S = 30.0
_RACE_TIMEOUT_S = 90.0
_INTERPRET_TIMEOUT_S = 60.0


@dataclasses.dataclass(frozen=True, kw_only=True)
class Final:
    """What the last comparison said.

    Attributes:
        timings: of each finalist, in their order; those of the search where there was no race.
        accuracy: largest error and what is allowed, of each finalist.
        baselines: median us of what was timed beside them.
        noise: relative difference below which two timings are a tie.
        refused: finalists that failed the last check, with the reason.
    """

    timings: list[Timing]
    accuracy: list[tuple[float, float]]
    baselines: dict[str, float]
    noise: float
    refused: dict[int, str]


class Evaluator(typing.Protocol):
    """Gives candidates their numbers, beside the compiling of others."""

    origin: Origin
    timing: str

    def submit(self, number: int, problem: Problem, config: KernelConfig, report: CompileReport) -> None:
        """Queue a compiled candidate."""

    def collect(self, timeout_s: float) -> list[tuple[int, Outcome]]:
        """Return what finished."""

    def pending(self) -> int:
        """Return how many candidates are queued or running."""

    def final(self, problem: Problem, finalists: typing.Sequence[Tried], target_ms: float, seed: int) -> Final:
        """Compare the best once more, with care."""

    def close(self) -> None:
        """Stop at once."""


class GpuEvaluator:
    """Times candidates on one GPU; a hang, an abort or an illegal access costs the worker and one candidate."""

    origin: Origin = "measured"
    timing = "cold-l2"

    def __init__(self, device: str) -> None:
        self._pool: Pool[int] = Pool(1, name="measuring process", setup=functools.partial(gpu_jobs.start, device))
        self._best_us: float | None = None
        self._problem: Problem | None = None

    def submit(self, number: int, problem: Problem, config: KernelConfig, report: CompileReport) -> None:
        if problem != self._problem:
            self._problem, self._best_us = problem, None
        self._pool.submit(number, gpu_jobs.evaluate, problem, config, self._best_us, timeout_s=_EVALUATE_TIMEOUT_S)

    def collect(self, timeout_s: float) -> list[tuple[int, Outcome]]:
        return [(finished.task_id, self._outcome(finished)) for finished in self._pool.wait(timeout_s)]

    def _outcome(self, finished: Finished[int]) -> Outcome:
        outcome = finished.outcome
        if isinstance(outcome, WorkerFailure):
            return Rejected(stage="run", reason=f"{outcome.kind}: {outcome.detail}"[:1000])
        result = typing.cast("Outcome", outcome.value)
        if isinstance(result, Measurement):
            self._best_us = min(self._best_us or result.timing.median_us, result.timing.median_us)
        return result

    def pending(self) -> int:
        return self._pool.pending

    def final(self, problem: Problem, finalists: typing.Sequence[Tried], target_ms: float, seed: int) -> Final:
        refused: dict[int, str] = {}
        outcome = self._call(gpu_jobs.race, problem, [tried.config for tried in finalists], target_ms, seed)
        if isinstance(outcome, WorkerFailure):
            raise FlashgenError(f"the final comparison failed, {outcome.kind}: {outcome.detail}")
        timings, others, _ = typing.cast("tuple[list[Timing], dict[str, Timing], dict[str, str]]", outcome.value)
        noise = 0.01
        again = others.pop("A/A", None)
        if again is not None:
            noise = max(noise, abs(again.median_us - timings[0].median_us) / timings[0].median_us)
        # The variant that also writes lse is other code: the best must be right in it too.
        for index in sorted(range(len(finalists)), key=lambda i: timings[i].median_us):
            checked = self._call(gpu_jobs.check_lse, problem, finalists[index].config)
            if isinstance(checked, WorkerFailure):
                refused[index] = f"with lse, {checked.kind}: {checked.detail}"
            elif isinstance(checked.value, Rejected):
                refused[index] = f"with lse, {checked.value.reason}"
            else:
                break
        return Final(
            timings=timings,
            accuracy=[(tried.max_error, tried.allowed_error) for tried in finalists],
            baselines={name: timing.median_us for name, timing in others.items()},
            noise=noise,
            refused=refused,
        )

    def _call(self, function: typing.Callable[..., object], *args: object) -> WorkerResult | WorkerFailure:
        self._pool.submit(0, function, *args, timeout_s=_RACE_TIMEOUT_S)
        while True:
            for finished in self._pool.wait(_RACE_TIMEOUT_S):
                return finished.outcome

    def close(self) -> None:
        self._pool.close()


class ModelEvaluator:
    """Ranks candidates by `predict_us`; the leaders must pass a check in the interpreter."""

    origin: Origin = "predicted"
    timing = "occupancy-roofline-model"

    def __init__(self, target: GpuTarget, workers: int) -> None:
        self._target = target
        self._done: collections.deque[tuple[int, Outcome]] = collections.deque()
        self._pool: Pool[int] = Pool(workers, name="interpreting process")

    def submit(self, number: int, problem: Problem, config: KernelConfig, report: CompileReport) -> None:
        resources = report.resources
        prediction = predict_us(problem, self._target, config, resources.registers, resources.smem_bytes)
        timing = Timing(median_us=prediction.us, spread=0.0, samples=0)
        self._done.append((number, Measurement(timing=timing, max_error=0.0, allowed_error=0.0)))

    def collect(self, timeout_s: float) -> list[tuple[int, Outcome]]:
        done, self._done = list(self._done), collections.deque()
        return done

    def pending(self) -> int:
        return len(self._done)

    def final(self, problem: Problem, finalists: typing.Sequence[Tried], target_ms: float, seed: int) -> Final:
        accuracy = [(0.0, 0.0)] * len(finalists)
        refused: dict[int, str] = {}
        for index, tried in enumerate(finalists):
            self._pool.submit(index, check_interpreted, problem, tried.config, timeout_s=_INTERPRET_TIMEOUT_S)
        while self._pool.pending:
            for finished in self._pool.wait(_INTERPRET_TIMEOUT_S):
                outcome = finished.outcome
                if isinstance(outcome, WorkerFailure):
                    refused[finished.task_id] = f"{outcome.kind}: {outcome.detail}"
                elif isinstance(outcome.value, Rejected):
                    refused[finished.task_id] = outcome.value.reason
                else:
                    accuracy[finished.task_id] = typing.cast("tuple[float, float]", outcome.value)
        return Final(
            timings=[tried.timing for tried in finalists], accuracy=accuracy, baselines={}, noise=0.0, refused=refused
        )

    def close(self) -> None:
        self._pool.close()
