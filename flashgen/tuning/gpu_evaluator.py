"""Timing candidates on a GPU, in a process that may hang or die without costing more than the candidate it ran."""

from __future__ import annotations

import collections
import math
import typing
from multiprocessing.connection import Connection

from flashgen.codegen import KernelConfig
from flashgen.compile import CompileReport
from flashgen.errors import FlashgenError
from flashgen.measure import Measurement, Outcome, Rejected, Timing
from flashgen.registry import Origin
from flashgen.spec import Phase, Problem
from flashgen.tuning.evaluators import Final, failure_reason, times_longer
from flashgen.tuning.jobs import Jobs
from flashgen.tuning.tried import Tried
from flashgen.tuning.workers import Outcome as WorkerOutcome
from flashgen.tuning.workers import Worker, WorkerFailure, pack_request

_MIN_NOISE = 0.01
# Without a final race: timings of the search are minutes apart.
_NOISE_WITHOUT_RACE = 0.05
# A GPU may need a moment after a fault before a new process can use it.
_START_ATTEMPTS = 3
# What a huge problem adds to the timeouts: this many launches, at a rate that slow kernels reach.
_LAUNCHES, _SLOW_FLOPS = 50, 1e13
_MAX_EXTRA_S = 120.0

_VARIANTS: dict[Phase, str] = {"forward": "with lse", "backward": "with dbias"}

_Candidate = tuple[int, Problem, KernelConfig]
_Raced = tuple[list[Timing], dict[str, Timing]]


