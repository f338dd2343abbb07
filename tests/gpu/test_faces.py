"""Other people's functions on a GPU: PyTorch's SDPA, its flash attention hook, FlashAttention's names."""

from __future__ import annotations

import collections
import inspect
import itertools
import typing
from collections.abc import Callable, Iterator

import pytest
import torch
from torch.nn import functional
from torch.nn.attention import SDPBackend, sdpa_kernel

import flashgen.integrations
from flashgen.compat import flash_attn
from flashgen.dispatch import RUNGS
from flashgen.errors import FlashgenError
from flashgen.integrations import torch_flash
from flashgen.integrations.sdpa import scaled_dot_product_attention

pytestmark = pytest.mark.gpu

# Of FlashAttention's rule: twice the error of plain PyTorch at the same precision, and an ulp.
TINY = {torch.float16: 2.0**-10, torch.bfloat16: 2.0**-7, torch.float32: 2.0**-19}


@pytest.fixture(autouse=True)
def _plain_pytorch() -> Iterator[None]:
    """The same random numbers for every test, and a math backend that computes 16-bit inputs in 16 bits."""
    torch.manual_seed(0)
    before = torch.backends.cuda.fp16_bf16_reduction_math_sdp_allowed()
    torch.backends.cuda.allow_fp16_bf16_reduction_math_sdp(True)
    yield
    torch.backends.cuda.allow_fp16_bf16_reduction_math_sdp(before)


def randn(*sizes: int, dtype: torch.dtype = torch.bfloat16) -> torch.Tensor:
    return torch.randn(sizes, device="cuda", dtype=dtype)


def check(got: torch.Tensor, plain: torch.Tensor, wanted: torch.Tensor) -> None:
    assert got.shape == wanted.shape
    error, allowed = ((t.double() - wanted).abs().max().item() if t.numel() else 0.0 for t in (got, plain))
    largest = wanted.abs().max().item() if wanted.numel() else 0.0
    assert error <= 2 * allowed + TINY[got.dtype] * largest, f"off by {error}, plain PyTorch by {allowed}"


def check_sdpa(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, **options: typing.Any) -> None:
    out = scaled_dot_product_attention(q, k, v, **options)
    mask = options.get("attn_mask")
    exact = dict(options)
    if mask is not None and mask.is_floating_point():
        exact["attn_mask"] = mask.double()
    with sdpa_kernel(SDPBackend.MATH):
        wanted = functional.scaled_dot_product_attention(q.double(), k.double(), v.double(), **exact)
        plain = functional.scaled_dot_product_attention(q, k, v, **options)
    assert out.dtype == q.dtype
    check(out, plain, wanted)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_pytorchs_own_sample_inputs(dtype: torch.dtype, record_property: Callable[[str, object], None]) -> None:
    pytest.importorskip("expecttest")  # PyTorch's test suite needs it
    from torch.testing._internal.common_methods_invocations import sample_inputs_scaled_dot_product_attention

    counts: collections.Counter[str] = collections.Counter()
    for sample in sample_inputs_scaled_dot_product_attention(None, "cuda", dtype, False):
        q, (k, v), options = sample.input, sample.args, sample.kwargs
        if dtype == torch.float64:
            with pytest.raises(FlashgenError):
                scaled_dot_product_attention(q, k, v, **options)
            counts["refused: no kernel has float64"] += 1
        elif options["dropout_p"] > 0:
            # PyTorch's random numbers are others: the same seed gives the same output, of the right shape.
            outs = []
            for _ in range(2):
                torch.manual_seed(1)
                outs.append(scaled_dot_product_attention(q, k, v, **options))
            assert torch.equal(*outs)
            assert outs[0].shape == functional.scaled_dot_product_attention(q, k, v, **options).shape
            counts["reproducible alone: random numbers differ"] += 1
        else:
            check_sdpa(q, k, v, **options)
            counts["compared"] += 1
    record_property(str(dtype), dict(counts))
    assert sum(counts.values()) >= 25


SHAPES = {
    "self": ((2, 4, 300, 64), (2, 4, 300, 64), (2, 4, 300, 64)),
    "cross": ((2, 4, 130, 64), (2, 4, 257, 64), (2, 4, 257, 64)),
    "more queries": ((2, 4, 257, 64), (2, 4, 130, 64), (2, 4, 130, 64)),
    "odd head_dim": ((2, 4, 130, 59), (2, 4, 257, 59), (2, 4, 257, 111)),
    "5-D": ((2, 3, 2, 130, 64), (2, 1, 2, 257, 64), (1, 3, 2, 257, 64)),
    "3-D": ((4, 130, 64), (4, 257, 64), (4, 257, 64)),
    "key head shared": ((2, 4, 130, 64), (2, 1, 257, 64), (2, 1, 257, 64)),
}


