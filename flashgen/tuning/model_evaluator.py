"""Ranking by a model, and checking the leaders in the interpreter: what can be said without a GPU."""

from __future__ import annotations

import dataclasses
import math
import typing
from multiprocessing.connection import Connection

from flashgen.codegen import KernelConfig
from flashgen.codegen.constraints import interpreter_refusal
from flashgen.compile import CompileReport
from flashgen.measure import Measurement, Outcome, Rejected, Timing, predict_us
from flashgen.registry import Origin
from flashgen.spec import AttentionSpec, Phase, Problem
from flashgen.target import GpuTarget
from flashgen.tuning.evaluators import Final, failure_reason
from flashgen.tuning.jobs import Jobs
from flashgen.tuning.pool import Pool
from flashgen.tuning.tried import Tried
from flashgen.tuning.workers import Outcome as WorkerOutcome
from flashgen.tuning.workers import WorkerFailure

Checked = tuple[float, float] | Rejected


PREDICTED_TIMING = "occupancy-roofline-model"
"""What an entry says of times that nobody measured."""


class ModelEvaluator:
    """Ranks candidates by `predict_us`; leaders that the interpreter can run must pass a check in it."""

    origin: Origin = "predicted"
    reserve_s = 10.0

    def __init__(self, target: GpuTarget, workers: int, jobs: Jobs) -> None:
        """Make an evaluator for `target` whose checks run in up to `workers` processes."""
        self._target = target
        self._jobs = jobs
        self._done: list[tuple[int, Outcome]] = []
        self._pool: Pool[KernelConfig] = Pool(workers, name="interpreting process")
        self._checked: dict[tuple[Problem, KernelConfig], Checked] = {}

    def timing(self, phase: Phase) -> str:
        return PREDICTED_TIMING

    @property
    def connections(self) -> list[Connection]:
        return []

    @property
    def busy_s(self) -> float:
        return self._pool.busy_s

    def start(self) -> None:
        """Nothing to do: the interpreting processes start with the leaders."""

    def submit(self, number: int, problem: Problem, config: KernelConfig, report: CompileReport) -> None:
        resources = report.resources
        prediction = predict_us(problem, self._target, config, resources.registers, resources.smem_bytes)
        if math.isfinite(prediction.us):
            timing = Timing(median_us=prediction.us, spread=0.0, samples=0)
            self._done.append((number, Measurement(timing=timing, max_error=0.0, allowed_error=0.0)))
        else:
            reason = f"not one program fits a multiprocessor: too much {prediction.limiter}"
            self._done.append((number, Rejected(stage="resources", reason=reason)))

    def collect(self) -> list[tuple[int, Outcome]]:
        done, self._done = self._done, []
        return done

    def cancel(self) -> None:
        self._done.clear()
        self._pool.cancel()

    def final(self, problem: Problem, finalists: typing.Sequence[Tried], target_ms: float, seed: int) -> Final:
        self._check(problem, [tried.config for tried in finalists])
        checked = {tried.config: self._checked[problem, tried.config] for tried in finalists}
        return Final(
            timings={tried.config: tried.timing for tried in finalists},
            baselines={},
            noise=0.0,
            refused={config: c.reason for config, c in checked.items() if isinstance(c, Rejected)},
        )

    def confirmed_as(self, spec: AttentionSpec) -> AttentionSpec | None:
        return None

    def confirm(self, problem: Problem, tried: Tried) -> Tried | Rejected:
        self._check(problem, [tried.config])
        checked = self._checked[problem, tried.config]
        if isinstance(checked, Rejected):
            return checked
        return dataclasses.replace(tried, max_error=checked[0], allowed_error=checked[1])

    def _check(self, problem: Problem, configs: typing.Iterable[KernelConfig]) -> None:
        for config in configs:
            if interpreter_refusal(config):
                # Nothing was measured, and nothing is allowed.
                self._checked[problem, config] = (0.0, 0.0)
            elif (problem, config) not in self._checked:
                timeout_s = self._jobs.interpret_timeout_s
                self._pool.submit(config, self._jobs.interpret, problem, config, timeout_s=timeout_s)
        while self._pool.pending:
            for finished in self._pool.wait(1.0):
                self._checked[problem, finished.task_id] = _checked(finished.outcome)

    def close(self) -> None:
        self._pool.close()


def _checked(outcome: WorkerOutcome) -> Checked:
    if isinstance(outcome, WorkerFailure):
        return Rejected(stage="accuracy", reason=failure_reason(outcome))
    match outcome.value:
        case Rejected() as rejected:
            return rejected
        case (float() as error, float() as allowed) if math.isfinite(error) and math.isfinite(allowed):
            return error, allowed
    return Rejected(stage="accuracy", reason=f"the check returned {outcome.value!r}"[:1000])
