"""The search for one problem: ask, compile beside measuring, drop early, and race the best at the end."""

from __future__ import annotations

import dataclasses
import multiprocessing.connection
import time
import typing

from flashgen.codegen import KernelConfig, KernelResources
from flashgen.codegen.constraints import interpreter_refusal
from flashgen.compile import CompileReport
from flashgen.measure import Measurement, Outcome, Rejected, Timing
from flashgen.tuning.evaluators import Evaluator, Final, compile_report, shared_memory_refusal, times_longer
from flashgen.tuning.events import Observer, ProblemResult, TrialRecord
from flashgen.tuning.jobs import Jobs
from flashgen.tuning.pool import Finished, Pool
from flashgen.tuning.quarantine import Quarantine
from flashgen.tuning.sharing import Sharing
from flashgen.tuning.study import ProblemStudy
from flashgen.tuning.task import Task
from flashgen.tuning.tried import Tried
from flashgen.tuning.winner import Choice, by_speed, choose_winner, make_entry

# A few spilled registers outside the loop over visible tiles cost nothing (the winner at D=128 has some); more of them
# stand inside it. Where everything spills (float32 at D=128), the least spilling are tried.
SPILL_LIMIT_BYTES = 256
_TICK_S = 0.25
_MAX_RESERVE_SHARE = 0.4
# After this share of the time without a config that passed, those that spill are measured too.
_PATIENCE_SHARE = 0.5
# Timings of the search are taken apart from each other.
_NOISE_WITHOUT_RACE = 0.05
_CHECKED_ON_INTERRUPT = 3
# In place of a trial's number: only Triton's cache is to know.
_NO_TRIAL = -1
# Of what other machines compiled, so many are taken at a time, that a GPU of theirs finds some too.
_COMPILED_AHEAD = 4

_BinaryKey = tuple[str, KernelResources, KernelConfig]


@dataclasses.dataclass(frozen=True, kw_only=True)
class _Candidate:
    """A config that compiled."""

    number: int
    config: KernelConfig
    report: CompileReport

    def binary_key(self) -> _BinaryKey:
        return _binary_key(self.report.binary_hash, self.report.resources, self.config)


