"""Tensors of more than 2**31 elements: addresses are 64 bits wide, along every axis."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import pytest
import torch

import flashgen
from flashgen.codegen import TritonForwardConfig
from flashgen.launch import detect_target
from flashgen.measure import Oracle, sampled_heads
from flashgen.spec import AttentionSpec, DType, Extras, causal

pytestmark = pytest.mark.gpu

Check = Callable[..., torch.Tensor]
LIMIT = 2**31
GIB = 2**30


@pytest.fixture(autouse=True)
def _room() -> Iterator[None]:
    torch.cuda.empty_cache()
    free, _ = torch.cuda.mem_get_info()
    if free < 40 * GIB:
        pytest.skip(f"{free / GIB:.0f} GiB of GPU memory are free, of 40 that these tests take")
    yield
    torch.cuda.empty_cache()


def spread(t: torch.Tensor, axis: int) -> torch.Tensor:
    """The same values with the last index of `axis` more than 2**31 elements after the first."""
    step = -(-LIMIT // (t.shape[axis] - 1) // 64) * 64 + 64
    strides = [t.stride(0), t.stride(1), t.stride(2), 1]
    strides[axis] = step
    last = sum((size - 1) * stride for size, stride in zip(t.shape, strides, strict=True))
    assert last > LIMIT
    view = torch.empty(last + 1, dtype=t.dtype, device=t.device).as_strided(t.shape, strides)
    return view.copy_(t)


@pytest.mark.parametrize("loads", ["pointer", "descriptor"])
@pytest.mark.parametrize("axis", [0, 1, 2], ids=["batch", "head", "row"])
@pytest.mark.parametrize("which", ["q", "k", "v"])
def test_strides_past_31_bits(check: Check, which: str, axis: int, loads: str) -> None:
    target = detect_target(torch.device("cuda", torch.cuda.current_device()))
    if loads == "descriptor" and not target.has_tma:
        pytest.skip(f"{target.arch} has no bulk copies")
    config = TritonForwardConfig(block_m=64, block_n=64, num_warps=4, num_stages=2, loads=loads)  # type: ignore[arg-type]
    generator = torch.Generator(device="cuda").manual_seed(0)

    def normal(heads: int, seqlen: int) -> torch.Tensor:
        return torch.randn(2, heads, seqlen, 64, generator=generator, device="cuda", dtype=torch.float16)

    dense = normal(4, 130), normal(2, 203), normal(2, 203)
    q, k, v = (spread(t, axis) if name == which else t for name, t in zip("qkv", dense, strict=True))
    check(q, k, v, causal(), config=config)


def test_dense_queries_and_output() -> None:
    heads, seqlen, dim = 16, 2**20 + 131, 128
    q = torch.randn(1, heads, seqlen, dim, device="cuda", dtype=torch.float16)
    k, v = (torch.randn(1, 2, 100, dim, device="cuda", dtype=torch.float16) for _ in range(2))
    assert q.numel() > LIMIT
    out, lse = flashgen.attention(q, k, v, return_lse=True)
    # Whole heads, each of a million rows: the first, the last and one between.
    spec = AttentionSpec(dtype=DType.FP16, head_dim_qk=dim, head_dim_v=dim, lse=True)
    extras = Extras(softmax_scale=spec.default_scale)
    oracle = Oracle(q, k, v, spec=spec, extras=extras, heads=sampled_heads(1, heads, 3, seed=0))
    report = oracle.judge(out, lse)
    assert report.ok, report.reason


def test_dense_keys() -> None:
    seqlen, dim = 2**24 + 131, 128
    k = torch.randn(1, 1, seqlen, dim, device="cuda", dtype=torch.float16)
    v = torch.randn(1, 1, seqlen, 64, device="cuda", dtype=torch.float16)
    assert k.numel() > LIMIT
    # Row i of Q is a key, which so outweighs all others together: on both sides of element 2**31, and the ends.
    planted = [0, 2**23 + 5, 2**24 - 1, 2**24, seqlen - 1]
    q = k[:, :, planted].clone()
    # Scores of 64 and more beside others of 0 +- 6.
    out, lse = flashgen.attention(q, k, v, softmax_scale=0.5, return_lse=True)
    torch.testing.assert_close(out, v[:, :, planted], atol=2e-3, rtol=2e-3)
    own = (q.double() ** 2).sum(-1) * 0.5
    torch.testing.assert_close(lse.double(), own, atol=1e-2, rtol=1e-3)


def test_packed_queries_and_output() -> None:
    heads, seqlen, dim = 16, 2**19 + 67, 128
    tokens = 2 * seqlen
    q = torch.randn(tokens, heads, dim, device="cuda", dtype=torch.float16)
    k, v = (torch.randn(200, 2, dim, device="cuda", dtype=torch.float16) for _ in range(2))
    assert q.numel() > LIMIT
    starts_q, starts_k = (torch.tensor([0, n // 2, n], device="cuda", dtype=torch.int32) for n in (tokens, 200))
    out, lse = flashgen.attention_varlen(q, k, v, starts_q, starts_k, seqlen, 100, return_lse=True)
    spec = AttentionSpec(dtype=DType.FP16, head_dim_qk=dim, head_dim_v=dim, varlen=True, lse=True)
    extras = Extras(softmax_scale=spec.default_scale, cu_seqlens_q=starts_q, cu_seqlens_k=starts_k)
    report = Oracle(q, k, v, spec=spec, extras=extras, heads=((0, 0), (1, heads - 1))).judge(out, lse)
    assert report.ok, report.reason
