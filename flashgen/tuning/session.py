"""`tune`: problems in, registry entries out; `join`: help a run of it from another machine."""

from __future__ import annotations

import os
import typing
from pathlib import Path

import torch

from flashgen.errors import InputError
from flashgen.launch import detect_target, software_versions
from flashgen.resources import user_registry_dir
from flashgen.spec import Problem, parse_problem
from flashgen.target import GpuTarget, named_target
from flashgen.tuning.covering import tune_portfolio
from flashgen.tuning.effort import Effort, effort_named
from flashgen.tuning.events import JoinReport, Observer, SilentObserver, TuneReport
from flashgen.tuning.jobs import Jobs
from flashgen.tuning.joining import Machine, join_run
from flashgen.tuning.journal import can_be_joined, default_study
from flashgen.tuning.run import Run


def tune(
    problems: typing.Sequence[Problem | str],
    *,
    target: GpuTarget | None = None,
    device: str | None = None,
    effort: str = "quick",
    budget_s: float | None = None,
    seed: int = 0,
    registry: Path | None = None,
    study: str | None = None,
    workers: int | None = None,
    portfolio: int | None = None,
    observer: Observer | None = None,
) -> TuneReport:
    """Search the best config for each problem, check it, time it, and write it into the registry.

    On a GPU every candidate is checked against the float64 reference before it is timed, in a process that is killed
    if it hangs. Without one (or for a named `target`), candidates are compiled for the target, ranked by a model and
    the leaders checked in the interpreter, which runs all kernels but those in Gluon; their entries say
    `origin: predicted`.

    Trials are kept in an Optuna study: the same call goes on where an earlier one stopped. Ctrl-C ends the search, and
    the best so far is written.

    With a `portfolio`, the winners and runners-up of all problems of one spec are then raced on each of them, and as
    many kernels as it says are chosen that serve them all, with the smallest worst loss; their entries take the place
    of the winners', who stay among the runners-up. Only problems of one spec, but for the numbers of its mask, can
    share a kernel: the limit is one for each.

    Args:
        problems: what to tune; a problem, or its text (`b=4 hq=32 hkv=8 sq=4096 sk=4096 d=128 causal bf16`).
        target: rank by the model for this GPU, which need not be here.
        device: the GPU to measure on, such as `cuda:0`; several of one kind, such as `cuda:0,cuda:1`, or `all`, share
            the candidates; `cpu` for none; by default the first GPU there is.
        effort: `check` (the seeds), `quick` or `full`.
        budget_s: wall-clock seconds for all problems together, compiling included; by default the effort's own limit.
        seed: of the search.
        registry: folder to write to; by default the user's.
        study: a journal file or database URL for the trials; by default a file in the cache. Other machines join the
            run by a study that is named (`join`), if it is a journal file or on PostgreSQL.
        workers: processes that compile; by default one for each core that the measuring leaves.
        portfolio: how many kernels may serve all problems of one spec; by default each problem has its own winner.
        observer: is told what happens.

    Returns:
        What was found and written.

    Raises:
        InputError: for no problems, a text that is none, an unknown effort, target or device, or a damaged study.
        RegistryError: if the registry cannot be written; the trials are kept.
        FlashgenError: if another run is using the study, it cannot be written, or worker processes cannot start.
    """
    if not problems:
        raise InputError("nothing to tune: give at least one problem")
    if portfolio is not None and portfolio < 1:
        raise InputError(f"a portfolio has at least 1 kernel, got {portfolio}")
    run = plan_run(
        target=target,
        device=device,
        effort=effort_named(effort),
        budget_s=budget_s,
        seed=seed,
        registry=registry,
        study=study,
        workers=workers,
        observer=observer,
    )
    parsed = [parse_problem(p) if isinstance(p, str) else p for p in problems]
    return run.tune(parsed) if portfolio is None else tune_portfolio(run, parsed, portfolio)