def _binary_key(binary_hash: str, resources: KernelResources, config: KernelConfig) -> _BinaryKey:
    # These leave no trace but in the code; the other numbers also shape the grid and the launch.
    traceless = [name for name in config.as_dict() if name in ("num_stages", "num_stages2", "maxnreg")]
    return binary_hash, resources, dataclasses.replace(config, **dict.fromkeys(traceless, 0))


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
        self._tried = list(study.finished())
        self._resumed = len(self._tried)
        self._compiling: dict[int, KernelConfig] = {}
        # Held back until nothing else passed.
        self._spilling: list[_Candidate] = []
        # Being measured: the trial that is, by number, and all those with its binary.
        self._measuring: dict[int, _BinaryKey] = {}
        self._same_binary: dict[_BinaryKey, list[_Candidate]] = {}
        self._known: dict[_BinaryKey, Tried] = {}
        for tried in self._tried:
            self._know(tried)
        self._refused: dict[KernelConfig, str] = {}
        self._start = time.monotonic()
        self._compile_from_s, self._measure_from_s = pool.busy_s, evaluator.busy_s
        seconds = max(0.0, task.deadline - self._start)
        reserve_s = evaluator.reserve_s * times_longer(task.effort.finalists)
        self._stop = task.deadline - min(reserve_s, _MAX_RESERVE_SHARE * seconds)
        self._patient_until = self._start + _PATIENCE_SHARE * (self._stop - self._start)

    def run(self, index: int) -> ProblemResult:
        """Return what was found; a Ctrl-C ends the search with the best so far and sets `interrupted`.

        Raises:
            FlashgenError: if the study cannot be written, or worker processes cannot start.
        """
        self._observer.problem_started(index, self.task.problem, self.task.planned, self._resumed)
        if self._sharing:
            self._sharing.start(self._tried)
        note = ""
        try:
            try:
                self._search()
            finally:
                self._drop_unfinished()
            if len(self._tried) < self.task.planned and time.monotonic() >= self._stop:
                note = f"out of time after {len(self._tried)} of {self.task.planned} configs"
            choice = self.choice = self._compare()
        except KeyboardInterrupt:
            self.interrupted = True
            choice = self._best_so_far()
            note = "interrupted: the best so far, without the final comparison" if choice else "interrupted"
        result = self._result(choice, note)
        self._observer.problem_finished(result)
        return result

    def _search(self) -> None:
        if self._can_ask():
            todo = self.task.planned - len(self._tried)
            self._observer.stage(f"compiling and measuring {todo} configs with {self._pool.size} processes")
        while (in_time := time.monotonic() < self._stop) or self._is_owed():
            if in_time and self._pool.idle and self._begin_another():
                continue
            busy = bool(self._compiling or self._measuring or self._spilling)
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
        waiting = (candidate.config for same in self._same_binary.values() for candidate in same)
        under_way = {*self._compiling.values(), *waiting}
        return time.monotonic() < self.task.deadline and not under_way.isdisjoint(self.task.owed)

    def _share(self, sharing: Sharing, busy: bool) -> None:
        """Keep what other machines handed in, take what they compiled for here, and offer them more."""
        for tried in sharing.collect(busy=busy):
            if isinstance(tried.record.result, Rejected):
                self._quarantine.consider(self.task.problem, tried.config, tried.record.result)
            self._know(tried)
            self._count(tried)
        while len(self._measuring) < _COMPILED_AHEAD and (offer := sharing.take(compiled=True)):
            assert offer.report is not None
            self._judge(_Candidate(number=offer.number, config=offer.config, report=offer.report))
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
        waiting = sum(map(len, self._same_binary.values()))
        under_way = len(self._compiling) + len(self._spilling) + waiting
        under_way += self._sharing.under_way if self._sharing else 0
        return len(self._tried) + under_way < self.task.planned and self._study.remaining() > 0

    def _compile(self, number: int, config: KernelConfig) -> None:
        refused = self._quarantine.refusal(self.task.problem.spec, config)
        if refused is not None:
            self._record(number, config, None, refused)
            return
        self._compiling[number] = config
        spec, target = self.task.problem.spec, self.task.target
        self._pool.submit(number, self._jobs.compile, spec, config, target, timeout_s=self._jobs.compile_timeout_s)

    def _compiled(self, finished: Finished[int]) -> None:
        number, outcome = finished.task_id, finished.outcome
        if number == _NO_TRIAL:
            return
        config = self._compiling.pop(number)
        report = compile_report(outcome)
        if isinstance(report, Rejected):
            self._quarantine.consider(self.task.problem, config, report)
            self._record(number, config, None, report)
        else:
            self._judge(_Candidate(number=number, config=config, report=report))

    def _judge(self, candidate: _Candidate) -> None:
        """Reject what cannot run, hold back what spills, and have the others measured."""
        resources = candidate.report.resources
        refused = shared_memory_refusal(resources, self.task.target)
        if refused is not None:
            self._record(candidate.number, candidate.config, resources, refused)
        elif resources.spills > SPILL_LIMIT_BYTES:
            self._spilling.append(candidate)
        else:
            self._measure(candidate)

    def _release_spilling(self) -> None:
        """Drop those that spill once one that does not has passed; measure them when none is left that could."""
        if not self._spilling:
            return
        if any(tried.passed and not _spills(tried.record.resources) for tried in self._tried):
            held, self._spilling = self._spilling, []
            for candidate in held:
                self._reject(candidate, f"{candidate.report.resources.spills} bytes of registers spilled")
            return
        others = self._compiling or self._measuring or self._can_ask() or (self._sharing and self._sharing.under_way)
        if not others or time.monotonic() > self._patient_until:
            held, self._spilling = self._spilling, []
            for candidate in sorted(held, key=lambda c: (c.report.resources.spills, c.number)):
                self._measure(candidate)

    def _measure(self, candidate: _Candidate) -> None:
        """Have a candidate evaluated, unless equal machine code has been, or is being."""
        key = candidate.binary_key()
        known = self._known.get(key)
        if known is not None:
            self._copy(candidate, known)
        elif key in self._same_binary:
            self._same_binary[key].append(candidate)
        else:
            self._same_binary[key] = [candidate]
            self._measuring[candidate.number] = key
            self._evaluator.submit(candidate.number, self.task.problem, candidate.config, candidate.report)

    def _measured(self, number: int, outcome: Outcome) -> None:
        key = self._measuring.pop(number)
        first, *others = self._same_binary.pop(key)
        resources = first.report.resources
        if isinstance(outcome, Measurement):
            accuracy = (outcome.max_error, outcome.allowed_error)
            tried = self._record(number, first.config, resources, outcome.timing, accuracy, first.report.binary_hash)
        else:
            for candidate in (first, *others):
                self._quarantine.consider(self.task.problem, candidate.config, outcome)
            tried = self._record(number, first.config, resources, outcome, binary_hash=first.report.binary_hash)
        self._known[key] = tried
        for candidate in others:
            self._copy(candidate, tried)

    def _copy(self, candidate: _Candidate, known: Tried) -> None:
        record = dataclasses.replace(known.record, number=candidate.number, config=candidate.config, resumed=False)
        self._keep(dataclasses.replace(known, record=record))

    def _reject(self, candidate: _Candidate, reason: str) -> None:
        rejected = Rejected(stage="resources", reason=reason)
        self._record(candidate.number, candidate.config, candidate.report.resources, rejected)

    def _record(
        self,
        number: int,
        config: KernelConfig,
        resources: KernelResources | None,
        result: Timing | Rejected,
        accuracy: tuple[float, float] = (0.0, 0.0),
        binary_hash: str = "",
    ) -> Tried:
        record = TrialRecord(number=number, config=config, resources=resources, result=result)
        return self._keep(
            Tried(record=record, max_error=accuracy[0], allowed_error=accuracy[1], binary_hash=binary_hash)
        )

    def _keep(self, tried: Tried) -> Tried:
        self._study.tell(tried)
        self._count(tried)
        return tried

    def _know(self, tried: Tried) -> None:
        """Remember what became of a binary."""
        if tried.binary_hash and tried.record.resources:
            key = _binary_key(tried.binary_hash, tried.record.resources, tried.config)
            self._known.setdefault(key, tried)

    def _count(self, tried: Tried) -> None:
        self._tried.append(tried)
        elapsed = time.monotonic() - self._start
        left = max(0.0, self.task.deadline - time.monotonic())
        to_do = max(0, self.task.planned - len(self._tried))
        estimate = elapsed / (len(self._tried) - self._resumed) * to_do
        best = self._ranked()[:1]
        self._observer.trial(tried.record, best[0].record if best else None, len(self._tried), min(left, estimate))

    def _drop_unfinished(self) -> None:
        """Stop what is under way, so that nothing of it is taken for a later problem's."""
        self._pool.cancel()
        self._evaluator.cancel()
        self._compiling.clear()
        self._measuring.clear()
        self._same_binary.clear()
        self._spilling.clear()
        if self._sharing:
            self._sharing.close()
        self._study.abandon()

    def _ranked(self) -> list[Tried]:
        return sorted((t for t in self._tried if t.passed and t.config not in self._refused), key=by_speed)

    def _compare(self) -> Choice | None:
        """Return the outcome of the final comparison; if all of them are refused, of the next best, while time is."""
        while ranked := self._ranked():
            finalists = ranked[: self.task.effort.finalists]
            finalists += [t for t in ranked[len(finalists) :] if t.config == self.task.default]
            self._observer.stage(f"comparing the best {len(finalists)}")
            self._compile_ahead(finalists)
            final = self._evaluator.final(self.task.problem, finalists, self.task.effort.final_ms, self.task.seed)
            choice = self._settle(finalists, final)
            if choice is not None or time.monotonic() > self.task.deadline:
                return choice
        return None

    def _compile_ahead(self, finalists: typing.Sequence[Tried]) -> None:
        """Have what the winner is confirmed with compiled while the finalists are raced."""
        spec = self._evaluator.confirmed_as(self.task.problem.spec)
        for tried in finalists if spec else ():
            job = (self._jobs.compile, spec, tried.config, self.task.target)
            self._pool.submit(_NO_TRIAL, *job, timeout_s=self._jobs.compile_timeout_s)

    def _best_so_far(self) -> Choice | None:
        """Return the best by the timings of the search; None if there is none, or at another Ctrl-C."""
        self._observer.stage("interrupted: checking the best so far; Ctrl-C again to leave at once")
        try:
            self._drop_unfinished()
            finalists = self._ranked()[:_CHECKED_ON_INTERRUPT]
            timings = {tried.config: tried.timing for tried in finalists}
            final = Final(timings=timings, baselines={}, noise=_NOISE_WITHOUT_RACE, refused={})
            return self._settle(finalists, final)
        except KeyboardInterrupt:
            return None

    def _settle(self, finalists: typing.Sequence[Tried], final: Final) -> Choice | None:
        """Return the choice whose winner is confirmed, refusing those that are not; None if none is left."""
        refused = dict(final.refused)
        while True:
            choice = choose_winner(finalists, dataclasses.replace(final, refused=refused), self.task.default)
            if choice is not None:
                confirmed = self._evaluator.confirm(self.task.problem, choice.winner)
                if isinstance(confirmed, Rejected):
                    refused[choice.winner.config] = confirmed.reason
                    continue
                choice = dataclasses.replace(choice, winner=confirmed)
            self._refuse(refused)
            return choice

    def _refuse(self, refused: dict[KernelConfig, str]) -> None:
        self._refused |= refused
        if self._evaluator.origin == "measured":
            for config, reason in refused.items():
                self._quarantine.consider(self.task.problem, config, Rejected(stage="run", reason=reason))

    def _result(self, choice: Choice | None, note: str) -> ProblemResult:
        entry = None
        if choice is not None:
            evaluator, trials = self._evaluator, len(self._tried)
            entry = make_entry(self.task, choice, origin=evaluator.origin, timing=evaluator.timing, trials=trials)
            unchecked = interpreter_refusal(entry.config) if entry.origin == "predicted" else None
            note = "; ".join(filter(None, (note, unchecked and f"the winner was not checked: {unchecked}")))
        else:
            note = "; ".join(filter(None, (note, self._why_nothing())))
        return ProblemResult(
            problem=self.task.problem,
            entry=entry,
            trials=tuple(tried.record for tried in self._tried),
            legal=self.task.legal,
            baselines=choice.baselines if choice else {},
            tied=choice.tied if choice else (),
            wall_s=time.monotonic() - self._start,
            compile_s=self._pool.busy_s - self._compile_from_s,
            measure_s=self._evaluator.busy_s - self._measure_from_s,
            note=note,
        )

    def _why_nothing(self) -> str:
        in_order = sorted((tried.record for tried in self._tried), key=lambda record: record.number)
        reasons = {r.config: r.result.reason for r in in_order if isinstance(r.result, Rejected)} | self._refused
        if not reasons:
            return "no config was tried in time"
        config, reason = next(iter(reasons.items()))
        return f"no config passed; of {len(reasons)} refused, the first, {config}: {reason}"


def _spills(resources: KernelResources | None) -> bool:
    return resources is not None and resources.spills > SPILL_LIMIT_BYTES
