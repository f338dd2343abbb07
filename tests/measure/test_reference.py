"""The oracle against PyTorch's own attention, FlexAttention, and attention written out number by number."""

from __future__ import annotations

import dataclasses
import math

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention.flex_attention import AuxRequest, create_block_mask, flex_attention

from flashgen.errors import InputError
from flashgen.measure import attention_reference, dropout_keep, random_extras, random_inputs, reference
from flashgen.measure.arithmetic import Precision, round_to_tf32
from flashgen.measure.entries import pick_heads
from flashgen.spec import AttentionSpec, DType, Extras, Mask, Positions, Problem, Shape, parse_mask
from flashgen.spec.mods import Capture, ModFunction

MASKS = [
    "full",
    "causal",
    "causal(align=top_left)",
    "sliding_window(3,1)",
    "sliding_window(-1,2)",
    "prefix_lm(4)",
    "chunked(5)",
    "dilated_window(6,2,3)",
    "global_tokens(2)|sliding_window(2,0)",
    "~causal&chunked(7)",
]
SCORE_MOD = ModFunction(
    role="score",
    source="return score + slope[h] * (q_idx - kv_idx) + table[b, kv_idx]",
    captures=(
        Capture(name="slope", dtype="float32", axes=("h",)),
        Capture(name="table", dtype="float32", axes=("b", "kv_idx")),
    ),
)


def make_problem(
    seqlen_q: int = 9,
    seqlen_k: int = 13,
    *,
    mask: str = "full",
    dtype: DType = DType.FP32,
    heads: tuple[int, int] = (4, 2),
    batch: int = 2,
    features: AttentionSpec | None = None,
) -> Problem:
    spec = features or AttentionSpec(dtype=dtype, head_dim_qk=16, head_dim_v=32)
    shape = Shape(batch=batch, seqlen_q=seqlen_q, seqlen_k=seqlen_k, nheads_q=heads[0], nheads_kv=heads[1])
    return Problem(spec=dataclasses.replace(spec, dtype=dtype, mask=parse_mask(mask)), shape=shape)


def with_features(problem: Problem, **features: object) -> Problem:
    return dataclasses.replace(problem, spec=dataclasses.replace(problem.spec, **features))  # type: ignore[arg-type]


def boolean_mask(mask: Mask, seqlen_q: int, seqlen_k: int) -> Tensor:
    def sees(i: int, j: int) -> bool:
        return bool(mask.sees(Positions(q_idx=i, kv_idx=j, seqlen_q=seqlen_q, seqlen_k=seqlen_k)))

    return torch.tensor([[sees(i, j) for j in range(seqlen_k)] for i in range(seqlen_q)])


def exact(problem: Problem, q: Tensor, k: Tensor, v: Tensor, extras: Extras) -> tuple[Tensor, Tensor]:
    return attention_reference(q, k, v, spec=problem.spec, extras=extras, precision="float64")


def explicit(q: Tensor, k: Tensor, v: Tensor, scale: float, added: Tensor) -> tuple[Tensor, Tensor]:
    """SDPA in float64 with everything in one additive bias; rows that see nothing come out as 0 and -inf."""
    group = q.shape[1] // k.shape[1]
    q, k, v = q.double(), k.double().repeat_interleave(group, dim=1), v.double().repeat_interleave(group, dim=1)
    lse = (q @ k.transpose(2, 3) * scale + added).logsumexp(dim=-1)
    out = F.scaled_dot_product_attention(q, k, v, attn_mask=added.expand(*q.shape[:3], -1), scale=scale)
    return out.masked_fill((lse == -math.inf).unsqueeze(-1), 0.0), lse


def hidden(seen: Tensor) -> Tensor:
    return torch.zeros(seen.shape, dtype=torch.float64).masked_fill(~seen, -math.inf)