def join(
    study: str,
    *,
    device: str | None = None,
    workers: int | None = None,
    say: typing.Callable[[str], None] = lambda text: None,
) -> JoinReport:
    """Help the run of `tune` that uses a study, from another GPU or machine, until it ends.

    What that run offers is compiled here and, on a GPU of the same model with the same driver and Triton, checked and
    timed; elsewhere it is only compiled. The run alone chooses, compares the finalists on its own GPU and writes the
    registry. A Ctrl-C gives back what this machine holds.

    Args:
        study: the journal file or database URL that the run was given.
        device: the GPUs to measure on, as in `tune`, or `cpu` to compile only.
        workers: processes that compile; by default one for each core that the measuring leaves.
        say: is told in a line what happens.

    Returns:
        What this machine did.

    Raises:
        InputError: for an unknown device, or a study that cannot be joined or opened.
        FlashgenError: if this machine's code or Triton differ from the run's, the storage fails, or worker processes
            cannot start.
    """
    gpus = _gpus(None, device)
    machine = Machine(
        gpus=gpus,
        target=_kind(gpus) if gpus else None,
        software=software_versions(),
        workers=workers or default_workers(len(gpus)),
        jobs=Jobs(),
    )
    return join_run(machine, study, say)


def plan_run(
    *,
    target: GpuTarget | None,
    device: str | None,
    effort: Effort,
    budget_s: float | None,
    seed: int,
    registry: Path | None,
    study: str | None,
    workers: int | None,
    observer: Observer | None,
) -> Run:
    """Return the run that these arguments of `tune` mean.

    Raises:
        InputError: for a budget of nothing, or an unknown target or device.
    """
    if budget_s is not None and budget_s <= 0:
        raise InputError(f"the budget must be above 0 seconds, got {budget_s:g}")
    gpus = _gpus(target, device)
    where = _kind(gpus) if gpus else target or named_target("H200")
    return Run(
        target=where,
        gpus=gpus,
        effort=effort,
        budget_s=budget_s,
        seed=seed,
        folder=registry or user_registry_dir(),
        study=study or default_study(where),
        workers=workers or default_workers(len(gpus)),
        observer=observer or SilentObserver(),
        jobs=Jobs(),
        shared=study is not None and can_be_joined(study),
    )


def default_workers(gpus: int) -> int:
    """Return how many processes compile: all cores, less one for each measuring process and one for this one."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return max(1, cores - gpus - 1) if gpus else cores


def _gpus(target: GpuTarget | None, device: str | None) -> tuple[str, ...]:
    if target is not None:
        if device not in (None, "cpu"):
            raise InputError(f"give a target or a device, not both: got {target} and {device!r}")
        return ()
    count = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if device == "cpu" or (device is None and not count):
        return ()
    every = [f"cuda:{index}" for index in range(max(count, 1))]
    names = every if device == "all" else (device or "cuda:0").split(",")
    return tuple(dict.fromkeys(_gpu(name.strip(), count) for name in names))


def _gpu(name: str, count: int) -> str:
    index = name.removeprefix("cuda").removeprefix(":") or "0"
    if not name.startswith("cuda") or not index.isdecimal():
        raise InputError(
            f"device must be 'cpu', 'cuda', 'cuda:N', several such as 'cuda:0,cuda:1', or 'all'; got {name!r}"
        )
    if int(index) >= count:
        raise InputError(f"device {name!r} is not here; there are {count} GPUs")
    return f"cuda:{index}"


def _kind(gpus: typing.Sequence[str]) -> GpuTarget:
    """Return what the GPUs are.

    Raises:
        InputError: if they are not all the same.
    """
    first, *others = ((gpu, detect_target(torch.device(gpu))) for gpu in gpus)
    for gpu, target in others:
        if target != first[1]:
            raise InputError(f"{first[0]} is {first[1]} and {gpu} is {target}: tune for one kind of GPU at a time")
    return first[1]
