"""The rule lets a correct kernel pass at every dtype and catches planted faults."""

from __future__ import annotations

import dataclasses
import math

import pytest
import torch
from torch import Tensor

from flashgen.errors import InputError
from flashgen.measure import AccuracyReport, Oracle, accuracy_error, attention_reference, random_extras, random_inputs
from flashgen.spec import AttentionSpec, Causal, DType, Extras, Full, Mask, Positions, Problem, Shape, parse_problem

FULL = Full()
SCALE = Extras(softmax_scale=0.125)
LENGTHS = [(1, 1), (3, 3), (33, 193), (65, 127), (127, 40), (7, 0)]


def make_problem(dtype: DType, mask: Mask = FULL, seqlen_q: int = 96, seqlen_k: int = 130, group: int = 2) -> Problem:
    spec = AttentionSpec(dtype=dtype, head_dim_qk=64, head_dim_v=64, mask=mask, lse=True)
    shape = Shape(batch=2, seqlen_q=seqlen_q, seqlen_k=seqlen_k, nheads_q=2 * group, nheads_kv=2)
    return Problem(spec=spec, shape=shape)


def tiled_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: Mask,
    dtype: DType,
    scale: float = 0.125,
    *,
    shift: int = 0,
    block_n: int = 64,
) -> tuple[Tensor, Tensor]:
    """Compute as a kernel does: tiles, base-2 online softmax in float32, P rounded; `shift` moves the diagonal.

    tf32 operands are cut off as the matrix unit does, and fp8 probabilities are e4m3.
    """
    tf32 = dtype is DType.TF32
    q, k, v = ((cut_to_tf32(t) if tf32 else t) for t in (q, k, v))
    seqlen_q, seqlen_k = q.shape[2], k.shape[2]
    group = q.shape[1] // k.shape[1]
    k, v = k.float().repeat_interleave(group, dim=1), v.float().repeat_interleave(group, dim=1)
    acc = torch.zeros(*q.shape[:3], v.shape[3])
    m_i = torch.full(q.shape[:3], -math.inf)
    l_i = torch.zeros(q.shape[:3])
    q_idx = torch.arange(seqlen_q)[:, None] + shift
    for start in range(0, seqlen_k, block_n):
        tile = slice(start, start + block_n)
        scores = q.float() @ k[:, :, tile].float().transpose(2, 3) * (scale * math.log2(math.e))
        kv_idx = torch.arange(seqlen_k)[tile][None, :]
        at = Positions(q_idx=q_idx, kv_idx=kv_idx, seqlen_q=seqlen_q, seqlen_k=seqlen_k)
        scores = scores.masked_fill(~mask.sees(at), -math.inf)
        m_new = torch.maximum(m_i, scores.amax(dim=-1))
        m_safe = m_new.masked_fill(m_new == -math.inf, 0.0)
        p = torch.exp2(scores - m_safe.unsqueeze(-1))
        alpha = torch.exp2(m_i - m_safe)
        l_i = l_i * alpha + p.sum(dim=-1)
        weights = cut_to_tf32(p) if tf32 else p.to(q.dtype).float()
        acc = acc * alpha.unsqueeze(-1) + weights @ v[:, :, tile].float()
        m_i = m_new
    out = acc / l_i.masked_fill(l_i == 0, 1.0).unsqueeze(-1)
    return out.to(getattr(torch, dtype.out.torch_name)), m_i * math.log(2) + l_i.log()


def cut_to_tf32(tensor: Tensor) -> Tensor:
    return (tensor.contiguous().view(torch.int32) & ~0x1FFF).view(torch.float32)


class Case:
    """Inputs, and what a correct kernel makes of them."""

    def __init__(self, problem: Problem) -> None:
        self.spec = problem.spec
        self.q, self.k, self.v = random_inputs(problem, device="cpu", seed=1)
        self.out, self.lse = self.compute()

    def compute(self, *, shift: int = 0, seqlen_k: int | None = None) -> tuple[Tensor, Tensor]:
        keys, values = self.k[:, :, :seqlen_k], self.v[:, :, :seqlen_k]
        return tiled_attention(self.q, keys, values, self.spec.mask, self.spec.dtype, shift=shift)

    def judge(self, out: Tensor | None = None, lse: Tensor | None = None) -> AccuracyReport:
        return accuracy_error(
            self.out if out is None else out,
            self.lse if lse is None else lse,
            self.q,
            self.k,
            self.v,
            spec=self.spec,
            extras=SCALE,
        )


@pytest.mark.parametrize("dtype", DType)
@pytest.mark.parametrize("mask", [Full(), Causal(), Causal("top_left")], ids=str)
@pytest.mark.parametrize(("seqlen_q", "seqlen_k"), LENGTHS)
def test_a_correct_kernel_passes(dtype: DType, mask: Mask, seqlen_q: int, seqlen_k: int) -> None:
    report = Case(make_problem(dtype, mask, seqlen_q, seqlen_k)).judge()
    assert report.ok, report.reason
    assert report.reason == ""
    assert report.max_error <= report.allowed_error


