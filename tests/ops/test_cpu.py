"""CPU tensors: eager PyTorch, the same meaning as the kernels."""

from __future__ import annotations

import logging
import typing

import pytest
import torch

import flashgen
from flashgen.measure import attention_reference
from flashgen.spec import AttentionSpec, Extras, causal, full, parse_dtype
from flashgen.spec.masks import Mask

Layout = typing.Literal["bhsd", "bshd"]


def tensors(
    layout: Layout = "bhsd", dtype: torch.dtype = torch.float16, lengths: tuple[int, int] = (10, 12), batch: int = 2
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)

    def normal(heads: int, seqlen: int, dim: int) -> torch.Tensor:
        rows = (heads, seqlen) if layout == "bhsd" else (seqlen, heads)
        return torch.randn(batch, *rows, dim, generator=generator).to(dtype)

    return normal(6, lengths[0], 40), normal(2, lengths[1], 40), normal(2, lengths[1], 24)


def reference(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, mask: Mask, scale: float, layout: Layout
) -> tuple[torch.Tensor, torch.Tensor]:
    q, k, v = (t if layout == "bhsd" else t.transpose(1, 2) for t in (q, k, v))
    spec = AttentionSpec(
        dtype=parse_dtype(str(q.dtype)), head_dim_qk=q.shape[3], head_dim_v=v.shape[3], mask=mask, lse=True
    )
    out, lse = attention_reference(q, k, v, spec=spec, extras=Extras(softmax_scale=scale), precision="input")
    return (out if layout == "bhsd" else out.transpose(1, 2)), lse


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize("layout", ["bhsd", "bshd"])
@pytest.mark.parametrize("mask", [full(), causal(), causal("top_left")], ids=str)
def test_equals_the_reference(mask: Mask, layout: Layout, dtype: torch.dtype) -> None:
    q, k, v = tensors(layout, dtype)
    want, want_lse = reference(q, k, v, mask, 40**-0.5, layout)
    out, lse = flashgen.attention(q, k, v, mask=mask, layout=layout, return_lse=True)
    assert torch.equal(out, want)
    assert torch.equal(lse, want_lse)
    assert out.dtype == dtype
    assert lse.dtype == torch.float32
    assert out.shape == (*q.shape[:3], 24)
    assert lse.shape == (2, 6, 10)
    assert torch.equal(flashgen.attention(q, k, v, mask=mask, layout=layout), out)


def test_masks_and_their_short_form() -> None:
    q, k, v = tensors()
    assert torch.equal(flashgen.attention(q, k, v, causal=True), flashgen.attention(q, k, v, mask=causal()))
    assert torch.equal(
        flashgen.attention(q, k, v, causal=True, mask=full()), flashgen.attention(q, k, v, mask=causal())
    )
    assert not torch.equal(flashgen.attention(q, k, v, causal=True), flashgen.attention(q, k, v))


def test_agrees_with_torch() -> None:
    q, k, v = tensors(dtype=torch.float32)
    sdpa = torch.nn.functional.scaled_dot_product_attention
    torch.testing.assert_close(flashgen.attention(q, k, v), sdpa(q, k, v, enable_gqa=True))
    # PyTorch aligns to the top left.
    out = flashgen.attention(q, k, v, mask=causal("top_left"))
    torch.testing.assert_close(out, sdpa(q, k, v, is_causal=True, enable_gqa=True))


@pytest.mark.parametrize("scale", [-0.4, 0.0, 1.5])
def test_any_scale(scale: float) -> None:
    q, k, v = tensors(dtype=torch.float32)
    out, lse = flashgen.attention(q, k, v, softmax_scale=scale, causal=True, return_lse=True)
    want, want_lse = reference(q, k, v, causal(), scale, "bhsd")
    assert torch.equal(out, want)
    assert torch.equal(lse, want_lse)


def test_scale_zero_is_the_mean() -> None:
    q, k, v = tensors(dtype=torch.float32)
    out, lse = flashgen.attention(q, k, v, softmax_scale=0, return_lse=True)
    torch.testing.assert_close(out[:, :3], v[:, :1].mean(2, keepdim=True).expand(-1, 3, 10, -1))
    torch.testing.assert_close(lse, torch.full_like(lse, 12.0).log())


@pytest.mark.parametrize("layout", ["bhsd", "bshd"])
@pytest.mark.parametrize(("lengths", "batch"), [((10, 12), 0), ((0, 12), 2), ((10, 0), 2), ((0, 0), 2), ((0, 0), 0)])
def test_empty(lengths: tuple[int, int], batch: int, layout: Layout) -> None:
    q, k, v = tensors(layout, lengths=lengths, batch=batch)
    for is_causal in (False, True):
        out, lse = flashgen.attention(q, k, v, causal=is_causal, layout=layout, return_lse=True)
        assert out.shape == (*q.shape[:3], 24)
        assert lse.shape == (batch, 6, lengths[0])
        assert bool((out == 0).all())
        assert bool((lse == float("-inf")).all())


def test_rows_that_see_nothing() -> None:
    q, k, v = tensors(lengths=(12, 5))
    out, lse = flashgen.attention(q, k, v, causal=True, return_lse=True)
    assert bool((out[:, :, :7] == 0).all())
    assert bool((lse[:, :, :7] == float("-inf")).all())
    assert bool(lse[:, :, 7:].isfinite().all())


def test_any_strides() -> None:
    q, k, v = tensors(dtype=torch.float32)
    want = flashgen.attention(q, k, v)
    last_is_strided = [t.transpose(2, 3).contiguous().transpose(2, 3) for t in (q, k, v)]
    assert not last_is_strided[0].is_contiguous()
    torch.testing.assert_close(flashgen.attention(*last_is_strided), want)
    one = k[:, :1].expand(-1, 2, -1, -1)
    torch.testing.assert_close(flashgen.attention(q, one, v), flashgen.attention(q, one.contiguous(), v))


@pytest.mark.parametrize("layout", ["bhsd", "bshd"])
def test_outputs_are_fresh_and_contiguous(layout: Layout) -> None:
    q, k, v = (t.transpose(1, 2).contiguous().transpose(1, 2) for t in tensors(layout))
    copies = [t.clone() for t in (q, k, v)]
    out, lse = flashgen.attention(q, k, v, layout=layout, return_lse=True)
    assert out.is_contiguous()
    assert lse.is_contiguous()
    assert not {t.untyped_storage().data_ptr() for t in (q, k, v)} & {out.untyped_storage().data_ptr()}
    assert all(torch.equal(t, copy) for t, copy in zip((q, k, v), copies, strict=True))


def test_says_once_that_it_is_eager(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING, logger="flashgen"):
        for _ in range(3):
            flashgen.attention(*tensors())
    records = [record for record in caplog.records if record.name == "flashgen"]
    assert len(records) == 1
    assert "eager PyTorch" in records[0].getMessage()
    assert "flashgen.interpreting()" in records[0].getMessage()
