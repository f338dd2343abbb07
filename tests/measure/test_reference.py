"""The oracle is compared with PyTorch's own attention."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from flashgen.errors import InputError
from flashgen.measure import attention_reference, reference
from flashgen.spec import Causal, Full, Mask


def tensors(
    nheads_q: int, nheads_kv: int, seqlen_q: int, seqlen_k: int, dtype: torch.dtype = torch.float64
) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)

    def normal(*sizes: int) -> Tensor:
        return torch.randn(sizes, generator=generator, dtype=dtype)

    return (
        normal(2, nheads_q, seqlen_q, 16),
        normal(2, nheads_kv, seqlen_k, 16),
        normal(2, nheads_kv, seqlen_k, 24),
    )


def boolean_mask(mask: Mask, seqlen_q: int, seqlen_k: int) -> Tensor:
    rows = [[bool(mask.sees(i, j, seqlen_q, seqlen_k)) for j in range(seqlen_k)] for i in range(seqlen_q)]
    return torch.tensor(rows)


@pytest.mark.parametrize("mask", [Full(), Causal(), Causal("top_left")], ids=str)
@pytest.mark.parametrize(("seqlen_q", "seqlen_k"), [(1, 1), (7, 7), (5, 19), (19, 5), (33, 1)])
@pytest.mark.parametrize(("nheads_q", "nheads_kv"), [(2, 2), (6, 2), (3, 1)])
def test_agrees_with_sdpa(mask: Mask, seqlen_q: int, seqlen_k: int, nheads_q: int, nheads_kv: int) -> None:
    q, k, v = tensors(nheads_q, nheads_kv, seqlen_q, seqlen_k)
    out, lse = attention_reference(q, k, v, mask=mask, softmax_scale=0.3, precision="float64")
    seen = boolean_mask(mask, seqlen_q, seqlen_k)
    expected = F.scaled_dot_product_attention(q, k, v, attn_mask=seen, scale=0.3, enable_gqa=True)
    alive = seen.any(dim=1)
    torch.testing.assert_close(out[:, :, alive], expected[:, :, alive])
    group = nheads_q // nheads_kv
    scores = (q @ k.repeat_interleave(group, dim=1).transpose(2, 3) * 0.3).masked_fill(~seen, -math.inf)
    torch.testing.assert_close(lse, scores.logsumexp(dim=-1))
    assert (out[:, :, ~alive] == 0).all()
    assert (lse[:, :, ~alive] == -math.inf).all()
    assert out.dtype == lse.dtype == torch.float64


def test_rows_that_see_nothing_are_zero_at_input_precision() -> None:
    q, k, v = tensors(2, 1, 9, 4, torch.bfloat16)
    out, lse = attention_reference(q, k, v, mask=Causal(), softmax_scale=0.25, precision="input")
    assert out.dtype == torch.bfloat16
    assert lse.dtype == torch.float32
    assert (out[:, :, :5] == 0).all()
    assert (lse[:, :, :5] == -math.inf).all()
    assert out.isfinite().all()
    assert lse[:, :, 5:].isfinite().all()


@pytest.mark.parametrize("precision", ["float64", "input"])
@pytest.mark.parametrize(("seqlen_q", "seqlen_k"), [(5, 0), (0, 5), (0, 0)])
def test_empty_lengths(precision: reference.Precision, seqlen_q: int, seqlen_k: int) -> None:
    q, k, v = tensors(2, 2, seqlen_q, seqlen_k, torch.float16)
    out, lse = attention_reference(q, k, v, mask=Causal(), softmax_scale=0.25, precision=precision)
    assert out.shape == (2, 2, seqlen_q, 24)
    assert (out == 0).all()
    assert lse.shape == (2, 2, seqlen_q)
    assert (lse == -math.inf).all()


@pytest.mark.parametrize("precision", ["float64", "input"])
def test_chunks_of_rows_change_nothing(precision: reference.Precision, monkeypatch: pytest.MonkeyPatch) -> None:
    q, k, v = tensors(4, 2, 29, 23, torch.float32)
    whole = attention_reference(q, k, v, mask=Causal(), softmax_scale=0.25, precision=precision)
    monkeypatch.setattr(reference, "MAX_SCORE_ELEMENTS", 4 * 23 * 3)
    parts = attention_reference(q, k, v, mask=Causal(), softmax_scale=0.25, precision=precision)
    torch.testing.assert_close(parts[0], whole[0])
    torch.testing.assert_close(parts[1], whole[1])


def test_any_strides() -> None:
    q, k, v = tensors(4, 2, 9, 11)
    strided = [x.transpose(1, 2).contiguous().transpose(1, 2) for x in (q, k, v)]
    assert not strided[0].is_contiguous()
    expected = attention_reference(q, k, v, mask=Full(), softmax_scale=0.25, precision="float64")
    got = attention_reference(*strided, mask=Full(), softmax_scale=0.25, precision="float64")
    torch.testing.assert_close(got, expected)


def test_input_precision_is_less_exact_but_close() -> None:
    q, k, v = tensors(2, 2, 40, 40, torch.bfloat16)
    exact, _ = attention_reference(q, k, v, mask=Full(), softmax_scale=0.25, precision="float64")
    rounded, _ = attention_reference(q, k, v, mask=Full(), softmax_scale=0.25, precision="input")
    error = (rounded.double() - exact).abs().max().item()
    assert 1e-4 < error < 3e-2


def test_shapes_that_do_not_belong_together() -> None:
    q, k, v = tensors(3, 2, 4, 4)
    with pytest.raises(InputError, match="multiple of nheads_kv"):
        attention_reference(q, k, v, mask=Full(), softmax_scale=1.0, precision="float64")
    with pytest.raises(InputError, match="key length"):
        attention_reference(q[:, :2], k, v[:, :, :3], mask=Full(), softmax_scale=1.0, precision="float64")
    with pytest.raises(InputError, match="head_dim"):
        attention_reference(q[0], k, v, mask=Full(), softmax_scale=1.0, precision="float64")
