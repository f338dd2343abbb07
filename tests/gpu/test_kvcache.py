"""Decoding on a GPU: accuracy, CUDA graphs whose lengths change, the short way of repeated calls, torch.compile."""

from __future__ import annotations

import contextlib
import dataclasses
import typing

import pytest
import torch

import flashgen
from flashgen.errors import FlashgenError, InputError
from flashgen.measure import CacheOracle, Oracle, random_decode_call
from flashgen.ops import kvcache_calls, run_decode_call
from flashgen.ops.call import Layout
from flashgen.spec import parse_problem

pytestmark = pytest.mark.gpu

SIZES = "b=5 hq=8 hkv=2 sk=700 decode"
FEATURES = [
    "sq=1 d=128 full bf16 lse",
    "sq=4 d=64 causal fp16 lse append page=16 rotary=halves",
    "sq=4 d=128 causal fp16 lse append page=16 rotary=halves rotary_fp32",
    "sq=3 d=128 sliding_window(100,0) bf16 append rotary=pairs leftpad batch_idx lse",
    "sq=2 d=80 causal fp16 alibi sinks softcap leftpad",
    "sq=1 d=128 full bf16 fp8_kv descale page=256 lse",
    "sq=17 d=256 causal bf16 page=7 append",
    "sq=1 d=192 dv=128 full bf16 lse",
    "sq=1 d=576 dv=512 full bf16 shared_kv lse",
    "sq=200 d=64 causal bf16 append page=64",
    "sq=200 d=128 causal bf16 lse",
    "sq=70 d=64 sliding_window(100,0) fp16 sinks alibi page=128 lse",
    "sq=2 d=32 causal fp32 append lse",
]


@contextlib.contextmanager
def poisoned() -> typing.Iterator[None]:
    """Let PyTorch fill what `empty` gives with NaN."""
    before = torch.are_deterministic_algorithms_enabled(), torch.is_deterministic_algorithms_warn_only_enabled()
    torch.use_deterministic_algorithms(True)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(before[0], warn_only=before[1])


@pytest.mark.parametrize("words", FEATURES)
@pytest.mark.parametrize("splits", [0, 1, 5, 32])
def test_accuracy(words: str, splits: int) -> None:
    layout: Layout = "bshd" if splits % 2 else "bhsd"
    problem = parse_problem(f"{SIZES} {words}")
    call = random_decode_call(problem, device="cuda", seed=splits, ragged=True, layout=layout)
    call = dataclasses.replace(call, extras=dataclasses.replace(call.extras, num_splits=splits))
    oracle = Oracle(call.q, call.k, call.v, spec=problem.spec, extras=call.extras)
    caches = CacheOracle(call)
    # Twice: what is appended is the same, and counters of the first launch must be back at zero.
    for _ in range(2):
        with poisoned():
            out, lse = run_decode_call(call, layout=layout)
        report = oracle.judge(out.transpose(1, 2) if layout == "bshd" else out, lse)
        assert report.ok, report.reason
        assert not caches.fault()


Given = tuple[torch.Tensor, torch.Tensor, torch.Tensor]


def given(*, seqlen_q: int = 1, rows: int = 512, dim: int = 64, seed: int = 0) -> Given:
    generator = torch.Generator(device="cuda").manual_seed(seed)

    def normal(*sizes: int) -> torch.Tensor:
        return torch.randn(sizes, generator=generator, device="cuda", dtype=torch.bfloat16)

    return normal(3, seqlen_q, 8, dim), normal(3, rows, 2, dim), normal(3, rows, 2, dim)


def lengths(*numbers: int) -> torch.Tensor:
    return torch.tensor(numbers, dtype=torch.int32, device="cuda")


def new(seed: int) -> dict[str, torch.Tensor]:
    generator = torch.Generator(device="cuda").manual_seed(seed)
    return {name: torch.randn(3, 1, 2, 64, generator=generator, device="cuda", dtype=torch.bfloat16) for name in "kv"}


