"""What each parameter did: the times of its values, and its share in what makes a config fast."""

from __future__ import annotations

import collections
import statistics
import typing
import warnings

import optuna
from optuna.importance import PedAnovaImportanceEvaluator

from flashgen.codegen.kernel_config import Scalar
from flashgen.report.data import Importances, Parameter, Trial, ValueSummary

# PED-ANOVA compares the fastest tenth with all: two trials there are the least it takes, five what it asks for.
_MIN_TRIALS = 20
_ENOUGH_TRIALS = 50


def parameters_of(trials: typing.Sequence[Trial], shares: typing.Mapping[str, float]) -> tuple[Parameter, ...]:
    """Return the parameters of which several values were tried, by importance, then by name."""
    varied = {name: by_value for name, by_value in _by_value(trials).items() if len(by_value) > 1}
    return tuple(
        Parameter(name=name, values=tuple(_summary(value, varied[name][value]) for value in _in_order(varied[name])))
        for name in sorted(varied, key=lambda name: (-shares.get(name, 0.0), name))
    )


def fixed_values(trials: typing.Sequence[Trial]) -> dict[str, Scalar]:
    """Return the parameters that had one value in every config that has them."""
    return {name: next(iter(values)) for name, values in sorted(_by_value(trials).items()) if len(values) == 1}


def importances_of(study: optuna.Study, trials: typing.Sequence[Trial]) -> Importances:
    """Return how much each parameter tells the fastest tenth of the trials from all of them.

    By PED-ANOVA (Watanabe, Bansal, Hutter: IJCAI 2023), which needs nothing beside Optuna and NumPy. Rejected trials
    count as the slowest.
    """
    if len(trials) < _MIN_TRIALS:
        return Importances(shares={}, note=f"{len(trials)} trials are too few to tell: it takes {_MIN_TRIALS}.")
    if len({trial.us for trial in trials}) < 2:
        return Importances(shares={}, note="All trials ended alike, so no parameter tells them apart.")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        found = optuna.importance.get_param_importances(study, evaluator=PedAnovaImportanceEvaluator())
    shares = {name: share for name, share in found.items() if share > 0}
    if not shares:
        return Importances(shares={}, note="No parameter tells the fastest trials from the rest.")
    few = len(trials) < _ENOUGH_TRIALS
    return Importances(
        shares=shares, note=f"{len(trials)} trials: a rough answer, {_ENOUGH_TRIALS} give a better one." if few else ""
    )


def _by_value(trials: typing.Iterable[Trial]) -> dict[str, dict[Scalar, list[Trial]]]:
    found: dict[str, dict[Scalar, list[Trial]]] = collections.defaultdict(lambda: collections.defaultdict(list))
    for trial in trials:
        for name, value in trial.config.as_dict().items():
            found[name][value].append(trial)
    return found


def _in_order(values: typing.Iterable[Scalar]) -> list[Scalar]:
    return sorted(values, key=lambda value: (isinstance(value, str), value))


def _summary(value: Scalar, trials: typing.Sequence[Trial]) -> ValueSummary:
    times = [trial.us for trial in trials if trial.us is not None]
    return ValueSummary(
        value=value,
        tried=len(trials),
        passed=len(times),
        best_us=min(times, default=None),
        median_us=statistics.median(times) if times else None,
    )