@pytest.mark.parametrize("options", [{}, {"is_causal": True}, {"scale": 0.3}], ids=["plain", "causal", "scale"])
@pytest.mark.parametrize("sizes", SHAPES.values(), ids=SHAPES.keys())
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_sdpa(dtype: torch.dtype, sizes: tuple[tuple[int, ...], ...], options: dict[str, typing.Any]) -> None:
    q, k, v = (randn(*size, dtype=dtype) for size in sizes)
    check_sdpa(q, k, v, **options)


@pytest.mark.parametrize("size", [(130, 257), (1, 257), (130, 1), (4, 130, 257), (2, 1, 1, 257), (2, 4, 130, 257)])
@pytest.mark.parametrize("kind", ["bool", "bfloat16", "float32"])
def test_sdpa_masks(size: tuple[int, ...], kind: str) -> None:
    q, k, v = randn(2, 4, 130, 64), randn(2, 4, 257, 64), randn(2, 4, 257, 64)
    mask = randn(*size) > 0 if kind == "bool" else randn(*size, dtype=getattr(torch, kind))
    check_sdpa(q, k, v, attn_mask=mask)


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("head_dim", [64, 59])
def test_flash_attn(head_dim: int, causal: bool) -> None:
    q, k, v = randn(2, 130, 4, head_dim), randn(2, 257, 2, head_dim), randn(2, 257, 2, head_dim)
    out, lse, dmask = flash_attn.flash_attn_func(q, k, v, 0.2, causal=causal, return_attn_probs=True)
    kept = dmask[:, :, :130, :257] >= 0
    outs = []
    for dtype in (torch.bfloat16, torch.float64):
        queries, keys, values = (t.transpose(1, 2).to(dtype) for t in (q, k, v))
        keys, values = (t.repeat_interleave(2, 1) for t in (keys, values))
        scores = queries @ keys.mT * head_dim**-0.5
        if causal:
            hidden = ~torch.ones(130, 257, dtype=torch.bool, device="cuda").tril(127)
            scores = scores.masked_fill(hidden, -torch.inf)
        weights = scores.softmax(-1).masked_fill(~kept, 0.0) / 0.8
        outs.append((weights @ values).transpose(1, 2))
    check(out, outs[0], outs[1])
    torch.testing.assert_close(lse.double(), scores.logsumexp(-1), rtol=0, atol=1e-2)


def test_flash_attn_varlen_is_each_sequence_alone() -> None:
    lengths_q, lengths_k = (130, 0, 1, 300), (257, 40, 7, 300)
    q, kv = randn(sum(lengths_q), 4, 64), randn(sum(lengths_k), 2, 2, 64)
    ends = [
        torch.tensor([0, *itertools.accumulate(n)], device="cuda", dtype=torch.int32) for n in (lengths_q, lengths_k)
    ]
    out = flash_attn.flash_attn_varlen_kvpacked_func(q, kv, *ends, 300, 300, causal=True, window_size=(100, -1))
    assert isinstance(out, torch.Tensor)
    parts = zip(q.split(lengths_q), kv.split(lengths_k), out.split(lengths_q), strict=True)
    for q_b, kv_b, out_b in parts:
        alone = flash_attn.flash_attn_kvpacked_func(q_b[None], kv_b[None], causal=True, window_size=(100, -1))
        torch.testing.assert_close(out_b, alone[0], rtol=0, atol=2e-2)


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[str]]:
    """flashgen behind PyTorch's flash attention, tuned or not; every call that it runs adds a word."""
    made: list[str] = []

    def counted(function: Callable[..., typing.Any]) -> Callable[..., typing.Any]:
        def call(*args: typing.Any, **options: typing.Any) -> typing.Any:
            made.append(function.__name__)
            return function(*args, **options)

        return call

    for name in ("attention", "attention_varlen"):
        monkeypatch.setattr(torch_flash, name, counted(getattr(torch_flash, name)))
    monkeypatch.setattr(torch_flash, "TUNED", frozenset(RUNGS))
    torch_flash._tuned.clear()
    flashgen.integrations.register_torch_flash()
    torch.nn.attention.activate_flash_attention_impl("flashgen")
    yield made
    torch.nn.attention.restore_flash_attention_impl()
    torch_flash._tuned.clear()


