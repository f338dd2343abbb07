"""What each option means: the rendered kernel, interpreted, and the eager path, against plain float64 arithmetic."""

from __future__ import annotations

import contextlib
import math
import typing
from collections.abc import Callable, Iterator

import pytest
import torch
from torch.nn.attention.flex_attention import flex_attention

import flashgen
from flashgen.codegen import TritonForwardConfig
from flashgen.ops.rng import dropout_state

CONFIG = TritonForwardConfig(block_m=32, block_n=32, num_warps=2, num_stages=1)
HEADS, HEADS_KV, SQ, SK, D, DV = 4, 2, 37, 45, 16, 24
NEVER = float("-inf")

Scores = Callable[[torch.Tensor], torch.Tensor]


def normal(*sizes: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(sizes, generator=torch.Generator().manual_seed(seed + sum(sizes)))


def inputs() -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    return normal(2, HEADS, SQ, D), normal(2, HEADS_KV, SK, D), normal(2, HEADS_KV, SK, DV)


ROW, KEY = torch.arange(SQ)[:, None], torch.arange(SK)[None, :]
BEHIND = ROW + SK - SQ - KEY


def plain(scores: Scores, sinks: torch.Tensor | None = None) -> tuple[torch.Tensor, torch.Tensor]:
    """Attention in float64 with scores changed by a function, and its log-sum-exp."""
    q, k, v = (t.double() for t in inputs())
    k, v = (t.repeat_interleave(HEADS // HEADS_KV, 1) for t in (k, v))
    changed = scores(q @ k.transpose(2, 3) / math.sqrt(D))
    logits = changed
    if sinks is not None:
        logits = torch.cat([changed, sinks.double()[None, :, None, None].expand(2, HEADS, SQ, 1)], -1)
    lse = torch.logsumexp(logits, -1)
    return (changed - lse[..., None]).exp().nan_to_num() @ v, lse


@contextlib.contextmanager
def either(interpreted: bool) -> Iterator[None]:
    with flashgen.interpreting() if interpreted else contextlib.nullcontext():
        yield


BIAS = normal(HEADS, SQ, SK)
SEEN = normal(SQ, SK) > -0.5
SLOPES = torch.tensor([0.5, 0.25, 0.125, 0.0625])
SINKS = torch.tensor([0.0, 1.0, 2.0, 3.0])
TABLE = normal(HEADS, SK)
IDS = torch.arange(SK) // 11


def distance_mod(score: typing.Any, b: typing.Any, h: typing.Any, q_idx: typing.Any, kv_idx: typing.Any) -> typing.Any:
    return score + TABLE[h, kv_idx] * torch.abs(q_idx - kv_idx)


def hidden(seen: torch.Tensor) -> Scores:
    return lambda scores: scores.masked_fill(~seen, NEVER)


CASES: dict[str, tuple[dict[str, typing.Any], Scores]] = {
    "bias": ({"bias": BIAS}, lambda s: s + BIAS),
    "bias of two dimensions": ({"bias": BIAS[0]}, lambda s: s + BIAS[0]),
    "bias of one row": ({"bias": BIAS[:, :1]}, lambda s: s + BIAS[:, :1]),
    "bias of one key": ({"bias": BIAS[:, :, :1]}, lambda s: s + BIAS[:, :, :1]),
    "bool bias": ({"bias": SEEN}, hidden(SEEN)),
    "causal": ({"causal": True}, hidden(BEHIND >= 0)),
    "window": ({"window": (5, 3)}, hidden((BEHIND <= 5) & (BEHIND >= -3))),
    "left window": ({"window": (5, -1)}, hidden(BEHIND <= 5)),
    "causal window": ({"window": (7, 9), "causal": True}, hidden((BEHIND <= 7) & (BEHIND >= 0))),
    "three masks": (
        {"window": (9, -1), "causal": True, "mask": flashgen.masks.chunked(16)},
        hidden((BEHIND <= 9) & (BEHIND >= 0) & ((ROW + SK - SQ) // 16 == KEY // 16)),
    ),
    "document": ({"mask": flashgen.masks.document(IDS[:SQ], IDS)}, hidden(IDS[:SQ, None] == IDS[None])),
    "function": ({"mask": lambda b, h, q_idx, kv_idx: (q_idx + kv_idx) % 3 != 0}, hidden((ROW + KEY) % 3 != 0)),
    "function that sees tensors": (
        {"mask": lambda b, h, q_idx, kv_idx: TABLE[h, kv_idx] < 0.5},
        lambda s: s.masked_fill(~(TABLE[:, None] < 0.5), NEVER),
    ),
    "score_mod": ({"score_mod": distance_mod}, lambda s: s + TABLE[:, None] * (ROW - KEY).abs()),
    "softcap": ({"softcap": 1.5}, lambda s: 1.5 * torch.tanh(s / 1.5)),
    "alibi": ({"alibi_slopes": SLOPES}, lambda s: s - SLOPES[:, None, None] * BEHIND.abs()),
    "alibi of each batch": (
        {"alibi_slopes": torch.stack([SLOPES, 3 * SLOPES]).double()},
        lambda s: s - torch.stack([SLOPES, 3 * SLOPES])[:, :, None, None] * BEHIND.abs(),
    ),
    "order": (
        {"softcap": 1.5, "score_mod": distance_mod, "bias": BIAS, "alibi_slopes": SLOPES, "causal": True},
        lambda s: (
            1.5 * torch.tanh(s / 1.5) + TABLE[:, None] * (ROW - KEY).abs() + BIAS - SLOPES[:, None, None] * BEHIND.abs()
        ).masked_fill(BEHIND < 0, NEVER),
    ),
}


@pytest.mark.parametrize("interpreted", [True, False], ids=["interpreted", "eager"])
@pytest.mark.parametrize("name", CASES)
def test_meaning(name: str, interpreted: bool) -> None:
    options, scores = CASES[name]
    want, want_lse = plain(scores)
    with either(interpreted):
        out, lse = flashgen.attention(*inputs(), return_lse=True, config=CONFIG, **options)
    torch.testing.assert_close(out.double(), want, atol=3e-6, rtol=1e-5)
    torch.testing.assert_close(lse.double(), want_lse, atol=3e-6, rtol=1e-5)


@pytest.mark.parametrize("interpreted", [True, False], ids=["interpreted", "eager"])
def test_sinks(interpreted: bool) -> None:
    want, want_lse = plain(hidden((BEHIND >= 0) & (BEHIND <= 3) & (ROW > 2)), SINKS)
    with either(interpreted):
        out, lse = flashgen.attention(
            *inputs(),
            causal=True,
            window=(3, -1),
            mask=lambda b, h, q_idx, kv_idx: q_idx > 2,
            sinks=SINKS.double(),
            return_lse=True,
            config=CONFIG,
        )
    torch.testing.assert_close(out.double(), want, atol=3e-6, rtol=1e-5)
    torch.testing.assert_close(lse.double(), want_lse, atol=3e-6, rtol=1e-5)


def test_agrees_with_flex_attention() -> None:
    out = flashgen.attention(*inputs(), score_mod=distance_mod)
    torch.testing.assert_close(out, flex_attention(*inputs(), score_mod=distance_mod, enable_gqa=True))


def test_agrees_with_torch_on_a_bias() -> None:
    sdpa = torch.nn.functional.scaled_dot_product_attention
    for bias in (BIAS[None].expand(2, -1, -1, -1), SEEN):
        torch.testing.assert_close(
            flashgen.attention(*inputs(), bias=bias), sdpa(*inputs(), attn_mask=bias, enable_gqa=True)
        )


LENGTHS = ((5, 9), (0, 4), (20, 0), (12, 32))
STARTS_Q = torch.tensor([0, 5, 5, 25, 37], dtype=torch.int32)
STARTS_K = torch.tensor([0, 9, 13, 13, 45], dtype=torch.int32)


@pytest.mark.parametrize("interpreted", [True, False], ids=["interpreted", "eager"])
@pytest.mark.parametrize("options", [{}, {"causal": True}, {"window": (4, 4), "sinks": SINKS, "softcap": 2.0}], ids=str)
def test_packed_sequences_are_calls_of_their_own(options: dict[str, typing.Any], interpreted: bool) -> None:
    q, k, v = (t[0].transpose(0, 1) for t in inputs())
    with either(interpreted):
        out, lse = flashgen.attention_varlen(
            q, k, v, STARTS_Q, STARTS_K, 20, 32, return_lse=True, config=CONFIG, **options
        )
    assert out.shape == (SQ, HEADS, DV)
    assert lse.shape == (HEADS, SQ)
    for index in range(len(LENGTHS)):
        rows, keys = (slice(int(s[index]), int(s[index + 1])) for s in (STARTS_Q, STARTS_K))
        one = (q[rows], k[keys], v[keys])
        alone, alone_lse = flashgen.attention(
            *(t.transpose(0, 1)[None] for t in one), return_lse=True, config=CONFIG, **options
        )
        torch.testing.assert_close(out[rows], alone[0].transpose(0, 1), atol=3e-6, rtol=1e-5)
        torch.testing.assert_close(lse[:, rows], alone_lse[0], atol=3e-6, rtol=1e-5)


@pytest.mark.parametrize("interpreted", [True, False], ids=["interpreted", "eager"])
def test_used_lengths(interpreted: bool) -> None:
    q, k, v = (t[0].transpose(0, 1) for t in inputs())
    starts_q, starts_k = (torch.tensor([0, 20, n], dtype=torch.int32) for n in (SQ, SK))
    used_q, used_k = (torch.tensor(n, dtype=torch.int32) for n in ([7, 17], [9, 20]))
    with either(interpreted):
        out, lse = flashgen.attention_varlen(
            q, k, v, starts_q, starts_k, 20, 25,
            causal=True, seqused_q=used_q, seqused_k=used_k, return_lse=True, config=CONFIG,
        )  # fmt: skip
    one = (q[:7], k[:9], v[:9])
    alone = flashgen.attention(*(t.transpose(0, 1)[None] for t in one), causal=True)
    torch.testing.assert_close(out[:7], alone[0].transpose(0, 1), atol=3e-6, rtol=1e-5)
    assert bool((out[7:20] == 0).all())
    assert bool((lse[:, 7:20] == NEVER).all())


@pytest.mark.parametrize("sinks", [None, SINKS], ids=["", "sinks"])
@pytest.mark.parametrize("sizes", [(0, 5), (5, 0), (0, 0)], ids=str)
def test_packed_sequences_without_queries_or_keys(sizes: tuple[int, int], sinks: torch.Tensor | None) -> None:
    q, k, v = (torch.ones(n, HEADS, 16) for n in (sizes[0], sizes[1], sizes[1]))
    starts = (torch.tensor([0, 0, n], dtype=torch.int32) for n in sizes)
    out, lse = flashgen.attention_varlen(q, k, v, *starts, *sizes, sinks=sinks, return_lse=True)
    assert bool((out == 0).all())
    want = torch.full((HEADS,), NEVER) if sinks is None else sinks
    assert torch.equal(lse, want[:, None].expand(HEADS, sizes[0]))


def test_rows_without_any_key_have_the_sink() -> None:
    q, kv = torch.ones(2, HEADS, 3, 16), torch.ones(2, HEADS, 0, 16)
    lse = flashgen.attention(q, kv, kv, sinks=SINKS, return_lse=True)[1]
    assert torch.equal(lse, SINKS[:, None].expand(2, HEADS, 3))


@pytest.mark.parametrize("interpreted", [True, False], ids=["interpreted", "eager"])
def test_rows_of_no_sequence(interpreted: bool) -> None:
    q = normal(20, HEADS, 16)
    starts = torch.tensor([3, 8, 15], dtype=torch.int32)
    with either(interpreted):
        out, lse = flashgen.attention_varlen(q, q, q, starts, starts, 7, 7, return_lse=True, config=CONFIG)
    assert bool((out[:3] == 0).all())
    assert bool((out[15:] == 0).all())
    assert bool((lse[:, :3] == NEVER).all())
    assert bool((lse[:, 15:] == NEVER).all())
    assert bool(lse[:, 3:15].isfinite().all())


def test_dropout() -> None:
    q, k, v = (
        torch.zeros(2, HEADS, SQ, D),
        torch.zeros(2, HEADS_KV, SK, D),
        torch.eye(SK, 48).expand(2, HEADS_KV, -1, -1),
    )
    out, lse = flashgen.attention(q, k, v, dropout_p=0.25, seed=3, return_lse=True)
    kept = out[..., :SK] > 0
    torch.testing.assert_close(out[..., :SK][kept], torch.full((int(kept.sum()),), 1 / (SK * 0.75)))
    assert abs(float(kept.float().mean()) - 0.75) < 0.02
    # The statistics know nothing of it.
    torch.testing.assert_close(lse, torch.full_like(lse, SK).log())
    assert torch.equal(flashgen.attention(q, k, v, dropout_p=0.25, seed=3), out)
    assert not torch.equal(flashgen.attention(q, k, v, dropout_p=0.25, seed=4), out)
    assert torch.equal(flashgen.attention(q, k, v, dropout_p=0.25, seed=dropout_state(q.device, 3)), out)
    with flashgen.interpreting():
        interpreted = flashgen.attention(q[:1], k[:1], v[:1], dropout_p=0.25, seed=3, config=CONFIG)
    assert torch.equal(interpreted[..., :SK] > 0, kept[:1])


def test_dropout_draws_from_the_generator_of_torch() -> None:
    q, k, v = inputs()
    torch.manual_seed(5)
    first, second = (flashgen.attention(q, k, v, dropout_p=0.5) for _ in range(2))
    torch.manual_seed(5)
    assert torch.equal(flashgen.attention(q, k, v, dropout_p=0.5), first)
    assert not torch.equal(first, second)


@pytest.mark.parametrize("seed", [-(2**63), -1, 0, 2**63, 2**64 - 1])
def test_every_seed_of_64_bits(seed: int) -> None:
    state = dropout_state(torch.device("cpu"), seed)
    assert state.dtype == torch.int64
    assert state.tolist()[0] % 2**64 == seed % 2**64
    assert state.tolist()[1] == 0


@pytest.mark.parametrize("interpreted", [True, False], ids=["interpreted", "eager"])
@pytest.mark.parametrize("scale", [None, -0.2])
def test_fp8(scale: float | None, interpreted: bool) -> None:
    sizes = ((2, HEADS, SQ, 16), (2, HEADS_KV, SK, 16), (2, HEADS_KV, SK, 32))
    q, k, v = (normal(*size).to(torch.float8_e4m3fn) for size in sizes)
    q_factors, v_factors = torch.tensor([[0.5, 2.0], [1.0, 3.0]]), torch.tensor([0.25, 1.0])
    factors: dict[str, typing.Any] = {"q_descale": q_factors, "k_descale": 1.5, "v_descale": v_factors}
    with either(interpreted):
        out = flashgen.attention(q, k, v, causal=True, softmax_scale=scale, config=CONFIG, **factors)
    assert out.dtype == torch.bfloat16
    wide = (
        q.double() * q_factors.repeat_interleave(2, 1)[:, :, None, None],
        k.double() * 1.5,
        v.double() * v_factors[:, None, None],
    )
    mask = torch.zeros(SQ, SK).masked_fill(BEHIND < 0, NEVER).double()
    want = torch.nn.functional.scaled_dot_product_attention(*wide, attn_mask=mask, enable_gqa=True, scale=scale)
    # The eager path rounds probabilities to the 4 bits of e4m3, as kernels on a GPU do.
    torch.testing.assert_close(out.double(), want, atol=0.12, rtol=0.06)


def test_a_function_is_read_with_the_values_of_now() -> None:
    far = 3

    def near(b: typing.Any, h: typing.Any, q_idx: typing.Any, kv_idx: typing.Any) -> typing.Any:
        return abs(q_idx - kv_idx) < far

    for far in (3, 6):
        got = flashgen.attention(*inputs(), mask=near, return_lse=True)
        for tensor, want in zip(got, plain(hidden((ROW - KEY).abs() < far)), strict=True):
            torch.testing.assert_close(tensor.double(), want, atol=3e-6, rtol=1e-5)


def test_captured_tensors_may_have_any_strides() -> None:
    table = TABLE.t().contiguous().t()
    got = flashgen.attention(*inputs(), score_mod=lambda score, b, h, q_idx, kv_idx: score + table[h, kv_idx])
    torch.testing.assert_close(got.double(), plain(lambda s: s + TABLE[:, None])[0], atol=3e-6, rtol=1e-5)


def test_explain_of_packed_sequences() -> None:
    q, k, v = (t[0].transpose(0, 1) for t in inputs())
    selection = flashgen.explain(q, k, v, STARTS_Q, STARTS_K, 20, 32, causal=True, sinks=SINKS)
    assert selection.problem.spec.varlen
    assert selection.problem.spec.sinks
    assert (selection.problem.shape.batch, selection.problem.shape.seqlen_k) == (4, 32)


@pytest.mark.parametrize(
    ("bias", "aligned"),
    [
        (torch.zeros(2, 4, 16, 32), True),
        (torch.zeros(16, 32), True),
        (torch.zeros(16, 40)[:, :32], True),
        (torch.zeros(16, 33)[:, :32], False),
        (torch.zeros(16, 40)[:, 1:33], False),
        (torch.zeros(32, 16).t(), False),
        (torch.zeros(16, 1), False),
        (torch.zeros(1, 32), True),
        (torch.zeros(16, 40, dtype=torch.bool)[:, :32], False),
        (torch.zeros(16, 48, dtype=torch.bool)[:, :32], True),
    ],
)
def test_what_is_known_of_a_bias_in_memory(bias: torch.Tensor, aligned: bool) -> None:
    q, kv = torch.zeros(2, 4, 16, 16), torch.zeros(2, 4, 32, 16)
    assert flashgen.explain(q, kv, kv, bias=bias).problem.spec.bias_aligned == aligned
