"""`retune`: entries whose kept configs are raced again, after new software or a changed template."""

from __future__ import annotations

import dataclasses
import typing
from pathlib import Path

from flashgen.codegen import KernelConfig
from flashgen.dispatch import is_stale
from flashgen.errors import InputError, NoKernelError
from flashgen.registry import RegistryEntry, file_name, read_file
from flashgen.spec import PHASES, Problem, parse_problem
from flashgen.target import GpuTarget
from flashgen.tuning.choices import Choices, kept_choices
from flashgen.tuning.effort import EFFORTS
from flashgen.tuning.events import Observer
from flashgen.tuning.journal import shown_place
from flashgen.tuning.opened_run import OpenRun, Searched
from flashgen.tuning.run import Run, one_of_each_key, require_writable
from flashgen.tuning.session import plan_run
from flashgen.tuning.winner import dated_after


@dataclasses.dataclass(frozen=True, kw_only=True)
class Reraced:
    """What became of one entry.

    Attributes:
        old: as it was.
        stale: whether its template had changed since it was measured.
        new: what stands in its place; None where it was kept as it was.
        old_config_us: what its config takes today; None where that fell, or was not raced.
        baselines: median us of what was timed beside it, by name; empty without a GPU.
        note: why it was kept, or which of its configs are illegal today; empty otherwise.
    """

    old: RegistryEntry
    stale: bool
    new: RegistryEntry | None
    old_config_us: float | None
    baselines: dict[str, float]
    note: str

    @property
    def changed(self) -> bool:
        """Whether another config wins."""
        return self.new is not None and self.new.config != self.old.config

    @property
    def gain(self) -> float | None:
        """The old time over the new one: above 1 where the problem got faster."""
        if self.new is None or not self.new.performance.median_us:
            return None
        return self.old.performance.median_us / self.new.performance.median_us


@dataclasses.dataclass(frozen=True, kw_only=True)
class RetuneReport:
    """What `retune` found.

    Attributes:
        target: the GPU it was for.
        results: one for each entry, in the order of the files; entries that an interrupt left out are missing.
        missing: problems that were asked for and have no entry.
        files: registry files that were written.
        study: the file or URL that holds the trials, without its password; the same command goes on from it.
        interrupted: whether Ctrl-C cut it short.
        wall_s: wall-clock seconds spent.
    """

    target: GpuTarget
    results: tuple[Reraced, ...]
    missing: tuple[Problem, ...]
    files: tuple[Path, ...]
    study: str
    interrupted: bool
    wall_s: float


def retune(
    problems: typing.Sequence[Problem | str] | None = None,
    *,
    target: GpuTarget | None = None,
    device: str | None = None,
    budget_s: float | None = None,
    seed: int = 0,
    registry: Path | None = None,
    study: str | None = None,
    workers: int | None = None,
    observer: Observer | None = None,
) -> RetuneReport:
    """Race the configs that the entries of a registry folder kept, and write who wins today.

    For each entry, stale ones included, its config, its runners-up and what would run untuned are checked and timed as
    `tune` does; nothing else is searched. An entry that is left without a legal or a right config, or that the time
    did not suffice for, stays as it was. Where no GPU is, only predicted entries can be ranked again.

    Args:
        problems: entries that cover one of these; by default all of the GPU's.
        target: rank by the model for this GPU, which need not be here.
        device: the GPUs to measure on, as in `tune`.
        budget_s: wall-clock seconds for all entries together; by default each has its own limit.
        seed: of the races.
        registry: the folder; by default the user's.
        study: a journal file or database URL for the trials; by default a file in the cache.
        workers: processes that compile; by default one for each core that the measuring leaves.
        observer: is told what happens.

    Raises:
        NoKernelError: if there is no such entry.
        InputError: for a text that is no problem, an unknown target or device, or a damaged study.
        RegistryError: if the registry is damaged or cannot be written.
        FlashgenError: if another run is using the study, it cannot be written, or worker processes cannot start.
    """
    run = plan_run(
        target=target,
        device=device,
        effort=EFFORTS["full"],
        budget_s=budget_s,
        seed=seed,
        registry=registry,
        study=study,
        workers=workers,
        observer=observer,
    )
    return retune_entries(run, None if problems is None else [_parsed(problem) for problem in problems])


