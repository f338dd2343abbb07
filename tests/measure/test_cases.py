"""Inputs, what goes with them, awkward shapes and samples of heads."""

from __future__ import annotations

import pytest
import torch

from flashgen.errors import InputError
from flashgen.measure import (
    API_LENGTHS,
    awkward_shapes,
    count_visible,
    poisoned_empty,
    poisoned_outputs,
    random_extras,
    random_inputs,
    sampled_heads,
)
from flashgen.spec import Extras, Positions, Problem, parse_problem

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


FEATURES = (
    "b=3 hq=6 hkv=2 sq=12 sk=20 d=32 {mask} bf16 lse softcap alibi sinks dropout bias=input seqused=qk "
    "score_mod('return score + slope[h] + table[b,q_idx]', slope='float32[h]', table='bfloat16[b,q_idx]')"
)


def test_packed_inputs_have_the_lengths_of_the_problem() -> None:
    problem = parse_problem("b=3 hq=6 hkv=2 sq=12 sk=20 d=32 dv=16 varlen fp16 lse")
    tokens_q, tokens_k = (sum(lengths) for lengths in zip(*problem.lengths(), strict=True))
    q, k, v = random_inputs(problem, device="cpu", seed=0)
    assert [list(x.shape) for x in (q, k, v)] == [[tokens_q, 6, 32], [tokens_k, 2, 32], [tokens_k, 2, 16]]
    extras = random_extras(problem, device="cpu", seed=0)
    for starts, column in ((extras.cu_seqlens_q, 0), (extras.cu_seqlens_k, 1)):
        assert starts is not None
        assert starts.dtype == torch.int32
        assert starts.diff().tolist() == [lengths[column] for lengths in problem.lengths()]
    out, lse = poisoned_outputs(problem, device="cpu")
    assert lse is not None
    assert out.shape == (tokens_q, 6, 16)
    assert lse.shape == (6, tokens_q)
    assert out.isnan().all()
    assert lse.isnan().all()


def test_fp8_inputs_are_normal_numbers_and_out_is_bf16() -> None:
    problem = parse_problem("b=2 hq=4 s=64 d=32 fp8 descale")
    q, _, _ = random_inputs(problem, device="cpu", seed=0)
    assert q.dtype == torch.float8_e4m3fn
    assert 0.9 < q.float().std().item() < 1.1
    out, lse = poisoned_outputs(problem, device="cpu", layout="bshd")
    assert out.dtype == torch.bfloat16
    assert out.transpose(1, 2).is_contiguous()
    assert lse is None
    extras = random_extras(problem, device="cpu", seed=0)
    for factors in (extras.q_descale, extras.k_descale, extras.v_descale):
        assert factors is not None
        assert factors.shape == (2, 4)
        assert 0.5 <= factors.min().item() < factors.max().item() <= 2.0


def test_extras_hold_what_the_spec_asks_for_and_nothing_else() -> None:
    bare = random_extras(PROBLEM, device="cpu", seed=0, softmax_scale=0.5)
    assert bare == Extras(softmax_scale=0.5)
    problem = parse_problem(FEATURES.format(mask="document(batched)&causal"))
    extras = random_extras(problem, device="cpu", seed=2)
    assert extras.softmax_scale == problem.spec.default_scale
    assert extras.softcap > 0
    assert extras.dropout_p == 0.17
    assert extras.rng_state is not None
    assert extras.rng_state.dtype == torch.int64
    assert extras.bias is not None
    assert extras.bias.dtype == torch.bfloat16
    assert extras.bias.shape == (3, 6, 12, 20)
    assert extras.sinks is not None
    assert extras.sinks.shape == (6,)
    assert extras.seqused_q is not None
    assert extras.seqused_k is not None
    assert all(6 <= used <= 12 for used in extras.seqused_q.tolist())
    assert all(10 <= used <= 20 for used in extras.seqused_k.tolist())
    shapes = [(list(t.shape), t.dtype) for t in extras.captures]
    assert shapes == [
        ([3, 12], torch.int32),
        ([3, 20], torch.int32),
        ([6], torch.float32),
        ([3, 12], torch.bfloat16),
    ]
    assert all(t.is_contiguous() for t in extras.captures)
    again = random_extras(problem, device="cpu", seed=2)
    other = random_extras(problem, device="cpu", seed=3)
    assert torch.equal(extras.captures[3], again.captures[3])
    assert not torch.equal(extras.captures[3], other.captures[3])


