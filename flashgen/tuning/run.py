"""One run of the tuner: its problems in turn, over one study, one pool of compiling processes and one evaluator."""

from __future__ import annotations

import contextlib
import dataclasses
import math
import tempfile
import time
import typing
from pathlib import Path

import optuna

from flashgen.codegen import KernelConfig
from flashgen.errors import NoKernelError, RegistryError
from flashgen.launch import software_versions
from flashgen.registry import file_name, load, read_file, search_locations, write_entries
from flashgen.spec import Problem
from flashgen.target import GpuTarget, Software
from flashgen.tuning.choices import Choices, find_choices
from flashgen.tuning.effort import Effort
from flashgen.tuning.evaluators import Evaluator
from flashgen.tuning.events import Observer, ProblemResult, TuneReport
from flashgen.tuning.gpu_evaluator import GpuEvaluator
from flashgen.tuning.jobs import Jobs
from flashgen.tuning.journal import open_storage
from flashgen.tuning.model_evaluator import ModelEvaluator
from flashgen.tuning.search import ProblemSearch
from flashgen.tuning.study import ProblemStudy
from flashgen.tuning.task import Task
from flashgen.tuning.workers import Pool


@dataclasses.dataclass(frozen=True, kw_only=True)
class Run:
    """One call of `tune`, with everything decided.

    Attributes:
        target: for which GPU.
        gpu: the device to measure on, or None to rank by the model.
        effort: how hard to search.
        budget_s: wall-clock seconds for all problems together, or None for the effort's own limit.
        seed: of the search.
        folder: registry folder to write to.
        study: journal file or database URL.
        workers: processes that compile.
        observer: is told what happens.
        jobs: what the processes run.
    """

    target: GpuTarget
    gpu: str | None
    effort: Effort
    budget_s: float | None
    seed: int
    folder: Path
    study: str
    workers: int
    observer: Observer
    jobs: Jobs

    def tune(self, problems: typing.Sequence[Problem]) -> TuneReport:
        """Return what was found for the problems; those with the same tuning key are one."""
        start = time.monotonic()
        end = math.inf if self.budget_s is None else start + self.budget_s
        unique = tuple(dict.fromkeys(dataclasses.replace(p, spec=p.spec.tuning_key()) for p in problems))
        _require_writable(self.folder, {file_name(self.target.device_name, p.spec.phase) for p in unique})
        self.observer.run_started(self.target, len(unique), self.study, self.gpu is not None)
        results: list[ProblemResult] = []
        files: dict[Path, None] = {}
        interrupted = False
        optuna.logging.set_verbosity(optuna.logging.ERROR)
        with (
            open_storage(self.study) as storage,
            Pool[int](self.workers, name="compiling process") as pool,
            self._evaluator() as evaluator,
        ):
            if self.gpu is not None:
                self.observer.stage(f"starting the measuring process on {self.gpu}")
            evaluator.start()
            for index, problem in enumerate(unique):
                seconds = (end - time.monotonic()) / (len(unique) - index)
                deadline = time.monotonic() + (self.effort.seconds if math.isinf(seconds) else seconds)
                try:
                    found = self._choices(problem, results)
                    if isinstance(found, str):
                        result = self._impossible(index, problem, found)
                    else:
                        search = self._search(problem, found, deadline, storage, pool, evaluator)
                        result = search.run(index)
                        interrupted = search.interrupted
                    results.append(result)
                    if result.entry is not None:
                        files |= dict.fromkeys(write_entries(self.folder, [result.entry]))
                except KeyboardInterrupt:
                    interrupted = True
                if interrupted:
                    break
        return TuneReport(
            target=self.target,
            results=tuple(results),
            files=tuple(files),
            study=self.study,
            interrupted=interrupted,
            wall_s=time.monotonic() - start,
        )

    @contextlib.contextmanager
    def _evaluator(self) -> typing.Iterator[Evaluator]:
        evaluator: Evaluator
        if self.gpu is not None:
            evaluator = GpuEvaluator(self.gpu, self.jobs)
        else:
            evaluator = ModelEvaluator(self.target, self.workers, self.jobs)
        try:
            yield evaluator
        finally:
            evaluator.close()

    def _choices(self, problem: Problem, results: typing.Sequence[ProblemResult]) -> Choices | str:
        """Return what may be tried for a problem, or why nothing may."""
        try:
            return find_choices(problem, self.target, self.effort, self._winners(problem, results))
        except NoKernelError as error:
            return str(error)

    def _impossible(self, index: int, problem: Problem, reason: str) -> ProblemResult:
        result = ProblemResult(
            problem=problem, entry=None, trials=(), legal=0, baselines={}, tied=(), wall_s=0.0, note=reason
        )
        self.observer.problem_started(index, problem, 0, 0)
        self.observer.problem_finished(result)
        return result

    def _search(
        self,
        problem: Problem,
        choices: Choices,
        deadline: float,
        storage: optuna.storages.BaseStorage,
        pool: Pool[int],
        evaluator: Evaluator,
    ) -> ProblemSearch:
        software = software_versions()
        study = ProblemStudy(
            storage,
            problem=problem,
            target=self.target,
            how=_how(evaluator, software),
            configs=choices.configs,
            seeds=choices.seeds,
            seed=self.seed,
            n_quasi_random=max(self.effort.trials - len(choices.seeds), 0) // 2,
        )
        possible = len(choices.seeds) if self.effort.seeds_only else len(choices.configs)
        task = Task(
            problem=problem,
            target=self.target,
            effort=self.effort,
            legal=len(choices.configs),
            planned=min(self.effort.trials, possible),
            default=choices.default,
            deadline=deadline,
            software=software,
            seed=self.seed,
        )
        return ProblemSearch(task, study=study, pool=pool, evaluator=evaluator, observer=self.observer, jobs=self.jobs)

    def _winners(self, problem: Problem, results: typing.Sequence[ProblemResult]) -> list[KernelConfig]:
        """Return winners of like problems, of this run and of the registry, the latest first."""
        entries = [result.entry for result in reversed(results) if result.entry]
        entries += [located.entry for located in load(search_locations(self.folder)).candidates(problem.spec)]
        head_dim, arch = problem.spec.head_dim_qk, self.target.arch
        return [entry.config for entry in entries if entry.spec.head_dim_qk == head_dim and entry.arch == arch]


def _how(evaluator: Evaluator, software: Software) -> str:
    return f"{evaluator.timing}, triton {software.triton}, driver {software.driver}"


def _require_writable(folder: Path, names: typing.Iterable[str]) -> None:
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
