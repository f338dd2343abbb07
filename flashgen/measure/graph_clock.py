"""Device time of short calls: many of them replayed as one CUDA graph, on inputs that no cache of the GPU holds."""

from __future__ import annotations

import dataclasses
import math

import torch

from flashgen.measure.benchmark import Call

# What one graph takes at least: events and the start of a graph cost about 2 us.
_GRAPH_US = 1000.0
_MAX_CALLS = 512
_MIN_REPLAYS = 3
# Captured graphs that are kept: as many as race each other.
_KEPT = 32
# A cache keeps part of what is read in a circle a little larger than itself.
_TIMES_L2 = 3
_MAX_COPIES = 128


@dataclasses.dataclass(frozen=True, kw_only=True)
class Rotation:
    """One call on several copies of its inputs; called itself, it is the first of them."""

    calls: tuple[Call, ...]

    def __call__(self) -> object:
        """Make the first call, and return what it returns."""
        return self.calls[0]()


class GraphClock:
    """Device time of a call as a CUDA graph replays it: calls captured one after the other, over how many there are.

    What a model's step costs: no host time, and kernels a microsecond apart. The calls of a `Rotation` follow each
    other in the graph; with `rotation_size` copies whatever a call reads comes from memory, as it does in a model
    whose layers have caches of their own. Nothing is overwritten in between. A plain call finds its inputs in the L2
    cache, as far as they fit.
    """

    def __init__(self, device: torch.device | str) -> None:
        """Take the device; graphs are captured when a call is first timed, and kept."""
        self._device = torch.device(device)
        self._graphs: dict[Call, tuple[torch.cuda.CUDAGraph, int]] = {}

    def samples_us(self, call: Call, repeats: int) -> list[float]:
        """Call once untimed, then return the microseconds of a call in each of some replays, `repeats` calls in all.

        Three replays at least. Raises what a call that cannot be captured raises.
        """
        with torch.cuda.device(self._device):
            if call not in self._graphs:
                if len(self._graphs) == _KEPT:
                    del self._graphs[next(iter(self._graphs))]
                self._graphs[call] = self._captured(call)
            graph, calls = self._graphs[call]
            replays = max(_MIN_REPLAYS, math.ceil(repeats / calls))
            return [us / calls for us in self._replayed_us(graph, replays)]

    def _captured(self, call: Call) -> tuple[torch.cuda.CUDAGraph, int]:
        """Return a graph that is long enough, and how many calls it holds."""
        calls = call.calls if isinstance(call, Rotation) else (call,)
        # What a first call compiles or allocates for good is not part of a graph.
        for each in calls:
            each()
        graph = _capture(calls)
        rounds = math.ceil(_GRAPH_US / max(1.0, min(self._replayed_us(graph, _MIN_REPLAYS))))
        rounds = min(rounds, max(1, _MAX_CALLS // len(calls)))
        return (graph if rounds == 1 else _capture(calls * rounds)), rounds * len(calls)

    def _replayed_us(self, graph: torch.cuda.CUDAGraph, replays: int) -> list[float]:
        pairs = [(torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)) for _ in range(replays)]
        # Keeps the device busy while the host enqueues the next one.
        graph.replay()
        for start, end in pairs:
            start.record()
            graph.replay()
            end.record()
        torch.cuda.synchronize()
        return [start.elapsed_time(end) * 1e3 for start, end in pairs]


def rotation_size(call_bytes: int, device: torch.device | str) -> int:
    """Return how many copies of a call's inputs are read in turn so that none is found in the L2 cache of a GPU.

    At most 128: calls that read less than about 1 MB are timed with part of it in the cache. One where there is no GPU.

    Args:
        call_bytes: what one call reads, in bytes.
        device: the GPU.
    """
    if torch.device(device).type != "cuda":
        return 1
    l2_bytes = torch.cuda.get_device_properties(device).L2_cache_size
    return min(_MAX_COPIES, max(1, math.ceil(_TIMES_L2 * l2_bytes / max(1, call_bytes))))


def _capture(calls: tuple[Call, ...]) -> torch.cuda.CUDAGraph:
    graph = torch.cuda.CUDAGraph()
    torch.cuda.synchronize()
    with torch.cuda.graph(graph):
        for call in calls:
            call()
    return graph
