"""What a call does not use has no say in its result: spoilt rows past what is used, neighbours, padding."""

from __future__ import annotations

import dataclasses
import itertools
import math
from collections.abc import Callable

import pytest
import torch

from flashgen.codegen import TritonForwardConfig
from flashgen.launch import interpret_forward
from flashgen.measure import random_extras, random_inputs
from flashgen.spec import Extras, Problem, parse_problem

CheckProblem = Callable[..., tuple[torch.Tensor, torch.Tensor | None]]
Inputs = tuple[torch.Tensor, torch.Tensor, torch.Tensor]

CONFIG = TritonForwardConfig(block_m=16, block_n=32, num_warps=1, num_stages=1)
LOADS = ("pointer", "descriptor")
MASKS = ("full", "causal", "sliding_window(9,3)", "document", "prefix_lm(5)", "mask_mod('return q_idx * 3 != kv_idx')")
GARBAGE = (math.nan, -math.inf)
FEATURES = ("", "softcap alibi sinks", "bias=fp32:unaligned", "score_mod('return score + 1.0')", "dropout")


def call(words: str, sq: int = 21, sk: int = 40, seed: int = 0) -> tuple[Problem, Inputs, Extras]:
    problem = parse_problem(f"b=3 hq=2 hkv=1 sq={sq} sk={sk} d=16 fp32 lse {words}")
    extras = random_extras(problem, device="cpu", seed=seed)
    return problem, random_inputs(problem, device="cpu", seed=seed), extras


def spoilt(tensor: torch.Tensor, rows: list[tuple[slice, int]], packed: bool, garbage: float) -> torch.Tensor:
    """Return a copy with garbage in the rows past what each batch entry uses of its own."""
    copy = tensor.clone()
    for b, (own, used) in enumerate(rows):
        part = copy[own].transpose(0, 1) if packed else copy[b]
        part[:, used:] = garbage
    return copy


def rows_of(used: torch.Tensor, cu_seqlens: torch.Tensor | None) -> list[tuple[slice, int]]:
    if cu_seqlens is None:
        return [(slice(None), int(n)) for n in used]
    starts = itertools.pairwise(cu_seqlens.tolist())
    return [(slice(a, b), int(n)) for (a, b), n in zip(starts, used, strict=True)]


@pytest.mark.parametrize("loads", LOADS)
@pytest.mark.parametrize("varlen", ["", "varlen"])
@pytest.mark.parametrize("mask", MASKS)
def test_keys_past_what_is_used(check_problem: CheckProblem, mask: str, varlen: str, loads: str) -> None:
    config = dataclasses.replace(CONFIG, loads=loads)
    problem, (q, k, v), extras = call(f"{mask} {varlen} seqused=k")
    assert extras.seqused_k is not None
    rows = rows_of(extras.seqused_k, extras.cu_seqlens_k)
    clean = check_problem(q, k, v, problem, config, extras)
    for garbage in GARBAGE:
        bad_k, bad_v = (spoilt(t, rows, bool(varlen), garbage) for t in (k, v))
        got = check_problem(q, bad_k, bad_v, problem, config, extras)
        assert all(torch.equal(a, b) for a, b in zip(clean, got, strict=True))


@pytest.mark.parametrize("loads", LOADS)
@pytest.mark.parametrize("features", FEATURES)
def test_keys_past_what_is_used_under_features(check_problem: CheckProblem, features: str, loads: str) -> None:
    problem, (q, k, v), extras = call(f"causal varlen seqused=qk {features}")
    assert extras.seqused_q is not None
    assert extras.seqused_k is not None
    keys, queries = rows_of(extras.seqused_k, extras.cu_seqlens_k), rows_of(extras.seqused_q, extras.cu_seqlens_q)
    config = dataclasses.replace(CONFIG, loads=loads)
    clean = check_problem(q, k, v, problem, config, extras)
    bad_q = spoilt(q, queries, True, math.nan)
    bad_k, bad_v = (spoilt(t, keys, True, math.nan) for t in (k, v))
    got = check_problem(bad_q, bad_k, bad_v, problem, config, extras)
    assert all(torch.equal(a, b) for a, b in zip(clean, got, strict=True))


@pytest.mark.parametrize("loads", LOADS)
@pytest.mark.parametrize("varlen", ["", "varlen"])
def test_nothing_is_used(check_problem: CheckProblem, varlen: str, loads: str) -> None:
    problem, (q, k, v), extras = call(f"causal {varlen} seqused=qk sinks")
    none = torch.zeros(3, dtype=torch.int32)
    some = torch.tensor([0, 9, 0], dtype=torch.int32)
    config = dataclasses.replace(CONFIG, loads=loads)
    for used_q, used_k in ((none, none), (some, none), (none, some), (some, some)):
        changed = dataclasses.replace(extras, seqused_q=used_q, seqused_k=used_k)
        rows = rows_of(used_k, extras.cu_seqlens_k)
        bad_k, bad_v = (spoilt(t, rows, bool(varlen), math.nan) for t in (k, v))
        check_problem(q, bad_k, bad_v, problem, config, changed)