def test_the_seed_picks_the_forms() -> None:
    problem = parse_problem("b=3 hq=6 hkv=2 sq=12 sk=20 d=32 alibi bias=fp32")
    made = [random_extras(problem, device="cpu", seed=seed) for seed in range(3)]
    strides = [extras.bias.stride() for extras in made if extras.bias is not None]
    assert [[stride == 0 for stride in of_bias[:2]] for of_bias in strides] == [
        [True, False],
        [False, True],
        [False, False],
    ]
    assert [extras.alibi_slopes.ndim for extras in made if extras.alibi_slopes is not None] == [1, 2, 1]


@pytest.mark.parametrize("kind", ["input", "fp32", "bool"])
@pytest.mark.parametrize("seqlen_k", [1, 16, 20, 23, 24])
def test_alignment_of_the_bias(kind: str, seqlen_k: int) -> None:
    text = f"b=2 hq=2 sq=5 sk={seqlen_k} d=32 bias={kind}"
    aligned, unaligned = (
        random_extras(parse_problem(text + end), device="cpu", seed=2).bias for end in ("", ":unaligned")
    )
    assert aligned is not None
    assert unaligned is not None
    assert aligned.stride(-1) == unaligned.stride(-1) == 1
    assert all(stride * aligned.element_size() % 16 == 0 for stride in aligned.stride()[:3])
    assert aligned.data_ptr() % 16 == 0
    assert unaligned.stride(2) % 8
    assert unaligned.storage_offset() == 1
    if kind == "bool":
        assert aligned.dtype == torch.bool
        assert 0.5 < aligned.double().mean().item() < 1


@pytest.mark.parametrize("mask", ["document", "document(batched)"])
@pytest.mark.parametrize(("seqlen_q", "seqlen_k"), [(300, 300), (200, 400)])
def test_documents_are_a_few_and_in_order(mask: str, seqlen_q: int, seqlen_k: int) -> None:
    problem = parse_problem(f"b=2 hq=2 sq={seqlen_q} sk={seqlen_k} d=32 {mask}")
    q_ids, kv_ids = random_extras(problem, device="cpu", seed=0).captures
    assert q_ids.shape == ((2, seqlen_q) if "batched" in mask else (seqlen_q,))
    assert (q_ids.diff(dim=-1) >= 0).all()
    assert (kv_ids.diff(dim=-1) >= 0).all()
    assert 3 <= len(kv_ids.unique()) <= 4
    assert torch.equal(q_ids, kv_ids if seqlen_q == seqlen_k else kv_ids[..., ::2])


def visible_by_hand(problem: Problem, extras: Extras) -> int:
    mask, count = extras.bound_mask(problem.spec), 0
    for b, (seqlen_q, seqlen_k) in enumerate(problem.lengths()):
        used_q = seqlen_q if extras.seqused_q is None else int(extras.seqused_q[b])
        used_k = seqlen_k if extras.seqused_k is None else int(extras.seqused_k[b])
        for h in range(problem.shape.nheads_q):
            for index in range(used_q * used_k):
                i, j = divmod(index, used_k)
                at = Positions(q_idx=i, kv_idx=j, seqlen_q=used_q, seqlen_k=used_k, b=b, h=h, ops=torch)
                count += bool(mask.sees(at))
    return count


@pytest.mark.parametrize(
    "words",
    [
        "full",
        "causal seqused=qk",
        "causal varlen",
        "document&causal",
        "document(batched) varlen seqused=k",
        "mask_mod('return kv_idx <= q_idx + h * kind[b]', kind='int32[b]')",
    ],
)
def test_visible_pairs_are_counted(words: str) -> None:
    problem = parse_problem(f"b=2 hq=3 sq=7 sk=9 d=32 {words}")
    extras = random_extras(problem, device="cpu", seed=0)
    counted = count_visible(problem.spec, problem.shape, extras)
    assert counted == visible_by_hand(problem, extras) > 0
