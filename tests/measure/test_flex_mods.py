"""The closures that FlexAttention gets, against the masks and scores that flashgen computes."""

from __future__ import annotations

import pytest
import torch

from flashgen.measure import random_extras
from flashgen.measure.flex_mods import flex_mask_mod, flex_score_mod
from flashgen.spec import AttentionSpec, DType, Positions, Problem, Shape, parse_mask, parse_problem

LENGTHS = ((17, 17), (9, 23), (23, 9))
MASKS = (
    "causal",
    "causal(align=top_left)",
    "sliding_window(3,0)",
    "sliding_window(-1,4)",
    "sliding_window(5,-1)",
    "prefix_lm(4)",
    "chunked(6)",
    "dilated_window(6,4,2)",
    "global_tokens(3)|sliding_window(2,2)",
    "causal&document",
    "document(batched)",
    "~chunked(4)|causal",
)


def problem_of(mask: str, seqlen_q: int, seqlen_k: int) -> Problem:
    spec = AttentionSpec(dtype=DType.FP32, head_dim_qk=16, head_dim_v=16, mask=parse_mask(mask))
    return Problem(spec=spec, shape=Shape(batch=2, seqlen_q=seqlen_q, seqlen_k=seqlen_k, nheads_q=3, nheads_kv=1))


@pytest.mark.parametrize("text", MASKS)
def test_mask_mod_sees_what_the_mask_sees(text: str) -> None:
    for seqlen_q, seqlen_k in LENGTHS:
        problem = problem_of(text, seqlen_q, seqlen_k)
        mask = random_extras(problem, device="cpu", seed=0).bound_mask(problem.spec)
        mask_mod = flex_mask_mod(mask, seqlen_q, seqlen_k)
        assert callable(mask_mod)
        b = torch.arange(2)[:, None, None]
        q_idx, kv_idx = torch.arange(seqlen_q)[:, None], torch.arange(seqlen_k)[None, :]
        at = Positions(q_idx=q_idx, kv_idx=kv_idx, seqlen_q=seqlen_q, seqlen_k=seqlen_k, b=b, ops=torch)
        shape = (2, seqlen_q, seqlen_k)
        expected = mask.sees(at).expand(shape)
        assert torch.equal(mask_mod(b, torch.tensor(0), q_idx, kv_idx).expand(shape), expected)


def test_no_mask_is_none() -> None:
    assert flex_mask_mod(parse_mask("full"), 4, 4) is None


def test_functions_are_refused_with_the_reason() -> None:
    answer = flex_mask_mod(parse_mask("causal&mask_mod('return h == 0')"), 4, 4)
    assert isinstance(answer, str)
    assert "no adapter" in answer


def test_scores_in_the_order_of_the_kernels() -> None:
    problem = parse_problem("b=2 hq=4 hkv=2 sq=5 sk=7 d=16 softcap alibi bias=fp32 fp32")
    extras = random_extras(problem, device="cpu", seed=1)
    score_mod = flex_score_mod(problem.spec, extras, 2)
    assert callable(score_mod)
    assert extras.bias is not None
    assert extras.alibi_slopes is not None
    score = torch.tensor(4.0)
    b, h, q_idx, kv_idx = (torch.tensor(i) for i in (1, 2, 3, 1))
    capped = extras.softcap * torch.tanh(score / extras.softcap)
    expected = capped + extras.bias[1, 2, 3, 1] - extras.alibi_slopes[1, 2] * 4
    assert torch.allclose(score_mod(score, b, h, q_idx, kv_idx), expected)


def test_plain_scores_need_no_function() -> None:
    problem = parse_problem("h=1 s=4 d=16 fp32")
    assert flex_score_mod(problem.spec, random_extras(problem, device="cpu", seed=0), 0) is None
