"""Inputs, awkward shapes and samples of heads."""

from __future__ import annotations

import pytest
import torch

from flashgen.errors import InputError
from flashgen.measure import (
    API_LENGTHS,
    accuracy_error,
    attention_reference,
    awkward_shapes,
    poisoned_empty,
    random_inputs,
    sampled_heads,
    take_heads,
)
from flashgen.spec import Causal, parse_problem

PROBLEM = parse_problem("b=2 hq=6 hkv=2 sq=12 sk=20 d=32 dv=16 causal fp16 lse")


@pytest.mark.parametrize(("block_m", "block_n"), [(16, 16), (64, 32), (128, 64), (128, 128)])
def test_awkward_shapes_hold_what_breaks_kernels(block_m: int, block_n: int) -> None:
    shapes = awkward_shapes(PROBLEM, block_m, block_n)
    lengths = [(s.seqlen_q, s.seqlen_k) for s in shapes]
    assert (1, 1) in lengths
    assert (block_m + 1, 2 * block_n - 1) in lengths
    assert any(0 < sk < block_n for _, sk in lengths[1:])
    assert any(sk == 0 for _, sk in lengths)
    assert any(sq > sk > 0 and sq > block_m for sq, sk in lengths)
    assert any(sk > sq and sk > block_n for sq, sk in lengths)
    assert any(sq % block_m == 0 and sk % block_n == 0 and sk > 0 for sq, sk in lengths)
    assert len(set(lengths)) == len(lengths)
    assert {s.group for s in shapes} == {3}
    assert max(s.batch * s.nheads_q * s.seqlen_q * s.seqlen_k for s in shapes) < 10_000_000


def test_awkward_shapes_keep_a_single_key_head_single() -> None:
    shapes = awkward_shapes(parse_problem("b=1 hq=8 hkv=1 s=4096 d=64"), 64, 64)
    assert {(s.nheads_q, s.nheads_kv) for s in shapes} == {(8, 1)}


def test_api_lengths_cover_both_directions() -> None:
    assert len(API_LENGTHS) == len(set(API_LENGTHS)) == 15
    assert (1, 1) in API_LENGTHS
    assert (1024, 1023) in API_LENGTHS


@pytest.mark.parametrize("layout", ["bhsd", "bshd"])
def test_random_inputs(layout: str) -> None:
    q, k, v = random_inputs(PROBLEM, device="cpu", seed=3, layout=layout)  # type: ignore[arg-type]
    assert [list(x.shape) for x in (q, k, v)] == [[2, 6, 12, 32], [2, 2, 20, 32], [2, 2, 20, 16]]
    assert q.dtype == torch.float16
    in_order = [x.transpose(1, 2) if layout == "bshd" else x for x in (q, k, v)]
    assert all(x.is_contiguous() for x in in_order)
    again = random_inputs(PROBLEM, device="cpu", seed=3, layout=layout)  # type: ignore[arg-type]
    assert torch.equal(q, again[0])
    other = random_inputs(PROBLEM, device="cpu", seed=4, layout=layout)  # type: ignore[arg-type]
    assert not torch.equal(q, other[0])
    assert 0.9 < q.float().std().item() < 1.1


def test_poisoned_outputs_are_nan_in_either_layout() -> None:
    out = poisoned_empty((2, 6, 12, 16), torch.bfloat16, "cpu", layout="bshd")
    assert out.shape == (2, 6, 12, 16)
    assert out.transpose(1, 2).is_contiguous()
    assert out.isnan().all()
    assert poisoned_empty((2, 6, 12), torch.float32, "cpu").isnan().all()
    with pytest.raises(InputError, match="layout"):
        poisoned_empty((2, 6, 12), torch.float32, "cpu", layout="bshd")


def test_sampled_heads_hold_first_and_last() -> None:
    pairs = sampled_heads(8, 16, 5, seed=0)
    assert len(pairs) == len(set(pairs)) == 5
    assert pairs[0] == (0, 0)
    assert pairs[-1] == (7, 15)
    assert pairs == sampled_heads(8, 16, 5, seed=0)
    assert pairs != sampled_heads(8, 16, 5, seed=1)
    assert sampled_heads(1, 3, 8, seed=0) == ((0, 0), (0, 1), (0, 2))
    assert sampled_heads(1, 1, 2, seed=0) == ((0, 0),)
    with pytest.raises(InputError, match="at least 2"):
        sampled_heads(2, 2, 1, seed=0)


def test_taken_heads_are_a_problem_of_their_own() -> None:
    q, k, v = random_inputs(PROBLEM, device="cpu", seed=3, layout="bshd")
    out, lse = attention_reference(q, k, v, mask=Causal(), softmax_scale=0.2, precision="input")
    sample = take_heads(sampled_heads(2, 6, 4, seed=2), q, k, v, out, lse)
    assert sample.q.shape == (4, 1, 12, 32)
    assert sample.k.shape == (4, 1, 20, 32)
    report = accuracy_error(sample.out, sample.lse, sample.q, sample.k, sample.v, mask=Causal(), softmax_scale=0.2)
    assert report.ok, report.reason
    assert take_heads(((0, 1),), q, k, v, out, None).lse is None