def test_graph_replays_with_lengths_that_change() -> None:
    q, k, v = given()
    used, added = lengths(1, 100, 400), new(1)
    mine = k.clone(), v.clone()
    flashgen.attention_with_kvcache(q, *mine, **added, cache_seqlens=used, causal=True, return_lse=True)
    torch.cuda.synchronize()
    for cache, fresh in zip(mine, (k, v), strict=True):
        cache.copy_(fresh)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out, lse = flashgen.attention_with_kvcache(q, *mine, **added, cache_seqlens=used, causal=True, return_lse=True)
    for step, numbers in enumerate([(0, 0, 0), (511, 3, 64), (2, 511, 511), (300, 300, 1)]):
        used.copy_(lengths(*numbers))
        for name, fresh in new(step + 10).items():
            added[name].copy_(fresh)
        q.copy_(given(seed=step + 20)[0])
        graph.replay()
        want, want_lse = flashgen.attention_with_kvcache(
            q, k, v, **added, cache_seqlens=used, causal=True, return_lse=True
        )
        torch.testing.assert_close(out, want)
        torch.testing.assert_close(lse, want_lse)
        assert torch.equal(mine[0], k)
        assert torch.equal(mine[1], v)


def test_graph_replays_with_pages_that_change() -> None:
    q, k, v = given(rows=16)
    k, v = (t.repeat(30, 1, 1, 1) + torch.rand(90, 1, 1, 1, device="cuda").bfloat16() for t in (k, v))
    table, used = torch.randperm(90, device="cuda", dtype=torch.int32).view(3, 30), lengths(480, 17, 200)
    want = flashgen.attention_with_kvcache(q, k, v, cache_seqlens=used, page_table=table)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = flashgen.attention_with_kvcache(q, k, v, cache_seqlens=used, page_table=table)
    graph.replay()
    torch.testing.assert_close(out, want)
    table.copy_(table.flip(1))
    used.copy_(lengths(5, 480, 333))
    graph.replay()
    torch.testing.assert_close(out, flashgen.attention_with_kvcache(q, k, v, cache_seqlens=used, page_table=table))


def test_more_programs_than_run_at_once_do_not_wait_for_each_other() -> None:
    generator = torch.Generator(device="cuda").manual_seed(0)
    q, k, v = (
        torch.randn(8, rows, 16, 64, generator=generator, device="cuda", dtype=torch.float16)
        for rows in (1, 8192, 8192)
    )
    used = torch.arange(1, 9, dtype=torch.int32, device="cuda") * 1024
    whole = flashgen.attention_with_kvcache(q, k, v, cache_seqlens=used, num_splits=1)
    for _ in range(3):
        # 64 parts of each of 128 tiles, where they have so many keys.
        cut = flashgen.attention_with_kvcache(q, k, v, cache_seqlens=used, num_splits=64)
        torch.testing.assert_close(cut, whole, atol=2e-3, rtol=2e-3)


def test_launches_on_two_streams_at_once() -> None:
    calls = [given(rows=20_000, seed=seed) for seed in range(2)]
    used = lengths(20_000, 300, 9000)
    wanted = [flashgen.attention_with_kvcache(*tensors, cache_seqlens=used) for tensors in calls]
    streams = [torch.cuda.Stream() for _ in calls]
    torch.cuda.synchronize()
    found: list[list[torch.Tensor]] = [[], []]
    for _ in range(100):
        for tensors, stream, outs in zip(calls, streams, found, strict=True):
            with torch.cuda.stream(stream):
                outs.append(flashgen.attention_with_kvcache(*tensors, cache_seqlens=used))
    torch.cuda.synchronize()
    # Programs wait for each other, whoever else runs; parts are merged in one order.
    assert all(torch.equal(out, want) for outs, want in zip(found, wanted, strict=True) for out in outs)


def test_a_launch_that_starts_early_reads_what_came_before_and_is_read_after() -> None:
    q, k, v = given(rows=2000)
    used = lengths(2000, 100, 1500)
    queries = [given(seed=seed)[0] for seed in range(8)]
    wanted = [flashgen.attention_with_kvcache(each, k, v, cache_seqlens=used) for each in queries]
    # Writes Q last of all, after some 50 us.
    slow = torch.randn(4096, 4096, device="cuda", dtype=torch.bfloat16)
    torch.cuda.synchronize()
    outs = []
    for each in queries * 10:
        zero = (slow @ slow)[:1, :1].float().clamp(0, 0).bfloat16()
        torch.add(each, zero, out=q)
        out = flashgen.attention_with_kvcache(q, k, v, cache_seqlens=used)
        outs.append(out + 0)
        q.fill_(float("nan"))
        out.fill_(float("nan"))
    assert all(torch.equal(out, want) for out, want in zip(outs, wanted * 10, strict=True))


def test_graph_capture_after_warmup() -> None:
    q, k, v = given(dim=96)
    flashgen.warmup(["b=3 hq=8 hkv=2 sq=1 sk=512 d=96 full bf16 decode"], layout="bshd")
    used = lengths(7, 512, 100)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = flashgen.attention_with_kvcache(q, k, v, cache_seqlens=used)
    graph.replay()
    torch.testing.assert_close(out, flashgen.attention_with_kvcache(q, k, v, cache_seqlens=used))


