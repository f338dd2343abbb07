"""Rounds, order and medians, by a clock that only pretends."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch

from flashgen.errors import InputError
from flashgen.measure import (
    CudaClock,
    HostClock,
    Timing,
    benchmark,
    host_time_us,
    quick_time,
)


class FakeClock:
    """Asks each call for its own time and keeps a log of (name, repeats)."""

    def __init__(self) -> None:
        self.log: list[tuple[str, int]] = []
        self.now = 0

    def samples_us(self, call: Callable[[], object], repeats: int) -> list[float]:
        name, us = call()  # type: ignore[misc]
        self.log.append((name, repeats))
        self.now += 1
        # A drift that every candidate meets in every round.
        return [us + self.now * 0.01] * repeats


CANDIDATES: dict[str, Callable[[], object]] = {
    "slow": lambda: ("slow", 1000.0),
    "fast": lambda: ("fast", 100.0),
    "middle": lambda: ("middle", 400.0),
}


def test_rounds_interleave_all_candidates_in_changing_order() -> None:
    clock = FakeClock()
    result = benchmark(CANDIDATES, clock=clock, rounds=6, target_ms=12.0, seed=1)
    assert list(result) == ["slow", "fast", "middle"]
    timed = [name for name, _ in clock.log[3:]]
    rounds = [tuple(timed[i : i + 3]) for i in range(0, len(timed), 3)]
    assert len(rounds) == 6
    assert all(set(r) == set(CANDIDATES) for r in rounds)
    assert len(set(rounds)) > 1


def test_repeats_fill_the_time_of_a_round() -> None:
    clock = FakeClock()
    result = benchmark(CANDIDATES, clock=clock, rounds=6, target_ms=12.0)
    assert dict(clock.log[3:]) == {"slow": 2, "fast": 20, "middle": 5}
    assert result["fast"].samples == 6 * 20
    assert result["fast"].median_us == pytest.approx(100, abs=1)
    assert result["slow"].median_us == pytest.approx(1000, abs=1)


def test_a_long_call_is_timed_once_a_round_and_a_short_one_not_forever() -> None:
    clock = FakeClock()
    candidates: dict[str, Callable[[], object]] = {"long": lambda: ("long", 1e6), "short": lambda: ("short", 0.1)}
    benchmark(candidates, clock=clock, rounds=2, target_ms=100.0)
    assert dict(clock.log[2:]) == {"long": 1, "short": 500}


def test_the_seed_fixes_the_order() -> None:
    logs = []
    for seed in (1, 1, 2):
        clock = FakeClock()
        benchmark(CANDIDATES, clock=clock, rounds=6, target_ms=12.0, seed=seed)
        logs.append(clock.log)
    assert logs[0] == logs[1]
    assert logs[0] != logs[2]


def test_bad_rounds_are_refused() -> None:
    with pytest.raises(InputError, match="rounds"):
        benchmark(CANDIDATES, clock=FakeClock(), rounds=0, target_ms=1.0)
    with pytest.raises(InputError, match="target_ms"):
        benchmark(CANDIDATES, clock=FakeClock(), rounds=1, target_ms=0.0)


def test_timing_is_median_and_relative_interquartile_range() -> None:
    timing = Timing.of([10.0, 40.0, 20.0, 30.0, 1000.0])
    assert timing == Timing(median_us=30.0, spread=20.0 / 30.0, samples=5)
    assert Timing.of([5.0]) == Timing(median_us=5.0, spread=0.0, samples=1)
    assert Timing.of([7.0, 7.0, 7.0]).spread == 0
    with pytest.raises(InputError, match="at least one"):
        Timing.of([])


def test_quick_time_takes_few_launches() -> None:
    clock = FakeClock()
    timing = quick_time(CANDIDATES["fast"], clock)
    assert clock.log == [("fast", 3)]
    assert timing.samples == 3


def test_host_clock_leaves_the_first_call_out() -> None:
    calls: list[int] = []
    samples = HostClock().samples_us(lambda: calls.append(1), 4)
    assert len(samples) == 4
    assert len(calls) == 5
    assert all(s >= 0 for s in samples)


def test_host_time_counts_every_call() -> None:
    calls: list[int] = []
    assert host_time_us(lambda: calls.append(1), repeats=10) > 0
    assert len(calls) == 1 + 5 * 10
    with pytest.raises(InputError, match="repeats"):
        host_time_us(lambda: None, repeats=0)


@pytest.mark.gpu
def test_cuda_clock_times_the_device_and_not_the_host() -> None:
    x = torch.randn(4096, 4096, device="cuda", dtype=torch.bfloat16)
    clock = CudaClock("cuda")
    result = benchmark({"one": lambda: x @ x, "two": lambda: x @ x @ x}, clock=clock, rounds=3, target_ms=10.0)
    # 2 * 4096**3 operations take 1 us at 137 PFLOP/s and 1 s at 0.14 TFLOP/s.
    assert 1.0 < result["one"].median_us < result["two"].median_us < 1e6
    assert host_time_us(lambda: x @ x) > 0
