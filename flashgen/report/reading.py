"""From a study, and what the registry holds of it, to what the report says."""

from __future__ import annotations

import bisect
import collections
import dataclasses
import datetime
import itertools
import math
import re
import typing

import optuna
from optuna.storages import BaseStorage
from optuna.trial import FrozenTrial, TrialState

from flashgen.codegen import KernelConfig
from flashgen.errors import FlashgenError, InputError
from flashgen.measure import Rejected
from flashgen.registry import Located, MeasuredRange, Registry
from flashgen.report.data import ProblemReport, Rejection, Roof, StudyReport, Trial
from flashgen.report.finalists import find_finalists, untuned_trial
from flashgen.report.parameters import fixed_values, importances_of, parameters_of
from flashgen.report.snapshot import open_snapshot
from flashgen.spec import Problem, parse_problem
from flashgen.target import GpuTarget, named_target
from flashgen.tuning.journal import shown_place
from flashgen.tuning.model_evaluator import PREDICTED_TIMING
from flashgen.tuning.tried import tried_from

ShortName = typing.Callable[[KernelConfig], str]

# What `tune` names a study: the problem, the device, how the times come about, and a digest of the choices.
_NAME_PARTS = 4
_HOW = re.compile(r"(?P<timing>.+), triton (?P<triton>.+), driver (?P<driver>.+)")
_NUMBER = re.compile(r"\d+(?:\.\d+)?(?:e[+-]?\d+)?")


def read_report(
    study: str, *, registry: Registry, short_name: ShortName, problems: typing.Sequence[str] = ()
) -> StudyReport:
    """Return what a study shows; it is only read, whoever else is using it.

    Args:
        study: a journal file or a database URL, as `tune` takes it.
        registry: where the winners of the study may be: their final comparison is kept there, not in the study.
        short_name: gives a config in a few characters.
        problems: texts of those to report on; by default all in the study.

    Raises:
        InputError: if there is no such study, it is damaged or empty, or does not hold a problem.
    """
    storage = open_snapshot(study)
    names = [found.study_name for found in storage.get_all_studies()]
    ours = [name for name in names if name.count(" | ") >= _NAME_PARTS - 1]
    if not ours:
        raise InputError(
            f"the study {shown_place(study)} holds no problem of flashgen's; name another, or run flashgen tune first"
        )
    wanted = set(_tuned_texts(problems))
    found = {_split(name)[0] for name in ours}
    if wanted - found:
        raise InputError(
            f"the study {shown_place(study)} does not hold {'; '.join(sorted(wanted - found))}; "
            f"it holds: {'; '.join(sorted(found))}"
        )
    chosen = [name for name in ours if not wanted or _split(name)[0] in wanted]
    return StudyReport(
        place=shown_place(study),
        problems=tuple(_problem_report(storage, name, registry, short_name) for name in chosen),
        foreign=tuple(name for name in names if name not in ours),
    )


def _tuned_texts(problems: typing.Iterable[str]) -> typing.Iterator[str]:
    for text in problems:
        problem = parse_problem(text)
        yield str(dataclasses.replace(problem, spec=problem.spec.tuning_key()))


def _split(name: str) -> list[str]:
    # A mask may hold the same bar; the parts after the problem do not.
    return name.rsplit(" | ", _NAME_PARTS - 1)


def _problem_report(storage: BaseStorage, name: str, registry: Registry, short_name: ShortName) -> ProblemReport:
    text, device, how, _ = _split(name)
    study = optuna.load_study(study_name=name, storage=storage)
    trials = _trials(study, short_name)
    match = _HOW.fullmatch(how)
    timing = match["timing"] if match else how
    versions = {"triton": match["triton"], "driver": match["driver"]} if match else {}
    problem, target = _known(parse_problem, text), _known(named_target, device)
    located = _entry_of(registry, problem, device, versions, trials)
    entry = located.entry if located else None
    importances = importances_of(study, trials)
    return ProblemReport(
        text=text,
        problem=problem,
        device=device,
        target=target,
        timing=timing,
        origin="predicted" if timing == PREDICTED_TIMING else "measured",
        versions=versions,
        trials=trials,
        unfinished=len(study.get_trials(deepcopy=False, states=(TrialState.RUNNING, TrialState.WAITING))),
        entry=entry,
        entry_file=str(located.path) if located else "",
        finalists=find_finalists(trials, entry, problem, target),
        untuned=untuned_trial(trials, problem, target),
        parameters=parameters_of(trials, importances.shares),
        fixed=fixed_values(trials),
        importances=importances,
        rejections=_rejections(trials),
        roof=_roof(problem, target),
    )