@pytest.mark.parametrize("mask", MASKS)
@pytest.mark.parametrize(("seqlen_q", "seqlen_k"), [(1, 1), (7, 7), (5, 19), (19, 5), (17, 1)])
@pytest.mark.parametrize("heads", [(2, 2), (6, 2), (3, 1)], ids=str)
def test_agrees_with_sdpa(mask: str, seqlen_q: int, seqlen_k: int, heads: tuple[int, int]) -> None:
    problem = make_problem(seqlen_q, seqlen_k, mask=mask, heads=heads)
    q, k, v = random_inputs(problem, device="cpu", seed=0)
    extras = Extras(softmax_scale=0.3)
    got = exact(problem, q, k, v, extras)
    seen = boolean_mask(problem.spec.mask, seqlen_q, seqlen_k)
    torch.testing.assert_close(got, explicit(q, k, v, 0.3, hidden(seen)))
    assert got[0].dtype == got[1].dtype == torch.float64


@pytest.mark.parametrize("bias", ["input", "fp32", "bool"])
@pytest.mark.parametrize("aligned", [True, False])
@pytest.mark.parametrize("seed", [0, 1, 2])
def test_bias_is_that_of_sdpa(bias: str, aligned: bool, seed: int) -> None:
    problem = with_features(make_problem(mask="causal"), bias=bias, bias_aligned=aligned)
    q, k, v = random_inputs(problem, device="cpu", seed=seed)
    extras = random_extras(problem, device="cpu", seed=seed)
    assert extras.bias is not None
    added = hidden(extras.bias) if bias == "bool" else extras.bias.double()
    expected = explicit(q, k, v, 0.25, added + hidden(boolean_mask(problem.spec.mask, 9, 13)))
    torch.testing.assert_close(exact(problem, q, k, v, extras), expected)


@pytest.mark.parametrize("sizes", [(1, 1, 9, 13), (2, 1, 1, 13), (1, 4, 9, 1), (2, 4, 1, 1)], ids=str)
def test_bias_of_size_one_is_broadcast(sizes: tuple[int, ...]) -> None:
    problem = with_features(make_problem(), bias="fp32")
    q, k, v = random_inputs(problem, device="cpu", seed=0)
    bias = torch.randn(sizes, generator=torch.Generator().manual_seed(0))
    got = exact(problem, q, k, v, Extras(softmax_scale=0.25, bias=bias))
    torch.testing.assert_close(got, explicit(q, k, v, 0.25, bias.double().expand(2, 4, 9, 13)))


@pytest.mark.parametrize("seed", [0, 1])
def test_alibi_takes_slope_times_distance_off(seed: int) -> None:
    problem = with_features(make_problem(), alibi=True)
    q, k, v = random_inputs(problem, device="cpu", seed=0)
    extras = random_extras(problem, device="cpu", seed=seed)
    assert extras.alibi_slopes is not None
    slopes = extras.alibi_slopes.double().expand(2, 4)
    # Query 0 stands at key 4 and query 8 at key 12, the last.
    distance = (torch.arange(9)[:, None] + 4 - torch.arange(13)).abs()
    expected = explicit(q, k, v, 0.25, -slopes[:, :, None, None] * distance)
    torch.testing.assert_close(exact(problem, q, k, v, extras), expected)


@pytest.mark.parametrize("mask", ["full", "causal"])
def test_a_sink_is_one_more_key_of_value_zero(mask: str) -> None:
    problem = with_features(make_problem(13, 5, mask=mask), sinks=True)
    q, k, v = random_inputs(problem, device="cpu", seed=0)
    extras = random_extras(problem, device="cpu", seed=0)
    assert extras.sinks is not None
    seen = hidden(boolean_mask(problem.spec.mask, 13, 5)).expand(2, 4, 13, 5)
    column = extras.sinks.double()[None, :, None, None].expand(2, 4, 13, 1)
    longer_k, longer_v = (F.pad(x, (0, 0, 0, 1)) for x in (k, v))
    expected = explicit(q, longer_k, longer_v, 0.25, torch.cat([seen, column], dim=-1))
    got = exact(problem, q, k, v, extras)
    torch.testing.assert_close(got, expected)
    if mask == "causal":
        assert (got[0][:, :, :8] == 0).all()
        torch.testing.assert_close(got[1][:, :, 0], extras.sinks.double().expand(2, 4))


