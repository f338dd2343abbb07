"""Candidates against each other: which of them are no slower than the fastest, as far as their rounds can tell."""

from __future__ import annotations

import dataclasses
import math
import random
import statistics
from collections.abc import Mapping, Sequence

from flashgen.measure.benchmark import Call, Clock, interleaved
from flashgen.measure.outcome import Timing

_RESAMPLES = 2000
_TAIL = 0.025
_AGAIN = "A/A"

Rounds = Sequence[Sequence[float]]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Race:
    """What a race said.

    Attributes:
        timings: of each candidate, and of what ran beside them.
        at_least: of each candidate, how many times the time of the fastest it takes at least, with 97.5% confidence.
        noise: by how much the first candidate differed from itself, as a share.
    """

    timings: dict[str, Timing]
    at_least: dict[str, float]
    noise: float


def run_race(
    candidates: Mapping[str, Call],
    beside: Mapping[str, Call],
    *,
    clock: Clock,
    rounds: int,
    target_ms: float,
    seed: int = 0,
) -> Race:
    """Time candidates in interleaved rounds, the first of them twice.

    Args:
        candidates: who may win, by name.
        beside: what else is timed in the same rounds.
        clock: how one call is timed.
        rounds: each times everything once, in a new random order.
        target_ms: time to spend on each candidate over all rounds.
        seed: of the order and of the resampling.

    Raises:
        InputError: if rounds is below 1 or target_ms is not positive.
    """
    first = next(iter(candidates))
    calls = {**candidates, _AGAIN: candidates[first], **beside}
    samples = interleaved(calls, clock=clock, rounds=rounds, target_ms=target_ms, seed=seed)
    again = samples.pop(_AGAIN)
    timings = {name: Timing.of([us for of_round in each for us in of_round]) for name, each in samples.items()}
    fastest = min(candidates, key=lambda name: timings[name].median_us)
    return Race(
        timings=timings,
        at_least={name: times_longer_at_least(samples[name], samples[fastest], seed=seed) for name in candidates},
        noise=abs(math.expm1(statistics.fmean(_log_ratios(again, samples[first])))),
    )


def times_longer_at_least(samples: Rounds, base: Rounds, *, seed: int = 0) -> float:
    """Return the lower end of a 95% interval of how many times longer one call takes than another.

    Both were timed in the same rounds, whose drift of clock and temperature their ratio does not have. The interval is
    the bootstrap's percentile interval of the geometric mean over rounds (B. Efron and R. Tibshirani, "An Introduction
    to the Bootstrap", 1993, chapter 13).
    """
    ratios = _log_ratios(samples, base)
    rng = random.Random(seed)
    means = sorted(statistics.fmean(rng.choices(ratios, k=len(ratios))) for _ in range(_RESAMPLES))
    return math.exp(means[int(_TAIL * _RESAMPLES)])


def _log_ratios(samples: Rounds, base: Rounds) -> list[float]:
    pairs = zip(samples, base, strict=True)
    return [math.log(statistics.median(of_round) / statistics.median(of_base)) for of_round, of_base in pairs]
