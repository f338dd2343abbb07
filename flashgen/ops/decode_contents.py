"""Whether the numbers on the device that say where keys lie fit the caches: looked at on request."""

from __future__ import annotations

import typing

import torch

from flashgen.errors import InputError
from flashgen.measure.decode_reference import turns_each_query
from flashgen.ops.call import heads_first
from flashgen.ops.decode_call import DecodeOptions, DecodeTensors
from flashgen.spec import Problem


def check_contents(
    q: torch.Tensor, k_cache: torch.Tensor, problem: Problem, tensors: DecodeTensors, options: DecodeOptions
) -> None:
    """Check the numbers in cache_seqlens, cache_leftpad, cache_batch_idx and page_table, which waits for the device.

    Raises:
        InputError: for the first that lies outside the caches, or inside a CUDA graph capture, where nobody can wait.
    """
    if q.is_cuda and torch.cuda.is_current_stream_capturing():
        raise InputError("check=True reads lengths back from the GPU, which a CUDA graph capture forbids: leave it out")
    capacity, new = problem.shape.seqlen_k, 0
    if tensors.k_new is not None:
        new = heads_first(tensors.k_new, options.layout).shape[2]
    lengths: list[int] = tensors.cache_seqlens.tolist()
    for b, length in enumerate(lengths):
        if length < 0 or length + new > capacity:
            appended = f" and {new} appended" if new else ""
            raise InputError(f"cache_seqlens[{b}] is {length}{appended}; the cache of a sequence holds {capacity}")
    pads: list[int] = [0] * len(lengths) if tensors.cache_leftpad is None else tensors.cache_leftpad.tolist()
    for b, (pad, length) in enumerate(zip(pads, lengths, strict=True)):
        if not 0 <= pad <= length:
            raise InputError(f"cache_leftpad[{b}] is {pad}; it must be from 0 to cache_seqlens[{b}] = {length}")
    _check_positions(problem, tensors, lengths, new)
    if tensors.cache_batch_idx is not None:
        entries: list[int] = tensors.cache_batch_idx.tolist()
        wrong = next((b for b, entry in enumerate(entries) if not 0 <= entry < k_cache.shape[0]), None)
        if wrong is not None:
            raise InputError(
                f"cache_batch_idx[{wrong}] is {entries[wrong]}; the caches have the entries 0 to {k_cache.shape[0] - 1}"
            )
    if tensors.page_table is not None:
        _check_pages(k_cache.shape[0], problem.spec.page_size, tensors.page_table, pads, lengths, new)


def _check_positions(problem: Problem, tensors: DecodeTensors, lengths: typing.Sequence[int], new: int) -> None:
    if tensors.rotary_cos is None:
        return
    past = max(new, problem.shape.seqlen_q if turns_each_query(problem.spec.mask) else 1)
    longest = max(lengths, default=0)
    if longest + past > len(tensors.rotary_cos):
        raise InputError(
            f"rotary_cos has {len(tensors.rotary_cos)} positions; the call needs {longest + past}, the longest of "
            f"cache_seqlens and {past} more"
        )


def _check_pages(
    num_pages: int,
    page_size: int,
    table: torch.Tensor,
    pads: typing.Sequence[int],
    lengths: typing.Sequence[int],
    new: int,
) -> None:
    rows: list[list[int]] = table.tolist()
    for b, (row, pad, length) in enumerate(zip(rows, pads, lengths, strict=True)):
        for slot in range(pad // page_size, -(-(length + new) // page_size)):
            if not 0 <= row[slot] < num_pages:
                raise InputError(
                    f"page_table[{b}, {slot}] is {row[slot]}, of keys in use; the caches have the pages 0 to "
                    f"{num_pages - 1}"
                )
