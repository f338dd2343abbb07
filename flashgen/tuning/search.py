"""The search for one problem: ask, compile beside measuring, drop early, and race the best at the end."""

from __future__ import annotations

import dataclasses
import datetime
import time
import typing

from flashgen.codegen import KernelConfig, KernelResources, render
from flashgen.compile import CompileReport, compile_job
from flashgen.measure import Measurement, Outcome, Rejected, Timing, tflops
from flashgen.registry import Accuracy, MeasuredRange, Performance, Provenance, RegistryEntry, RunnerUp
from flashgen.spec import Problem
from flashgen.target import GpuTarget, Software
from flashgen.tuning.effort import Effort
from flashgen.tuning.evaluators import Evaluator, Final
from flashgen.tuning.events import Observer, ProblemResult, TrialRecord
from flashgen.tuning.study import ProblemStudy, Tried
from flashgen.tuning.workers import Finished, Pool, WorkerFailure

_COMPILE_TIMEOUT_S = 60.0
_POLL_S = 0.02
_KEPT_RUNNERS_UP = 8
# A few spilled registers outside the loop over visible tiles cost nothing (the winner at D=128 has some); more of them
# stand inside it.
SPILL_LIMIT_BYTES = 256


@dataclasses.dataclass(frozen=True, kw_only=True)
class Task:
    """What one search is about.

    Attributes:
        problem: what is tuned.
        target: for which GPU.
        effort: how hard.
        legal: how many configs the space holds.
        default: what runs where nothing is tuned; the winner must beat it.
        deadline: monotonic time at which the result is due.
        software: versions, for the entry.
        seed: of the search.
    """

    problem: Problem
    target: GpuTarget
    effort: Effort
    legal: int
    default: KernelConfig
    deadline: float
    software: Software
    seed: int


