"""The gradients' oracle against autograd through attention written out whole, and the rule on planted faults."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from flashgen.errors import InputError
from flashgen.measure import (
    AccuracyReport,
    GradientOracle,
    Gradients,
    dropout_keep,
    gradient_error,
    gradient_reference,
    gradients,
    poisoned_gradients,
    random_extras,
    random_inputs,
    random_lse_gradients,
    random_output_gradients,
)
from flashgen.spec import Extras, Positions, Problem, parse_problem

NAMES = ("dq", "dk", "dv", "dbias", "dsinks")
SHAPE = "b=2 hq=6 hkv=2 sq=9 sk=13 d=16 dv=24"
# Where a causal mask aligned to the top left hides a key, its derivative is not a number: infinity times 0.
BENT = "causal(align=top_left) score_mod('return (h + 1) * sqrt(where(kv_idx > q_idx, score * 0, score * score + 1))')"


@dataclasses.dataclass
class Call:
    """One call and its inputs."""

    problem: Problem
    extras: Extras
    q: Tensor
    k: Tensor
    v: Tensor
    dout: Tensor
    dlse: Tensor

    @classmethod
    def of(cls, text: str, seed: int = 0, **given: object) -> Call:
        problem = parse_problem(f"{text} backward")
        extras = dataclasses.replace(random_extras(problem, device="cpu", seed=seed), **given)  # type: ignore[arg-type]
        q, k, v = random_inputs(problem, device="cpu", seed=seed)
        dout = random_output_gradients(problem, device="cpu", seed=seed)
        dlse = random_lse_gradients(problem, device="cpu", seed=seed)
        return cls(problem, extras, q, k, v, dout, dlse)

    def reference(self, precision: str = "float64", heads: tuple[tuple[int, int], ...] | None = None) -> Gradients:
        return gradient_reference(
            self.q,
            self.k,
            self.v,
            self.dout,
            spec=self.problem.spec,
            extras=self.extras,
            precision=precision,  # type: ignore[arg-type]
            dlse=self.dlse,
            heads=heads,
        )

    def oracle(self, heads: tuple[tuple[int, int], ...] | None = None) -> GradientOracle:
        spec, extras = self.problem.spec, self.extras
        return GradientOracle(self.q, self.k, self.v, self.dout, spec=spec, extras=extras, dlse=self.dlse, heads=heads)

    def lengths(self) -> list[tuple[slice, slice]]:
        """Rows of queries and of keys of each batch entry that are used."""
        found, first_q, first_k = [], 0, 0
        for b, (seqlen_q, seqlen_k) in enumerate(self.problem.lengths()):
            used_q = seqlen_q if self.extras.seqused_q is None else int(self.extras.seqused_q[b])
            used_k = seqlen_k if self.extras.seqused_k is None else int(self.extras.seqused_k[b])
            found.append((slice(first_q, first_q + used_q), slice(first_k, first_k + used_k)))
            if self.problem.spec.varlen:
                first_q, first_k = first_q + seqlen_q, first_k + seqlen_k
        return found


def autograd(call: Call) -> Gradients:
    """Differentiate attention that is written out whole, entry by entry, in float64."""
    extras, varlen = call.extras, call.problem.spec.varlen
    q, k, v = (t.double().requires_grad_() for t in (call.q, call.k, call.v))
    sinks = None if extras.sinks is None else extras.sinks.double().requires_grad_()
    numbers = extras.bias is not None and extras.bias.dtype != torch.bool
    # Before it was broadcast: what autograd then sums is what dbias must be.
    bias = None
    if extras.bias is not None and numbers:
        own = tuple(slice(0, 1) if stride == 0 else slice(None) for stride in extras.bias.stride())
        bias = extras.bias[own].double().requires_grad_()
    loss = torch.zeros((), dtype=torch.float64)
    for b, (rows, keys) in enumerate(call.lengths()):
        entry = [t[part].transpose(0, 1) if varlen else t[b][:, part] for t, part in ((q, rows), (k, keys), (v, keys))]
        whole = None if bias is None else bias.expand(call.extras.bias.shape)[b]  # type: ignore[union-attr]
        out, lse = written_out(call, b, *entry, whole, sinks)
        dout = call.dout[rows].transpose(0, 1) if varlen else call.dout[b][:, rows]
        dlse = call.dlse[:, rows] if varlen else call.dlse[b][:, rows]
        loss = loss + (out * dout).sum() + (lse * dlse).sum()
    leaves = [t for t in (q, k, v, bias, sinks) if t is not None]
    found = torch.autograd.grad(loss, leaves, allow_unused=True, materialize_grads=True)
    by_leaf = dict(zip((id(leaf) for leaf in leaves), found, strict=True))
    dbias = by_leaf[id(bias)] if call.problem.spec.dbias else None
    dsinks = None if sinks is None else by_leaf[id(sinks)]
    return Gradients(dq=by_leaf[id(q)], dk=by_leaf[id(k)], dv=by_leaf[id(v)], dbias=dbias, dsinks=dsinks)


def written_out(
    call: Call, b: int, q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None, sinks: Tensor | None
) -> tuple[Tensor, Tensor]:
    """Out and lse [heads, rows] of one entry; 0 for rows that see nothing."""
    spec, extras = call.problem.spec, call.extras
    nheads, seqlen_q, seqlen_k = q.shape[0], q.shape[1], k.shape[1]
    k, v = (t.repeat_interleave(call.problem.shape.group, dim=0) for t in (k, v))
    heads, q_idx, kv_idx = torch.arange(nheads)[:, None, None], torch.arange(seqlen_q)[:, None], torch.arange(seqlen_k)
    at = {"b": torch.tensor(b), "h": heads, "q_idx": q_idx, "kv_idx": kv_idx}
    scores = q @ k.transpose(1, 2) * extras.softmax_scale
    if spec.softcap:
        scores = extras.softcap * torch.tanh(scores / extras.softcap)
    seen = torch.ones_like(scores, dtype=torch.bool)
    places = Positions(**at, seqlen_q=seqlen_q, seqlen_k=seqlen_k, ops=torch)
    seen = seen & torch.as_tensor(extras.bound_mask(spec).sees(places))
    if spec.bias == "bool":
        assert extras.bias is not None
        seen = seen & extras.bias[b][:, :seqlen_q, :seqlen_k]
    score_mod = extras.bound_score_mod(spec)
    if score_mod is not None:
        # Of hidden scores nothing must flow back, not even 0 times infinity.
        scores = score_mod.evaluate(torch, score=scores.where(seen, torch.ones(())), **at)
        scores = scores.where(seen, torch.zeros(()))
    if bias is not None:
        scores = scores + bias[:, :seqlen_q, :seqlen_k]
    if spec.alibi:
        assert extras.alibi_slopes is not None
        slopes = extras.alibi_slopes.double().expand(call.problem.shape.batch, -1)[b]
        scores = scores - slopes[:, None, None] * (q_idx + seqlen_k - seqlen_q - kv_idx).abs()
    scores = scores.masked_fill(~seen, -1e300)
    column = torch.full((nheads, seqlen_q, 1), -1e300, dtype=torch.float64)
    if sinks is not None:
        column = sinks[:, None, None].expand(-1, seqlen_q, -1)
    some = seen.any(dim=-1) | (sinks is not None)
    logits = torch.cat([scores, column], dim=-1)
    p = logits.softmax(dim=-1)[..., :-1] * seen
    if spec.dropout:
        assert extras.rng_state is not None
        kept = dropout_keep(extras.rng_state, extras.dropout_p, b * nheads + heads, q_idx, kv_idx)
        p = p * kept / (1 - extras.dropout_p)
    return p @ v, logits.logsumexp(dim=-1).where(some, torch.zeros(()))


def assert_equal(got: Gradients, expected: Gradients) -> None:
    for name in NAMES:
        tensor = getattr(got, name)
        assert (tensor is None) == (getattr(expected, name) is None), name
        if tensor is not None:
            torch.testing.assert_close(tensor, getattr(expected, name), atol=1e-11, rtol=1e-9, msg=name)


FEATURES = [
    "",
    "causal",
    "softcap",
    "alibi causal",
    "sinks",
    "sinks causal",
    "dropout",
    "bias=bool",
    "bias=input",
    "bias=fp32 dbias",
    "document(batched)&causal",
    "varlen causal sinks",
    "varlen bias=fp32 dbias dropout",
    "seqused=qk bias=fp32 dbias sinks",
    "varlen seqused=qk causal softcap",
    BENT,
    "score_mod('return score * slope[h] + table[kv_idx]', slope='float32[h]', table='float32[kv_idx]')",
    "score_mod('return 0.1 * (q_idx + kv_idx)')",
    f"{BENT} softcap bias=input:unaligned dbias alibi sinks dropout",
]


@pytest.mark.parametrize("features", FEATURES)
@pytest.mark.parametrize("lengths", ["", "sq=17 sk=5", "sq=1 sk=1", "sq=4 sk=0"])
def test_agrees_with_autograd(features: str, lengths: str) -> None:
    shape = SHAPE if not lengths else f"b=2 hq=6 hkv=2 {lengths} d=16 dv=24"
    call = Call.of(f"{shape} fp32 {features}")
    found = call.reference()
    assert found.dq.dtype == torch.float64
    assert_equal(found, autograd(call))


@pytest.mark.parametrize("features", FEATURES)
def test_blocks_of_rows_change_nothing(features: str, monkeypatch: pytest.MonkeyPatch) -> None:
    call = Call.of(f"{SHAPE} fp32 {features}", seed=1)
    whole = call.reference()
    monkeypatch.setattr(gradients, "MAX_GRADIENT_ELEMENTS", 6 * 13 * 2)
    assert_equal(call.reference(), whole)


@pytest.mark.parametrize("sizes", [(2, 6, 9, 13), (1, 6, 9, 13), (2, 1, 9, 13), (2, 6, 1, 13), (1, 1, 9, 1)], ids=str)
@pytest.mark.parametrize("expanded", [True, False])
def test_dbias_is_summed_where_the_bias_is_broadcast(sizes: tuple[int, ...], expanded: bool) -> None:
    bias = torch.randn(sizes, generator=torch.Generator().manual_seed(0))
    call = Call.of(f"{SHAPE} fp32 bias=fp32 dbias causal", bias=bias.expand(2, 6, 9, 13) if expanded else bias)
    expected = autograd(
        dataclasses.replace(call, extras=dataclasses.replace(call.extras, bias=bias.expand(2, 6, 9, 13)))
    )
    found = call.reference()
    assert found.dbias is not None
    assert found.dbias.shape == sizes
    assert_equal(found, expected)


@pytest.mark.parametrize("features", ["causal sinks", "varlen seqused=k", "bias=fp32 dbias dropout"])
def test_heads_alone_have_the_gradients_they_have_among_all(features: str) -> None:
    call = Call.of(f"b=3 hq=6 hkv=2 sq=9 sk=13 d=16 fp32 {features}", seed=2)
    whole, found = call.reference(), call.reference(heads=((2, 1), (0, 0)))
    if call.problem.spec.varlen:
        rows_q, rows_k = (
            [0, *torch.tensor(part).cumsum(0).tolist()] for part in zip(*call.problem.lengths(), strict=True)
        )
        dq = [whole.dq[rows_q[b] : rows_q[b + 1], h] for b, h in ((2, 3), (2, 4), (2, 5), (0, 0), (0, 1), (0, 2))]
        dk = [whole.dk[rows_k[b] : rows_k[b + 1], h] for b, h in ((2, 1), (0, 0))]
        expected = (torch.cat(dq), torch.cat(dk))
    else:
        expected = (torch.cat([whole.dq[2, 3:], whole.dq[0, :3]]), torch.stack([whole.dk[2, 1], whole.dk[0, 0]]))
    torch.testing.assert_close((found.dq, found.dk), expected)


@pytest.mark.parametrize("precision", ["float64", "input"])
def test_what_is_not_used_is_0_whatever_it_holds(precision: str) -> None:
    call = Call.of(f"{SHAPE} bf16 seqused=qk causal sinks bias=input dbias")
    lengths = call.lengths()
    for b, (rows, keys) in enumerate(lengths):
        for tensor, used in ((call.q, rows), (call.dout, rows), (call.dlse, rows), (call.k, keys), (call.v, keys)):
            tensor[b, :, used.stop :] = math.nan
    assert any(rows.stop < 9 for rows, _ in lengths)
    found = call.reference(precision)
    for name in NAMES:
        assert getattr(found, name).isfinite().all(), name
    for b, (rows, keys) in enumerate(lengths):
        assert (found.dq[b, :, rows.stop :] == 0).all()
        assert (found.dk[b, :, keys.stop :] == 0).all()


def test_a_gradient_of_lse_that_is_nan_where_nothing_is_seen_does_no_harm() -> None:
    call = Call.of("b=1 hq=2 hkv=2 sq=8 sk=3 d=16 fp32 causal")
    expected = call.reference()
    call.dlse[:, :, :5] = math.nan
    assert_equal(call.reference(), expected)


def test_plain_pytorch_returns_the_inputs_dtypes() -> None:
    call = Call.of(f"{SHAPE} bf16 bias=fp32 dbias sinks causal")
    found, exact = call.reference("input"), call.reference()
    assert [getattr(found, name).dtype for name in NAMES] == [torch.bfloat16] * 3 + [torch.float32] * 2
    for name in NAMES:
        error = (getattr(found, name).double() - getattr(exact, name)).square().mean().sqrt()
        share = error / getattr(exact, name).square().mean().sqrt()
        assert 1e-5 < share.item() < 2e-2, name


def test_where_autograd_is_off_no_derivative_is_taken_for_0() -> None:
    with torch.inference_mode(), pytest.raises(InputError, match="switched off here"):
        Call.of(f"{SHAPE} fp32 softcap").reference()


def test_wrong_calls_are_refused() -> None:
    call = Call.of(f"{SHAPE} fp32 bias=fp32 dbias")
    with pytest.raises(InputError, match="backward phase"):
        gradient_reference(
            call.q,
            call.k,
            call.v,
            call.dout,
            spec=call.problem.spec.forward(),
            extras=call.extras,
            precision="input",
        )
    with pytest.raises(InputError, match="dout must have the shape of out"):
        dataclasses.replace(call, dout=call.dout[..., :16]).reference()
    with pytest.raises(InputError, match="dlse must have the shape of lse"):
        dataclasses.replace(call, dlse=call.dlse[:1]).reference()
    found, oracle = call.reference(), call.oracle()
    with pytest.raises(InputError, match="dk must be"):
        oracle.judge(dataclasses.replace(found, dk=found.dq))
    with pytest.raises(InputError, match="dbias is missing"):
        oracle.judge(dataclasses.replace(found, dbias=None))
    with pytest.raises(InputError, match="dsinks is given"):
        oracle.judge(dataclasses.replace(found, dsinks=torch.zeros(6)))


@pytest.mark.parametrize("text", [f"{SHAPE} bf16", f"{SHAPE} fp16 varlen"])
def test_poisoned_gradients_have_the_form_of_the_inputs(text: str) -> None:
    problem = parse_problem(f"{text} backward")
    for tensor, poisoned in zip(
        random_inputs(problem, device="cpu", seed=0, layout="bshd"),
        poisoned_gradients(problem, device="cpu", layout="bshd"),
        strict=True,
    ):
        assert (poisoned.shape, poisoned.dtype, poisoned.stride()) == (tensor.shape, tensor.dtype, tensor.stride())
        assert poisoned.isnan().all()


JUDGED = "b=2 hq=6 hkv=2 sq=65 sk=90 d=64 causal"


def as_a_kernel(call: Call) -> Gradients:
    """Compute as a kernel does: float32, delta from the rounded out, P and dS rounded before their products."""
    dtype, exact = call.q.dtype, dataclasses.replace(call.extras)
    scale, group = exact.softmax_scale, call.problem.shape.group
    q, dout = call.q.float(), call.dout.float()
    k, v = (t.float().repeat_interleave(group, dim=1) for t in (call.k, call.v))
    scores = q @ k.transpose(2, 3) * scale
    if call.problem.spec.bias != "none":
        assert exact.bias is not None
        scores = scores + exact.bias.float()
    seqlen_q, seqlen_k = scores.shape[2:]
    hidden = torch.ones(seqlen_q, seqlen_k, dtype=torch.bool).triu(seqlen_k - seqlen_q + 1)
    scores = scores.masked_fill(hidden, -math.inf)
    lse = scores.logsumexp(dim=-1, keepdim=True)
    p = (scores - lse).exp().nan_to_num(0.0)
    rounded = p.to(dtype).float()
    out = (rounded @ v).to(dtype).float()
    delta = (dout * out).sum(dim=-1, keepdim=True) - call.dlse.unsqueeze(-1)
    ds = p * (dout @ v.transpose(2, 3) - delta)
    products = ds.to(dtype).float()
    dq = products @ k * scale
    dk, dv = (
        (weights.transpose(2, 3) @ rows).unflatten(1, (-1, group)).sum(dim=2) * factor
        for weights, rows, factor in ((products, q, scale), (rounded, dout, 1.0))
    )
    dbias = None
    if call.problem.spec.dbias:
        assert exact.bias is not None
        dbias = ds.sum(dim=[i for i in range(4) if exact.bias.stride(i) == 0], keepdim=True)
    return Gradients(dq=dq.to(dtype), dk=dk.to(dtype), dv=dv.to(dtype), dbias=dbias)


@pytest.mark.parametrize("dtype", ["bf16", "fp16", "fp32"])
@pytest.mark.parametrize(
    "lengths",
    ["sq=1 sk=1", "sq=3 sk=3", "sq=64 sk=1", "sq=65 sk=90", "sq=90 sk=33", "sq=1 sk=200", "sq=5 sk=0", "sq=0 sk=7"],
)
@pytest.mark.parametrize("seed", [0, 1])
def test_a_correct_kernel_passes(dtype: str, lengths: str, seed: int) -> None:
    call = Call.of(f"b=2 hq=6 hkv=2 {lengths} d=64 causal {dtype} bias=fp32 dbias", seed=seed)
    report = call.oracle().judge(as_a_kernel(call))
    assert report.ok, report.reason


@pytest.mark.parametrize("dtype", ["bf16", "fp16", "fp32", "tf32"])
@pytest.mark.parametrize("features", ["", "softcap", "varlen seqused=q sinks", "dropout bias=input dbias"])
def test_plain_pytorch_itself_passes(dtype: str, features: str) -> None:
    call = Call.of(f"{JUDGED} {dtype} {features}")
    report = call.oracle().judge(call.reference("input"))
    assert report.ok, report.reason
    assert 0 < report.max_error < report.allowed_error


def scaled_queries(found: Gradients) -> Gradients:
    return dataclasses.replace(found, dq=(found.dq.float() * 1.02).to(found.dq.dtype))


def swapped_rows(found: Gradients) -> Gradients:
    dv = found.dv.clone()
    dv[1, 0, [40, 41]] = dv[1, 0, [41, 40]]
    return dataclasses.replace(found, dv=dv)


def negated_bias(found: Gradients) -> Gradients:
    assert found.dbias is not None
    return dataclasses.replace(found, dbias=-found.dbias)


FAULTS: dict[str, tuple[Callable[[Gradients], Gradients], str]] = {
    "a wrong factor": (scaled_queries, "dq"),
    "two rows swapped": (swapped_rows, "dv[1, 0, 4"),
    "a wrong sign": (negated_bias, "dbias["),
}


@pytest.mark.parametrize("fault", FAULTS)
@pytest.mark.parametrize("dtype", ["bf16", "fp16", "fp32"])
def test_planted_faults_are_caught_and_named(fault: str, dtype: str) -> None:
    call = Call.of(f"{JUDGED} {dtype} bias=fp32 dbias")
    break_it, named = FAULTS[fault]
    report = call.oracle().judge(break_it(as_a_kernel(call)))
    assert not report.ok
    assert report.reason.startswith(named)


@pytest.mark.parametrize("dtype", ["bf16", "fp16", "fp32"])
def test_a_head_left_out_of_the_group_is_caught(dtype: str) -> None:
    call = Call.of(f"{JUDGED} {dtype}")
    found = as_a_kernel(call)
    call.dout[:, 5], call.dlse[:, 5] = 0, 0
    without = as_a_kernel(call)
    call = Call.of(f"{JUDGED} {dtype}")
    oracle = call.oracle()
    assert oracle.judge(dataclasses.replace(found, dk=without.dk)).reason.startswith("dk[")
    assert oracle.judge(dataclasses.replace(found, dv=without.dv)).reason.startswith("dv[")


@pytest.mark.parametrize("dtype", ["bf16", "fp16", "fp32"])
@pytest.mark.parametrize("forgotten", ["dlse", "dout"])
def test_a_forgotten_gradient_is_caught(dtype: str, forgotten: str) -> None:
    call = Call.of(f"{JUDGED} {dtype}")
    oracle = call.oracle()
    getattr(call, forgotten).zero_()
    assert not oracle.judge(as_a_kernel(call)).ok


@pytest.mark.parametrize("name", NAMES)
def test_nan_never_passes(name: str) -> None:
    call = Call.of(f"{JUDGED} bf16 bias=input dbias sinks")
    found = call.reference("input")
    oracle = call.oracle()
    assert oracle.judge(found).ok
    getattr(found, name).view(-1)[-1] = math.nan
    report = oracle.judge(found)
    assert report.reason.startswith(f"{name}[")
    assert report.max_error == math.inf


@pytest.mark.parametrize("name", ["dsinks", "dbias"])
def test_gradients_of_sinks_and_bias_are_judged(name: str) -> None:
    call = Call.of(f"{JUDGED} bf16 bias=input dbias sinks")
    found = call.reference("input")
    changed = dataclasses.replace(found, **{name: getattr(found, name) * 0.9})
    assert call.oracle().judge(changed).reason.startswith(name)
    assert call.oracle().judge(dataclasses.replace(found, dsinks=None)).ok


def judged_by(call: Call, found: Gradients) -> AccuracyReport:
    spec, extras = call.problem.spec, call.extras
    return gradient_error(found, call.q, call.k, call.v, call.dout, spec=spec, extras=extras, dlse=call.dlse)


def test_with_one_key_a_delta_from_the_rounded_out_passes_and_none_at_all_does_not() -> None:
    call = Call.of("b=2 hq=2 hkv=2 sq=40 sk=1 d=64 bf16")
    call.dlse.zero_()
    found = dataclasses.replace(call.reference("input"), dq=torch.zeros_like(call.q), dk=torch.zeros_like(call.k))
    assert judged_by(call, found).ok
    delta = (call.dout.float() * call.v.float()).sum(dim=-1, keepdim=True)
    out_error = (call.dout.float().abs() * call.v.float().abs()).sum(dim=-1, keepdim=True) * 2.0**-10
    for share, passes in ((out_error, True), (0.1 * delta, False)):
        dq = (share * call.k.float() * call.extras.softmax_scale).to(call.q.dtype)
        assert judged_by(call, dataclasses.replace(found, dq=dq)).ok == passes


@pytest.mark.parametrize("layout", ["", "varlen"])
def test_a_sample_of_heads_judges_whole_gradients(layout: str) -> None:
    call = Call.of(f"b=3 hq=4 hkv=2 sq=20 sk=33 d=64 causal bf16 sinks bias=input dbias {layout}", seed=2)
    found, oracle = call.reference("input"), call.oracle(heads=((0, 1), (1, 1), (2, 1)))
    assert oracle.judge(found).ok
    last_q, last_k = (sum(part) - 1 for part in zip(*call.problem.lengths(), strict=True))
    rows_q, rows_k = call.problem.lengths()[2]
    places: list[tuple[Tensor, int, str]] = [
        (found.dq, 3, f"dq[b=2, h=3, {rows_q - 1}, 5]"),
        (found.dk, 1, f"dk[b=2, h=1, {rows_k - 1}, 5]"),
        (found.dv, 1, f"dv[b=2, h=1, {rows_k - 1}, 5]"),
    ]
    for tensor, head, named in places:
        last = last_q if head == 3 else last_k
        own, other = ((last, h, 5) if layout else (2, h, -1, 5) for h in (head, 0))
        tensor[other] = math.nan
        assert oracle.judge(found).ok
        before = tensor[own].item()
        tensor[own] = before + 1
        assert named in oracle.judge(found).reason
        tensor[own] = before
    assert found.dbias is not None
    assert found.dsinks is not None
    found.dsinks[0], found.dbias[2, 1, 3, 4] = math.nan, math.nan
    assert oracle.judge(found).ok
    for tensor, index, named in (
        (found.dbias, (1, 2, 3, 4), "dbias[b=1, h=2, 3, 4]"),
        (found.dsinks, (3,), "dsinks[3]"),
    ):
        tensor[index] += 1
        assert named in oracle.judge(found).reason
        tensor[index] -= 1
