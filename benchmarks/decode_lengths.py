"""Decoding where sequences differ in length: `python benchmarks/decode_lengths.py`.

Batches of one long sequence among short ones, and of lengths drawn from a lognormal distribution. What bounds a call is
reading the keys and values in use, at the bandwidth that a large copy reaches on this machine. Caches in one piece and
in pages, which lie in no order. The graph of a cache is captured once, with lengths that are all alike; each batch then
changes them in place. That of `anew us` was captured with the batch's own.

Times are medians of CUDA graph replays on a cold L2 cache, in interleaved rounds. Without a GPU calls are timed as they
are, by the host's clock: nothing but that they run can be learned from it.
"""

from __future__ import annotations

import argparse
import dataclasses
import math
import random
import statistics
from collections.abc import Callable, Mapping, Sequence

import torch

import flashgen
from flashgen.cli.output import print_json, print_table
from flashgen.measure import Clock, CudaClock, HostClock, benchmark
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
    """A cache of one kind, the lengths in it, and calls over them."""

    def __init__(self, problem: Problem, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, page_size: int) -> None:
        """Take K and V of [batch, seqlen_k, heads, head_dim] as they are, or as pages in an order of their own."""
        self.name = f"pages of {page_size}" if page_size else "contiguous"
        self.mask, self.q, self.page_table = problem.spec.mask, q, None
        self.lengths = torch.full(k.shape[:1], k.shape[1] // 2, dtype=torch.int32, device=q.device)
        if page_size:
            count = k.shape[0] * k.shape[1] // page_size
            order = torch.randperm(count, generator=torch.Generator().manual_seed(0))
            self.page_table = order.to(q.device, torch.int32).view(k.shape[0], -1)
            k, v = (t.view(count, page_size, *t.shape[2:]) for t in (k, v))
        self.k, self.v = k, v
        self.replay = self.captured()

    def call(self) -> torch.Tensor:
        """Return attention over the keys in use."""
        out: torch.Tensor = flashgen.attention_with_kvcache(
            self.q,
            self.k,
            self.v,
            cache_seqlens=self.lengths,
            page_table=self.page_table,
            mask=self.mask,
            layout="bshd",
        )
        return out

    def captured(self) -> Callable[[], torch.Tensor]:
        """Return what replays a CUDA graph of the call; the call itself where there is no GPU."""
        if not self.q.is_cuda:
            return self.call
        # Compiles what is to be compiled.
        self.call()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            out = self.call()

        def replay() -> torch.Tensor:
            graph.replay()
            return out

        return replay

    def use(self, lengths: Sequence[int]) -> None:
        """Change the lengths in place.

        Raises:
            SystemExit: if a replay then gives something else than a call.
        """
        self.lengths.copy_(torch.tensor(lengths, dtype=torch.int32))
        torch.testing.assert_close(self.replay(), self.call(), msg=lambda said: f"{self.name}: a stale graph: {said}")


def main() -> None:
    """Run the command."""
    options = _options()
    problem = parse_problem(options.shape)
    wrong = [size for size in options.page_sizes if size < 1 or problem.shape.seqlen_k % size]
    if wrong:
        raise SystemExit(f"--page-sizes must divide sk={problem.shape.seqlen_k}, got {', '.join(map(str, wrong))}")
    device = torch.device(options.device)
    clock: Clock = CudaClock(device) if device.type == "cuda" else HostClock()
    copied_tbps = copy_tbps(clock, device, options.copy_mib)
    with torch.no_grad():
        figures = _measured(problem, options, device, clock, copied_tbps)
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


def copy_tbps(clock: Clock, device: torch.device, mib: int) -> float:
    """Return what copying so many MiB moves, read and written, in TB/s."""
    source = torch.zeros(mib << 20, dtype=torch.uint8, device=device)
    copy = torch.empty_like(source)
    us = statistics.median(clock.samples_us(lambda: copy.copy_(source), _COPIES))
    return 2 * source.numel() / us * 1e-6


def batches(batch: int, longest: int, short: int, draws: int) -> Mapping[str, tuple[int, ...]]:
    """Return the lengths of the sequences of each batch that is measured, by name."""
    found = {"all alike": (longest,) * batch, f"one of {longest}": (longest, *(short,) * (batch - 1))}
    for seed in range(draws):
        chance = random.Random(seed)
        drawn = (round(chance.lognormvariate(math.log(short), _SPREAD)) for _ in range(batch))
        found[f"lognormal {seed}"] = tuple(min(max(1, length), longest) for length in drawn)
    return found


def _measured(
    problem: Problem, options: argparse.Namespace, device: torch.device, clock: Clock, copied_tbps: float
) -> list[Figure]:
    spec, shape = problem.spec, problem.shape
    chance = torch.Generator(device).manual_seed(0)

    def drawn(seqlen: int, heads: int, dim: int) -> torch.Tensor:
        sizes = (shape.batch, seqlen, heads, dim)
        return torch.randn(sizes, dtype=getattr(torch, spec.dtype.torch_name), device=device, generator=chance)

    q = drawn(shape.seqlen_q, shape.nheads_q, spec.head_dim_qk)
    k = drawn(shape.seqlen_k, shape.nheads_kv, spec.head_dim_qk)
    v = drawn(shape.seqlen_k, shape.nheads_kv, spec.head_dim_v)
    caches = [Cache(problem, q, k, v, page_size) for page_size in (0, *options.page_sizes)]
    row_bytes = shape.nheads_kv * (spec.head_dim_qk + spec.head_dim_v) * spec.dtype.itemsize
    figures = []
    for name, lengths in batches(shape.batch, shape.seqlen_k, options.short, options.draws).items():
        candidates: dict[str, Callable[[], object]] = {}
        for cache in caches:
            cache.use(lengths)
            candidates |= {cache.name: cache.replay, f"{cache.name}, anew": cache.captured()}
        timings = benchmark(candidates, clock=clock, rounds=_ROUNDS, target_ms=options.target_ms)
        figures += [
            Figure(
                lengths=name,
                cache=cache.name,
                keys=sum(lengths),
                us=timings[cache.name].median_us,
                anew_us=timings[f"{cache.name}, anew"].median_us,
                bound_us=sum(lengths) * row_bytes / copied_tbps * 1e-6,
            )
            for cache in caches
        ]
    return figures


if __name__ == "__main__":
    main()
