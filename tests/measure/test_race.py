"""Races whose clock drifts: who is surely slower, and who is not."""

from __future__ import annotations

import math
import random

import pytest

from flashgen.errors import InputError
from flashgen.measure import run_race
from flashgen.measure.race import times_longer_at_least


class Drifting:
    """Times calls that return their microseconds, on a clock that slows down and is noisy."""

    def __init__(self, drift: float, noise: float) -> None:
        self._drift, self._noise, self._calls = drift, noise, 0
        self._rng = random.Random(0)

    def samples_us(self, call, repeats):
        self._calls += 1
        slower = 1 + self._drift * self._calls
        return [call() * slower * (1 + self._noise * self._rng.uniform(-1, 1)) for _ in range(repeats)]


def race(drift=0.0, noise=0.0, **us):
    calls = {name: (lambda us=us: us) for name, us in us.items()}
    clock = Drifting(drift, noise)
    return run_race(calls, {"peer": lambda: 50.0}, clock=clock, rounds=10, target_ms=5.0)


def test_everything_is_timed_and_the_fastest_is_who_the_others_are_held_against():
    found = race(a=110.0, b=100.0, c=150.0)
    assert {name: timing.median_us for name, timing in found.timings.items()} == {
        **{"a": 110.0, "b": 100.0, "c": 150.0},
        "peer": 50.0,
    }
    assert found.at_least == pytest.approx({"a": 1.1, "b": 1.0, "c": 1.5})
    assert found.noise == pytest.approx(0.0)


def test_a_drift_of_all_makes_nobody_slower_and_hides_nobody():
    # Half as slow again at the end: medians over all say little, rounds do.
    found = race(drift=0.01, noise=0.002, a=100.0, b=104.0)
    assert 1.0 < found.at_least["b"] < 1.04
    assert found.noise < 0.02


def test_what_the_noise_hides_is_not_surely_slower():
    assert race(noise=0.2, a=100.0, b=100.5).at_least["b"] <= 1.0
    assert race(noise=0.002, a=100.0, b=104.0).at_least["b"] > 1.02


def test_the_interval_is_that_of_the_rounds_and_the_same_every_time():
    base = [[100.0, 100.0, 100.0]] * 8
    samples = [[us] * 3 for us in (90.0, 120.0, 110.0, 95.0, 130.0, 115.0, 105.0, 125.0)]
    low = times_longer_at_least(samples, base)
    assert low == times_longer_at_least(samples, base)
    ratios = sorted(round_us[0] / 100.0 for round_us in samples)
    assert ratios[0] < low < math.exp(sum(map(math.log, ratios)) / len(ratios))


def test_no_rounds_are_refused():
    with pytest.raises(InputError, match="rounds must be at least 1"):
        run_race({"a": lambda: 1.0}, {}, clock=Drifting(0.0, 0.0), rounds=0, target_ms=1.0)
