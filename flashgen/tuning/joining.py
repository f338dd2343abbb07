"""A machine that joins a run by its study: claims what the run offers, compiles it, measures it if it may, hands it in.

It proposes nothing, compares no finalists and writes no registry: the run does. Its compiling and measuring processes
are those of a run, so a candidate that hangs or breaks something costs it that candidate alone.
"""

from __future__ import annotations

import contextlib
import dataclasses
import random
import time
import typing

import optuna
import sqlalchemy.exc
from optuna.storages import BaseStorage

from flashgen.errors import FlashgenError
from flashgen.spec import parse_problem
from flashgen.target import GpuTarget, Software
from flashgen.tuning.claims import Claims
from flashgen.tuning.events import JoinReport
from flashgen.tuning.gpu_evaluator import GpuEvaluator
from flashgen.tuning.jobs import Jobs
from flashgen.tuning.joined_study import JoinedStudy
from flashgen.tuning.journal import join_storage, shown_place
from flashgen.tuning.pool import Pool
from flashgen.tuning.shared_run import SharedRun, code_digest, find_open, has_ended

_PAUSE_S = 1.0

Say = typing.Callable[[str], None]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Machine:
    """What a machine brings to a run.

    Attributes:
        gpus: the devices to measure on, all of one kind; none to compile only.
        target: what they are.
        software: versions.
        workers: processes that compile.
        jobs: what the processes run.
    """

    gpus: tuple[str, ...]
    target: GpuTarget | None
    software: Software
    workers: int
    jobs: Jobs


def join_run(machine: Machine, study: str, say: Say) -> JoinReport:
    """Work for the run that uses a study, as soon as there is one, until it ends or a Ctrl-C comes.

    Raises:
        InputError: if the study cannot be joined or opened.
        FlashgenError: if this machine can do nothing for the run, the storage fails, or processes cannot start.
    """
    optuna.logging.set_verbosity(optuna.logging.ERROR)
    report = JoinReport()
    try:
        with _failing_clearly(study):
            storage = _wait_for_storage(study, say)
            with Pool[int](machine.workers, name="compiling process") as pool, _Joined(machine, pool, say) as joined:
                joined.work(storage, study, report)
    except KeyboardInterrupt:
        report.interrupted = True
    return report


class _Joined:
    """A machine at work for one run after another, until one ends that it worked for."""

    def __init__(self, machine: Machine, pool: Pool[int], say: Say) -> None:
        self._machine = machine
        self._pool = pool
        self._say = say
        self._evaluator: GpuEvaluator | None = None

    def __enter__(self) -> _Joined:
        return self

    def __exit__(self, *_: object) -> None:
        if self._evaluator is not None:
            self._evaluator.close()

    def work(self, storage: BaseStorage, study: str, report: JoinReport) -> None:
        """Return when a run has ended that this machine worked for.

        Raises:
            FlashgenError: if it can do nothing for a run, or processes cannot start.
        """
        run, is_told = "", False
        while not (run and has_ended(storage, run)):
            found = find_open(storage)
            if found is None:
                if not is_told:
                    self._say(f"waiting for a run on {shown_place(study)}")
                    is_told = True
                time.sleep(_PAUSE_S * random.uniform(0.5, 1.0))
                continue
            study_id, shared = found
            run, is_told = shared.run, False
            evaluator = self._evaluator_for(shared)
            JoinedStudy(
                Claims(storage, study_id, shared),
                problem=parse_problem(shared.problem),
                target=shared.target,
                pool=self._pool,
                evaluator=evaluator,
                jobs=self._machine.jobs,
                report=report,
            ).work()
        self._say("the run has ended")

    def _evaluator_for(self, run: SharedRun) -> GpuEvaluator | None:
        """Return what measures for a run, or None where this machine can only compile for it.

        Raises:
            FlashgenError: if it can do neither, or its GPU cannot be used.
        """
        _require_same_code(run, self._machine.software)
        helping = f"helping with {run.problem} on {run.target}: compiling in {self._pool.size} processes"
        reason = _why_not_measure(run, self._machine)
        if reason:
            self._say(f"{helping}, measuring nothing: {reason}")
            return None
        self._say(f"{helping}, measuring on {', '.join(self._machine.gpus)}")
        if self._evaluator is None:
            self._evaluator = GpuEvaluator(self._machine.gpus, self._machine.jobs)
            self._evaluator.start()
        return self._evaluator


def _require_same_code(run: SharedRun, software: Software) -> None:
    if run.code != code_digest():
        raise FlashgenError(
            f"this machine cannot help: its flashgen ({software.flashgen}, digest {code_digest()}) is other code than "
            f"the run's (digest {run.code}); install the same on both"
        )
    if run.triton != software.triton:
        raise FlashgenError(
            f"this machine cannot help: with Triton {software.triton} it would build and time other binaries than the "
            f"run with {run.triton}; install the same on both"
        )


def _why_not_measure(run: SharedRun, machine: Machine) -> str:
    """Return why a machine's times would be no good to a run; empty if they are."""
    here, there = machine.target, run.target
    if not machine.gpus or here is None:
        return "no GPU in use"
    if not run.measured:
        return "the run ranks by a model"
    if (here.device_name, here.arch) != (there.device_name, there.arch):
        return f"its GPU is a {here}"
    if machine.software.driver != run.driver:
        return f"its driver is {machine.software.driver}, the run's {run.driver}"
    return ""


def _wait_for_storage(study: str, say: Say) -> BaseStorage:
    storage = join_storage(study)
    if storage is None:
        say(f"waiting for a run: there is no study at {shown_place(study)} yet")
    while storage is None:
        time.sleep(_PAUSE_S)
        storage = join_storage(study)
    return storage


@contextlib.contextmanager
def _failing_clearly(study: str) -> typing.Iterator[None]:
    try:
        yield
    except (OSError, optuna.exceptions.StorageInternalError, sqlalchemy.exc.SQLAlchemyError) as error:
        raise FlashgenError(
            f"the study {shown_place(study)} cannot be used ({error}); the run tries again what this machine held: "
            "join again when the storage is back"
        ) from error