def retune_entries(run: Run, problems: typing.Iterable[Problem] | None = None) -> RetuneReport:
    """Return what racing anew made of the entries of the run's folder: of all for its GPU, or those for `problems`.

    Raises:
        NoKernelError: if there is none.
    """
    wanted = None if problems is None else one_of_each_key(problems)
    entries = [entry for entry in _entries(run) if wanted is None or any(_covers(entry, p) for p in wanted)]
    if not entries:
        asked = "" if wanted is None else f" that covers {' or '.join(map(str, wanted))}"
        raise NoKernelError(
            f"no entry for {run.target} in {run.folder}{asked}; name another folder with --registry, or `flashgen tune`"
        )
    results: list[Reraced] = []
    with run.opened([entry.spec.phase for entry in entries], searches=len(entries)) as opened:
        for index, entry in enumerate(entries):
            reraced = _rerace(opened, index, entry)
            if reraced.new is not None:
                opened.write([reraced.new])
            results.append(reraced)
            opened.stop_if_interrupted()
    return RetuneReport(
        target=run.target,
        results=tuple(results),
        missing=tuple(p for p in wanted or () if not any(_covers(entry, p) for entry in entries)),
        files=opened.files,
        study=shown_place(run.study),
        interrupted=opened.interrupted,
        wall_s=opened.wall_s,
    )


def problem_of(entry: RegistryEntry) -> Problem:
    """Return the problem that stands for an entry: the smallest sizes of its range.

    Raises:
        InputError: if these are no shape.
    """
    return Problem(spec=entry.spec, shape=entry.range.smallest())


def _parsed(problem: Problem | str) -> Problem:
    return parse_problem(problem) if isinstance(problem, str) else problem


def _covers(entry: RegistryEntry, problem: Problem) -> bool:
    return entry.spec == problem.spec and entry.range.covers(problem.shape)


def _entries(run: Run) -> list[RegistryEntry]:
    """Return the entries of the run's folder for its GPU.

    Raises:
        RegistryError: if a file is damaged.
    """
    names = [file_name(run.target.device_name, phase) for phase in PHASES]
    paths = [run.folder / name for name in names if (run.folder / name).exists()]
    if paths:
        require_writable(run.folder, names)
    found = [entry for path in paths for entry in read_file(path).entries]
    return [entry for entry in found if (entry.device_name, entry.arch) == (run.target.device_name, run.target.arch)]


def _rerace(opened: OpenRun, index: int, entry: RegistryEntry) -> Reraced:
    """Race the kept configs of one entry; writes nothing."""
    kept = tuple(dict.fromkeys((entry.config, *(runner_up.config for runner_up in entry.runners_up))))
    target = opened.run.target
    stale = is_stale(entry) is not None

    def choose(problem: Problem) -> Choices:
        if not opened.run.gpus and entry.origin == "measured":
            raise NoKernelError(f"it was measured, which a prediction does not replace: run this on a {target}")
        choices = kept_choices(problem, target, kept)
        # Within the noise, what has been running goes on.
        return dataclasses.replace(choices, default=entry.config) if entry.config in choices.configs else choices

    try:
        problem = problem_of(entry)
    except InputError as error:
        return _unchanged(entry, stale, f"no problem stands for its range: {error}")
    searched = opened.search(index, problem, choose, opened.run.effort.for_all_of(len(kept) + 1))
    found, choice = searched.result.entry, searched.choice
    if found is None or choice is None or not searched.is_complete:
        return _unchanged(entry, stale, "interrupted" if opened.interrupted else searched.result.note)
    times = {tried.config: tried.timing.median_us for tried in (choice.winner, *choice.runners_up)}
    return Reraced(
        old=entry,
        stale=stale,
        new=dated_after(dataclasses.replace(found, range=entry.range), entry),
        old_config_us=times.get(entry.config),
        baselines=choice.baselines,
        note="; ".join(filter(None, (_illegal(kept, searched), searched.result.note))),
    )


def _unchanged(entry: RegistryEntry, stale: bool, why: str) -> Reraced:
    return Reraced(old=entry, stale=stale, new=None, old_config_us=None, baselines={}, note=why)


def _illegal(kept: typing.Sequence[KernelConfig], searched: Searched) -> str:
    tried = {trial.config for trial in searched.result.trials}
    count = sum(config not in tried for config in kept)
    return f"{count} of {len(kept)} kept configs are not legal any more" if count else ""
