"""The search for one problem: ask, compile beside measuring, drop early, and have the best compared at the end."""

from __future__ import annotations

import dataclasses
import multiprocessing.connection
import time

from flashgen.codegen import KernelConfig
from flashgen.codegen.constraints import interpreter_refusal
from flashgen.measure import Measurement, Outcome, Rejected
from flashgen.tuning.candidates import Binaries, Candidate, spills_much
from flashgen.tuning.evaluators import Evaluator, compile_report, shared_memory_refusal, times_longer
from flashgen.tuning.events import Observer, ProblemResult
from flashgen.tuning.final_comparison import NO_TRIAL, FinalComparison
from flashgen.tuning.jobs import Jobs
from flashgen.tuning.pool import Finished, Pool
from flashgen.tuning.quarantine import Quarantine
from flashgen.tuning.sharing import Sharing
from flashgen.tuning.study import ProblemStudy
from flashgen.tuning.task import Task
from flashgen.tuning.trials import Trials
from flashgen.tuning.tried import Tried
from flashgen.tuning.winner import Choice, make_entry

_TICK_S = 0.25
_MAX_RESERVE_SHARE = 0.4
# After this share of the time without a config that passed, those that spill are measured too.
_PATIENCE_SHARE = 0.5
# Of what other machines compiled, so many are taken at a time, that a GPU of theirs finds some too.
_COMPILED_AHEAD = 4