@pytest.mark.parametrize("precision", ["float64", "input"])
@pytest.mark.parametrize("seqlen_k", [0, 3])
def test_sinks_far_off_and_absent(precision: Precision, seqlen_k: int) -> None:
    problem = with_features(make_problem(5, seqlen_k, mask="causal", heads=(3, 3)), sinks=True)
    q, k, v = random_inputs(problem, device="cpu", seed=0)
    extras = Extras(softmax_scale=0.25, sinks=torch.tensor([-math.inf, 1e4, -1e4]))
    out, lse = attention_reference(q, k, v, spec=problem.spec, extras=extras, precision=precision)
    plain = attention_reference(
        q, k, v, spec=make_problem(mask="causal").spec, extras=Extras(softmax_scale=0.25), precision=precision
    )
    torch.testing.assert_close((out[:, 0], lse[:, 0]), (plain[0][:, 0], plain[1][:, 0]))
    assert (out[:, 1] == 0).all()
    assert (lse[:, 1] == 1e4).all()
    torch.testing.assert_close(out[:, 2], plain[0][:, 2])
    unseen = plain[1][:, 2] == -math.inf
    assert int(unseen.sum()) == 2 * (5 - seqlen_k)
    assert (lse[:, 2][unseen] == -1e4).all()


def test_softcap_bends_scores_before_the_bias() -> None:
    problem = with_features(make_problem(), softcap=True, bias="fp32")
    q, k, v = random_inputs(problem, device="cpu", seed=0)
    extras = dataclasses.replace(random_extras(problem, device="cpu", seed=2), softcap=1.5)
    assert extras.bias is not None
    scores = q.double() @ k.double().repeat_interleave(2, dim=1).transpose(2, 3) * 0.25
    bent = 1.5 * torch.tanh(scores / 1.5)
    expected = explicit(q, k, v, 0.25, bent - scores + extras.bias.double())
    torch.testing.assert_close(exact(problem, q, k, v, extras), expected)


def test_score_mod_and_mask_mod_are_those_of_flex_attention() -> None:
    masked = ModFunction(
        role="mask",
        source="return (kv_idx <= q_idx + 4) & (group[kv_idx] != h)",
        captures=(Capture(name="group", dtype="int32", axes=("kv_idx",)),),
    )
    problem = with_features(make_problem(mask=str(masked)), score_mod=SCORE_MOD)
    q, k, v = random_inputs(problem, device="cpu", seed=0)
    extras = random_extras(problem, device="cpu", seed=0, softmax_scale=0.3)
    group, slope, table = extras.captures
    block_mask = create_block_mask(
        lambda b, h, q_idx, kv_idx: (kv_idx <= q_idx + 4) & (group[kv_idx] != h), 2, 4, 9, 13, device="cpu"
    )
    out, aux = flex_attention(
        q.double(),
        k.double(),
        v.double(),
        score_mod=lambda score, b, h, q_idx, kv_idx: score + slope[h] * (q_idx - kv_idx) + table[b, kv_idx],
        block_mask=block_mask,
        scale=0.3,
        enable_gqa=True,
        return_aux=AuxRequest(lse=True),
    )
    torch.testing.assert_close(exact(problem, q, k, v, extras), (out, aux.lse.double()), atol=1e-6, rtol=1e-6)


