"""Timing: interleaved rounds in random order on a cold L2 cache, medians over all samples."""

from __future__ import annotations

import math
import random
import statistics
import time
import typing
from collections.abc import Callable, Mapping

import torch

from flashgen.errors import InputError
from flashgen.measure.outcome import Timing

Call = Callable[[], object]

# Larger than the L2 of any GPU: 256 MB, as triton.testing.do_bench clears.
_FLUSH_BYTES = 256 * 1024 * 1024
_MAX_FLUSHES = 16
_MAX_REPEATS = 500
_FIRST_LAUNCHES = 3


class Clock(typing.Protocol):
    """Times calls; `benchmark` only decides which, when and how often."""

    def samples_us(self, call: Call, repeats: int) -> list[float]:
        """Call once untimed, then return the microseconds of each of `repeats` calls."""
        ...


class HostClock:
    """Wall-clock time of calls that are finished when they return: CPU tensors, tests."""

    def samples_us(self, call: Call, repeats: int) -> list[float]:
        """Call once untimed, then return the microseconds of each of `repeats` calls."""
        call()
        samples = []
        for _ in range(repeats):
            start = time.perf_counter()
            call()
            samples.append((time.perf_counter() - start) * 1e6)
        return samples


class CudaClock:
    """Device time by events around each call, with the L2 cache overwritten before each.

    Overwriting also keeps the device busy while the host enqueues the call, so that host time stays out of the sample;
    a call that takes the host longer than one overwrite gets several.
    """

    def __init__(self, device: torch.device | str) -> None:
        """Allocate the buffer (256 MB) on `device` and time one overwrite of it."""
        self._device = torch.device(device)
        self._buffer = torch.empty(_FLUSH_BYTES // 4, dtype=torch.int32, device=self._device)
        self._flush_us = max(1.0, min(self._events_us(self._flush, repeats=5, flushes=0)))

    def samples_us(self, call: Call, repeats: int) -> list[float]:
        """Call once untimed, then return the device microseconds of each of `repeats` calls."""
        with torch.cuda.device(self._device):
            torch.cuda.synchronize()
            start = time.perf_counter()
            call()
            host_us = (time.perf_counter() - start) * 1e6
        flushes = min(_MAX_FLUSHES, 1 + math.ceil(host_us / self._flush_us))
        return self._events_us(call, repeats=repeats, flushes=flushes)

    def _flush(self) -> None:
        self._buffer.zero_()

    def _events_us(self, call: Call, *, repeats: int, flushes: int) -> list[float]:
        with torch.cuda.device(self._device):
            pairs = [
                (torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)) for _ in range(repeats)
            ]
            for start, end in pairs:
                for _ in range(flushes):
                    self._flush()
                start.record()
                call()
                end.record()
            torch.cuda.synchronize()
        return [start.elapsed_time(end) * 1e3 for start, end in pairs]


def benchmark(
    candidates: Mapping[str, Call], *, clock: Clock, rounds: int, target_ms: float, seed: int = 0
) -> dict[str, Timing]:
    """Time candidates beside each other, so that a drift of the clock rate or the temperature meets all of them.

    Args:
        candidates: what to time, by name; already compiled and checked.
        clock: how one call is timed.
        rounds: each round times every candidate once, in a new random order.
        target_ms: time to spend on each candidate over all rounds, L2 overwrites not counted.
        seed: of the order.

    Returns:
        The timing of each candidate, in the order of `candidates`.

    Raises:
        InputError: if rounds is below 1 or target_ms is not positive.
    """
    samples = interleaved(candidates, clock=clock, rounds=rounds, target_ms=target_ms, seed=seed)
    return {name: Timing.of([us for of_round in each for us in of_round]) for name, each in samples.items()}


def interleaved(
    candidates: Mapping[str, Call], *, clock: Clock, rounds: int, target_ms: float, seed: int = 0
) -> dict[str, list[list[float]]]:
    """Return the samples of each candidate in microseconds, round by round; otherwise as `benchmark`."""
    if rounds < 1 or target_ms <= 0:
        raise InputError(f"rounds must be at least 1 and target_ms positive, got {rounds} and {target_ms}")
    round_us = target_ms * 1e3 / rounds
    repeats = {name: estimate_repeats(call, clock, round_us) for name, call in candidates.items()}
    samples: dict[str, list[list[float]]] = {name: [] for name in candidates}
    order = list(candidates)
    shuffler = random.Random(seed)
    for _ in range(rounds):
        shuffler.shuffle(order)
        for name in order:
            samples[name].append(clock.samples_us(candidates[name], repeats[name]))
    return samples


def estimate_repeats(call: Call, clock: Clock, round_us: float) -> int:
    """Return how many calls take about `round_us` microseconds, from 1 to 500, judged by a few launches."""
    estimate = statistics.median(clock.samples_us(call, _FIRST_LAUNCHES))
    if estimate <= 0:
        return _MAX_REPEATS
    return min(_MAX_REPEATS, max(1, round(round_us / estimate)))


def quick_time(call: Call, clock: Clock, launches: int = 3) -> Timing:
    """Return a rough timing by a few launches: enough to drop what is far behind."""
    return Timing.of(clock.samples_us(call, launches))


def host_time_us(call: Call, repeats: int = 50) -> float:
    """Return what one call costs the host, in microseconds: for a GPU call, what enqueueing it takes.

    The median of five batches, each started on an idle device; `repeats` is small enough that a batch never fills the
    launch queue, where the host would wait for the device.

    Raises:
        InputError: if repeats is below 1.
    """
    if repeats < 1:
        raise InputError(f"repeats must be at least 1, got {repeats}")
    call()
    batches = []
    for _ in range(5):
        _wait_for_device()
        start = time.perf_counter()
        for _ in range(repeats):
            call()
        batches.append((time.perf_counter() - start) * 1e6 / repeats)
    _wait_for_device()
    return statistics.median(batches)


def _wait_for_device() -> None:
    # is_initialized: timing a CPU call must not start a CUDA context.
    if torch.cuda.is_initialized():
        torch.cuda.synchronize()
