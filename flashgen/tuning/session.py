"""`tune`: problems in, registry entries out."""

from __future__ import annotations

import contextlib
import math
import os
import time
import typing
from pathlib import Path

import filelock
import optuna
import torch

from flashgen.codegen import KernelConfig
from flashgen.codegen.constraints import check_config
from flashgen.errors import FlashgenError, InputError
from flashgen.heuristics import default_configs
from flashgen.launch import detect_target, software_versions
from flashgen.registry import load, search_locations, write_entries
from flashgen.resources import cache_dir, user_registry_dir
from flashgen.search_space import load_space
from flashgen.spec import Problem
from flashgen.target import GpuTarget, Software, named_target
from flashgen.tuning.effort import Effort, effort_named
from flashgen.tuning.evaluators import Evaluator, GpuEvaluator, ModelEvaluator
from flashgen.tuning.events import Observer, ProblemResult, SilentObserver, TuneReport
from flashgen.tuning.search import ProblemSearch, Task
from flashgen.tuning.study import ProblemStudy, open_storage
from flashgen.tuning.workers import Pool

_TEMPLATES = {"forward": "triton/forward"}
_MAX_NEIGHBOURS = 4


def tune(
    problems: typing.Sequence[Problem],
    *,
    target: GpuTarget | None = None,
    device: str | None = None,
    effort: str = "quick",
    budget_s: float | None = None,
    seed: int = 0,
    registry: Path | None = None,
    study: str | None = None,
    workers: int | None = None,
    observer: Observer | None = None,
) -> TuneReport:
    """Search the best config for each problem, check it, time it, and write it into the registry.

    On a GPU every candidate is checked against the float64 reference before it is timed, in a process that is killed
    if it hangs. Without one (or for a named `target`), candidates are compiled for the target, ranked by a model and
    the leaders checked in the interpreter; their entries say `origin: predicted`.

    Trials are kept in an Optuna study: the same call goes on where an earlier one stopped. Ctrl-C ends the search, and
    the best so far is written.

    Args:
        problems: what to tune.
        target: rank by the model for this GPU, which need not be here.
        device: the GPU to measure on, such as `cuda:0`, or `cpu` for none; by default the first GPU there is.
        effort: `check` (the seeds), `quick` or `full`.
        budget_s: wall-clock seconds for all problems together, compiling included; by default the effort's own limit.
        seed: of the search.
        registry: folder to write to; by default the user's.
        study: a journal file or database URL for the trials; by default a file in the cache.
        workers: processes that compile; by default one for each core that the measuring leaves.
        observer: is told what happens.

    Returns:
        What was found and written.

    Raises:
        InputError: for no problems, or an unknown effort, target or device.
        RegistryError: if the registry cannot be written; the trials are kept.
    """
    if not problems:
        raise InputError("nothing to tune: give at least one problem")
    if budget_s is not None and budget_s <= 0:
        raise InputError(f"the budget must be above 0 seconds, got {budget_s:g}")
    level = effort_named(effort)
    gpu = _gpu(target, device)
    where = detect_target(torch.device(gpu)) if gpu else target or named_target("H200")
    folder = registry or user_registry_dir()
    place = study or str(cache_dir() / "studies" / f"{where.arch}.journal")
    unique = tuple(dict.fromkeys(Problem(spec=p.spec.tuning_key(), shape=p.shape) for p in problems))
    run = _Run(where, gpu, level, budget_s, seed, folder, place, observer or SilentObserver())
    return run.tune(unique, workers or default_workers(gpu is not None))


