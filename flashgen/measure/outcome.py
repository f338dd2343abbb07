"""The outcome of one trial: a `Measurement`, or a `Rejected` that says at which stage the candidate fell and why."""

from __future__ import annotations

import dataclasses
import statistics
import typing
from collections.abc import Sequence

from flashgen.errors import InputError

Stage = typing.Literal["constraint", "compile", "resources", "run", "accuracy", "timing"]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Rejected:
    """A candidate that cannot win.

    Attributes:
        stage: where it fell.
        reason: one sentence for people.
    """

    stage: Stage
    reason: str


@dataclasses.dataclass(frozen=True, kw_only=True)
class Timing:
    """The time of one call.

    Attributes:
        median_us: median over all samples, in microseconds.
        spread: interquartile range over the median; 0 for a single sample.
        samples: how many calls were timed.
    """

    median_us: float
    spread: float
    samples: int

    @classmethod
    def of(cls, samples_us: Sequence[float]) -> Timing:
        """Return the timing that `samples_us`, in microseconds, amount to.

        Raises:
            InputError: if there is no sample.
        """
        if not samples_us:
            raise InputError("a timing needs at least one sample, got none; time at least one launch")
        median = statistics.median(samples_us)
        if len(samples_us) == 1 or median == 0:
            return cls(median_us=median, spread=0.0, samples=len(samples_us))
        lower, _, upper = statistics.quantiles(samples_us, n=4, method="inclusive")
        return cls(median_us=median, spread=(upper - lower) / median, samples=len(samples_us))


@dataclasses.dataclass(frozen=True, kw_only=True)
class Measurement:
    """A candidate that computed the right thing.

    Attributes:
        timing: how long it took.
        max_error: largest absolute difference of an output element from the float64 reference.
        allowed_error: what the accuracy rule allowed for it.
    """

    timing: Timing
    max_error: float
    allowed_error: float


Outcome = Measurement | Rejected