def gradients(
    function: Callable[..., torch.Tensor], dout: torch.Tensor, *inputs: torch.Tensor
) -> tuple[torch.Tensor, ...]:
    """Return the output and the gradients of the inputs."""
    leaves = [t.detach().requires_grad_() for t in inputs]
    out = function(*leaves)
    return out.detach(), *torch.autograd.grad(out, leaves, dout.to(out.dtype))


@pytest.mark.parametrize("order", ["bhsd", "bshd"])
@pytest.mark.parametrize("is_causal", [False, True])
def test_training_through_pytorchs_sdpa(calls: list[str], is_causal: bool, order: str) -> None:
    q, k, v, dout = (randn(2, 4, 256, 64) for _ in range(4))
    if order == "bshd":
        q, k, v = (t.transpose(1, 2).contiguous().transpose(1, 2) for t in (q, k, v))

    def sdpa(*tensors: torch.Tensor) -> torch.Tensor:
        return functional.scaled_dot_product_attention(*tensors, is_causal=is_causal)

    with sdpa_kernel(SDPBackend.FLASH_ATTENTION):
        got = gradients(sdpa, dout, q, k, v)
    assert calls == ["attention"]
    assert got[0].stride() == torch.empty_like(q).stride()
    with sdpa_kernel(SDPBackend.MATH):
        plain = gradients(sdpa, dout, q, k, v)
        wanted = gradients(sdpa, dout, q.double(), k.double(), v.double())
    for mine, other, exact in zip(got, plain, wanted, strict=True):
        check(mine, other, exact)


def test_what_is_not_taken_runs_by_pytorch(calls: list[str]) -> None:
    q, k, v = (randn(2, 4, 256, 64) for _ in range(3))
    with sdpa_kernel(SDPBackend.FLASH_ATTENTION):
        out = functional.scaled_dot_product_attention(q, k, v, dropout_p=0.5)
        torch.nn.attention.restore_flash_attention_impl()
        functional.scaled_dot_product_attention(q, k, v)
    assert out.shape == q.shape
    assert not calls


def varlen_attn(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, ends: torch.Tensor, longest: int) -> torch.Tensor:
    """Return PyTorch's causal varlen_attn, whose word for causal changed between versions."""
    from torch.nn.attention.varlen import varlen_attn as function

    arguments: dict[str, typing.Any] = {"is_causal": True}
    if "window_size" in inspect.signature(function).parameters:
        arguments = {"window_size": (-1, 0)}
    out = function(q, k, v, ends, ends, longest, longest, **arguments)
    assert isinstance(out, torch.Tensor)
    return out


def test_training_through_pytorchs_varlen_attn(calls: list[str]) -> None:
    pytest.importorskip("torch.nn.attention.varlen")
    lengths = (130, 1, 300)
    q, k, v, dout = (randn(sum(lengths), 4, 64) for _ in range(4))
    ends = torch.tensor([0, *itertools.accumulate(lengths)], device="cuda", dtype=torch.int32)
    got = gradients(lambda *t: varlen_attn(*t, ends, 300), dout, q, k, v)
    assert calls == ["attention_varlen"]
    exact: list[tuple[torch.Tensor, ...]] = []
    plain: list[tuple[torch.Tensor, ...]] = []
    for parts in zip(*(t.split(lengths) for t in (dout, q, k, v)), strict=True):
        first, *inputs = (t.transpose(0, 1)[None] for t in parts)
        for results, dtype in ((exact, torch.float64), (plain, torch.bfloat16)):
            with sdpa_kernel(SDPBackend.MATH):
                found = gradients(
                    lambda *t: functional.scaled_dot_product_attention(*t, is_causal=True),
                    first,
                    *(t.to(dtype) for t in inputs),
                )
            results.append(tuple(t[0].transpose(0, 1) for t in found))
    for mine, others, wanted in zip(got, zip(*plain, strict=True), zip(*exact, strict=True), strict=True):
        check(mine, torch.cat(others), torch.cat(wanted))


def test_the_hook_under_compile_and_in_a_graph(calls: list[str]) -> None:
    q, k, v = (randn(2, 4, 256, 64) for _ in range(3))

    def sdpa(*tensors: torch.Tensor) -> torch.Tensor:
        return functional.scaled_dot_product_attention(*tensors, is_causal=True) * 2

    with sdpa_kernel(SDPBackend.FLASH_ATTENTION):
        wanted = sdpa(q, k, v)
        compiled = torch.compile(sdpa, fullgraph=True)(q, k, v)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            captured = sdpa(q, k, v)
    graph.replay()
    torch.cuda.synchronize()
    assert len(calls) == 3
    torch.testing.assert_close(compiled, wanted, rtol=0, atol=2e-2)
    assert torch.equal(captured, wanted)