class ProblemSearch:
    """Runs one task over a study, a pool of compiling processes and an evaluator."""

    def __init__(
        self, task: Task, *, study: ProblemStudy, pool: Pool[int], evaluator: Evaluator, observer: Observer
    ) -> None:
        self.task = task
        self.interrupted = False
        self._study = study
        self._pool = pool
        self._evaluator = evaluator
        self._observer = observer
        self._tried = list(study.finished())
        self._compiling: dict[int, KernelConfig] = {}
        self._measuring: dict[int, tuple[KernelConfig, CompileReport]] = {}
        self._by_binary: dict[tuple[object, ...], Tried] = {}
        self._start = time.monotonic()
        self._resumed = len(self._tried)

    def run(self, index: int, planned: int) -> ProblemResult:
        """Return what was found; a Ctrl-C ends the search with the best so far and sets `interrupted`."""
        self._observer.problem_started(index, self.task.problem, planned, self._resumed)
        note = ""
        final: Final | None = None
        finalists: list[Tried] = []
        try:
            self._search(planned)
            finalists = self._finalists()
            if finalists:
                self._observer.stage(f"comparing the best {len(finalists)}")
                final = self._evaluator.final(self.task.problem, finalists, self.task.effort.final_ms, self.task.seed)
        except KeyboardInterrupt:
            self.interrupted = True
            note = "interrupted: the best so far, without the final comparison"
        finally:
            self._study.abandon()
        result = self._result(finalists, final, note)
        self._observer.problem_finished(result)
        return result

    def _search(self, planned: int) -> None:
        final_s = self.task.effort.finalists * self.task.effort.final_ms * 4e-3 + 2.0
        stop_asking = self.task.deadline - final_s
        while True:
            in_flight = len(self._compiling) + len(self._measuring)
            late = time.monotonic() > stop_asking
            wanted = planned - len(self._tried) - in_flight
            if not late and wanted > 0 and self._pool.idle > 0 and self._study.remaining() > 0:
                number, config = self._study.ask()
                self._compiling[number] = config
                spec = self.task.problem.spec
                self._pool.submit(number, compile_job, spec, config, self.task.target, timeout_s=_COMPILE_TIMEOUT_S)
                continue
            if not in_flight or time.monotonic() > self.task.deadline:
                return
            for finished in self._pool.wait(_POLL_S if self._compiling else 0.0):
                self._compiled(finished)
            for number, outcome in self._evaluator.collect(0.0 if self._compiling else _POLL_S):
                self._measured(number, outcome)

    def _compiled(self, finished: Finished[int]) -> None:
        config = self._compiling.pop(finished.task_id, None)
        if config is None:
            return
        outcome = finished.outcome
        if isinstance(outcome, WorkerFailure):
            reason = f"{outcome.kind}: {outcome.detail}"[:1000]
            self._record(finished.task_id, config, None, Rejected(stage="compile", reason=reason))
            return
        report = typing.cast("CompileReport", outcome.value)
        rejected = self._too_big(report.resources)
        same = self._by_binary.get(self._binary_key(config, report))
        if rejected:
            self._record(finished.task_id, config, report.resources, rejected)
        elif same is not None:
            # Equal machine code on an equal grid: the time is known.
            record = dataclasses.replace(same.record, number=finished.task_id, config=config)
            self._keep(dataclasses.replace(same, record=record))
        else:
            self._measuring[finished.task_id] = (config, report)
            self._evaluator.submit(finished.task_id, self.task.problem, config, report)

    def _too_big(self, resources: KernelResources) -> Rejected | None:
        if resources.smem_bytes > self.task.target.smem_bytes:
            limit = self.task.target.smem_bytes
            return Rejected(stage="resources", reason=f"{resources.smem_bytes} bytes of shared memory of {limit}")
        if resources.spills > SPILL_LIMIT_BYTES:
            return Rejected(stage="resources", reason=f"{resources.spills} bytes of registers spilled")
        return None

    def _binary_key(self, config: KernelConfig, report: CompileReport) -> tuple[object, ...]:
        # Run-time numbers are not in the binary.
        return (report.binary_hash, getattr(config, "head_group", None))

    def _measured(self, number: int, outcome: Outcome) -> None:
        if number not in self._measuring:
            return
        config, report = self._measuring.pop(number)
        if isinstance(outcome, Measurement):
            tried = self._record(
                number, config, report.resources, outcome.timing, outcome.max_error, outcome.allowed_error
            )
            self._by_binary[self._binary_key(config, report)] = tried
        else:
            self._record(number, config, report.resources, outcome)

    def _record(
        self,
        number: int,
        config: KernelConfig,
        resources: KernelResources | None,
        result: Timing | Rejected,
        max_error: float = 0.0,
        allowed_error: float = 0.0,
    ) -> Tried:
        record = TrialRecord(number=number, config=config, resources=resources, result=result)
        return self._keep(Tried(record=record, max_error=max_error, allowed_error=allowed_error))

    def _keep(self, tried: Tried) -> Tried:
        self._study.tell(tried)
        self._tried.append(tried)
        done = len(self._tried) - self._resumed
        elapsed = time.monotonic() - self._start
        left = max(0.0, self.task.deadline - time.monotonic())
        remaining = min(self.task.effort.trials, self.task.legal) - len(self._tried)
        best = self._ranked()[:1]
        self._observer.trial(
            tried.record,
            best[0].record if best else None,
            len(self._tried),
            min(left, elapsed / done * max(0, remaining)),
        )
        return tried

    def _ranked(self) -> list[Tried]:
        return sorted((t for t in self._tried if t.passed), key=_speed)

    def _finalists(self) -> list[Tried]:
        ranked = self._ranked()
        best = ranked[: self.task.effort.finalists]
        return best + [t for t in ranked if t.config == self.task.default and t not in best]

    def _result(self, finalists: list[Tried], final: Final | None, note: str) -> ProblemResult:
        ranked = self._ranked()
        entry: RegistryEntry | None = None
        tied: tuple[KernelConfig, ...] = ()
        if final is not None:
            winner, runners_up, tied = choose_winner(finalists, final, self.task.default)
            if winner is not None:
                entry = self._entry(winner, runners_up, final)
            else:
                note = "; ".join(f"{finalists[i].config}: {reason}" for i, reason in final.refused.items())
        elif ranked and self._evaluator.origin == "measured":
            entry = self._entry(ranked[0], ranked[1:], None)
        if entry is None and not note:
            note = f"no config passed: {self._rejections()}"
        return ProblemResult(
            problem=self.task.problem,
            entry=entry,
            trials=tuple(t.record for t in self._tried),
            legal=self.task.legal,
            baselines=final.baselines if final else {},
            tied=tied,
            wall_s=time.monotonic() - self._start,
            note=note,
        )

    def _rejections(self) -> str:
        reasons = [t.record.result for t in self._tried if isinstance(t.record.result, Rejected)]
        return f"{len(reasons)} rejected, the first for: {reasons[0].reason}" if reasons else "none was tried in time"

    def _entry(self, winner: Tried, runners_up: typing.Sequence[Tried], final: Final | None) -> RegistryEntry:
        problem, software = self.task.problem, self.task.software
        spec = problem.spec.tuning_key()
        resources = winner.record.resources
        assert resources is not None
        baselines = final.baselines if final else {}
        baseline = min(baselines, key=lambda name: baselines[name], default="none")
        timing = winner.timing
        return RegistryEntry(
            device_name=self.task.target.device_name,
            arch=self.task.target.arch,
            spec=spec,
            range=MeasuredRange.of(problem.shape),
            config=winner.config,
            origin=self._evaluator.origin,
            resources=resources,
            performance=Performance(
                median_us=timing.median_us,
                spread=timing.spread,
                tflops=tflops(problem, timing.median_us),
                baseline=baseline,
                baseline_us=baselines.get(baseline),
                timing=self._evaluator.timing,
            ),
            accuracy=Accuracy(max_error=winner.max_error, allowed_error=winner.allowed_error),
            runners_up=tuple(
                RunnerUp(config=t.config, median_us=t.timing.median_us) for t in runners_up[:_KEPT_RUNNERS_UP]
            ),
            provenance=Provenance(
                template_digest=render(spec, winner.config).digest,
                flashgen=software.flashgen,
                triton=software.triton,
                torch=software.torch,
                driver=software.driver,
                date=datetime.datetime.now(datetime.timezone.utc).strftime("%Y-%m-%dT%H:%M:%SZ"),
                trials=len(self._tried),
                seed=self.task.seed,
            ),
        )


