"""Decoding where sequences differ in length: `python benchmarks/decode_lengths.py`.

Batches of one long sequence among short ones, and of lengths drawn from a lognormal distribution. What bounds a call is
reading the keys and values in use, at the bandwidth that a large copy reaches on this machine. Caches in one piece and
in pages, which lie in no order. The graph of a cache is captured once, with lengths that are all alike; each batch then
changes them in place. That of `anew us` was captured with the batch's own.

Times are medians of CUDA graph replays in interleaved rounds, over so many copies of the caches that the L2 cache holds
none of them. Without a GPU calls are timed as they are, by the host's clock: only that they run can be learned from it.
"""

from __future__ import annotations

import argparse
import dataclasses
import functools
import math
import random
import statistics
from collections.abc import Mapping, Sequence

import torch

import flashgen
from flashgen.cli.output import print_json, print_table
from flashgen.measure import Clock, GraphClock, HostClock, Rotation, benchmark, rotation_size
from flashgen.spec import Problem, parse_problem

SHAPE = "b=16 hq=32 hkv=8 sq=1 sk=65536 d=128 full bf16"
_ROUNDS = 5
_COPIES = 20
# Of the logarithm: two in three lengths lie within a factor of three of the median.
_SPREAD = 1.1


@dataclasses.dataclass(frozen=True, kw_only=True)
class Figure:
    """What one batch of lengths takes with one kind of cache.

    Attributes:
        lengths: what the batch is.
        cache: `contiguous`, or the size of its pages.
        keys: how many the sequences have in all.
        us: the median time of a call, its graph captured with other lengths.
        anew_us: that of a graph captured with these.
        bound_us: what reading the keys and values in use takes at the bandwidth of a copy.
    """

    lengths: str
    cache: str
    keys: int
    us: float
    anew_us: float
    bound_us: float


