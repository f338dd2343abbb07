"""The operators of decoding: their schemas and fakes, and what compilers make of them."""

from __future__ import annotations

import typing

import pytest
import torch
from torch._dynamo.backends.common import aot_autograd
from torch.utils._python_dispatch import TorchDispatchMode

import flashgen
from flashgen.ops.call import Layout

READ = torch.ops.flashgen.attention_decode.default
APPEND = torch.ops.flashgen.attention_decode_append.default
LENGTHS = torch.tensor([3, 9], dtype=torch.int32)
FEATURES: dict[str, dict[str, typing.Any]] = {
    "plain": {},
    "scores": {"causal": True, "softcap": 5.0, "alibi_slopes": torch.ones(6), "sinks": torch.zeros(6)},
    "places": {"cache_batch_idx": torch.tensor([1, 0], dtype=torch.int32), "cache_leftpad": LENGTHS // 3},
    "pages": {"page_table": torch.tensor([[1, 0], [2, 3]], dtype=torch.int32), "num_splits": 3, "check": True},
}
TURN = {"rotary_cos": torch.rand(40, 8), "rotary_sin": torch.rand(40, 8), "rotary_interleaved": True}

Given = tuple[torch.Tensor, torch.Tensor, torch.Tensor]


def given(layout: Layout = "bshd") -> Given:
    generator = torch.Generator().manual_seed(0)
    q = torch.randn(2, 2, 6, 32, generator=generator)
    k, v = (torch.randn(4, 16, 2, 32, generator=generator) for _ in range(2))
    if layout == "bshd":
        return q, k, v
    return q.transpose(1, 2).contiguous(), k.transpose(1, 2).contiguous(), v.transpose(1, 2).contiguous()


def new() -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    return {name: torch.randn(2, 3, 2, 32, generator=generator) for name in "kv"}


def operands(operator: typing.Any, *args: torch.Tensor, **options: typing.Any) -> tuple[typing.Any, ...]:
    """What the operator is called with by a call of the public function."""
    seen: list[tuple[typing.Any, ...]] = []

    class Recorder(TorchDispatchMode):
        def __torch_dispatch__(
            self, func: typing.Any, types: object, args: typing.Any = (), kwargs: typing.Any = None
        ) -> object:
            if func is operator:
                seen.append(args)
            return func(*args, **(kwargs or {}))

    with Recorder():
        flashgen.attention_with_kvcache(*args, **options)
    (call,) = seen
    return call


@pytest.mark.parametrize("lse", [False, True])
@pytest.mark.parametrize("name", FEATURES)
def test_opcheck(name: str, lse: bool) -> None:
    options = {**FEATURES[name], "cache_seqlens": LENGTHS, "return_lse": lse}
    torch.library.opcheck(READ, operands(READ, *given(), **options))


@pytest.mark.parametrize("name", FEATURES)
def test_opcheck_of_what_is_written(name: str) -> None:
    options = {**FEATURES[name], **TURN, **new(), "cache_seqlens": LENGTHS, "return_lse": True}
    torch.library.opcheck(APPEND, operands(APPEND, *given(), **options))


@pytest.mark.parametrize("layout", ["bhsd", "bshd"])
def test_fakes_have_the_strides_of_what_comes(layout: Layout) -> None:
    q, k, v = given(layout)
    options = {"cache_seqlens": LENGTHS, "layout": layout, "return_lse": True}
    out, lse = flashgen.attention_with_kvcache(q, k, v, **options)
    meta = (t.to("meta") for t in (q, k, v))
    fake, fake_lse = flashgen.attention_with_kvcache(*meta, **{**options, "cache_seqlens": LENGTHS.to("meta")})
    assert (fake.shape, fake.stride(), fake.dtype) == (out.shape, out.stride(), out.dtype)
    assert (fake_lse.shape, fake_lse.stride(), fake_lse.dtype) == (lse.shape, lse.stride(), lse.dtype)


@pytest.mark.parametrize("name", FEATURES)
def test_a_step_compiles_to_one_graph(name: str) -> None:
    def step(
        q: torch.Tensor, k_cache: torch.Tensor, v_cache: torch.Tensor, lengths: torch.Tensor, **added: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        out, lse = flashgen.attention_with_kvcache(
            q * 2, k_cache, v_cache, cache_seqlens=lengths, return_lse=True, **added, **TURN, **FEATURES[name]
        )
        return out + 1, lse + k_cache.sum()

    compiled = torch.compile(step, backend="aot_eager", fullgraph=True)
    q, k, v = given()
    mine = q, k.clone(), v.clone()
    for lengths in (LENGTHS, LENGTHS - 2):
        for got, want in zip(compiled(*mine, lengths, **new()), step(q, k, v, lengths, **new()), strict=True):
            torch.testing.assert_close(got, want)
        assert torch.equal(mine[1], k)
        assert torch.equal(mine[2], v)


def test_a_length_that_changes_compiles_once_more_at_most() -> None:
    counter = torch._dynamo.testing.CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(flashgen.attention_with_kvcache, backend=counter, fullgraph=True)
    q, k, v = given()
    for length in range(3, 8):
        got = compiled(q, k, v, cache_seqlens=length, causal=True)
        torch.testing.assert_close(got, flashgen.attention_with_kvcache(q, k, v, cache_seqlens=length, causal=True))
    assert counter.frame_count <= 2


@pytest.mark.parametrize("appends", [False, True])
def test_only_what_is_written_to_is_functionalized(appends: bool) -> None:
    graphs: list[str] = []

    def keep(module: torch.fx.GraphModule, inputs: typing.Sequence[torch.Tensor]) -> typing.Any:
        graphs.append(str(module.graph))
        return module.forward

    compiled = torch.compile(flashgen.attention_with_kvcache, backend=aot_autograd(fw_compiler=keep), fullgraph=True)
    q, k, v = given()
    with torch.no_grad():
        compiled(q, k, v, cache_seqlens=LENGTHS, **(new() if appends else {}))
    (graph,) = graphs
    assert "attention_decode" in graph
    assert ("auto_functionalized" in graph) == appends
    assert ("attention_decode_append" in graph) == appends