@pytest.mark.parametrize("dtype", [DType.FP16, DType.BF16])
def test_one_ulp_passes_where_plain_pytorch_is_exact(dtype: DType) -> None:
    case = Case(make_problem(dtype, Full(), 5, 1))
    up = torch.nextafter(case.out, torch.full_like(case.out, math.inf))
    assert case.judge(out=up).ok
    assert not case.judge(out=case.out * 1.05).ok


@pytest.mark.parametrize("dtype", DType)
@pytest.mark.parametrize("mask", [Full(), Causal()], ids=str)
def test_a_wrong_factor_is_caught(dtype: DType, mask: Mask) -> None:
    case = Case(make_problem(dtype, mask))
    # Rounding probabilities to 4 bits alone is worth some percent.
    factor = 1.1 if dtype is DType.FP8 else 1.01
    report = case.judge(out=(case.out.float() * factor).to(case.out.dtype))
    assert not report.ok
    assert "out" in report.reason


@pytest.mark.parametrize("dtype", DType)
def test_one_wrong_element_is_caught_and_named(dtype: DType) -> None:
    case = Case(make_problem(dtype))
    case.out[1, 2, 40, 7] += 0.1
    report = case.judge()
    assert not report.ok
    assert "out[1, 2, 40, 7]" in report.reason
    assert "1 of " in report.reason
    assert report.max_error > 0.09 > report.allowed_error


@pytest.mark.parametrize("dtype", DType)
@pytest.mark.parametrize("shift", [-1, 1])
@pytest.mark.parametrize(("seqlen_q", "seqlen_k"), [(130, 130), (65, 127), (127, 40)])
def test_a_diagonal_one_off_is_caught(dtype: DType, shift: int, seqlen_q: int, seqlen_k: int) -> None:
    case = Case(make_problem(dtype, Causal(), seqlen_q, seqlen_k))
    out, _ = case.compute(shift=shift)
    assert not case.judge(out=out).ok


@pytest.mark.parametrize("dtype", DType)
def test_heads_swapped_within_a_group_are_caught(dtype: DType) -> None:
    case = Case(make_problem(dtype))
    assert not case.judge(out=case.out[:, [1, 0, 2, 3]]).ok


@pytest.mark.parametrize("dtype", DType)
def test_an_ignored_key_tail_is_caught(dtype: DType) -> None:
    case = Case(make_problem(dtype, Full(), 40, 66))
    out, _ = case.compute(seqlen_k=64)
    assert not case.judge(out=out).ok


def test_an_unwritten_tail_is_caught() -> None:
    case = Case(make_problem(DType.BF16))
    case.out[:, :, 95:] = math.nan
    report = case.judge()
    assert not report.ok
    assert report.max_error == math.inf
    assert "out[0, 0, 95, 0] is nan" in report.reason


@pytest.mark.parametrize("value", [math.inf, -math.inf])
def test_infinite_out_is_caught(value: float) -> None:
    case = Case(make_problem(DType.FP16))
    case.out[0, 1, 2, 3] = value
    assert "out[0, 1, 2, 3]" in case.judge().reason


@pytest.mark.parametrize("dtype", DType)
def test_lse_in_the_wrong_base_is_caught(dtype: DType) -> None:
    case = Case(make_problem(dtype))
    report = case.judge(lse=case.lse * math.log2(math.e))
    assert not report.ok
    assert report.reason.startswith("lse")


def test_lse_of_empty_rows_must_be_minus_infinity() -> None:
    case = Case(make_problem(DType.BF16, Causal(), 20, 5))
    assert case.judge().ok
    wrong = case.lse.masked_fill(case.lse == -math.inf, -1e30)
    assert "lse[0, 0, 0]" in case.judge(lse=wrong).reason
    assert not case.judge(lse=torch.full_like(case.lse, -math.inf)).ok
    assert not case.judge(lse=case.lse.masked_fill(case.lse == -math.inf, math.inf)).ok


def test_lse_is_optional() -> None:
    case = Case(make_problem(DType.BF16))
    assert accuracy_error(case.out, None, case.q, case.k, case.v, spec=case.spec, extras=SCALE).ok


def test_empty_rows_must_be_zero() -> None:
    case = Case(make_problem(DType.BF16, Full(), 7, 0))
    assert case.judge().ok
    assert not case.judge(out=case.out + 0.01).ok


def test_no_query_passes() -> None:
    case = Case(make_problem(DType.BF16, Causal(), 0, 9))
    report = case.judge()
    assert report.ok
    assert report.max_error == 0


def test_wrong_shapes_and_dtypes_are_refused() -> None:
    case = Case(make_problem(DType.BF16))
    with pytest.raises(InputError, match="out must be"):
        case.judge(out=case.out[:, :1])
    with pytest.raises(InputError, match="no accuracy rule"):
        accuracy_error(case.out, None, case.q.double(), case.k.double(), case.v.double(), spec=case.spec, extras=SCALE)


