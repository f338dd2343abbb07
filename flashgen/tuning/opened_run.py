"""A run of the tuner while its study, its processes and its GPU are at hand: one search after the other."""

from __future__ import annotations

import contextlib
import dataclasses
import itertools
import time
import typing
from pathlib import Path

import optuna
import sqlalchemy.exc

from flashgen.codegen import KernelConfig
from flashgen.errors import NoKernelError
from flashgen.launch import software_versions
from flashgen.measure import Rejected
from flashgen.registry import RegistryEntry, load, search_locations, write_entries
from flashgen.spec import Problem
from flashgen.tuning.choices import Choices, find_choices
from flashgen.tuning.effort import Effort
from flashgen.tuning.evaluators import Evaluator
from flashgen.tuning.events import PortfolioResult, ProblemResult, TuneReport
from flashgen.tuning.interrupts import finishing_first
from flashgen.tuning.journal import shown_place
from flashgen.tuning.pool import Pool
from flashgen.tuning.quarantine import Quarantine, default_quarantine
from flashgen.tuning.search import ProblemSearch
from flashgen.tuning.shared_run import Announcer, can_be_told
from flashgen.tuning.sharing import Sharing
from flashgen.tuning.study import ProblemStudy
from flashgen.tuning.task import Task
from flashgen.tuning.tried import Tried
from flashgen.tuning.winner import Choice, make_entry

if typing.TYPE_CHECKING:
    from flashgen.tuning.run import Run

Choose = typing.Callable[[Problem], Choices]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Searched:
    """A search that ended.

    Attributes:
        result: what was found.
        search: which has the final comparison; None where nothing could be tried.
    """

    result: ProblemResult
    search: ProblemSearch | None = None

    @property
    def choice(self) -> Choice | None:
        """The outcome of the final comparison; None where there was none, or nothing was left in it."""
        return self.search.choice if self.search else None

    @property
    def is_complete(self) -> bool:
        """Whether all that was to be tried was."""
        return self.search is not None and len(self.result.trials) >= self.search.task.planned