def choose_winner(
    finalists: typing.Sequence[Tried], final: Final, default: KernelConfig
) -> tuple[Tried | None, list[Tried], tuple[KernelConfig, ...]]:
    """Return the winner (None if every finalist was refused), the others best first, and who is tied with it.

    Within the noise of the fastest the default wins, so that nothing changes without a gain; else the one with fewer
    spills, less shared memory, and the earlier config: the same answer every time.
    """
    raced = [
        dataclasses.replace(
            tried,
            record=dataclasses.replace(tried.record, result=final.timings[index]),
            max_error=final.accuracy[index][0],
            allowed_error=final.accuracy[index][1],
        )
        for index, tried in enumerate(finalists)
        if index not in final.refused
    ]
    if not raced:
        return None, [], ()
    raced.sort(key=_speed)
    limit = raced[0].timing.median_us * (1 + final.noise)
    tied = [tried for tried in raced if tried.timing.median_us <= limit]
    winner = min(tied, key=lambda tried: (tried.config != default, _tie_break(tried)))
    others = [tried for tried in raced if tried is not winner]
    return winner, others, tuple(tried.config for tried in tied if tried is not winner)


def _speed(tried: Tried) -> tuple[float, KernelConfig]:
    return (tried.timing.median_us, tried.config)


def _tie_break(tried: Tried) -> tuple[object, ...]:
    resources = tried.record.resources
    assert resources is not None
    return (resources.spills, resources.smem_bytes, tried.config)
