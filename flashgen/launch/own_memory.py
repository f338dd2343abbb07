"""Memory on a GPU that outlives the call that asks for it."""

from __future__ import annotations

import concurrent.futures
import typing
from collections.abc import Callable

import torch

T = typing.TypeVar("T")


def outside_pools(make: Callable[[], T], device: torch.device | int) -> T:
    """Return what `make` returns, its tensors in the allocator's common memory; queued on the current stream.

    PyTorch's private pools (`torch.cuda.use_mem_pool`, the compiler's CUDA graphs, which refuse a tensor of their pool
    that somebody else keeps) are a thread's own, so `make` runs on another thread.

    Args:
        make: what allocates, once.
        device: the GPU whose current stream that is.
    """
    stream = torch.cuda.current_stream(device)

    def on_stream() -> T:
        with torch.cuda.stream(stream):
            return make()

    with concurrent.futures.ThreadPoolExecutor(1, thread_name_prefix="flashgen") as thread:
        return thread.submit(on_stream).result()