class OpenRun:
    """A run whose study, processes and GPU are at hand; made by `Run.opened`."""

    def __init__(
        self,
        run: Run,
        *,
        storage: optuna.storages.BaseStorage,
        pool: Pool[int],
        evaluator: Evaluator,
        start: float,
        searches: int,
    ) -> None:
        self.run = run
        self.interrupted = False
        self._storage = storage
        self._pool = pool
        self._evaluator = evaluator
        self._start = start
        self._searches_left = searches
        self._results: list[ProblemResult] = []
        self._files: dict[Path, None] = {}
        self._said: set[str] = set()
        self._announcer: Announcer | None = None
        if run.shared:
            measured = evaluator.origin == "measured"
            self._announcer = Announcer(storage, target=run.target, software=software_versions(), measured=measured)

    def tune(self, problems: typing.Iterable[Problem]) -> list[Searched]:
        """Search each problem and write its winner; a Ctrl-C ends them all once the best so far is written."""
        found = []
        for index, problem in enumerate(problems):
            searched = self.search(index, problem, self._choices, self.run.effort)
            self._results.append(searched.result)
            if searched.result.entry is not None:
                self.write([searched.result.entry])
            self.stop_if_interrupted()
            found.append(searched)
        return found

    def search(self, index: int, problem: Problem, choose: Choose, effort: Effort) -> Searched:
        """Search one problem among what `choose` returns for it; writes no entry.

        Where `choose` raises NoKernelError, the result has its message. A Ctrl-C meanwhile sets `interrupted`.
        """
        deadline = self._deadline(effort)
        try:
            choices = choose(problem)
        except NoKernelError as error:
            return Searched(result=self._impossible(index, problem, str(error)))
        task = self._task(problem, choices, effort, deadline)
        quarantine = Quarantine(default_quarantine(), task.target, task.software)
        self._say(quarantine.issue)
        study = self._study(task, choices)
        search = ProblemSearch(
            task,
            study=study,
            pool=self._pool,
            evaluator=self._evaluator,
            observer=self.run.observer,
            jobs=self.run.jobs,
            quarantine=quarantine,
            sharing=self._sharing(study, problem),
        )
        result = search.run(index)
        self.interrupted |= search.interrupted
        self._say(quarantine.issue)
        return Searched(result=result, search=search)

    def _say(self, issue: str) -> None:
        """Tell what went wrong beside the search, once."""
        if issue and issue not in self._said:
            self._said.add(issue)
            self.run.observer.stage(issue)

    def _sharing(self, study: ProblemStudy, problem: Problem) -> Sharing | None:
        """Announce a study to machines that join, where they may."""
        if self._announcer is None or not can_be_told(problem):
            return None
        jobs = self.run.jobs
        return Sharing(study, announcer=self._announcer, problem=problem, lost_s=jobs.lost_s, idle_s=jobs.idle_s)

    def end(self) -> None:
        """Tell the machines that joined that the run has ended."""
        if self._announcer is None:
            return
        # Where the storage is gone, they see that themselves.
        gone = (OSError, optuna.exceptions.StorageInternalError, sqlalchemy.exc.SQLAlchemyError)
        with finishing_first(), contextlib.suppress(*gone):
            self._announcer.end()

    def stop_if_interrupted(self) -> None:
        """Return if there was no Ctrl-C.

        Raises:
            KeyboardInterrupt: which ends the block of `Run.opened`.
        """
        if self.interrupted:
            raise KeyboardInterrupt

    def crowned(self, searched: Searched, tried: Tried) -> RegistryEntry | None:
        """Return the entry that has another one of the final comparison as its winner, the winner as first runner-up.

        None if the last check refuses it.
        """
        choice, search = searched.choice, searched.search
        assert choice is not None
        assert search is not None
        if tried is choice.winner:
            return searched.result.entry
        confirmed = self._evaluator.confirm(search.task.problem, tried)
        if isinstance(confirmed, Rejected):
            return None
        others = (choice.winner, *(other for other in choice.runners_up if other is not tried))
        crowned = Choice(winner=confirmed, runners_up=others, tied=(), baselines=choice.baselines)
        evaluator, trials = self._evaluator, len(searched.result.trials)
        return make_entry(
            search.task,
            crowned,
            origin=evaluator.origin,
            timing=evaluator.timing(search.task.problem.spec.phase),
            trials=trials,
        )

    def write(self, entries: typing.Iterable[RegistryEntry]) -> None:
        """Write entries into the registry.

        Raises:
            RegistryError: if a file is damaged meanwhile, or cannot be written.
        """
        self._files |= dict.fromkeys(write_entries(self.run.folder, entries))

    def report(self, portfolios: typing.Iterable[PortfolioResult] = ()) -> TuneReport:
        """Return what `tune` found and `write` wrote."""
        return TuneReport(
            target=self.run.target,
            results=tuple(self._results),
            files=self.files,
            study=shown_place(self.run.study),
            interrupted=self.interrupted,
            wall_s=self.wall_s,
            portfolios=tuple(portfolios),
        )

    @property
    def files(self) -> tuple[Path, ...]:
        """The registry files that were written."""
        return tuple(self._files)

    @property
    def wall_s(self) -> float:
        """Seconds since the run began."""
        return time.monotonic() - self._start

    def _impossible(self, index: int, problem: Problem, reason: str) -> ProblemResult:
        result = ProblemResult(
            problem=problem, entry=None, trials=(), legal=0, baselines={}, tied=(), wall_s=0.0, note=reason
        )
        self.run.observer.problem_started(index, problem, 0, 0)
        self.run.observer.problem_finished(result)
        return result

    def _task(self, problem: Problem, choices: Choices, effort: Effort, deadline: float) -> Task:
        return Task(
            problem=problem,
            target=self.run.target,
            effort=effort,
            legal=len(choices.configs),
            planned=min(effort.trials, len(choices.seeds if effort.seeds_only else choices.configs)),
            default=choices.default,
            # Seeds begin with the winners of like problems and the default.
            owed=frozenset(itertools.takewhile(lambda c: c != choices.default, choices.seeds)) | {choices.default},
            deadline=deadline,
            software=software_versions(),
            seed=self.run.seed,
        )

    def _deadline(self, effort: Effort) -> float:
        """Return when the next search must end: the searches that are left share what is left of the budget."""
        now, searches = time.monotonic(), self._searches_left
        self._searches_left -= 1
        if self.run.budget_s is None:
            return now + effort.seconds
        return now + (self._start + self.run.budget_s - now) / searches

    def _study(self, task: Task, choices: Choices) -> ProblemStudy:
        timing = self._evaluator.timing(task.problem.spec.phase)
        return ProblemStudy(
            self._storage,
            problem=task.problem,
            target=task.target,
            how=f"{timing}, triton {task.software.triton}, driver {task.software.driver}",
            configs=choices.configs,
            seeds=choices.seeds,
            seed=task.seed,
            n_quasi_random=task.effort.spread(len(choices.seeds)),
        )

    def _choices(self, problem: Problem) -> Choices:
        return find_choices(problem, self.run.target, self.run.effort, self._winners(problem))

    def _winners(self, problem: Problem) -> list[KernelConfig]:
        """Return winners of like problems, of this run and of the registry, the latest first."""
        entries = [result.entry for result in reversed(self._results) if result.entry]
        locations = search_locations(self.run.folder)
        entries += [located.entry for located in load(locations).candidates(problem.spec)]
        head_dim, arch = problem.spec.head_dim_qk, self.run.target.arch
        return [entry.config for entry in entries if entry.spec.head_dim_qk == head_dim and entry.arch == arch]