class Cache:
    """Caches of one kind, the lengths of the sequences in them, and calls over them."""

    def __init__(self, problem: Problem, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, page_size: int) -> None:
        """Take K and V of [copies, batch, seqlen_k, heads, head_dim] as they are, or as pages in no order."""
        self.name = f"pages of {page_size}" if page_size else "contiguous"
        copies, batch, capacity = k.shape[:3]
        self._mask, self._q, self._page_table = problem.spec.mask, q, None
        self._lengths = torch.full((batch,), capacity // 2, dtype=torch.int32, device=q.device)
        if page_size:
            count = batch * capacity // page_size
            order = torch.randperm(count, generator=torch.Generator().manual_seed(0))
            self._page_table = order.to(q.device, torch.int32).view(batch, -1)
            k, v = (t.view(copies, count, page_size, *t.shape[3:]) for t in (k, v))
        self.calls = Rotation(calls=tuple(functools.partial(self._call, *each) for each in zip(k, v, strict=True)))

    def _call(self, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        out: torch.Tensor = flashgen.attention_with_kvcache(
            self._q,
            k,
            v,
            cache_seqlens=self._lengths,
            page_table=self._page_table,
            mask=self._mask,
            layout="bshd",
        )
        return out

    def use(self, lengths: Sequence[int]) -> None:
        """Change the lengths in place."""
        self._lengths.copy_(torch.tensor(lengths, dtype=torch.int32))


def main() -> None:
    """Run the command."""
    options = _options()
    problem = parse_problem(options.shape)
    wrong = [size for size in options.page_sizes if size < 1 or problem.shape.seqlen_k % size]
    if wrong:
        raise SystemExit(f"--page-sizes must divide sk={problem.shape.seqlen_k}, got {', '.join(map(str, wrong))}")
    device = torch.device(options.device)
    copied_tbps = _copy_tbps(device, options.copy_mib)
    with torch.no_grad():
        figures = _measured(problem, options, device, copied_tbps)
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else "no GPU"
    if options.json:
        print_json(
            {
                "shape": options.shape,
                "device": name,
                "copy_tbps": copied_tbps,
                "figures": [dataclasses.asdict(figure) for figure in figures],
            }
        )
        return
    columns = (f"{options.shape}, {name}, copy {copied_tbps:.2f} TB/s", "cache", "keys", "us", "anew us", "of bound")
    rows = [
        (f.lengths, f.cache, f"{f.keys}", f"{f.us:.1f}", f"{f.anew_us:.1f}", f"{f.bound_us / f.us:.1%}")
        for f in figures
    ]
    print_table(columns, rows, numeric=columns[2:])


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", default=SHAPE, help=f"sk is the longest sequence; default: {SHAPE}")
    parser.add_argument("--short", type=int, default=1024, help="keys of the others, and the median of what is drawn")
    parser.add_argument("--draws", type=int, default=8, help="batches of random lengths")
    parser.add_argument("--page-sizes", type=_numbers, default=(16, 256), help="separated by commas; default: 16,256")
    parser.add_argument("--copy-mib", type=int, default=2048, help="size of the copy")
    parser.add_argument("--target-ms", type=float, default=50.0, help="to time each call for")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--json", action="store_true")
    return parser.parse_args()


def _numbers(text: str) -> tuple[int, ...]:
    return tuple(int(word) for word in text.split(",") if word)


def _clock(device: torch.device) -> Clock:
    """Return a clock that has captured nothing yet."""
    return GraphClock(device) if device.type == "cuda" else HostClock()


def _copy_tbps(device: torch.device, mib: int) -> float:
    """Return what a kernel that copies so many MiB moves, read and written, in TB/s."""
    source = torch.zeros(mib << 18, dtype=torch.float32, device=device)
    copy = torch.empty_like(source)
    # Not copy_: the driver's own copy, which a graph replays, moves less.
    us = statistics.median(_clock(device).samples_us(lambda: torch.neg(source, out=copy), _COPIES))
    return 8 * source.numel() / us * 1e-6


def _batches(batch: int, longest: int, short: int, draws: int) -> Mapping[str, tuple[int, ...]]:
    """Return the lengths of the sequences of each batch that is measured, by name."""
    found = {"all alike": (longest,) * batch, f"one of {longest}": (longest, *(short,) * (batch - 1))}
    for seed in range(draws):
        chance = random.Random(seed)
        drawn = (round(chance.lognormvariate(math.log(short), _SPREAD)) for _ in range(batch))
        found[f"lognormal {seed}"] = tuple(min(max(1, length), longest) for length in drawn)
    return found


def _measured(problem: Problem, options: argparse.Namespace, device: torch.device, copied_tbps: float) -> list[Figure]:
    spec, shape = problem.spec, problem.shape
    mixes = _batches(shape.batch, shape.seqlen_k, options.short, options.draws)
    row_bytes = shape.nheads_kv * (spec.head_dim_qk + spec.head_dim_v) * spec.dtype.itemsize
    fewest_bytes = min(map(sum, mixes.values())) * row_bytes
    copies = rotation_size(fewest_bytes, device) if device.type == "cuda" else 1
    chance = torch.Generator(device).manual_seed(0)

    def drawn(*sizes: int) -> torch.Tensor:
        return torch.randn(sizes, dtype=getattr(torch, spec.dtype.torch_name), device=device, generator=chance)

    q = drawn(shape.batch, shape.seqlen_q, shape.nheads_q, spec.head_dim_qk)
    k = drawn(copies, shape.batch, shape.seqlen_k, shape.nheads_kv, spec.head_dim_qk)
    v = drawn(copies, shape.batch, shape.seqlen_k, shape.nheads_kv, spec.head_dim_v)
    caches = [Cache(problem, q, k, v, page_size) for page_size in (0, *options.page_sizes)]
    calls = {cache.name: cache.calls for cache in caches}
    kept = _clock(device)
    for call in calls.values():
        kept.samples_us(call, 1)

    figures = []
    for name, lengths in mixes.items():
        for cache in caches:
            cache.use(lengths)
        timings, anew = (
            benchmark(calls, clock=clock, rounds=_ROUNDS, target_ms=options.target_ms)
            for clock in (kept, _clock(device))
        )
        figures += [
            Figure(
                lengths=name,
                cache=cache,
                keys=sum(lengths),
                us=timings[cache].median_us,
                anew_us=anew[cache].median_us,
                bound_us=sum(lengths) * row_bytes / copied_tbps * 1e-6,
            )
            for cache in calls
        ]
    return figures


if __name__ == "__main__":
    main()
