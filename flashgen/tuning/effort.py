"""How hard to search."""

from __future__ import annotations

import dataclasses
import math
import typing

from flashgen.errors import InputError

_SEEDS_SHARE = 2 / 3
# To compile, check and time one config, where a list of them is raced.
_SECONDS_OF_ONE = 5.0

EffortName = typing.Literal["check", "quick", "full"]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Effort:
    """Limits of one effort level.

    Attributes:
        trials: configs to try at most; fewer when the legal space is smaller.
        finalists: how many of the best are timed against each other in interleaved rounds at the end.
        final_ms: time that each finalist gets for that, in milliseconds.
        seconds: wall-clock limit of one problem where no budget is given.
        seeds_only: try only the seeds of the search space and the default.
    """

    trials: int
    finalists: int
    final_ms: float
    seconds: float
    seeds_only: bool = False

    @property
    def seeds(self) -> int:
        """How many configs are given to try at most; the rest of the trials is the search's own."""
        return self.trials if self.seeds_only else math.ceil(_SEEDS_SHARE * self.trials)

    def spread(self, seeds: int) -> int:
        """Return how many points spread over the space follow so many seeds; the rest are neighbours of the best."""
        return max(self.trials - seeds, 0) // 4

    def for_all_of(self, configs: int) -> Effort:
        """Return the effort of trying so many given configs and no other, all of which go to the final comparison."""
        seconds = max(self.seconds, configs * _SECONDS_OF_ONE)
        return dataclasses.replace(self, trials=configs, finalists=configs, seconds=seconds, seeds_only=True)


EFFORTS: dict[EffortName, Effort] = {
    "check": Effort(trials=8, finalists=3, final_ms=20, seconds=30, seeds_only=True),
    "quick": Effort(trials=96, finalists=6, final_ms=60, seconds=50),
    "full": Effort(trials=200, finalists=8, final_ms=150, seconds=165),
}


def effort_named(name: str) -> Effort:
    """Return the effort level called `name`.

    Raises:
        InputError: if there is none of that name.
    """
    for known, effort in EFFORTS.items():
        if name == known:
            return effort
    raise InputError(f"unknown effort {name!r}; allowed: {', '.join(EFFORTS)}")
