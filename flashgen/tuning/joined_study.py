"""What a machine that joined a run does for one study of it: compile, measure, hand in."""

from __future__ import annotations

import multiprocessing.connection
import random
import time

from flashgen.compile import CompileReport
from flashgen.measure import Measurement, Outcome, Rejected
from flashgen.spec import Problem
from flashgen.target import GpuTarget
from flashgen.tuning.candidates import SPILL_LIMIT_BYTES, spills_much
from flashgen.tuning.claims import Claims, Pace
from flashgen.tuning.evaluators import Evaluator, compile_report, shared_memory_refusal
from flashgen.tuning.events import JoinReport, TrialRecord
from flashgen.tuning.jobs import Jobs
from flashgen.tuning.offers import Offer
from flashgen.tuning.pool import Finished, Pool
from flashgen.tuning.tried import Tried

_TICK_S = 0.25
_CHECK_S = 2.0
# Claimed ahead of the GPU; another machine's may be free.
_MEASURED_AHEAD = 3


class JoinedStudy:
    """Claims trials of one study as long as its run is at it."""

    def __init__(
        self,
        claims: Claims,
        *,
        problem: Problem,
        target: GpuTarget,
        pool: Pool[int],
        evaluator: Evaluator | None,
        jobs: Jobs,
        report: JoinReport,
    ) -> None:
        """Take part in a study.

        Args:
            claims: its trials.
            problem: what is tuned.
            target: for which GPU.
            pool: compiles.
            evaluator: measures; None where this machine only compiles.
            jobs: what the processes run.
            report: counts what is done.
        """
        self._claims = claims
        self._problem, self._target = problem, target
        self._pool, self._evaluator, self._jobs = pool, evaluator, jobs
        self._report = report
        self._compiling: dict[int, Offer] = {}
        self._measuring: dict[int, tuple[Offer, CompileReport]] = {}

    def work(self) -> None:
        """Return when the run is done with the study; what is unfinished is given back, then or at an exception.

        Raises:
            FlashgenError: if processes cannot start.
        """
        pace = Pace()
        next_look = next_check = time.monotonic()
        try:
            while True:
                now = time.monotonic()
                if now >= next_check:
                    if not self._claims.is_open():
                        return
                    next_check = now + _CHECK_S * random.uniform(0.5, 1.0)
                if now >= next_look and self._has_room():
                    found = self._claim_some()
                    looked = time.monotonic()
                    next_look = looked + pace.pause_s(found=found, took_s=looked - now)
                connections = [*self._pool.connections, *(self._evaluator.connections if self._evaluator else ())]
                multiprocessing.connection.wait(connections, _TICK_S)
                if self._advance():
                    next_look = time.monotonic()
        finally:
            self._stop()

    def _has_room(self) -> bool:
        return self._pool.idle > 0 and len(self._measuring) < _MEASURED_AHEAD

    def _claim_some(self) -> bool:
        """Return whether there was anything for this machine."""
        claimed = False
        measures = self._evaluator is not None
        while self._has_room() and (offer := self._claims.claim(measures=measures, spill_limit=SPILL_LIMIT_BYTES)):
            claimed = True
            if offer.report is not None:
                self._measure(offer, offer.report)
                continue
            self._compiling[offer.number] = offer
            spec, timeout_s = self._problem.spec, self._jobs.compile_timeout_s
            job = self._jobs.compile
            self._pool.submit(offer.number, job, spec, offer.config, self._target, timeout_s=timeout_s)
        return claimed

    def _advance(self) -> bool:
        """Return whether anything ended."""
        compiled = self._pool.wait(0.0)
        for finished in compiled:
            self._compiled(finished)
        measured = self._evaluator.collect() if self._evaluator else []
        for number, outcome in measured:
            self._measured(number, outcome)
        return bool(compiled or measured)

    def _compiled(self, finished: Finished[int]) -> None:
        offer = self._compiling.pop(finished.task_id)
        report = compile_report(finished.outcome)
        if isinstance(report, Rejected):
            self._hand_in(offer, None, report)
            return
        refused = shared_memory_refusal(report.resources, self._target)
        if refused is not None:
            self._hand_in(offer, report, refused)
        elif self._evaluator is None or spills_much(report.resources):
            self._report.compiled += self._claims.put_back(offer, report)
        else:
            self._measure(offer, report)

    def _measure(self, offer: Offer, report: CompileReport) -> None:
        assert self._evaluator is not None
        self._measuring[offer.number] = offer, report
        self._evaluator.submit(offer.number, self._problem, offer.config, report)

    def _measured(self, number: int, outcome: Outcome) -> None:
        offer, report = self._measuring.pop(number)
        self._hand_in(offer, report, outcome, report.binary_hash)

    def _hand_in(self, offer: Offer, report: CompileReport | None, outcome: Outcome, binary_hash: str = "") -> None:
        """Tell the run what became of a trial, the binary's hash where it is the binary that was measured."""
        measured = outcome if isinstance(outcome, Measurement) else None
        record = TrialRecord(
            number=offer.number,
            config=offer.config,
            resources=report.resources if report else None,
            result=outcome.timing if isinstance(outcome, Measurement) else outcome,
        )
        tried = Tried(
            record=record,
            max_error=measured.max_error if measured else 0.0,
            allowed_error=measured.allowed_error if measured else 0.0,
            binary_hash=binary_hash,
        )
        if not self._claims.hand_in(offer, tried):
            self._report.ignored += 1
        elif tried.passed:
            self._report.measured += 1
        else:
            self._report.rejected += 1

    def _stop(self) -> None:
        self._pool.cancel()
        if self._evaluator is not None:
            self._evaluator.cancel()
        self._compiling.clear()
        self._measuring.clear()
        self._report.given_back += self._claims.give_back()