@pytest.mark.parametrize("loads", LOADS)
@pytest.mark.parametrize("mask", MASKS)
def test_a_packed_sequence_does_not_reach_its_neighbours(check_problem: CheckProblem, mask: str, loads: str) -> None:
    config = dataclasses.replace(CONFIG, loads=loads)
    problem, (q, k, v), extras = call(f"{mask} varlen")
    assert extras.cu_seqlens_q is not None
    assert extras.cu_seqlens_k is not None
    clean, clean_lse = check_problem(q, k, v, problem, config, extras)
    assert clean_lse is not None
    for broken in range(3):
        bad = [t.clone() for t in (q, k, v)]
        for t, starts in zip(bad, (extras.cu_seqlens_q, extras.cu_seqlens_k, extras.cu_seqlens_k), strict=True):
            t[starts[broken] : starts[broken + 1]] = math.nan
        out, lse = _outputs(bad, problem, config, extras)
        first, last = extras.cu_seqlens_q[broken], extras.cu_seqlens_q[broken + 1]
        others = torch.ones(len(q), dtype=torch.bool)
        others[first:last] = False
        assert torch.equal(out[others], clean[others])
        assert torch.equal(lse[:, others], clean_lse[:, others])
        assert out[first:last].isnan().any()


def _outputs(
    tensors: list[torch.Tensor], problem: Problem, config: TritonForwardConfig, extras: Extras
) -> tuple[torch.Tensor, torch.Tensor]:
    q, k, v = tensors
    out, lse = interpret_forward(q, k, v, problem=problem, config=config, extras=extras)
    assert lse is not None
    return out, lse


@pytest.mark.parametrize("loads", LOADS)
def test_sequences_of_no_token_and_tokens_of_no_sequence(check_problem: CheckProblem, loads: str) -> None:
    # Empty ones first, in the middle and last; rows after the last belong to none.
    problem, (q, k, v), extras = call("causal varlen")
    lengths_q, lengths_k = (0, 13, 0, 7, 18, 0), (5, 0, 0, 17, 40, 0)
    starts_q, starts_k = (
        torch.tensor([0, *itertools.accumulate(lengths)], dtype=torch.int32) for lengths in (lengths_q, lengths_k)
    )
    shape = dataclasses.replace(problem.shape, batch=6, seqlen_q=18, seqlen_k=40)
    problem = dataclasses.replace(problem, shape=shape)
    extras = dataclasses.replace(extras, cu_seqlens_q=starts_q, cu_seqlens_k=starts_k)
    config = dataclasses.replace(CONFIG, loads=loads)
    used = q[: sum(lengths_q)], k[: sum(lengths_k)], v[: sum(lengths_k)]
    clean = check_problem(*used, problem, config, extras)
    k[sum(lengths_k) :], v[sum(lengths_k) :] = math.nan, math.nan
    got = check_problem(used[0], k, v, problem, config, extras)
    assert all(torch.equal(a, b) for a, b in zip(clean, got, strict=True))


@pytest.mark.parametrize("loads", LOADS)
@pytest.mark.parametrize("words", [*MASKS, "causal varlen", "causal seqused=k", "dilated_window(9,9,2)&chunked(20)"])
@pytest.mark.parametrize("dims", [(24, 40), (96, 80)], ids=str)
def test_padding_of_rows_and_columns(
    check_problem: CheckProblem, words: str, dims: tuple[int, int], loads: str
) -> None:
    # Inside tensors of NaN, with heads of two tiles too: tiles stick out of both ends of every row and column.
    problem = parse_problem(f"b=2 hq=2 hkv=1 sq=21 sk=35 d={dims[0]} dv={dims[1]} fp16 lse {words}")
    extras = random_extras(problem, device="cpu", seed=0)
    inputs = random_inputs(problem, device="cpu", seed=0)
    rows = 0 if problem.spec.varlen else 2

    def guarded(t: torch.Tensor) -> torch.Tensor:
        sizes = list(t.shape)
        sizes[rows] += 64
        sizes[-1] += 64
        whole = torch.full(sizes, math.nan, dtype=t.dtype)
        view = whole.narrow(rows, 0, t.shape[rows])[..., 16 : 16 + t.shape[-1]]
        return view.copy_(t)

    config = dataclasses.replace(CONFIG, loads=loads, head_tiles=2)
    clean = check_problem(*inputs, problem, config, extras)
    got = check_problem(*map(guarded, inputs), problem, config, extras)
    assert all(torch.equal(a, b) for a, b in zip(clean, got, strict=True))


@pytest.mark.parametrize("loads", LOADS)
def test_bias_beside_and_past_what_is_used(check_problem: CheckProblem, loads: str) -> None:
    for words in ("bias=fp32", "bias=fp32:unaligned", "bias=input:unaligned"):
        problem, (q, k, v), extras = call(f"full seqused=qk {words}", seed=2)
        assert extras.bias is not None
        assert extras.seqused_q is not None
        assert extras.seqused_k is not None
        bias = extras.bias.clone()
        for b in range(3):
            bias[b, :, int(extras.seqused_q[b]) :] = math.nan
            bias[b, :, :, int(extras.seqused_k[b]) :] = math.nan
        whole = torch.full((*bias.shape[:2], bias.shape[2] + 20, 80), math.nan, dtype=bias.dtype)
        view = whole[:, :, : bias.shape[2], 16 : 16 + bias.shape[3]]
        view.copy_(bias)
        config = dataclasses.replace(CONFIG, loads=loads)
        clean = check_problem(q, k, v, problem, config, extras)
        got = check_problem(q, k, v, problem, config, dataclasses.replace(extras, bias=view))
        assert all(torch.equal(a, b) for a, b in zip(clean, got, strict=True)), words