Known = typing.TypeVar("Known")


def _known(read: typing.Callable[[str], Known], text: str) -> Known | None:
    """Return what a name in the study means; None if this version does not know it."""
    try:
        return read(text)
    except FlashgenError:
        return None


def _trials(study: optuna.Study, short_name: ShortName) -> tuple[Trial, ...]:
    """Return the trials that ended, in that order.

    Raises:
        InputError: if one is not what `tune` wrote.
    """
    ended = study.get_trials(deepcopy=False, states=(TrialState.COMPLETE,))
    clock = _Stopwatch((t.datetime_start, t.datetime_complete) for t in ended)
    in_order = sorted(ended, key=lambda t: (t.datetime_complete is None, t.datetime_complete, t.number))
    return tuple(_trial(place, frozen, clock, short_name) for place, frozen in enumerate(in_order, 1))


def _trial(place: int, frozen: FrozenTrial, clock: _Stopwatch, short_name: ShortName) -> Trial:
    tried = tried_from(frozen)
    if tried.passed and not (math.isfinite(tried.timing.median_us) and tried.timing.median_us > 0):
        raise InputError(
            f"the study is damaged: trial {frozen.number} took {tried.timing.median_us} us; move it away or name "
            "another"
        )
    return Trial(
        place=place,
        number=frozen.number,
        config=tried.config,
        name=short_name(tried.config),
        resources=tried.record.resources,
        result=tried.record.result,
        max_error=tried.max_error,
        allowed_error=tried.allowed_error,
        elapsed_s=clock.seconds_until(frozen.datetime_complete),
    )


class _Stopwatch:
    """Runs while a trial is under way, so that pauses between runs do not count."""

    def __init__(self, spans: typing.Iterable[tuple[datetime.datetime | None, datetime.datetime | None]]) -> None:
        whole = sorted((start, end) for start, end in spans if start is not None and end is not None)
        self._spans: list[tuple[datetime.datetime, datetime.datetime]] = []
        for start, end in whole:
            if self._spans and start <= self._spans[-1][1]:
                start, end = self._spans[-1][0], max(end, self._spans[-1][1])
                self._spans.pop()
            self._spans.append((start, end))
        lengths = ((end - start).total_seconds() for start, end in self._spans)
        self._before = list(itertools.accumulate(lengths, initial=0.0))

    def seconds_until(self, moment: datetime.datetime | None) -> float | None:
        if moment is None or not self._spans:
            return None
        index = max(0, bisect.bisect_right(self._spans, moment, key=lambda span: span[0]) - 1)
        return self._before[index] + max(0.0, (moment - self._spans[index][0]).total_seconds())


def _entry_of(
    registry: Registry,
    problem: Problem | None,
    device: str,
    versions: typing.Mapping[str, str],
    trials: typing.Sequence[Trial],
) -> Located | None:
    """Return what the registry holds of this search: for its problem, device and versions, of a config it timed."""
    if problem is None:
        return None
    configs = {trial.config for trial in trials if trial.us is not None}
    measured_at = MeasuredRange.of(problem.shape)
    for located in registry.candidates(problem.spec):
        entry = located.entry
        same_versions = all(getattr(entry.provenance, name) == version for name, version in versions.items())
        if entry.device_name == device and entry.range == measured_at and same_versions and entry.config in configs:
            return located
    return None


def _rejections(trials: typing.Iterable[Trial]) -> tuple[Rejection, ...]:
    groups: dict[tuple[str, str], list[tuple[Trial, Rejected]]] = collections.defaultdict(list)
    for trial in sorted(trials, key=lambda t: t.number):
        if isinstance(trial.result, Rejected):
            groups[trial.result.stage, _NUMBER.sub("#", trial.result.reason)].append((trial, trial.result))
    rejections = (
        Rejection(stage=group[0][1].stage, reason=group[0][1].reason, trials=tuple(trial.number for trial, _ in group))
        for group in groups.values()
    )
    return tuple(sorted(rejections, key=lambda r: (-len(r.trials), r.stage, r.trials)))


def _roof(problem: Problem | None, target: GpuTarget | None) -> Roof | None:
    if problem is None or target is None or not (problem.flops() and problem.min_bytes()):
        return None
    return Roof.of(problem, target)
