"""FlashAttention's functions by their own names: signatures, results, and what is not there yet."""

from __future__ import annotations

import inspect
import itertools
import math

import pytest
import torch

import flashgen
from flashgen.compat import flash_attn
from flashgen.compat.flash_attn import (
    flash_attn_func,
    flash_attn_kvpacked_func,
    flash_attn_qkvpacked_func,
    flash_attn_varlen_func,
    flash_attn_varlen_kvpacked_func,
    flash_attn_varlen_qkvpacked_func,
)
from flashgen.errors import InputError, UnsupportedError


@pytest.fixture(autouse=True)
def _same_numbers() -> None:
    torch.manual_seed(0)


def attend(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    *,
    causal: bool = False,
    window_size: tuple[int, int] = (-1, -1),
    softcap: float = 0.0,
    slopes: torch.Tensor | None = None,
    scale: float | None = None,
    factors: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return out [seqlen_q, nheads, head_dim] and lse [nheads, seqlen_q] of one sequence in float64.

    `slopes` are [nheads]; `factors` [nheads, seqlen_q, seqlen_k] multiply the probabilities.
    """
    q, k, v = (t.double() for t in (q, k, v))
    k, v = (t.repeat_interleave(q.shape[1] // k.shape[1], 1) for t in (k, v))
    scores = torch.einsum("qhd,khd->hqk", q, k) * (q.shape[-1] ** -0.5 if scale is None else scale)
    if softcap > 0:
        scores = softcap * torch.tanh(scores / softcap)
    # How far ahead of the query's own position the key lies.
    ahead = torch.arange(len(k))[None, :] - (torch.arange(len(q))[:, None] + len(k) - len(q))
    if slopes is not None:
        scores = scores - slopes.double()[:, None, None] * ahead.abs()
    left, right = window_size
    hidden = ahead > 0 if causal else torch.zeros_like(ahead, dtype=torch.bool)
    if left >= 0:
        hidden = hidden | (ahead < -left)
    if right >= 0:
        hidden = hidden | (ahead > right)
    scores = scores.masked_fill(hidden, -math.inf)
    weights = torch.softmax(scores, -1).nan_to_num(0.0)
    if factors is not None:
        weights = weights * factors
    return torch.einsum("hqk,khd->qhd", weights, v), torch.logsumexp(scores, -1)


def close(got: torch.Tensor, wanted: torch.Tensor) -> None:
    torch.testing.assert_close(got.double(), wanted, rtol=0, atol=1e-5)


OPTIONS: dict[str, dict[str, object]] = {
    "plain": {},
    "causal": {"causal": True},
    "window": {"window_size": (3, 2)},
    "window to the left": {"window_size": (4, -1)},
    "causal window": {"causal": True, "window_size": (3, 5)},
    "softcap": {"softcap": 2.0},
    "softcap off": {"softcap": -1.0},
    "scale": {"softmax_scale": 0.5},
}


@pytest.mark.parametrize(("seqlen_q", "seqlen_k"), [(6, 9), (9, 6), (1, 7)])
@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS.keys())
def test_dense(options: dict[str, object], seqlen_q: int, seqlen_k: int) -> None:
    q, k, v = torch.randn(2, seqlen_q, 4, 16), torch.randn(2, seqlen_k, 2, 16), torch.randn(2, seqlen_k, 2, 16)
    out, lse, dmask = flash_attn_func(q, k, v, return_attn_probs=True, **options)  # type: ignore[arg-type]
    assert (out.shape, lse.shape, lse.dtype) == (q.shape, (2, 4, seqlen_q), torch.float32)
    assert dmask.shape == (0,)
    expected = {("scale" if name == "softmax_scale" else name): value for name, value in options.items()}
    for b in range(2):
        wanted, wanted_lse = attend(q[b], k[b], v[b], **expected)  # type: ignore[arg-type]
        close(out[b], wanted)
        close(lse[b], wanted_lse)
    alone = flash_attn_func(q, k, v, **options)  # type: ignore[arg-type]
    assert isinstance(alone, torch.Tensor)
    assert torch.equal(alone, out)


@pytest.mark.parametrize("per_batch", [False, True])
def test_alibi(per_batch: bool) -> None:
    q, k, v = torch.randn(2, 5, 4, 16), torch.randn(2, 7, 4, 16), torch.randn(2, 7, 4, 16)
    slopes = torch.rand(2, 4) if per_batch else torch.rand(4)
    out = flash_attn_func(q, k, v, causal=True, alibi_slopes=slopes)
    assert isinstance(out, torch.Tensor)
    for b in range(2):
        close(out[b], attend(q[b], k[b], v[b], causal=True, slopes=slopes[b] if per_batch else slopes)[0])


@pytest.mark.parametrize("head_dim", [5, 8, 20, 59])
def test_any_head_dim(head_dim: int) -> None:
    q, k, v = (torch.randn(1, 6, 2, head_dim) for _ in range(3))
    out, lse, _ = flash_attn_func(q, k, v, return_attn_probs=True)
    wanted, wanted_lse = attend(q[0], k[0], v[0])
    close(out[0], wanted)
    close(lse[0], wanted_lse)


def test_window_as_a_tensor() -> None:
    # FlashAttention's own tests give it so.
    q, k, v = (torch.randn(1, 6, 2, 16) for _ in range(3))
    out = flash_attn_func(q, k, v, window_size=torch.tensor([2, 1]))  # type: ignore[arg-type]
    assert isinstance(out, torch.Tensor)
    close(out[0], attend(q[0], k[0], v[0], window_size=(2, 1))[0])


def test_packed_tensors_are_their_parts() -> None:
    qkv = torch.randn(2, 6, 3, 4, 16)
    q, k, v = qkv.unbind(2)
    wanted = flash_attn_func(q, k, v, causal=True)
    assert isinstance(wanted, torch.Tensor)
    for out in (flash_attn_qkvpacked_func(qkv, causal=True), flash_attn_kvpacked_func(q, qkv[:, :, 1:], causal=True)):
        assert isinstance(out, torch.Tensor)
        assert torch.equal(out, wanted)


LENGTHS_Q, LENGTHS_K = (3, 0, 6), (5, 4, 2)


def starts(lengths: tuple[int, ...]) -> torch.Tensor:
    return torch.tensor([0, *itertools.accumulate(lengths)], dtype=torch.int32)


@pytest.mark.parametrize("head_dim", [16, 20])
@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS.keys())
def test_varlen(options: dict[str, object], head_dim: int) -> None:
    q, kv = torch.randn(9, 4, head_dim), torch.randn(11, 2, 2, head_dim)
    k, v = kv.unbind(1)
    slopes = torch.rand(3, 4)
    ends = (starts(LENGTHS_Q), starts(LENGTHS_K), 6, 5)
    out, lse, dmask = flash_attn_varlen_func(  # type: ignore[misc]
        q,
        k,
        v,
        *ends,
        alibi_slopes=slopes,
        return_attn_probs=True,
        **options,  # type: ignore[arg-type]
    )
    assert (out.shape, lse.shape, dmask.shape) == (q.shape, (4, 9), (0,))
    expected = {("scale" if name == "softmax_scale" else name): value for name, value in options.items()}
    for b, (q_b, k_b, v_b, out_b, lse_b) in enumerate(
        zip(
            q.split(LENGTHS_Q),
            k.split(LENGTHS_K),
            v.split(LENGTHS_K),
            out.split(LENGTHS_Q),
            lse.split(LENGTHS_Q, 1),
            strict=True,
        )
    ):
        wanted, wanted_lse = attend(q_b, k_b, v_b, slopes=slopes[b], **expected)  # type: ignore[arg-type]
        close(out_b, wanted)
        close(lse_b, wanted_lse)
    packed = flash_attn_varlen_kvpacked_func(q, kv, *ends, alibi_slopes=slopes, **options)  # type: ignore[arg-type]
    assert isinstance(packed, torch.Tensor)
    assert torch.equal(packed, out)


def test_varlen_of_one_packed_tensor() -> None:
    qkv = torch.randn(9, 3, 4, 16)
    ends = starts(LENGTHS_Q)
    out = flash_attn_varlen_qkvpacked_func(qkv, ends, 6, causal=True)
    wanted = flash_attn_varlen_func(*qkv.unbind(1), ends, ends, 6, 6, causal=True)
    assert isinstance(out, torch.Tensor)
    assert isinstance(wanted, torch.Tensor)
    assert torch.equal(out, wanted)


def factors_of(dmask: torch.Tensor, dropout_p: float) -> torch.Tensor:
    """Return what the probabilities were multiplied by: their signs tell what was dropped."""
    return (dmask >= 0).double() / (1 - dropout_p)


@pytest.mark.parametrize("causal", [False, True])
def test_dropped_probabilities_explain_the_output(causal: bool) -> None:
    q, k, v = torch.randn(2, 33, 4, 20), torch.randn(2, 70, 2, 20), torch.randn(2, 70, 2, 20)
    out, lse, dmask = flash_attn_func(q, k, v, 0.3, causal=causal, window_size=(60, 60), return_attn_probs=True)
    assert (dmask.shape, dmask.dtype) == ((2, 4, 128, 128), q.dtype)
    for b in range(2):
        wanted, wanted_lse = attend(
            q[b], k[b], v[b], causal=causal, window_size=(60, 60), factors=factors_of(dmask[b, :, :33, :70], 0.3)
        )
        close(out[b], wanted)
        # Dropout comes after the softmax: lse knows nothing of it.
        close(lse[b], wanted_lse)
    seen = dmask[:, :, :33, :70].abs() > 0
    assert abs((dmask < 0).sum() / seen.sum() - 0.3) < 0.02
    torch.testing.assert_close(dmask.abs().sum(-1)[:, :, :33], torch.ones(2, 4, 33))
    assert not dmask[:, :, 33:].any()
    assert not dmask[:, :, :, 70:].any()


def test_dropped_probabilities_of_packed_sequences() -> None:
    q, k, v = torch.randn(9, 4, 16), torch.randn(11, 2, 16), torch.randn(11, 2, 16)
    slopes = torch.rand(4)
    out, _, dmask = flash_attn_varlen_func(
        q,
        k,
        v,
        starts(LENGTHS_Q),
        starts(LENGTHS_K),
        6,
        5,
        0.4,
        softcap=3.0,
        alibi_slopes=slopes,
        return_attn_probs=True,
    )
    assert dmask.shape == (3, 4, 128, 128)
    for b, (q_b, k_b, v_b, out_b) in enumerate(
        zip(q.split(LENGTHS_Q), k.split(LENGTHS_K), v.split(LENGTHS_K), out.split(LENGTHS_Q), strict=True)
    ):
        own = dmask[b, :, : len(q_b), : len(k_b)]
        close(out_b, attend(q_b, k_b, v_b, softcap=3.0, slopes=slopes, factors=factors_of(own, 0.4))[0])


def test_dropout_follows_pytorchs_seed() -> None:
    q, k, v = (torch.randn(1, 20, 2, 16) for _ in range(3))
    torch.manual_seed(7)
    first, second = flash_attn_func(q, k, v, 0.5), flash_attn_func(q, k, v, 0.5)
    torch.manual_seed(7)
    again = flash_attn_func(q, k, v, 0.5, return_attn_probs=True)[0]
    assert isinstance(first, torch.Tensor)
    assert isinstance(second, torch.Tensor)
    assert torch.equal(again, first)
    assert not torch.equal(second, first)


def test_the_kernel_itself() -> None:
    q, k, v = torch.randn(1, 20, 4, 20), torch.randn(1, 33, 2, 20), torch.randn(1, 33, 2, 20)
    with flashgen.interpreting():
        out, lse, dmask = flash_attn_func(q, k, v, 0.3, causal=True, window_size=(9, -1), return_attn_probs=True)
    factors = factors_of(dmask[0, :, :20, :33], 0.3)
    wanted, wanted_lse = attend(q[0], k[0], v[0], causal=True, window_size=(9, -1), factors=factors)
    close(out[0], wanted)
    close(lse[0], wanted_lse)


GRADIENTS: dict[str, dict[str, object]] = {
    "plain": {},
    "causal": {"causal": True},
    "window": {"window_size": (3, 2), "deterministic": True},
    "softcap": {"softcap": 2.0, "causal": True},
    "scale": {"softmax_scale": 0.3},
}


@pytest.mark.parametrize("head_dim", [16, 20])
@pytest.mark.parametrize("options", GRADIENTS.values(), ids=GRADIENTS.keys())
def test_gradients(options: dict[str, object], head_dim: int) -> None:
    leaves = [torch.randn(2, n, heads, head_dim, requires_grad=True) for n, heads in ((9, 4), (11, 2), (11, 2))]
    out = flash_attn_func(*leaves, **options)  # type: ignore[arg-type]
    dout = torch.randn(2, 9, 4, head_dim)
    same = {"scale" if name == "softmax_scale" else name: v for name, v in options.items() if name != "deterministic"}
    wanted = torch.stack([attend(*(t[b] for t in leaves), **same)[0] for b in range(2)])  # type: ignore[arg-type]
    gradients = torch.autograd.grad(out, leaves, dout)  # type: ignore[arg-type]
    for mine, right in zip(gradients, torch.autograd.grad(wanted, leaves, dout.double()), strict=True):
        close(mine, right.double())


def test_packed_projections_get_one_gradient() -> None:
    qkv = torch.randn(2, 9, 3, 4, 16, requires_grad=True)
    dout = torch.randn(2, 9, 4, 16)
    (got,) = torch.autograd.grad(flash_attn_qkvpacked_func(qkv, causal=True), qkv, dout)  # type: ignore[arg-type]
    apart = [t.detach().requires_grad_() for t in qkv.unbind(2)]
    wanted = torch.autograd.grad(flash_attn_func(*apart, causal=True), apart, dout)  # type: ignore[arg-type]
    torch.testing.assert_close(got, torch.stack(wanted, 2))
    q, kv = apart[0], torch.stack([apart[1], apart[2]], 2).detach().requires_grad_()
    (together,) = torch.autograd.grad(flash_attn_kvpacked_func(q, kv, causal=True), kv, dout)  # type: ignore[arg-type]
    torch.testing.assert_close(together, torch.stack(wanted[1:], 2))


def test_gradients_of_packed_sequences() -> None:
    lengths = (4, 0, 5)
    qkv = torch.randn(9, 3, 4, 16, requires_grad=True)
    dout = torch.randn(9, 4, 16)
    out = flash_attn_varlen_qkvpacked_func(qkv, starts(lengths), 5, causal=True)
    (got,) = torch.autograd.grad(out, qkv, dout)  # type: ignore[arg-type]
    parts = [attend(*part.unbind(1), causal=True)[0] for part in qkv.split(lengths)]
    (wanted,) = torch.autograd.grad(torch.cat(parts), qkv, dout.double())
    close(got, wanted.double())


def test_what_has_no_gradient_in_flash_attn() -> None:
    q = torch.randn(1, 6, 2, 16, requires_grad=True)
    slopes = torch.rand(2, requires_grad=True)
    out, lse, dmask = flash_attn_func(q, q, q, 0.3, alibi_slopes=slopes, return_attn_probs=True)
    assert out.requires_grad
    assert not lse.requires_grad
    assert not dmask.requires_grad
    out.sum().backward()
    assert q.grad is not None
    assert slopes.grad is None


def test_dropout_of_the_backward_pass_is_the_forward_pass_s() -> None:
    q, k, v = (torch.randn(1, n, 2, 16, requires_grad=True) for n in (20, 33, 33))
    out, _, dmask = flash_attn_func(q, k, v, 0.3, causal=True, return_attn_probs=True)
    dout = torch.randn_like(out)
    factors = factors_of(dmask[0, :, :20, :33], 0.3)
    wanted, _ = attend(q[0], k[0], v[0], causal=True, factors=factors)
    for mine, right in zip(
        torch.autograd.grad(out, (q, k, v), dout), torch.autograd.grad(wanted, (q, k, v), dout[0].double()), strict=True
    ):
        close(mine, right.double())


DENSE = [
    "dropout_p=0.0",
    "softmax_scale=None",
    "causal=False",
    "window_size=(-1, -1)",
    "softcap=0.0",
    "alibi_slopes=None",
    "deterministic=False",
    "return_attn_probs=False",
]
PACKED = ["cu_seqlens_q", "cu_seqlens_k", "max_seqlen_q", "max_seqlen_k"]
CACHED = [
    *(f"{name}=None" for name in ("k", "v", "rotary_cos", "rotary_sin", "cache_seqlens", "cache_batch_idx")),
    *(f"{name}=None" for name in ("cache_leftpad", "block_table", "softmax_scale")),
    *("causal=False", "window_size=(-1, -1)", "softcap=0.0", "rotary_interleaved=True", "alibi_slopes=None"),
    *("num_splits=0", "return_softmax_lse=False"),
]


@pytest.mark.parametrize(
    ("name", "wanted"),
    [
        ("flash_attn_func", ["q", "k", "v", *DENSE]),
        ("flash_attn_kvpacked_func", ["q", "kv", *DENSE]),
        ("flash_attn_qkvpacked_func", ["qkv", *DENSE]),
        ("flash_attn_varlen_func", ["q", "k", "v", *PACKED, *DENSE, "block_table=None"]),
        ("flash_attn_varlen_kvpacked_func", ["q", "kv", *PACKED, *DENSE]),
        ("flash_attn_varlen_qkvpacked_func", ["qkv", "cu_seqlens", "max_seqlen", *DENSE]),
        ("flash_attn_with_kvcache", ["q", "k_cache", "v_cache", *CACHED]),
    ],
)
def test_signatures_are_those_of_flash_attn_2(name: str, wanted: list[str]) -> None:
    assert name in flash_attn.__all__
    parameters = inspect.signature(getattr(flash_attn, name)).parameters.values()
    assert all(p.kind is p.POSITIONAL_OR_KEYWORD for p in parameters)
    assert [p.name if p.default is p.empty else f"{p.name}={p.default}" for p in parameters] == wanted


def test_refusals() -> None:
    q = torch.randn(1, 6, 2, 16)
    with pytest.raises(InputError, match=r"\[batch, seqlen, 3, nheads, head_dim\]"):
        flash_attn_qkvpacked_func(q)
    with pytest.raises(InputError, match=r"\[total, 2, nheads, head_dim\]"):
        flash_attn_varlen_kvpacked_func(q[0], q[0], starts((6,)), starts((6,)), 6, 6)
    with pytest.raises(InputError, match="window_size"):
        flash_attn_func(q, q, q, window_size=(1, 2, 3))
    with pytest.raises(UnsupportedError, match="block_table"):
        flash_attn_varlen_func(
            q[0], q[0], q[0], starts((6,)), starts((6,)), 6, 6, block_table=torch.zeros(1, 1, dtype=torch.int32)
        )
    wide = torch.randn(1, 6, 2, 264)
    with pytest.raises(UnsupportedError, match="up to 256"):
        flash_attn_func(wide.requires_grad_(), wide, wide)
