"""Calls that a CUDA graph replays, and how many copies of their inputs leave the L2 cache cold."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch

from flashgen.measure import GraphClock, Rotation, benchmark, rotation_size

MIB = 2**20


@pytest.mark.parametrize(
    ("call_bytes", "copies"), [(200 * MIB, 1), (100 * MIB, 2), (16 * MIB, 10), (2 * MIB, 75), (1024, 128), (0, 128)]
)
def test_copies_are_three_times_the_cache(monkeypatch: pytest.MonkeyPatch, call_bytes: int, copies: int) -> None:
    properties = SimpleNamespace(L2_cache_size=50 * MIB)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: properties)
    assert rotation_size(call_bytes, "cuda") == copies


def test_a_rotation_called_itself_is_its_first_call() -> None:
    made: list[int] = []
    rotation = Rotation(calls=tuple(lambda i=i: made.append(i) for i in range(3)))
    rotation()
    rotation()
    assert made == [0, 0]


@pytest.mark.gpu
def test_replays_run_every_copy_and_time_one_call() -> None:
    sources = [torch.full((MIB,), float(i), device="cuda") for i in range(3)]
    targets = [torch.zeros(MIB, device="cuda") for _ in range(3)]

    def copy(i: int) -> object:
        return targets[i].copy_(sources[i])

    rotation = Rotation(calls=tuple(lambda i=i: copy(i) for i in range(3)))
    clock = GraphClock("cuda")
    timing = benchmark({"copy": rotation}, clock=clock, rounds=2, target_ms=2.0)["copy"]
    assert all(torch.equal(*pair) for pair in zip(sources, targets, strict=True))
    # 8 MiB through memory or cache: at no rate of any GPU in more than a millisecond or in less than 0.1 us.
    assert 0.1 < timing.median_us < 1000
