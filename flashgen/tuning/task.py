"""What one search is about."""

from __future__ import annotations

import dataclasses

from flashgen.codegen import KernelConfig
from flashgen.spec import Problem
from flashgen.target import GpuTarget, Software
from flashgen.tuning.effort import Effort


@dataclasses.dataclass(frozen=True, kw_only=True)
class Task:
    """What one search is about.

    Attributes:
        problem: what is tuned.
        target: for which GPU.
        effort: how hard.
        legal: how many configs the space holds.
        planned: how many of them to try, those of earlier runs included.
        default: what runs where nothing is tuned; the winner must beat it.
        owed: the default and what won before: even a search that is out of time waits for them, to the deadline.
        deadline: monotonic time at which the result is due.
        software: versions, for the entry.
        seed: of the search.
    """

    problem: Problem
    target: GpuTarget
    effort: Effort
    legal: int
    planned: int
    default: KernelConfig
    owed: frozenset[KernelConfig] = frozenset()
    deadline: float
    software: Software
    seed: int
