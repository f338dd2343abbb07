"""A portfolio: a few kernels that serve all problems of one spec, chosen after each was tuned."""

from __future__ import annotations

import collections
import dataclasses
import functools
import typing

from flashgen.codegen import KernelConfig
from flashgen.registry import RegistryEntry
from flashgen.spec import AttentionSpec, Problem
from flashgen.tuning.choices import kept_choices
from flashgen.tuning.events import PortfolioResult, ServedProblem, TuneReport
from flashgen.tuning.opened_run import OpenRun, Searched
from flashgen.tuning.portfolio import Cover, choose_columns, columns_needed
from flashgen.tuning.run import Run, one_of_each_key
from flashgen.tuning.tried import Tried
from flashgen.tuning.winner import by_speed, dated_after


def tune_portfolio(run: Run, problems: typing.Iterable[Problem], kernels: int) -> TuneReport:
    """Tune the problems, then choose at most `kernels` kernels for those of each spec, and write them."""
    unique = one_of_each_key(problems)
    portfolios: list[PortfolioResult] = []
    sharing = collections.Counter(problem.spec.structure() for problem in unique)
    races = sum(count for count in sharing.values() if count > 1)
    with run.opened([problem.spec.phase for problem in unique], searches=len(unique) + races) as opened:
        tuned = [searched for searched in opened.tune(unique) if searched.result.entry is not None]
        index = 0
        for spec, group in _by_kernels(tuned).items():
            portfolios.append(_portfolio(opened, spec, kernels, _races(opened, index, group)))
            index += len(group)
    return opened.report(portfolios)


@dataclasses.dataclass(frozen=True, kw_only=True)
class _Race:
    """A problem, its own winner, and all candidates on it.

    Attributes:
        own: the entry that tuning found.
        searched: the race.
        trials: configs that were tried on the problem by now.
    """

    own: RegistryEntry
    searched: Searched
    trials: int

    @property
    def problem(self) -> Problem:
        return self.searched.result.problem

    def fastest(self) -> dict[KernelConfig, Tried]:
        """Return for each kernel the fastest of the configs that launch it."""
        found: dict[KernelConfig, Tried] = {}
        for tried in sorted(_raced(self.searched), key=by_speed):
            found.setdefault(tried.config.kernel(), tried)
        return found


def _by_kernels(tuned: typing.Iterable[Searched]) -> dict[AttentionSpec, list[Searched]]:
    """Return the searches whose problems can share kernels: numbers of masks are told at run time."""
    groups: dict[AttentionSpec, list[Searched]] = {}
    for searched in tuned:
        groups.setdefault(searched.result.problem.spec.structure(), []).append(searched)
    return groups


def _races(opened: OpenRun, index: int, group: typing.Sequence[Searched]) -> list[_Race]:
    """Check and time all finalists of a group on each of its problems; whoever had them all in its own final is done.

    Raises:
        KeyboardInterrupt: after a Ctrl-C.
    """
    finalists = tuple(dict.fromkeys(tried.config for searched in group for tried in _raced(searched)))
    races = []
    for number, searched in enumerate(group, index):
        own, race = searched.result.entry, searched
        assert own is not None
        known = [tried.config for tried in _raced(searched)]
        if not set(known).issuperset(finalists):
            # Its own first, in case that time runs out.
            choose = functools.partial(kept_choices, target=opened.run.target, kept=(*known, *finalists))
            effort = opened.run.effort.for_all_of(len(finalists) + 1)
            race = opened.search(number, searched.result.problem, choose, effort)
        opened.stop_if_interrupted()
        configs = {trial.config for each in (searched, race) for trial in each.result.trials}
        races.append(_Race(own=own, searched=race, trials=len(configs)))
    return races


def _portfolio(opened: OpenRun, spec: AttentionSpec, asked: int, races: typing.Sequence[_Race]) -> PortfolioResult:
    """Choose kernels, and write the entries of the problems that they serve."""
    fastest = [race.fastest() for race in races]
    kernels = tuple(dict.fromkeys(kernel for by_kernel in fastest for kernel in by_kernel))
    times = [[_us(by_kernel.get(kernel)) for kernel in kernels] for by_kernel in fastest]
    entries: dict[tuple[int, int], RegistryEntry] = {}
    while True:
        cover = choose_columns(times, asked)
        new = [(row, column) for row, column in _served(cover) if (row, column) not in entries]
        for row, column in new:
            entry = opened.crowned(races[row].searched, fastest[row][kernels[column]])
            if entry is None:
                times[row][column] = None
            else:
                entries[row, column] = _in_place_of_own(races[row], entry)
        if all(place in entries for place in new):
            break
    served = {row: entries[row, column] for row, column in _served(cover)}
    opened.write(served.values())
    return PortfolioResult(
        spec=spec,
        asked=asked,
        kernels=tuple(kernels[column] for column in cover.columns),
        problems=tuple(
            ServedProblem(
                problem=race.problem,
                entry=served.get(row, race.own),
                kernel=None if column is None else cover.columns.index(column),
                best_us=min(filter(None, times[row]), default=race.own.performance.median_us),
                loss=cover.losses[row],
                note="" if race.searched.is_complete else race.searched.result.note,
            )
            for row, (race, column) in enumerate(zip(races, cover.serving, strict=True))
        ),
        needed=columns_needed(times),
    )


def _raced(searched: Searched) -> tuple[Tried, ...]:
    choice = searched.choice
    return () if choice is None else (choice.winner, *choice.runners_up)


def _us(tried: Tried | None) -> float | None:
    return None if tried is None else tried.timing.median_us


def _served(cover: Cover) -> list[tuple[int, int]]:
    """Return each row that is served, with its column."""
    return [(row, column) for row, column in enumerate(cover.serving) if column is not None]


def _in_place_of_own(race: _Race, entry: RegistryEntry) -> RegistryEntry:
    if entry is race.own:
        return entry
    provenance = dataclasses.replace(entry.provenance, trials=race.trials)
    return dated_after(dataclasses.replace(entry, provenance=provenance), race.own)
