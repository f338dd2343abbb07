"""Counters in device memory: by which programs take tile after tile, or learn of each other."""

from __future__ import annotations

import functools

import torch

from flashgen.launch.own_memory import outside_pools

# By device and stream; never let go, as a launch that is still queued may use one.
_counters: dict[tuple[int, int], torch.Tensor] = {}
_arrivals: dict[tuple[int, int], list[torch.Tensor]] = {}
_LEAST_ARRIVALS = 4096
# By device: zeros for launches that are captured, and how many of them are given away.
_for_graphs: dict[int, tuple[torch.Tensor, int]] = {}
_SPARE_ARRIVALS = 2**20
# CUDA's handle of the default stream of each thread: one number for many streams.
_PER_THREAD_STREAM = 2


def counter_is_shared(stream: int) -> bool:
    """Return whether all launches on the current stream, of this handle, take one counter; see `tile_counter`."""
    return not torch.cuda.is_current_stream_capturing() and stream != _PER_THREAD_STREAM


def tile_counter(device: int, stream: int) -> torch.Tensor:
    """Return int32 [2] of zeros on a GPU, for one launch on its current stream.

    A persistent kernel finds its counter at zero and leaves it at zero. Launches on one stream never overlap, so one
    counter serves all of them: made once for each stream, it costs a launch no memset. Inside a CUDA graph capture that
    does not hold, as graphs are replayed on any stream, several at once: there each launch gets a counter of its own,
    in the graph's memory, and what zeroes it is captured before the launch.

    Args:
        device: index of the current device.
        stream: handle of its current stream.
    """
    if not counter_is_shared(stream):
        return _zeros(device, 2)
    counter = _counters.get((device, stream))
    if counter is None:
        counter = _counters[device, stream] = outside_pools(functools.partial(_zeros, device, 2), device)
    return counter


def arrival_counters(device: int, stream: int, count: int) -> torch.Tensor:
    """Return at least `count` int32 zeros on a GPU, for one launch of a kernel that leaves them at zero.

    As `tile_counter`: shared by the launches on one stream, of their own inside a CUDA graph capture. There they come
    from memory that the first launch outside of captures has set to zero, while it lasts (4 MiB): a memset would cost
    every replay as much as a short kernel does.

    Args:
        device: index of the current device.
        stream: handle of its current stream.
        count: tiles that several programs may arrive at.
    """
    if not counter_is_shared(stream):
        spare, given = _for_graphs.get(device, (None, 0))
        if spare is None or given + count > len(spare):
            return _zeros(device, count)
        # Whole lines of the cache: what other graphs count is not in the way.
        _for_graphs[device] = spare, given + -(-count // 32) * 32
        return spare[given : given + count]
    made = _arrivals.setdefault((device, stream), [])
    if not made or len(made[-1]) < count:
        size = max(_LEAST_ARRIVALS, 2 * count)
        made.append(outside_pools(functools.partial(_zeros, device, size), device))
    if device not in _for_graphs:
        _for_graphs[device] = outside_pools(functools.partial(_zeros, device, _SPARE_ARRIVALS), device), 0
    return made[-1]


def counters_astray() -> int:
    """Return how many counters are not at zero once all launches have ended, from where the next would count on."""
    return sum(int(torch.count_nonzero(counter)) for counter in _all_counters())


def reset_tile_counters() -> None:
    """Set every counter to zero, after a kernel that may not have left it so, and take back what graphs were given.

    For a process that has let go of every graph it captured: later ones count where those did.
    """
    for counter in _all_counters():
        counter.zero_()
    for device, (spare, _) in _for_graphs.items():
        _for_graphs[device] = spare, 0


def _all_counters() -> list[torch.Tensor]:
    arrivals = [counter for made in _arrivals.values() for counter in made]
    return [*_counters.values(), *arrivals, *(spare for spare, _ in _for_graphs.values())]


def _zeros(device: int, count: int) -> torch.Tensor:
    return torch.zeros(count, dtype=torch.int32, device=torch.device("cuda", device))