FEATURES = ["softcap", "alibi", "sinks", "dropout", "bias=input", "bias=fp32", "bias=bool", "seqused=q", "seqused=k"]


def forget(extras: Extras, feature: str) -> Extras:
    """The extras of a kernel that ignores a feature."""
    name = feature.partition("=")[0]
    if feature == "softcap":
        return dataclasses.replace(extras, softcap=1e6)
    if feature == "dropout":
        return dataclasses.replace(extras, dropout_p=0.0)
    if name == "seqused":
        assert extras.seqused_q is not None or extras.seqused_k is not None
        return dataclasses.replace(extras, **{f"seqused_{feature[-1]}": torch.full((2,), 1000, dtype=torch.int32)})
    field = {"alibi": "alibi_slopes", "sinks": "sinks", "bias": "bias"}[name]
    tensor = getattr(extras, field)
    neutral = {"sinks": -math.inf, "bias": feature == "bias=bool"}.get(name, 0.0)
    return dataclasses.replace(extras, **{field: torch.full_like(tensor, neutral)})


@pytest.mark.parametrize("dtype", DType)
@pytest.mark.parametrize("feature", FEATURES)
@pytest.mark.parametrize("layout", ["", "varlen"])
def test_a_forgotten_feature_is_caught(dtype: DType, feature: str, layout: str) -> None:
    problem = parse_problem(f"b=2 hq=4 hkv=2 sq=70 sk=90 d=64 causal {dtype} {layout} {feature} lse")
    q, k, v = random_inputs(problem, device="cpu", seed=0)
    extras = random_extras(problem, device="cpu", seed=0)
    oracle = Oracle(q, k, v, spec=problem.spec, extras=extras)
    right = attention_reference(q, k, v, spec=problem.spec, extras=extras, precision="input")
    assert oracle.judge(*right).ok
    wrong, _ = attention_reference(q, k, v, spec=problem.spec, extras=forget(extras, feature), precision="input")
    assert not oracle.judge(wrong, None).ok


@pytest.mark.parametrize("name", ["q_descale", "k_descale", "v_descale"])
def test_a_factor_of_another_head_is_caught(name: str) -> None:
    problem = parse_problem("b=2 hq=4 hkv=2 sq=70 sk=90 d=64 causal fp8 descale lse")
    q, k, v = random_inputs(problem, device="cpu", seed=0)
    extras = random_extras(problem, device="cpu", seed=0)
    swapped = dataclasses.replace(extras, **{name: getattr(extras, name).flip(1)})
    wrong, _ = attention_reference(q, k, v, spec=problem.spec, extras=swapped, precision="input")
    assert not accuracy_error(wrong, None, q, k, v, spec=problem.spec, extras=extras).ok


@pytest.mark.parametrize("dtype", DType)
@pytest.mark.parametrize("layout", ["", "varlen"])
def test_a_sample_of_heads_judges_whole_outputs(dtype: DType, layout: str) -> None:
    problem = parse_problem(f"b=3 hq=4 hkv=2 sq=20 sk=33 d=64 document&causal {dtype} {layout} dropout lse")
    q, k, v = random_inputs(problem, device="cpu", seed=0)
    extras = random_extras(problem, device="cpu", seed=0)
    out, lse = attention_reference(q, k, v, spec=problem.spec, extras=extras, precision="input")
    oracle = Oracle(q, k, v, spec=problem.spec, extras=extras, heads=((0, 0), (2, 1)))
    assert oracle.judge(out, lse).ok
    first = sum(seqlen_q for seqlen_q, _ in problem.lengths()[:2])
    sampled, other = (out[first + 6, 1], out[first + 6, 2]) if layout else (out[2, 1, 6], out[2, 2, 6])
    other[7] += 1
    assert oracle.judge(out, lse).ok
    sampled[7] += 1
    report = oracle.judge(out, lse)
    assert "out[b=2, h=1, 6, 7]" in report.reason
    with pytest.raises(InputError, match="out must be"):
        oracle.judge(out[:1], lse)


def test_the_factor_is_the_larger_one() -> None:
    errors = {}
    for words in ("", "softcap"):
        problem = parse_problem(f"b=1 hq=2 s=64 d=64 bf16 {words}")
        q, k, v = random_inputs(problem, device="cpu", seed=0)
        # A softcap of 1e6 changes nothing but the factor.
        extras = Extras(softmax_scale=0.125, softcap=1e6 if words else 0.0)
        out, _ = attention_reference(q, k, v, spec=problem.spec, extras=extras, precision="input")
        report = accuracy_error(out, None, q, k, v, spec=problem.spec, extras=extras)
        errors[words] = report.allowed_error - 2 * report.max_error
        error = report.max_error
    assert errors["softcap"] - errors[""] == pytest.approx(error, rel=0.01)
