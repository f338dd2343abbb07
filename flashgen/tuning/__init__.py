"""The search for the best config: an Optuna study, processes that compile, and one that measures.

Importing this package imports neither optuna nor torch: worker processes and the command line's help need neither.
"""

from __future__ import annotations

import importlib
import typing

from flashgen.errors import MissingDependencyError

if typing.TYPE_CHECKING:
    from flashgen.tuning.effort import EFFORTS as EFFORTS
    from flashgen.tuning.events import JoinReport as JoinReport
    from flashgen.tuning.events import Observer as Observer
    from flashgen.tuning.events import ProblemResult as ProblemResult
    from flashgen.tuning.events import SilentObserver as SilentObserver
    from flashgen.tuning.events import TrialRecord as TrialRecord
    from flashgen.tuning.events import TuneReport as TuneReport
    from flashgen.tuning.retuning import Reraced as Reraced
    from flashgen.tuning.retuning import RetuneReport as RetuneReport
    from flashgen.tuning.retuning import retune as retune
    from flashgen.tuning.session import join as join
    from flashgen.tuning.session import tune as tune

_HOME = {
    "EFFORTS": "flashgen.tuning.effort",
    "JoinReport": "flashgen.tuning.events",
    "Observer": "flashgen.tuning.events",
    "ProblemResult": "flashgen.tuning.events",
    "Reraced": "flashgen.tuning.retuning",
    "RetuneReport": "flashgen.tuning.retuning",
    "SilentObserver": "flashgen.tuning.events",
    "TrialRecord": "flashgen.tuning.events",
    "TuneReport": "flashgen.tuning.events",
    "join": "flashgen.tuning.session",
    "retune": "flashgen.tuning.retuning",
    "tune": "flashgen.tuning.session",
}

__all__ = [
    "EFFORTS",
    "JoinReport",
    "Observer",
    "ProblemResult",
    "Reraced",
    "RetuneReport",
    "SilentObserver",
    "TrialRecord",
    "TuneReport",
    "join",
    "retune",
    "tune",
]


def __getattr__(name: str) -> typing.Any:
    if name not in _HOME:
        raise AttributeError(f"module 'flashgen.tuning' has no attribute {name!r}")
    try:
        return getattr(importlib.import_module(_HOME[name]), name)
    except ModuleNotFoundError as error:
        if error.name != "optuna":
            raise
        raise MissingDependencyError(
            "tuning needs optuna, which is not installed: pip install 'optuna>=4.2,<6'"
        ) from error
