"""One run of the tuner: its problems in turn, over one study, one pool of compiling processes and one evaluator."""

from __future__ import annotations

import contextlib
import dataclasses
import tempfile
import time
import typing
from pathlib import Path

import optuna

from flashgen.errors import RegistryError
from flashgen.registry import file_name, read_file
from flashgen.spec import Phase, Problem
from flashgen.target import GpuTarget
from flashgen.tuning.effort import Effort
from flashgen.tuning.evaluators import Evaluator
from flashgen.tuning.events import Observer, TuneReport
from flashgen.tuning.gpu_evaluator import GpuEvaluator
from flashgen.tuning.jobs import Jobs
from flashgen.tuning.journal import open_storage, shown_place
from flashgen.tuning.model_evaluator import ModelEvaluator
from flashgen.tuning.opened_run import OpenRun
from flashgen.tuning.pool import Pool


@dataclasses.dataclass(frozen=True, kw_only=True)
class Run:
    """One call of `tune`, with everything decided.

    Attributes:
        target: for which GPU.
        gpus: the devices to measure on, all of one kind; none to rank by the model.
        effort: how hard to search.
        budget_s: wall-clock seconds for all problems together, or None for the effort's own limit.
        seed: of the search.
        folder: registry folder to write to.
        study: journal file or database URL.
        workers: processes that compile.
        observer: is told what happens.
        jobs: what the processes run.
        shared: whether other machines may join by the study.
    """

    target: GpuTarget
    gpus: tuple[str, ...]
    effort: Effort
    budget_s: float | None
    seed: int
    folder: Path
    study: str
    workers: int
    observer: Observer
    jobs: Jobs
    shared: bool = False

    def tune(self, problems: typing.Sequence[Problem]) -> TuneReport:
        """Return what was found for the problems; those with the same tuning key are one."""
        unique = one_of_each_key(problems)
        with self.opened([problem.spec.phase for problem in unique], searches=len(unique)) as opened:
            opened.tune(unique)
        return opened.report()

    @contextlib.contextmanager
    def opened(self, phases: typing.Collection[Phase], *, searches: int) -> typing.Iterator[OpenRun]:
        """Give the run with its study, processes and GPU at hand; a Ctrl-C ends the block, and nothing more.

        Args:
            phases: one for each problem.
            searches: how many there are to be, which share the budget.

        Raises:
            RegistryError: if the entries could not be written.
            FlashgenError: if the study cannot be used, or nothing can be evaluated.
        """
        start = time.monotonic()
        require_writable(self.folder, {file_name(self.target.device_name, phase) for phase in phases})
        self.observer.run_started(self.target, len(phases), shown_place(self.study), bool(self.gpus))
        optuna.logging.set_verbosity(optuna.logging.ERROR)
        with (
            open_storage(self.study) as storage,
            Pool[int](self.workers, name="compiling process") as pool,
            self._evaluator() as evaluator,
        ):
            if self.gpus:
                self.observer.stage(f"starting the measuring process on {', '.join(self.gpus)}")
            evaluator.start()
            opened = OpenRun(self, storage=storage, pool=pool, evaluator=evaluator, start=start, searches=searches)
            try:
                yield opened
            except KeyboardInterrupt:
                opened.interrupted = True
            finally:
                opened.end()

    @contextlib.contextmanager
    def _evaluator(self) -> typing.Iterator[Evaluator]:
        evaluator: Evaluator
        if self.gpus:
            evaluator = GpuEvaluator(self.gpus, self.jobs)
        else:
            evaluator = ModelEvaluator(self.target, self.workers, self.jobs)
        try:
            yield evaluator
        finally:
            evaluator.close()


def one_of_each_key(problems: typing.Iterable[Problem]) -> tuple[Problem, ...]:
    """Return the problems as they are tuned, each tuning key once."""
    return tuple(dict.fromkeys(dataclasses.replace(p, spec=p.spec.tuning_key()) for p in problems))


def require_writable(folder: Path, names: typing.Iterable[str]) -> None:
    """Return if entries can be written to the files `names` of `folder`, which is made if need be.

    Raises:
        RegistryError: before an hour of tuning rather than after it.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as error:
        raise RegistryError(
            f"the registry folder {folder} cannot be written ({error}); nothing was tuned: choose another"
        ) from error
    for path in (folder / name for name in names):
        issues = read_file(path).issues if path.exists() else ()
        if issues:
            raise RegistryError(
                f"{issues[0]}; the file was left untouched and nothing was tuned: repair it or move it away"
            )