class ProblemSearch:
    """Runs one task over a study, a pool of compiling processes and an evaluator."""

    def __init__(
        self,
        task: Task,
        *,
        study: ProblemStudy,
        pool: Pool[int],
        evaluator: Evaluator,
        observer: Observer,
        jobs: Jobs,
        quarantine: Quarantine,
        sharing: Sharing | None = None,
    ) -> None:
        self.task = task
        self.interrupted = False
        # Of the final comparison; None where there was none, or nothing was left in it.
        self.choice: Choice | None = None
        self._study = study
        self._pool = pool
        self._evaluator = evaluator
        self._observer = observer
        self._jobs = jobs
        self._quarantine = quarantine
        self._sharing = sharing
        self._trials = Trials(task, study, observer)
        self._comparison = FinalComparison(
            task, self._trials, pool=pool, evaluator=evaluator, observer=observer, jobs=jobs, quarantine=quarantine
        )
        self._compiling: dict[int, KernelConfig] = {}
        # Held back until nothing else passed.
        self._spilling: list[Candidate] = []
        self._binaries = Binaries(self._trials.tried)
        self._compile_from_s, self._measure_from_s = pool.busy_s, evaluator.busy_s
        seconds = max(0.0, task.deadline - self._trials.start)
        reserve_s = evaluator.reserve_s * times_longer(task.effort.finalists)
        self._stop = task.deadline - min(reserve_s, _MAX_RESERVE_SHARE * seconds)
        self._patient_until = self._trials.start + _PATIENCE_SHARE * (self._stop - self._trials.start)

    def run(self, index: int) -> ProblemResult:
        """Return what was found; a Ctrl-C ends the search with the best so far and sets `interrupted`.

        Raises:
            FlashgenError: if the study cannot be written, or worker processes cannot start.
        """
        self._observer.problem_started(index, self.task.problem, self.task.planned, self._trials.resumed)
        if self._sharing:
            self._sharing.start(self._trials.tried)
        note = ""
        try:
            try:
                self._search()
            finally:
                self._drop_unfinished()
            if len(self._trials) < self.task.planned and time.monotonic() >= self._stop:
                note = f"out of time after {len(self._trials)} of {self.task.planned} configs"
            choice = self.choice = self._comparison.compare()
        except KeyboardInterrupt:
            self.interrupted = True
            choice = self._best_so_far()
            note = "interrupted: the best so far, without the final comparison" if choice else "interrupted"
        result = self._result(choice, note)
        self._observer.problem_finished(result)
        return result

    def _search(self) -> None:
        if self._can_ask():
            todo = self.task.planned - len(self._trials)
            self._observer.stage(f"compiling and measuring {todo} configs with {self._pool.size} processes")
        while (in_time := time.monotonic() < self._stop) or self._is_owed():
            if in_time and self._pool.idle and self._begin_another():
                continue
            busy = bool(self._compiling or self._binaries.measuring or self._spilling)
            if not (busy or self._can_ask() or (self._sharing and self._sharing.under_way)):
                return
            connections = [*self._pool.connections, *self._evaluator.connections]
            multiprocessing.connection.wait(connections, _TICK_S if connections or not busy else 0.0)
            for finished in self._pool.wait(0.0):
                self._compiled(finished)
            self._release_spilling()
            for number, outcome in self._evaluator.collect():
                self._measured(number, outcome)
            if self._sharing:
                self._share(self._sharing, busy)

    def _is_owed(self) -> bool:
        """Return whether something is under way without which another config might win that is no better."""
        under_way = {*self._compiling.values(), *(candidate.config for candidate in self._binaries.waiting)}
        return time.monotonic() < self.task.deadline and not under_way.isdisjoint(self.task.owed)

    def _share(self, sharing: Sharing, busy: bool) -> None:
        """Keep what other machines handed in, take what they compiled for here, and offer them more."""
        for tried in sharing.collect(busy=busy):
            if isinstance(tried.record.result, Rejected):
                self._quarantine.consider(self.task.problem, tried.config, tried.record.result)
            self._binaries.know(tried)
            self._trials.count(tried)
        while self._binaries.measuring < _COMPILED_AHEAD and (offer := sharing.take(compiled=True)):
            assert offer.report is not None
            self._judge(Candidate(number=offer.number, config=offer.config, report=offer.report))
        for _ in range(sharing.wanted):
            if not self._can_ask():
                break
            sharing.offer()

    def _begin_another(self) -> bool:
        """Return whether there was another config to compile: a new one or, failing that, one that nobody claimed."""
        if self._can_ask():
            self._compile(*self._study.ask())
            return True
        offer = self._sharing.take(compiled=False) if self._sharing else None
        if offer is None:
            return False
        self._compile(offer.number, offer.config)
        return True

    def _can_ask(self) -> bool:
        under_way = len(self._compiling) + len(self._spilling) + len(self._binaries.waiting)
        under_way += self._sharing.under_way if self._sharing else 0
        return len(self._trials) + under_way < self.task.planned and self._study.remaining() > 0

    def _compile(self, number: int, config: KernelConfig) -> None:
        refused = self._quarantine.refusal(self.task.problem.spec, config)
        if refused is not None:
            self._trials.record(number, config, None, refused)
            return
        self._compiling[number] = config
        spec, target = self.task.problem.spec, self.task.target
        self._pool.submit(number, self._jobs.compile, spec, config, target, timeout_s=self._jobs.compile_timeout_s)

    def _compiled(self, finished: Finished[int]) -> None:
        number, outcome = finished.task_id, finished.outcome
        if number == NO_TRIAL:
            return
        config = self._compiling.pop(number)
        report = compile_report(outcome)
        if isinstance(report, Rejected):
            self._quarantine.consider(self.task.problem, config, report)
            self._trials.record(number, config, None, report)
        else:
            self._judge(Candidate(number=number, config=config, report=report))

    def _judge(self, candidate: Candidate) -> None:
        """Reject what cannot run, hold back what spills, and have the others measured."""
        resources = candidate.report.resources
        refused = shared_memory_refusal(resources, self.task.target)
        if refused is not None:
            self._trials.record(candidate.number, candidate.config, resources, refused)
        elif spills_much(resources):
            self._spilling.append(candidate)
        else:
            self._measure(candidate)

    def _release_spilling(self) -> None:
        """Drop those that spill once one that does not has passed; measure them when none is left that could."""
        if not self._spilling:
            return
        if any(_passed_without_spilling(tried) for tried in self._trials.tried):
            held, self._spilling = self._spilling, []
            for candidate in held:
                self._reject(candidate, f"{candidate.report.resources.spills} bytes of registers spilled")
            return
        others = (
            self._compiling
            or self._binaries.measuring
            or self._can_ask()
            or (self._sharing and self._sharing.under_way)
        )
        if not others or time.monotonic() > self._patient_until:
            held, self._spilling = self._spilling, []
            for candidate in sorted(held, key=lambda c: (c.report.resources.spills, c.number)):
                self._measure(candidate)

    def _measure(self, candidate: Candidate) -> None:
        """Have a candidate evaluated, unless equal machine code has been, or is being."""
        known = self._binaries.known(candidate)
        if known is not None:
            self._copy(candidate, known)
        elif self._binaries.begin(candidate):
            self._evaluator.submit(candidate.number, self.task.problem, candidate.config, candidate.report)

    def _measured(self, number: int, outcome: Outcome) -> None:
        first, *others = self._binaries.end(number)
        resources, binary_hash = first.report.resources, first.report.binary_hash
        if isinstance(outcome, Measurement):
            accuracy = (outcome.max_error, outcome.allowed_error)
            tried = self._trials.record(number, first.config, resources, outcome.timing, accuracy, binary_hash)
        else:
            for candidate in (first, *others):
                self._quarantine.consider(self.task.problem, candidate.config, outcome)
            tried = self._trials.record(number, first.config, resources, outcome, binary_hash=binary_hash)
        self._binaries.measured(first, tried)
        for candidate in others:
            self._copy(candidate, tried)

    def _copy(self, candidate: Candidate, known: Tried) -> None:
        record = dataclasses.replace(known.record, number=candidate.number, config=candidate.config, resumed=False)
        self._trials.keep(dataclasses.replace(known, record=record))

    def _reject(self, candidate: Candidate, reason: str) -> None:
        rejected = Rejected(stage="resources", reason=reason)
        self._trials.record(candidate.number, candidate.config, candidate.report.resources, rejected)

    def _drop_unfinished(self) -> None:
        """Stop what is under way, so that nothing of it is taken for a later problem's."""
        self._pool.cancel()
        self._evaluator.cancel()
        self._compiling.clear()
        self._binaries.drop()
        self._spilling.clear()
        if self._sharing:
            self._sharing.close()
        self._study.abandon()

    def _best_so_far(self) -> Choice | None:
        """Return the best by the timings of the search; None if there is none, or at another Ctrl-C."""
        self._observer.stage("interrupted: checking the best so far; Ctrl-C again to leave at once")
        try:
            self._drop_unfinished()
            return self._comparison.best_so_far()
        except KeyboardInterrupt:
            return None

    def _result(self, choice: Choice | None, note: str) -> ProblemResult:
        entry = None
        if choice is not None:
            evaluator, trials = self._evaluator, len(self._trials)
            timing = evaluator.timing(self.task.problem.spec.phase)
            entry = make_entry(self.task, choice, origin=evaluator.origin, timing=timing, trials=trials)
            unchecked = interpreter_refusal(entry.config) if entry.origin == "predicted" else None
            note = "; ".join(filter(None, (note, unchecked and f"the winner was not checked: {unchecked}")))
        else:
            note = "; ".join(filter(None, (note, self._trials.why_nothing())))
        return ProblemResult(
            problem=self.task.problem,
            entry=entry,
            trials=tuple(tried.record for tried in self._trials.tried),
            legal=self.task.legal,
            baselines=choice.baselines if choice else {},
            tied=choice.tied if choice else (),
            wall_s=time.monotonic() - self._trials.start,
            compile_s=self._pool.busy_s - self._compile_from_s,
            measure_s=self._evaluator.busy_s - self._measure_from_s,
            note=note,
        )


def _passed_without_spilling(tried: Tried) -> bool:
    resources = tried.record.resources
    return tried.passed and (resources is None or not spills_much(resources))
