"""Timing candidates on GPUs, in processes that may hang or die without costing more than the candidate they ran."""

from __future__ import annotations

import collections
import math
import multiprocessing.connection
import typing
from multiprocessing.connection import Connection

from flashgen.codegen import KernelConfig
from flashgen.compile import CompileReport
from flashgen.errors import FlashgenError
from flashgen.measure import Measurement, Outcome, Race, Rejected, Timing
from flashgen.registry import Origin
from flashgen.spec import AttentionSpec, Phase, Problem
from flashgen.tuning.evaluators import Final, failure_reason, times_longer
from flashgen.tuning.jobs import Jobs
from flashgen.tuning.measuring import MeasuringProcess
from flashgen.tuning.tried import Tried
from flashgen.tuning.variants import confirmed_variant
from flashgen.tuning.workers import Outcome as WorkerOutcome
from flashgen.tuning.workers import WorkerFailure

_MIN_NOISE = 0.01
# Without a final race: timings of the search are minutes apart.
_NOISE_WITHOUT_RACE = 0.05
_TICK_S = 0.25
_VARIANTS: dict[Phase, str] = {
    "forward": "with lse",
    "backward": "with dbias",
    "decode": "with lse, pages and appended keys",
}

_Candidate = tuple[int, Problem, KernelConfig]


class GpuEvaluator:
    """Times candidates on GPUs of one kind; a hang, an abort or an illegal access costs a process and one candidate.

    Whichever GPU is free takes the next one. Two of one kind differ by a percent or two, so the last comparison takes
    place on the first of them alone.
    """

    origin: Origin = "measured"
    reserve_s = 8.0

    def __init__(self, devices: typing.Sequence[str], jobs: Jobs) -> None:
        """Make an evaluator for `devices`; `start` starts their processes."""
        self._jobs = jobs
        self._processes = [MeasuringProcess(device, jobs) for device in devices]
        # Sent one by one, so that each has the best time so far and its own deadline.
        self._queue: collections.deque[_Candidate] = collections.deque()
        self._current: dict[MeasuringProcess, _Candidate] = {}
        self._starting: set[MeasuringProcess] = set()
        # Busy with what was cancelled: to start a process again would cost more than to wait for most candidates.
        self._forgotten: set[MeasuringProcess] = set()
        self._best_us: float | None = None
        self._problem: Problem | None = None

    def timing(self, phase: Phase) -> str:
        return "cuda-graph" if phase == "decode" else "cold-l2"

    @property
    def connections(self) -> list[Connection]:
        busy = (*self._current, *self._starting, *self._forgotten)
        return [process.connection for process in busy if process.connection]

    @property
    def busy_s(self) -> float:
        return sum(process.busy_s for process in self._processes) / len(self._processes)

    def start(self) -> None:
        for process in self._processes:
            process.begin_start()
        self._starting.update(self._processes)

    def submit(self, number: int, problem: Problem, config: KernelConfig, report: CompileReport) -> None:
        if problem != self._problem:
            self._problem, self._best_us = problem, None
        self._queue.append((number, problem, config))
        self._feed()

    def collect(self) -> list[tuple[int, Outcome]]:
        self._free()
        ended = [(process, outcome) for process in self._current if (outcome := process.advance())]
        outcomes = [(self._current.pop(process), process, outcome) for process, outcome in ended]
        judged = [(number, self._judged(process, problem, o)) for (number, problem, _), process, o in outcomes]
        self._feed()
        return judged

    def _free(self) -> None:
        """See which processes have come to the end of what nobody waits for."""
        for process in tuple(self._forgotten):
            outcome = process.advance()
            if isinstance(outcome, WorkerFailure):
                process.kill()
            if outcome is not None:
                self._forgotten.remove(process)
        for process in tuple(self._starting):
            outcome = process.advance()
            if isinstance(outcome, WorkerFailure):
                raise FlashgenError(f"{process.device} cannot be measured on: {failure_reason(outcome)}")
            if outcome is not None:
                self._starting.remove(process)

    def _feed(self) -> None:
        busy = {*self._current, *self._starting, *self._forgotten}
        for process in self._processes:
            if self._queue and process not in busy:
                candidate = self._queue.popleft()
                _, problem, config = self._current[process] = candidate
                process.begin_evaluation(problem, config, self._best_us)

    def _judged(self, process: MeasuringProcess, problem: Problem, outcome: WorkerOutcome) -> Outcome:
        if isinstance(outcome, WorkerFailure):
            # After what nobody foresaw, even a process that lives may have lost its GPU context.
            process.kill()
            return Rejected(stage="run", reason=failure_reason(outcome))
        match outcome.value:
            case Rejected() as rejected:
                return rejected
            case Measurement(timing=timing, max_error=float(error), allowed_error=float(allowed)) as measured if (
                _is_sound(timing) and math.isfinite(error) and math.isfinite(allowed)
            ):
                process.warmed_for(problem)
                best = self._best_us
                self._best_us = timing.median_us if best is None else min(best, timing.median_us)
                return measured
        return Rejected(stage="run", reason=f"the measurement returned {outcome.value!r}"[:1000])

    def cancel(self) -> None:
        self._queue.clear()
        for process in self._current:
            process.hurry()
        self._forgotten.update(self._current)
        self._current.clear()

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
            if not survivors:
                return Final(timings={}, baselines={}, noise=_NOISE_WITHOUT_RACE, refused=refused)
            raced = self._race(problem, survivors, target_ms, seed, baselines=False)
        if isinstance(raced, str):
            timings = {tried.config: tried.timing for tried in survivors}
            return Final(timings=timings, baselines={}, noise=_NOISE_WITHOUT_RACE, refused=refused)
        names = {str(place): tried.config for place, tried in enumerate(survivors)}
        return Final(
            timings={config: raced.timings[name] for name, config in names.items()},
            baselines={name: timing.median_us for name, timing in raced.timings.items() if name not in names},
            noise=max(_MIN_NOISE, raced.noise),
            at_least={config: raced.at_least[name] for name, config in names.items()},
            refused=refused,
        )

    def _race(
        self, problem: Problem, finalists: typing.Sequence[Tried], target_ms: float, seed: int, *, baselines: bool
    ) -> Race | str:
        """Return the race of the finalists, by their places, or why there is none."""
        configs = [tried.config for tried in finalists]
        longer = times_longer(len(configs))
        outcome = self._call(self._jobs.race, problem, configs, target_ms, seed, baselines, longer=longer)
        if isinstance(outcome, WorkerFailure):
            return f"in the final comparison, {failure_reason(outcome)}"
        names = set(map(str, range(len(configs))))
        match outcome.value:
            case Race(timings=timings, at_least=at_least, noise=float(noise)) as race if (
                timings.keys() >= names == at_least.keys()
                and all(map(_is_sound, timings.values()))
                and all(map(math.isfinite, (noise, *at_least.values())))
            ):
                return race
        return f"in the final comparison, the measurement returned {outcome.value!r}"[:1000]

    def confirmed_as(self, spec: AttentionSpec) -> AttentionSpec | None:
        return confirmed_variant(spec)

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
        while self._processes[0] in self._starting | self._forgotten:
            multiprocessing.connection.wait(self.connections, _TICK_S)
            self._free()
        return self._processes[0].call(function, problem, *args, longer=longer)

    def close(self) -> None:
        for process in self._processes:
            process.close()


def _is_sound(timing: object) -> bool:
    return isinstance(timing, Timing) and math.isfinite(timing.median_us) and timing.median_us > 0
