"""Counters by which programs learn of each other: one memory for each stream, memory of their own for graphs."""

from __future__ import annotations

import pytest
import torch

from flashgen.launch import reset_tile_counters, tile_counter
from flashgen.launch.tile_counter import arrival_counters


@pytest.fixture
def capturing(monkeypatch: pytest.MonkeyPatch) -> list[bool]:
    """Whether a capture goes on, in a list of one; counters lie on the CPU."""
    state = [False]
    for name in ("_counters", "_arrivals", "_for_graphs"):
        monkeypatch.setattr(tile_counter, name, {})
    monkeypatch.setattr(tile_counter, "_zeros", lambda device, count: torch.zeros(count, dtype=torch.int32))
    monkeypatch.setattr(tile_counter, "outside_pools", lambda make, device: make())
    monkeypatch.setattr(tile_counter, "counter_is_shared", lambda stream: not state[0])
    return state


def test_launches_on_a_stream_share_what_is_large_enough(capturing: list[bool]) -> None:
    first = arrival_counters(0, 7, 10)
    assert arrival_counters(0, 7, 100) is first
    assert arrival_counters(0, 8, 10) is not first
    larger = arrival_counters(0, 7, len(first) + 1)
    assert len(larger) > len(first)


def test_captured_launches_have_their_own_until_the_memory_is_given_away(
    capturing: list[bool], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tile_counter, "_SPARE_ARRIVALS", 128)
    arrival_counters(0, 7, 1)
    capturing[0] = True
    given = [arrival_counters(0, 7, 40) for _ in range(3)]
    places = [counter.storage_offset() for counter in given]
    # Whole lines of 32; the third finds no more, and is zeroed in its graph.
    assert places == [0, 64, 0]
    assert given[0].untyped_storage().data_ptr() == given[1].untyped_storage().data_ptr()
    assert given[2].untyped_storage().data_ptr() != given[0].untyped_storage().data_ptr()


def test_a_reset_zeroes_all_and_takes_back_what_graphs_had(capturing: list[bool]) -> None:
    shared = arrival_counters(0, 7, 4)
    capturing[0] = True
    captured = arrival_counters(0, 7, 4)
    assert tile_counter.counters_astray() == 0
    shared.fill_(3)
    captured.fill_(5)
    assert tile_counter.counters_astray() == len(shared) + len(captured)
    reset_tile_counters()
    assert tile_counter.counters_astray() == 0
    assert not shared.any()
    assert not captured.any()
    assert arrival_counters(0, 7, 4).data_ptr() == captured.data_ptr()