@pytest.mark.parametrize("precision", ["float64", "input"])
def test_dropout_scales_what_it_keeps(precision: Precision) -> None:
    problem = with_features(make_problem(mask="causal"), dropout=True)
    q, k, v = random_inputs(problem, device="cpu", seed=0)
    extras = random_extras(problem, device="cpu", seed=0)
    assert extras.rng_state is not None
    heads = torch.arange(8).view(2, 4, 1, 1)
    kept = dropout_keep(extras.rng_state, extras.dropout_p, heads, torch.arange(9)[:, None], torch.arange(13))
    assert 0.7 < kept.double().mean().item() < 0.95
    k_all, v_all = (x.double().repeat_interleave(2, dim=1) for x in (k, v))
    scores = q.double() @ k_all.transpose(2, 3) * 0.25 + hidden(boolean_mask(problem.spec.mask, 9, 13))
    expected = (scores.softmax(dim=-1) * kept / (1 - 0.17)) @ v_all
    got = attention_reference(q, k, v, spec=problem.spec, extras=extras, precision=precision)
    torch.testing.assert_close(got[0].double(), expected, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(got[1].double(), scores.logsumexp(dim=-1), atol=1e-5, rtol=1e-5)
    nothing = dataclasses.replace(extras, dropout_p=1.0)
    assert (exact(problem, q, k, v, nothing)[0] == 0).all()


def test_descale_factors_belong_to_key_value_heads() -> None:
    problem = make_problem(dtype=DType.FP8, features=AttentionSpec(dtype=DType.FP32, head_dim_qk=16, head_dim_v=32))
    problem = with_features(problem, descale=True)
    q, k, v = random_inputs(problem, device="cpu", seed=0)
    extras = random_extras(problem, device="cpu", seed=0)
    assert extras.q_descale is not None
    assert extras.k_descale is not None
    assert extras.v_descale is not None
    full_q = q.double() * extras.q_descale.double().repeat_interleave(2, dim=1)[:, :, None, None]
    full_k, full_v = (
        x.double() * factor.double()[:, :, None, None] for x, factor in ((k, extras.k_descale), (v, extras.v_descale))
    )
    expected = explicit(full_q, full_k, full_v, 0.25, torch.zeros(9, 13, dtype=torch.float64))
    torch.testing.assert_close(exact(problem, q, k, v, extras), expected)


@pytest.mark.parametrize("seqused", ["", "q", "k", "qk"])
@pytest.mark.parametrize("mask", ["full", "causal", "sliding_window(3,2)"])
def test_packed_sequences_are_computed_one_by_one(seqused: str, mask: str) -> None:
    problem = with_features(make_problem(9, 14, mask=mask, batch=3), varlen=True, seqused=seqused, alibi=True)
    q, k, v = random_inputs(problem, device="cpu", seed=0)
    extras = random_extras(problem, device="cpu", seed=1)
    # Two rows before the first sequence, three after the last: they belong to none.
    q, k, v = (F.pad(x, (0, 0, 0, 0, 2, 3)) for x in (q, k, v))
    assert extras.cu_seqlens_q is not None
    assert extras.cu_seqlens_k is not None
    assert extras.alibi_slopes is not None
    extras = dataclasses.replace(
        extras, cu_seqlens_q=extras.cu_seqlens_q + 2, cu_seqlens_k=extras.cu_seqlens_k + 2, softmax_scale=0.3
    )
    out, lse = exact(problem, q, k, v, extras)
    assert out.shape == (q.shape[0], 4, 32)
    assert lse.shape == (4, q.shape[0])
    rest = torch.ones(q.shape[0], dtype=torch.bool)
    first_q = first_k = 2
    for b, (seqlen_q, seqlen_k) in enumerate(problem.lengths()):
        used_q = int(extras.seqused_q[b]) if extras.seqused_q is not None else seqlen_q
        used_k = int(extras.seqused_k[b]) if extras.seqused_k is not None else seqlen_k
        rows, keys = slice(first_q, first_q + used_q), slice(first_k, first_k + used_k)
        distance = (torch.arange(used_q)[:, None] + (used_k - used_q) - torch.arange(used_k)).abs()
        added = -extras.alibi_slopes[b].double()[:, None, None] * distance
        added = added + hidden(boolean_mask(problem.spec.mask, used_q, used_k))
        own = (q[rows], k[keys], v[keys])
        expected = explicit(*(x.transpose(0, 1).unsqueeze(0) for x in own), 0.3, added.unsqueeze(0))
        torch.testing.assert_close((out[rows].transpose(0, 1), lse[:, rows]), (expected[0][0], expected[1][0]))
        rest[rows] = False
        first_q, first_k = first_q + seqlen_q, first_k + seqlen_k
    assert int(rest.sum()) >= 5
    assert (out[rest] == 0).all()
    assert (lse[:, rest] == -math.inf).all()


def written_out(problem: Problem, q: Tensor, k: Tensor, v: Tensor, extras: Extras, b: int, h: int) -> Tensor:
    """One head of one dense batch entry, score by score, in Python's own floats: out beside lse."""
    spec, shape = problem.spec, problem.shape
    kv_head = h // shape.group
    seqlen_q = int(extras.seqused_q[b]) if extras.seqused_q is not None else shape.seqlen_q
    seqlen_k = int(extras.seqused_k[b]) if extras.seqused_k is not None else shape.seqlen_k
    mask, score_mod = extras.bound_mask(spec), extras.bound_score_mod(spec)
    rows = []
    for i in range(shape.seqlen_q):
        scores: dict[int, float] = {}
        for j in range(seqlen_k if i < seqlen_q else 0):
            at = Positions(b=b, h=h, q_idx=i, kv_idx=j, seqlen_q=seqlen_q, seqlen_k=seqlen_k, ops=torch)
            products = zip(q[b, h, i].tolist(), k[b, kv_head, j].tolist(), strict=True)
            score = extras.softmax_scale * sum(x * y for x, y in products)
            score = extras.softcap * math.tanh(score / extras.softcap)
            assert score_mod is not None
            numbers = {"b": b, "h": h, "q_idx": i, "kv_idx": j}
            score = float(score_mod.evaluate(torch, score=torch.tensor(score, dtype=torch.float64), **numbers))
            assert extras.bias is not None
            assert extras.alibi_slopes is not None
            slopes = extras.alibi_slopes if extras.alibi_slopes.ndim == 1 else extras.alibi_slopes[b]
            score += extras.bias[b, h, i, j].item() - slopes[h].item() * abs(i + seqlen_k - seqlen_q - j)
            if mask.sees(at):
                scores[j] = score
        assert extras.sinks is not None
        assert extras.rng_state is not None
        total = sum(map(math.exp, scores.values())) + (math.exp(extras.sinks[h].item()) if i < seqlen_q else 0.0)
        out = torch.zeros(spec.head_dim_v, dtype=torch.float64)
        for j, score in scores.items():
            place = (torch.tensor(b * shape.nheads_q + h), torch.tensor(i), torch.tensor(j))
            if dropout_keep(extras.rng_state, extras.dropout_p, *place):
                out += math.exp(score) / total / (1 - extras.dropout_p) * v[b, kv_head, j].double()
        rows.append(torch.cat([out, torch.tensor([math.log(total) if total else -math.inf], dtype=torch.float64)]))
    return torch.stack(rows)


@pytest.mark.parametrize("seed", [0, 1, 2, 3])
def test_everything_at_once_is_in_the_right_order(seed: int) -> None:
    problem = with_features(
        make_problem(6, 9, mask="document(batched)|global_tokens(1)"),
        **dict.fromkeys(("softcap", "alibi", "sinks", "dropout"), True),
        score_mod=SCORE_MOD,
        bias="fp32",
        seqused="qk",
    )
    q, k, v = random_inputs(problem, device="cpu", seed=seed)
    extras = dataclasses.replace(random_extras(problem, device="cpu", seed=seed), softcap=1.5)
    out, lse = exact(problem, q, k, v, extras)
    for b in range(2):
        for h in range(4):
            expected = written_out(problem, q, k, v, extras, b, h)
            torch.testing.assert_close(out[b, h], expected[:, :-1])
            torch.testing.assert_close(lse[b, h], expected[:, -1])


@pytest.mark.parametrize("varlen", [False, True])
@pytest.mark.parametrize("precision", ["float64", "input"])
def test_some_heads_are_those_of_all(varlen: bool, precision: Precision) -> None:
    mask = "document" if varlen else "document(batched)"
    problem = with_features(
        make_problem(7, 11, mask=mask, batch=3),
        **dict.fromkeys(("softcap", "alibi", "sinks", "dropout"), True),
        score_mod=SCORE_MOD,
        bias="input",
        seqused="qk",
        varlen=varlen,
    )
    q, k, v = random_inputs(problem, device="cpu", seed=0)
    extras = random_extras(problem, device="cpu", seed=1)
    heads = ((0, 3), (2, 0), (2, 1), (1, 2))
    whole = attention_reference(q, k, v, spec=problem.spec, extras=extras, precision=precision)
    some = attention_reference(q, k, v, spec=problem.spec, extras=extras, precision=precision, heads=heads)
    torch.testing.assert_close(some, pick_heads(*whole, heads, reference.entries_of(q, k, problem.spec, extras)))
    rows = sum(problem.lengths()[b][0] for b, _ in heads)
    assert some[0].shape == ((rows, 32) if varlen else (4, 7, 32))


@pytest.mark.parametrize("dtype", DType)
def test_rows_that_see_nothing_are_zero_at_input_precision(dtype: DType) -> None:
    problem = make_problem(9, 4, mask="causal", dtype=dtype)
    q, k, v = random_inputs(problem, device="cpu", seed=0)
    extras = Extras(softmax_scale=0.25)
    out, lse = attention_reference(q, k, v, spec=problem.spec, extras=extras, precision="input")
    assert out.dtype == getattr(torch, dtype.out.torch_name)
    assert lse.dtype == torch.float32
    assert (out[:, :, :5] == 0).all()
    assert (lse[:, :, :5] == -math.inf).all()
    assert out.isfinite().all()
    assert lse[:, :, 5:].isfinite().all()


@pytest.mark.parametrize("precision", ["float64", "input"])
@pytest.mark.parametrize("varlen", [False, True])
@pytest.mark.parametrize(("seqlen_q", "seqlen_k"), [(5, 0), (0, 5), (0, 0)])
def test_empty_lengths(precision: Precision, varlen: bool, seqlen_q: int, seqlen_k: int) -> None:
    problem = with_features(make_problem(seqlen_q, seqlen_k, mask="causal", dtype=DType.FP16), varlen=varlen)
    q, k, v = random_inputs(problem, device="cpu", seed=0)
    extras = random_extras(problem, device="cpu", seed=0)
    out, lse = attention_reference(q, k, v, spec=problem.spec, extras=extras, precision=precision)
    assert out.shape == (*q.shape[:-1], 32)
    assert (out == 0).all()
    assert lse.numel() * 32 == out.numel()
    assert (lse == -math.inf).all()


@pytest.mark.parametrize("precision", ["float64", "input"])
def test_chunks_of_rows_change_nothing(precision: Precision, monkeypatch: pytest.MonkeyPatch) -> None:
    problem = with_features(make_problem(29, 23, mask="causal"), bias="fp32", dropout=True, alibi=True)
    q, k, v = random_inputs(problem, device="cpu", seed=0)
    extras = random_extras(problem, device="cpu", seed=2)
    whole = attention_reference(q, k, v, spec=problem.spec, extras=extras, precision=precision)
    monkeypatch.setattr(reference, "MAX_SCORE_ELEMENTS", 4 * 23 * 3)
    parts = attention_reference(q, k, v, spec=problem.spec, extras=extras, precision=precision)
    torch.testing.assert_close(parts, whole)


def test_any_strides() -> None:
    problem = make_problem()
    inputs = random_inputs(problem, device="cpu", seed=0)
    strided = [x.transpose(1, 2).contiguous().transpose(1, 2) for x in inputs]
    assert not strided[0].is_contiguous()
    extras = Extras(softmax_scale=0.25)
    torch.testing.assert_close(exact(problem, *strided, extras), exact(problem, *inputs, extras))


@pytest.mark.parametrize(
    ("dtype", "least", "most"),
    [(DType.FP32, 1e-8, 1e-6), (DType.TF32, 1e-4, 4e-3), (DType.FP16, 1e-4, 2e-3), (DType.BF16, 1e-3, 2e-2)],
)
def test_input_precision_is_that_of_the_type(dtype: DType, least: float, most: float) -> None:
    problem = make_problem(40, 40, dtype=dtype)
    q, k, v = random_inputs(problem, device="cpu", seed=0)
    spec, extras = problem.spec, Extras(softmax_scale=0.25)
    rounded, _ = attention_reference(q, k, v, spec=spec, extras=extras, precision="input")
    error = (rounded.double() - exact(problem, q, k, v, extras)[0]).abs().max().item()
    assert least < error < most


def test_fp8_probabilities_of_long_rows_are_not_lost() -> None:
    problem = make_problem(4, 4000, dtype=DType.FP8)
    q, k, v = random_inputs(problem, device="cpu", seed=0)
    extras = Extras(softmax_scale=0.25)
    out, lse = attention_reference(q, k, v, spec=problem.spec, extras=extras, precision="input")
    expected_out, expected_lse = exact(problem, q, k, v, extras)
    assert out.dtype == torch.bfloat16
    error = (out.double() - expected_out).square().mean().sqrt() / expected_out.square().mean().sqrt()
    assert 1e-3 < error.item() < 5e-2
    torch.testing.assert_close(lse.double(), expected_lse, atol=1e-5, rtol=1e-5)


def test_tf32_rounds_to_nearest_even() -> None:
    ulp = 2.0**-10
    values = torch.tensor([1.0, 1 + 0.5 * ulp, 1 + 1.5 * ulp, 1 + 0.51 * ulp, -1 - 0.49 * ulp, 2 - 2**-20, 0.0, -3e-39])
    expected = torch.tensor([1.0, 1.0, 1 + 2 * ulp, 1 + ulp, -1.0, 2.0, 0.0, -3e-39])
    rounded = round_to_tf32(values)
    torch.testing.assert_close(rounded, expected, rtol=0, atol=2.0**-137)
    assert (rounded.view(torch.int32) & 0x1FFF == 0).all()
    assert round_to_tf32(torch.tensor([math.inf, -math.inf])).tolist() == [math.inf, -math.inf]


def test_shapes_that_do_not_belong_together() -> None:
    problem = make_problem()
    q, k, v = random_inputs(problem, device="cpu", seed=0)
    extras = Extras(softmax_scale=1.0)
    with pytest.raises(InputError, match="multiple of nheads_kv"):
        exact(problem, q[:, :3], k, v, extras)
    with pytest.raises(InputError, match="key length"):
        exact(problem, q, k, v[:, :, :3], extras)
    with pytest.raises(InputError, match="head_dim"):
        exact(problem, q[0], k, v, extras)
    with pytest.raises(InputError, match=r"\[tokens, heads, head_dim\]"):
        exact(with_features(problem, varlen=True), q, k, v, extras)


@pytest.mark.parametrize(
    ("feature", "value", "named"),
    [
        ("bias", "input", "bias"),
        ("alibi", True, "alibi_slopes"),
        ("sinks", True, "sinks"),
        ("dropout", True, "rng_state"),
        ("seqused", "qk", "seqused_q"),
        ("score_mod", SCORE_MOD, "captures 2"),
        ("softcap", True, "softcap"),
    ],
)
def test_what_the_spec_asks_for_must_be_given(feature: str, value: object, named: str) -> None:
    problem = with_features(make_problem(), **{feature: value})
    with pytest.raises(InputError, match=named):
        exact(problem, *random_inputs(problem, device="cpu", seed=0), Extras(softmax_scale=1.0))