def test_captures_of_cold_and_of_checked_calls_say_what_to_do() -> None:
    q, k, v = given(dim=24)
    used = lengths(1, 2, 3)
    torch.cuda.synchronize()
    with pytest.raises(FlashgenError, match="warmup"), torch.cuda.graph(torch.cuda.CUDAGraph()):
        flashgen.attention_with_kvcache(q, k, v, cache_seqlens=used)
    flashgen.attention_with_kvcache(q, k, v, cache_seqlens=used, check=True)
    with pytest.raises(InputError, match="check=True"), torch.cuda.graph(torch.cuda.CUDAGraph()):
        flashgen.attention_with_kvcache(q, k, v, cache_seqlens=used, check=True)


def test_repeated_calls_take_the_short_way_and_others_do_not(monkeypatch: pytest.MonkeyPatch) -> None:
    q, k, v = given()
    used = lengths(9, 10, 512)
    kvcache_calls._recent.clear()
    want = flashgen.attention_with_kvcache(q, k, v, cache_seqlens=used)
    flashgen.attention_with_kvcache(q, k, v, cache_seqlens=used)
    long_way = kvcache_calls.decode_arguments
    taken: list[int] = []

    def counted(*args: typing.Any) -> typing.Any:
        taken.append(1)
        return long_way(*args)

    monkeypatch.setattr(kvcache_calls, "decode_arguments", counted)
    assert torch.equal(flashgen.attention_with_kvcache(q, k, v, cache_seqlens=used), want)
    assert not taken
    changed = (
        {"q": q[:, :, :, :32].contiguous(), "k_cache": k[..., :32].contiguous(), "v_cache": v[..., :32].contiguous()},
        {"v_cache": k},
        {"softmax_scale": 0.5},
        {"return_lse": True},
        {"check": True},
        {"cache_seqlens": 9},
        {"num_splits": 2},
    )
    for number, change in enumerate(changed, 1):
        flashgen.attention_with_kvcache(
            **{"q": q, "k_cache": k, "v_cache": v, "cache_seqlens": used, **change}  # type: ignore[call-overload]
        )
        assert len(taken) == number, change


def test_memory_that_is_not_aligned_is_copied_or_refused() -> None:
    q, k, v = given()
    used = lengths(9, 10, 512)
    want = flashgen.attention_with_kvcache(q, k, v, cache_seqlens=used)
    for _ in range(3):
        flashgen.attention_with_kvcache(q, k, v, cache_seqlens=used)
    shifted = torch.empty(q.numel() + 1, device="cuda", dtype=q.dtype)[1:].view(q.shape).copy_(q)
    assert torch.equal(flashgen.attention_with_kvcache(shifted, k, v, cache_seqlens=used), want)
    off = torch.empty(k.numel() + 1, device="cuda", dtype=k.dtype)[1:].view(k.shape).copy_(k)
    with pytest.raises(InputError, match="k_cache must be readable in place"):
        flashgen.attention_with_kvcache(q, off, v, cache_seqlens=used)


def test_compiled_steps() -> None:
    def step(
        q: torch.Tensor, k_cache: torch.Tensor, v_cache: torch.Tensor, used: torch.Tensor, **added: torch.Tensor
    ) -> torch.Tensor:
        return flashgen.attention_with_kvcache(q * 2, k_cache, v_cache, cache_seqlens=used, causal=True, **added) + 1

    compiled = torch.compile(step, fullgraph=True)
    q, k, v = given()
    mine = k.clone(), v.clone()
    with torch.no_grad():
        for number, used in enumerate((lengths(0, 5, 100), lengths(1, 6, 101))):
            added = new(number)
            torch.testing.assert_close(compiled(q, *mine, used, **added), step(q, k, v, used, **added))
            assert torch.equal(mine[0], k)
            assert torch.equal(mine[1], v)


@pytest.mark.parametrize("appends", [False, True])
def test_opcheck(appends: bool) -> None:
    q, k, v = given()
    used = lengths(9, 10, 300)
    names = "attention_decode_append" if appends else "attention_decode"
    tensors = [*new(0).values()] if appends else []
    rest = (used, *[None] * 9, [], 0, "causal", "", None, 0.0, False, "bshd", True, False, "", "")
    torch.library.opcheck(getattr(torch.ops.flashgen, names).default, (q, k, v, *tensors, *rest))
