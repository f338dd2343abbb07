"""The end of a search: the best are compared once more, and the winner is confirmed."""

from __future__ import annotations

import dataclasses
import time
import typing

from flashgen.codegen import KernelConfig
from flashgen.measure import Rejected
from flashgen.tuning.evaluators import Evaluator, Final
from flashgen.tuning.events import Observer
from flashgen.tuning.jobs import Jobs
from flashgen.tuning.pool import Pool
from flashgen.tuning.quarantine import Quarantine
from flashgen.tuning.task import Task
from flashgen.tuning.trials import Trials
from flashgen.tuning.tried import Tried
from flashgen.tuning.winner import Choice, choose_winner

# In place of a trial's number: only Triton's cache is to know.
NO_TRIAL = -1
# Timings of the search are taken apart from each other.
_NOISE_WITHOUT_RACE = 0.05
_CHECKED_ON_INTERRUPT = 3


class FinalComparison:
    """Finds the winner among the trials of one search."""

    def __init__(
        self,
        task: Task,
        trials: Trials,
        *,
        pool: Pool[int],
        evaluator: Evaluator,
        observer: Observer,
        jobs: Jobs,
        quarantine: Quarantine,
    ) -> None:
        self._task = task
        self._trials = trials
        self._pool = pool
        self._evaluator = evaluator
        self._observer = observer
        self._jobs = jobs
        self._quarantine = quarantine

    def compare(self) -> Choice | None:
        """Return the outcome of the final comparison; if all of them are refused, of the next best, while time is.

        Raises:
            FlashgenError: if nothing can be evaluated at all.
        """
        while ranked := self._trials.ranked():
            finalists = ranked[: self._task.effort.finalists]
            finalists += [t for t in ranked[len(finalists) :] if t.config == self._task.default]
            self._observer.stage(f"comparing the best {len(finalists)}")
            self._compile_ahead(finalists)
            final = self._evaluator.final(self._task.problem, finalists, self._task.effort.final_ms, self._task.seed)
            choice = self._settle(finalists, final)
            if choice is not None or time.monotonic() > self._task.deadline:
                return choice
        return None

    def best_so_far(self) -> Choice | None:
        """Return the best by the timings of the search, without comparing again; None if there is none.

        Raises:
            FlashgenError: if nothing can be evaluated at all.
        """
        finalists = self._trials.ranked()[:_CHECKED_ON_INTERRUPT]
        timings = {tried.config: tried.timing for tried in finalists}
        final = Final(timings=timings, baselines={}, noise=_NOISE_WITHOUT_RACE, refused={})
        return self._settle(finalists, final)

    def _compile_ahead(self, finalists: typing.Sequence[Tried]) -> None:
        """Have what the winner is confirmed with compiled while the finalists are raced."""
        for tried in finalists:
            spec = self._evaluator.confirmed_as(self._task.problem.spec)
            if spec is not None:
                job = (self._jobs.compile, spec, tried.config, self._task.target)
                self._pool.submit(NO_TRIAL, *job, timeout_s=self._jobs.compile_timeout_s)

    def _settle(self, finalists: typing.Sequence[Tried], final: Final) -> Choice | None:
        """Return the choice whose winner is confirmed, refusing those that are not; None if none is left."""
        refused = dict(final.refused)
        while True:
            choice = choose_winner(finalists, dataclasses.replace(final, refused=refused), self._task.default)
            if choice is not None:
                confirmed = self._evaluator.confirm(self._task.problem, choice.winner)
                if isinstance(confirmed, Rejected):
                    refused[choice.winner.config] = confirmed.reason
                    continue
                choice = dataclasses.replace(choice, winner=confirmed)
            self._refuse(refused)
            return choice

    def _refuse(self, refused: dict[KernelConfig, str]) -> None:
        self._trials.refuse(refused)
        if self._evaluator.origin == "measured":
            for config, reason in refused.items():
                self._quarantine.consider(self._task.problem, config, Rejected(stage="run", reason=reason))
