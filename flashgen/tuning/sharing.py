"""The trials of one search that machines which joined the run work on, as the run sees them."""

from __future__ import annotations

import dataclasses
import datetime
import time
import typing

from optuna.trial import FrozenTrial, TrialState

from flashgen.spec import Problem
from flashgen.tuning import offers
from flashgen.tuning.offers import Offer
from flashgen.tuning.shared_run import Announcer
from flashgen.tuning.study import ProblemStudy
from flashgen.tuning.tried import Tried

_POLL_S = 0.25
# Of the time between two polls, each takes the inverse of this at most.
_POLLS_APART = 3.0
# Enough for a thousand machines at a trial in four seconds each; each of them reads the whole list to choose from it.
MOST_OFFERS = 64


class Sharing:
    """Offers configs to machines that join, collects what they hand in, and gives up on machines that are lost.

    One config more is on offer than machines are at work on: the queue grows with whoever comes, and costs nothing
    where nobody does. There are no heartbeats, and no clock but this process's monotonic one: a trial that another
    machine claimed is failed, and its config proposed again, when it takes longer than any of its timeouts allow, or
    when nothing else is left to wait for. What was handed in too late is ignored.

    What others measured only chooses who is compared at the end: the final comparison is this machine's own, on its
    own GPU. A machine that lies, or whose GPU is clocked otherwise, crowns nobody.
    """

    def __init__(
        self, study: ProblemStudy, *, announcer: Announcer, problem: Problem, lost_s: float, idle_s: float
    ) -> None:
        """Share what a study has left to try; `start` says so to other machines.

        Args:
            study: of one problem.
            announcer: of the run.
            problem: which.
            lost_s: after which a claimed trial is given up.
            idle_s: after which it is where nothing else is left to do.
        """
        self._study = study
        self._announcer = announcer
        self._problem = problem
        # Trials that were merged, or were there before.
        self._known: set[int] = set()
        self._lost_s, self._idle_s = lost_s, idle_s
        self._offers: dict[int, Offer] = {}
        # By number and start, as a trial may be claimed by one machine after another: when it was first seen running.
        self._running: dict[tuple[int, datetime.datetime | None], float] = {}
        self._next_poll = time.monotonic()
        self._idle_since: float | None = None

    def start(self, finished: typing.Iterable[Tried]) -> None:
        """Announce the study, of which the finished trials are known here.

        Raises:
            FlashgenError: if the study cannot be written.
        """
        self._known = {tried.record.number for tried in finished}
        with self._study.writing():
            self._announcer.open(self._study.study_id, self._problem)

    @property
    def under_way(self) -> int:
        """How many trials are on offer or with another machine."""
        return len(self._offers) + len(self._running)

    @property
    def wanted(self) -> int:
        """How many more should be offered."""
        fresh = sum(offer.report is None for offer in self._offers.values())
        return max(0, min(MOST_OFFERS, 1 + len(self._running)) - fresh)

    def offer(self) -> None:
        """Offer another config.

        Raises:
            FlashgenError: if the study cannot be written.
        """
        offer = self._study.offer()
        self._offers[offer.number] = offer

    def take(self, *, compiled: bool) -> Offer | None:
        """Return a config that nobody has claimed, this run's own from now on, or None where there is none.

        Raises:
            FlashgenError: if the study cannot be written.
        """
        for number, offer in list(self._offers.items()):
            if (offer.report is not None) == compiled:
                del self._offers[number]
                if self._study.take_back(offer):
                    return offer
                # Another machine was faster; the next poll says since when.
                self._running[number, None] = time.monotonic()
        return None

    def collect(self, *, busy: bool) -> list[Tried]:
        """Return what was handed in since the last call; asks the storage a few times a second at most.

        Args:
            busy: whether this process has anything else to do or to wait for.

        Raises:
            FlashgenError: if the study cannot be read or written.
        """
        now = time.monotonic()
        if now < self._next_poll:
            return []
        self._idle_since = None if busy else self._idle_since or now
        handed_in = self._sort(self._study.trials(), now)
        for key in [key for key, since in self._running.items() if self._is_lost(since, now)]:
            # Where it has just been handed in, the next poll finds it.
            if self._study.withdraw(key[0]):
                del self._running[key]
        # Where there is much to read, it is read less often.
        self._next_poll = time.monotonic() + max(_POLL_S, _POLLS_APART * (time.monotonic() - now))
        return handed_in

    def close(self) -> None:
        """Say that the search is over, and take back what nobody claimed.

        Who works on one may still hand it in, for the next run on this study.

        Raises:
            FlashgenError: if the study cannot be written.
        """
        with self._study.writing():
            self._announcer.close()
        while self.take(compiled=False) or self.take(compiled=True):
            pass

    def _sort(self, trials: typing.Iterable[FrozenTrial], now: float) -> list[Tried]:
        handed_in: list[Tried] = []
        waiting: dict[int, Offer] = {}
        running: dict[tuple[int, datetime.datetime | None], float] = {}
        for trial in trials:
            number = trial.number
            if number in self._known or not offers.is_offered(trial):
                continue
            if trial.state == TrialState.RUNNING:
                key = number, trial.datetime_start
                running[key] = self._running.get(key, now)
            elif trial.state == TrialState.WAITING:
                offer = self._offers.get(number)
                if offer is None or offer.report is None:
                    offer = offers.offer_from(trial)
                if offer is None:
                    self._study.withdraw(number)
                else:
                    waiting[number] = offer
            elif trial.state == TrialState.COMPLETE:
                self._known.add(number)
                tried = self._study.judged(trial)
                handed_in.append(dataclasses.replace(tried, record=dataclasses.replace(tried.record, resumed=False)))
        self._offers, self._running = waiting, running
        return handed_in

    def _is_lost(self, since: float, now: float) -> bool:
        if self._idle_since is not None and now - max(since, self._idle_since) > self._idle_s:
            return True
        return now - since > self._lost_s
