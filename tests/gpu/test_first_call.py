"""The first call of a shipped shape on the GPU, and calls like earlier ones."""

from __future__ import annotations

import typing
from pathlib import Path

import pytest
import torch
import triton

import flashgen
from flashgen.measure import random_inputs
from flashgen.ops import functional, runtime, torch_op
from flashgen.registry import Location, RegistryEntry, load
from flashgen.resources import shipped_registry_dir
from flashgen.spec import parse_problem
from flashgen.tuning.retuning import problem_of

pytestmark = pytest.mark.gpu

PROBLEM = parse_problem("b=2 hq=8 hkv=2 s=512 d=128 causal bf16")


@pytest.fixture(autouse=True)
def _fresh() -> None:
    torch_op._memo.clear()
    torch_op._recent.clear()
    functional._recent.clear()
    runtime._compiled.cache_clear()


def inputs(seed: int = 0) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    return random_inputs(PROBLEM, device="cuda", seed=seed)


def attention(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    return flashgen.attention(q, k, v, causal=True)


def settle(*given: torch.Tensor) -> torch.Tensor:
    """Return the output of the first call, after those that it takes until calls go the short way."""
    q, k, v = given
    outs = [attention(q, k, v) for _ in range(4)]
    assert len(functional._recent._kinds) == 1
    assert all(torch.equal(out, outs[0]) for out in outs)
    return outs[0]


def plain_entries() -> list[RegistryEntry]:
    device = torch.cuda.get_device_name()
    entries = [located.entry for located in load([Location(path=shipped_registry_dir(), label="shipped")]).entries()]
    plain = [
        e for e in entries
        if e.device_name == device and e.spec.phase == "forward" and not e.spec.features and e.spec.mask.by_formula
    ]  # fmt: skip
    if not plain:
        pytest.skip(f"no entry ships for {device}")
    return sorted(plain, key=lambda entry: entry.range.seqlen_q.lo * entry.range.batch.lo)


def test_one_launch_and_no_tuning() -> None:
    entry = plain_entries()[0]
    q, k, v = random_inputs(problem_of(entry), device="cuda", seed=0)
    launched: list[str] = []

    def note(metadata: typing.Any) -> None:
        launched.append(metadata.get()["name"])

    hook = triton.knobs.runtime.launch_enter_hook
    hook.add(note)
    try:
        flashgen.attention(q, k, v, mask=entry.spec.mask, score_mod=entry.spec.score_mod)
    finally:
        hook.remove(note)
    assert launched == ["attn_fwd"]


def test_other_tensors_of_the_kind() -> None:
    with torch.no_grad():
        settle(*inputs())
        given = inputs(1)
        want = flashgen.attention(*given, causal=True, return_lse=True)[0]
        assert torch.equal(attention(*given), want)
        strided = tuple(t.transpose(1, 2).contiguous().transpose(1, 2) for t in given)
        assert torch.equal(attention(*strided), want)
        shifted = tuple(torch.empty(t.numel() + 1, dtype=t.dtype, device="cuda")[1:].view_as(t).copy_(t) for t in given)
        assert torch.equal(attention(*shifted), want)


def test_gradients_and_autocast_go_their_own_way() -> None:
    q, k, v = inputs()
    out = settle(q, k, v)
    leaf = q.detach().requires_grad_()
    attention(leaf, k, v).float().sum().backward()
    assert leaf.grad is not None
    assert bool(leaf.grad.isfinite().all())
    with torch.autocast("cuda", torch.float16):
        assert attention(q, k, v).dtype == torch.float16
    assert torch.equal(attention(q, k, v), out)


def test_another_stream_and_a_graph() -> None:
    q, k, v = inputs()
    with torch.no_grad():
        want = settle(q, k, v)
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            beside = [attention(q, k, v) for _ in range(3)]
        torch.cuda.current_stream().wait_stream(stream)
        assert all(torch.equal(out, want) for out in beside)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            first, second = attention(q, k, v), attention(q, k, v)
        for _ in range(3):
            first.fill_(float("nan"))
            second.fill_(float("nan"))
            graph.replay()
            assert torch.equal(first, want)
            assert torch.equal(second, want)
        assert torch.equal(attention(q, k, v), want)


def test_a_profiler_sees_the_operator() -> None:
    q, k, v = inputs()
    with torch.no_grad():
        settle(q, k, v)
        with torch.profiler.profile() as profile:
            attention(q, k, v)
    assert "flashgen::attention_forward" in {event.name for event in profile.events()}


def test_files_of_an_earlier_process_launch(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FLASHGEN_CACHE", str(tmp_path))
    given = inputs()
    want = attention(*given)
    if not [*tmp_path.glob("binaries/*")]:
        pytest.skip("flashgen's files changed after this process loaded them: nothing is kept")
    torch_op._memo.clear()
    runtime._compiled.cache_clear()
    with monkeypatch.context() as patch:
        patch.setattr("flashgen.compile.compiler.triton_compile", None)
        assert torch.equal(attention(*given), want)