class GpuEvaluator:
    """Times candidates on one GPU; a hang, an abort or an illegal access costs the worker and one candidate."""

    origin: Origin = "measured"
    timing = "cold-l2"
    reserve_s = 8.0

    def __init__(self, device: str, jobs: Jobs) -> None:
        """Make an evaluator for `device`; `start` starts its process."""
        self._device = device
        self._jobs = jobs
        self._worker = Worker("measuring process", setup=jobs.start, setup_args=(device,))
        # Sent one by one, so that each has the best time so far and its own deadline.
        self._queue: collections.deque[_Candidate] = collections.deque()
        self._current: _Candidate | None = None
        self._best_us: float | None = None
        self._problem: Problem | None = None
        self._is_warm = False
        self._failed_starts = 0

    @property
    def connections(self) -> list[Connection]:
        return [self._worker.connection] if self._current and self._worker.connection else []

    def start(self) -> None:
        limit = self._jobs.race_timeout_s
        outcome = self._worker.call(self._jobs.start, self._device, timeout_s=limit)
        while self._may_start_again(outcome):
            outcome = self._worker.call(self._jobs.start, self._device, timeout_s=limit)
        if isinstance(outcome, WorkerFailure):
            raise FlashgenError(f"{self._device} cannot be measured on: {failure_reason(outcome)}")

    def submit(self, number: int, problem: Problem, config: KernelConfig, report: CompileReport) -> None:
        if problem != self._problem:
            self._problem, self._best_us, self._is_warm = problem, None, False
        self._queue.append((number, problem, config))
        self._feed()

    def collect(self) -> list[tuple[int, Outcome]]:
        outcome = self._worker.advance() if self._current else None
        if self._current is None or outcome is None:
            return []
        current, self._current = self._current, None
        outcomes: list[tuple[int, Outcome]] = []
        if self._may_start_again(outcome):
            self._queue.appendleft(current)
        else:
            outcomes.append((current[0], self._judged(outcome)))
        self._feed()
        return outcomes

    def _feed(self) -> None:
        if self._queue and self._current is None:
            self._current = self._queue.popleft()
            _, problem, config = self._current
            limit = self._jobs.evaluate_timeout_s if self._is_warm else self._jobs.first_evaluate_timeout_s
            request = pack_request(self._jobs.evaluate, problem, config, self._best_us)
            self._worker.begin(request, timeout_s=limit + _extra_s(problem))

    def _may_start_again(self, outcome: WorkerOutcome) -> bool:
        if not isinstance(outcome, WorkerFailure) or not outcome.at_start:
            self._failed_starts = 0
            return False
        self._failed_starts += 1
        return self._failed_starts < _START_ATTEMPTS

    def _judged(self, outcome: WorkerOutcome) -> Outcome:
        if isinstance(outcome, WorkerFailure):
            self._distrust()
            return Rejected(stage="run", reason=failure_reason(outcome))
        match outcome.value:
            case Rejected() as rejected:
                return rejected
            case Measurement(timing=timing, max_error=float(error), allowed_error=float(allowed)) as measured if (
                _is_sound(timing) and math.isfinite(error) and math.isfinite(allowed)
            ):
                self._is_warm = True
                best = self._best_us
                self._best_us = timing.median_us if best is None else min(best, timing.median_us)
                return measured
        return Rejected(stage="run", reason=f"the measurement returned {outcome.value!r}"[:1000])

    def _distrust(self) -> None:
        # After what nobody foresaw, even a process that lives may have lost its GPU context.
        self._worker.kill()
        self._is_warm = False

    def cancel(self) -> None:
        self._queue.clear()
        if self._current is not None:
            self._current = None
            self._distrust()

    def final(self, problem: Problem, finalists: typing.Sequence[Tried], target_ms: float, seed: int) -> Final:
        """Race the finalists and the baselines; whoever breaks the race is found and refused."""
        refused: dict[KernelConfig, str] = {}
        survivors = list(finalists)
        raced = self._race(problem, survivors, target_ms, seed, baselines=True)
        if isinstance(raced, str):
            for tried in finalists:
                alone = self._race(problem, [tried], target_ms, seed, baselines=False)
                if isinstance(alone, str):
                    refused[tried.config] = alone
            survivors = [tried for tried in finalists if tried.config not in refused]
            raced = self._race(problem, survivors, target_ms, seed, baselines=False) if survivors else ([], {})
        if isinstance(raced, str):
            timings = {tried.config: tried.timing for tried in survivors}
            return Final(timings=timings, baselines={}, noise=_NOISE_WITHOUT_RACE, refused=refused)
        timings = {tried.config: timing for tried, timing in zip(survivors, raced[0], strict=True)}
        medians = {name: timing.median_us for name, timing in raced[1].items()}
        noise = _MIN_NOISE
        if "A/A" in medians:
            first = raced[0][0].median_us
            noise = max(noise, abs(medians.pop("A/A") - first) / first)
        return Final(timings=timings, baselines=medians, noise=noise, refused=refused)

    def _race(
        self, problem: Problem, finalists: typing.Sequence[Tried], target_ms: float, seed: int, *, baselines: bool
    ) -> _Raced | str:
        """Return the timings of the finalists and of the rest, or why there are none."""
        configs = [tried.config for tried in finalists]
        longer = times_longer(len(configs))
        outcome = self._call(self._jobs.race, problem, configs, target_ms, seed, baselines, longer=longer)
        if isinstance(outcome, WorkerFailure):
            return f"in the final comparison, {failure_reason(outcome)}"
        match outcome.value:
            case (list() as timings, dict() as others) if len(timings) == len(configs) and all(
                map(_is_sound, (*timings, *others.values()))
            ):
                return timings, others
        return f"in the final comparison, the measurement returned {outcome.value!r}"[:1000]

    def confirm(self, problem: Problem, tried: Tried) -> Tried | Rejected:
        """Check the variant that writes more: it is other code, and the registry's key covers it."""
        what = _VARIANTS[problem.spec.phase]
        outcome = self._call(self._jobs.confirm, problem, tried.config)
        if isinstance(outcome, WorkerFailure):
            return Rejected(stage="accuracy", reason=f"{what}, {failure_reason(outcome)}")
        match outcome.value:
            case None:
                return tried
            case Rejected(stage=stage, reason=reason):
                return Rejected(stage=stage, reason=f"{what}, {reason}")
        return Rejected(stage="accuracy", reason=f"{what}, the check returned {outcome.value!r}"[:1000])

    def _call(self, function: str, problem: Problem, *args: object, longer: float = 1.0) -> WorkerOutcome:
        self.cancel()
        timeout_s = longer * (self._jobs.race_timeout_s + _extra_s(problem))
        outcome = self._worker.call(function, problem, *args, timeout_s=timeout_s)
        while self._may_start_again(outcome):
            outcome = self._worker.call(function, problem, *args, timeout_s=timeout_s)
        if isinstance(outcome, WorkerFailure):
            self._distrust()
        return outcome

    def close(self) -> None:
        self._worker.kill()


def _is_sound(timing: object) -> bool:
    return isinstance(timing, Timing) and math.isfinite(timing.median_us) and timing.median_us > 0


def _extra_s(problem: Problem) -> float:
    return min(_MAX_EXTRA_S, _LAUNCHES * problem.flops() / _SLOW_FLOPS)