def default_workers(gpu: bool) -> int:
    """Return how many processes compile: all cores, less one for the measuring process and one for this one."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return max(1, cores - 2) if gpu else cores


def _gpu(target: GpuTarget | None, device: str | None) -> str | None:
    if target is not None:
        if device not in (None, "cpu"):
            raise InputError(f"give a target or a device, not both: got {target} and {device!r}")
        return None
    if device == "cpu" or (device is None and not torch.cuda.is_available()):
        return None
    name = device or "cuda:0"
    index = name.removeprefix("cuda").removeprefix(":") or "0"
    if not name.startswith("cuda") or not index.isdecimal():
        raise InputError(f"device must be 'cpu', 'cuda' or 'cuda:N', got {device!r}")
    if int(index) >= torch.cuda.device_count():
        raise InputError(f"device {name!r} is not here; there are {torch.cuda.device_count()} GPUs")
    return f"cuda:{index}"


class _Run:
    """One call of `tune`."""

    def __init__(
        self,
        target: GpuTarget,
        gpu: str | None,
        effort: Effort,
        budget_s: float | None,
        seed: int,
        folder: Path,
        study: str,
        observer: Observer,
    ) -> None:
        self.target = target
        self.gpu = gpu
        self.effort = effort
        self.seed = seed
        self.folder = folder
        self.study = study
        self.observer = observer
        self.start = time.monotonic()
        self.end = math.inf if budget_s is None else self.start + budget_s
        self.files: dict[Path, None] = {}

    def tune(self, problems: typing.Sequence[Problem], workers: int) -> TuneReport:
        self.observer.run_started(self.target, len(problems), self.study, self.gpu is not None)
        results: list[ProblemResult] = []
        interrupted = False
        optuna.logging.set_verbosity(optuna.logging.ERROR)
        with self._lock(), Pool[int](workers, name="compiling process") as pool, self._evaluator(workers) as evaluator:
            storage = open_storage(self.study)
            for index, problem in enumerate(problems):
                try:
                    search = self._search(problem, len(problems) - index, storage, pool, evaluator, results)
                except KeyboardInterrupt:
                    interrupted = True
                    break
                planned = min(self.effort.trials, search.task.legal)
                result = search.run(index, planned)
                results.append(result)
                if result.entry is not None:
                    self.files |= dict.fromkeys(write_entries(self.folder, [result.entry]))
                if search.interrupted:
                    interrupted = True
                    break
        return TuneReport(
            target=self.target,
            results=tuple(results),
            files=tuple(self.files),
            study=self.study,
            interrupted=interrupted,
            wall_s=time.monotonic() - self.start,
        )

    def _search(
        self,
        problem: Problem,
        problems_left: int,
        storage: optuna.storages.BaseStorage,
        pool: Pool[int],
        evaluator: Evaluator,
        results: typing.Sequence[ProblemResult],
    ) -> ProblemSearch:
        template = _TEMPLATES[problem.spec.phase]
        space = load_space(template).legal(problem.spec, self.target)
        if not space.configs:
            raise FlashgenError(f"no legal config of {template} for {problem} on {self.target}: {space.refused}")
        default = _default_config(problem, self.target)
        seeds = dict.fromkeys((*self._neighbours(problem, results), default, *space.seeds))
        configs = list(dict.fromkeys((*space.configs, default)))
        software = software_versions()
        planned_seeds = list(seeds)[: self.effort.trials]
        study = ProblemStudy(
            storage,
            problem=problem,
            target=self.target,
            how=_how(evaluator, software),
            configs=configs,
            seeds=planned_seeds,
            seed=self.seed,
            n_quasi_random=max(self.effort.trials - len(planned_seeds), 0) // 2,
        )
        share = (self.end - time.monotonic()) / problems_left
        task = Task(
            problem=problem,
            target=self.target,
            effort=self.effort,
            legal=len(planned_seeds) if self.effort.seeds_only else len(configs),
            default=default,
            deadline=time.monotonic() + (self.effort.seconds if math.isinf(share) else share),
            software=software,
            seed=self.seed,
        )
        return ProblemSearch(task, study=study, pool=pool, evaluator=evaluator, observer=self.observer)

    def _neighbours(self, problem: Problem, results: typing.Sequence[ProblemResult]) -> list[KernelConfig]:
        """Return winners of like problems, of this run and of the registry: tried first."""
        entries = [result.entry for result in reversed(results) if result.entry]
        entries += [located.entry for located in load(search_locations(self.folder)).candidates(problem.spec)]
        near = [e for e in entries if e.spec.head_dim_qk == problem.spec.head_dim_qk and e.arch == self.target.arch]
        configs = dict.fromkeys(e.config for e in near)
        return [c for c in configs if not check_config(c, problem.spec, self.target)][:_MAX_NEIGHBOURS]

    @contextlib.contextmanager
    def _evaluator(self, workers: int) -> typing.Iterator[Evaluator]:
        evaluator = GpuEvaluator(self.gpu) if self.gpu else ModelEvaluator(self.target, workers)
        try:
            yield evaluator
        finally:
            evaluator.close()

    @contextlib.contextmanager
    def _lock(self) -> typing.Iterator[None]:
        if "://" in self.study:
            yield
            return
        path = Path(self.study)
        path.parent.mkdir(parents=True, exist_ok=True)
        lock = filelock.FileLock(f"{path}.run-lock")
        try:
            lock.acquire(timeout=0)
        except filelock.Timeout:
            raise FlashgenError(
                f"another flashgen tune is using the study {path}; wait for it, or name another with --study"
            ) from None
        try:
            yield
        finally:
            lock.release()


def _default_config(problem: Problem, target: GpuTarget) -> KernelConfig:
    for config in default_configs(problem, target):
        if not check_config(config, problem.spec, target):
            return config
    raise FlashgenError(f"no default config is legal for {problem} on {target}")


def _how(evaluator: Evaluator, software: Software) -> str:
    return f"{evaluator.timing}, triton {software.triton}" + (f", driver {software.driver}" if software.driver else "")
