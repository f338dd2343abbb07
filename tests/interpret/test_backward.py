"""The backward kernels in Triton's interpreter: masks, lengths, dimensions, groups, features, what is not used."""

from __future__ import annotations

import dataclasses
import itertools
import math
import typing
import warnings
from collections.abc import Callable

import pytest
import torch

from flashgen.codegen import TritonBackwardConfig
from flashgen.codegen.constraints import check_config
from flashgen.measure import attention_reference
from flashgen.spec import Extras, Problem, parse_problem
from flashgen.target import named_target

Tensors = dict[str, torch.Tensor]
# Words of a problem after its sizes, a config, the seed; returns what was given and what came out.
Check = Callable[..., tuple[Tensors, Tensors]]

OWN = TritonBackwardConfig(
    block_m1=16, block_n1=32, num_warps=1, num_stages=1, block_m2=32, block_n2=16, num_warps2=1, num_stages2=1
)
ADDED = TritonBackwardConfig(block_m1=32, block_n1=16, num_warps=1, num_stages=1, dq="atomic")
CONFIGS = {
    "kernel": OWN,
    "kernel descriptor": dataclasses.replace(OWN, loads="descriptor"),
    "kernel single": dataclasses.replace(OWN, loops="single"),
    "atomic": ADDED,
    "atomic descriptor": dataclasses.replace(ADDED, loads="descriptor"),
    "atomic single descriptor": dataclasses.replace(ADDED, loads="descriptor", loops="single"),
    "ordered": dataclasses.replace(ADDED, dq="ordered"),
    "ordered descriptor single": dataclasses.replace(ADDED, dq="ordered", loads="descriptor", loops="single"),
}
TARGET = named_target("sm_90")
MASKS = (
    "full", "causal", "causal(align=top_left)", "sliding_window(9,3)", "sliding_window(12,-1)", "sliding_window(-1,7)",
    "prefix_lm(20)", "chunked(24)", "dilated_window(20,9,3)", "global_tokens(4)|sliding_window(8,8)",
    "document(batched)", "causal&document", "prefix_lm(30)&sliding_window(40,9)", "~causal",
    "mask_mod('return (q_idx + kv_idx) // 3 % 2 == h % 2')",
    "mask_mod('return t[b, q_idx] < u[kv_idx]', t='float32[b,q_idx]', u='float32[kv_idx]')",
)  # fmt: skip
LENGTHS = ((1, 1), (3, 3), (65, 130), (70, 3), (33, 97), (130, 64))
FEATURES = (
    "softcap",
    "alibi",
    "sinks",
    "dropout",
    "bias=input dbias",
    "bias=fp32:unaligned dbias",
    "bias=bool",
    "score_mod('return tanh(score / 4.0) * 4.0 + r[h, q_idx - kv_idx]', r='float32[h,any]')",
    "softcap score_mod('return where(kv_idx % 3 == b, score * score, score)')",
    "softcap alibi sinks dropout bias=fp32 dbias",
)


def legal_configs(words: str) -> list[TritonBackwardConfig]:
    """Return the configs that a problem may have; never none."""
    problem = parse_problem(f"{words} backward")
    found = [config for config in CONFIGS.values() if not check_config(config, problem.spec, TARGET)]
    assert found
    return found


def hold(
    backward_product: typing.Any, problem: Problem, config: TritonBackwardConfig, given: Tensors, extras: Extras
) -> Tensors:
    """Return the gradients of one call, which are right."""
    got = backward_product.interpreted(problem, config, given, extras)
    reason = backward_product.judge(problem, given, extras, got)
    assert not reason, f"{reason}\n{problem} with {config}"
    return got


@pytest.fixture
def check(backward_product: typing.Any) -> Check:
    """A function that interprets one problem, holds it to the accuracy rule and returns what was given and came out."""

    def checked(words: str, config: TritonBackwardConfig, *, seed: int = 0) -> tuple[Tensors, Tensors]:
        problem = parse_problem(f"{words} backward")
        given, extras = backward_product.call_of(problem, ("dense",) * 3, "cpu", seed)
        return given, hold(backward_product, problem, config, given, extras)

    return checked


@pytest.mark.parametrize("mask", MASKS)
def test_masks(check: Check, mask: str) -> None:
    words = f"b=2 hq=2 hkv=1 sq=33 sk=50 d=16 fp32 {mask}"
    # Another half of them for the next mask.
    for seed, config in enumerate(legal_configs(words)[MASKS.index(mask) % 2 :: 2]):
        check(words, config, seed=seed)


@pytest.mark.parametrize("lengths", LENGTHS, ids=str)
@pytest.mark.parametrize("mask", ["causal", "sliding_window(9,3)"])
def test_lengths(check: Check, mask: str, lengths: tuple[int, int]) -> None:
    words = f"b=1 h=1 sq={lengths[0]} sk={lengths[1]} d=16 fp32 {mask}"
    configs = legal_configs(words)
    for config in configs[LENGTHS.index(lengths) % 2 :: 2]:
        check(words, config)


@pytest.mark.parametrize("offset", [-33, -32, -17, -16, -1, 0, 1, 15, 16, 17, 32])
def test_lengths_at_the_edges_of_tiles(check: Check, offset: int) -> None:
    # Where the diagonal lies decides which loop has a tile, or none.
    for name in ("kernel", "ordered"):
        check(f"b=1 h=1 sq=48 sk={48 + offset} d=16 fp32 causal", CONFIGS[name])


@pytest.mark.parametrize("name", ["kernel", "atomic", "ordered descriptor single"])
@pytest.mark.parametrize("group", [1, 3, 6])
def test_groups_and_tile_orders(check: Check, group: int, name: str) -> None:
    for head_group, batch in ((2, 2), (3, 1), (16, 1)):
        config = dataclasses.replace(CONFIGS[name], head_group=head_group)
        check(f"b={batch} hq={2 * group} hkv=2 sq=20 sk=35 d=16 fp32 causal", config)


@pytest.mark.parametrize("name", ["kernel", "kernel descriptor", "atomic", "atomic descriptor"])
@pytest.mark.parametrize("dims", [(80, 80), (96, 96), (24, 40), (128, 64), (16, 72)], ids=str)
def test_head_dimensions(check: Check, dims: tuple[int, int], name: str) -> None:
    check(f"b=1 hq=2 hkv=1 sq=21 sk=37 d={dims[0]} dv={dims[1]} fp32 causal", CONFIGS[name])


@pytest.mark.parametrize("name", ["kernel", "atomic descriptor", "ordered"])
@pytest.mark.parametrize("dtype", ["fp16", "bf16", "tf32"])
def test_dtypes(check: Check, dtype: str, name: str) -> None:
    given, got = check(f"b=1 hq=2 hkv=1 sq=33 sk=47 d=32 {dtype} causal bias=input dbias", CONFIGS[name])
    assert {got[name].dtype for name in ("dq", "dk", "dv")} == {given["q"].dtype}
    assert got["dbias"].dtype == torch.float32


@pytest.mark.parametrize("features", FEATURES)
def test_features(check: Check, features: str) -> None:
    for seed, (mask, name) in enumerate([("causal", "kernel"), ("full", "atomic descriptor"), ("document", "kernel")]):
        # The seed says whether a bias is one for all batch entries, or for all heads.
        check(f"b=2 hq=2 hkv=1 sq=20 sk=45 d=16 fp32 {mask} {features}", CONFIGS[name], seed=seed)


@pytest.mark.parametrize("seqused", ["", "seqused=q", "seqused=k", "seqused=qk"])
@pytest.mark.parametrize("varlen", ["", "varlen"])
@pytest.mark.parametrize("mask", ["full", "causal", "sliding_window(9,3)", "document"])
def test_packed_and_partly_used(check: Check, mask: str, varlen: str, seqused: str) -> None:
    words = f"b=3 hq=2 hkv=1 sq=33 sk=40 d=16 fp32 {mask} {varlen} {seqused}"
    configs = [config for config in legal_configs(words) if config.loads == "pointer"]
    # Each of them somewhere; the random calls have the rest.
    check(words, configs[(len(seqused) + len(mask) + len(varlen)) % len(configs)])


@pytest.mark.parametrize("name", ["kernel", "ordered"])
@pytest.mark.parametrize("features", FEATURES)
def test_features_of_packed_sequences(check: Check, features: str, name: str) -> None:
    check(f"b=3 hq=2 hkv=1 sq=21 sk=33 d=16 fp32 causal varlen seqused=qk {features}", CONFIGS[name])


@pytest.mark.parametrize("name", CONFIGS)
def test_what_sees_nothing_has_no_gradient(check: Check, name: str) -> None:
    # The first rows see no key.
    given, got = check("b=1 hq=2 hkv=1 sq=70 sk=30 d=16 fp32 causal", CONFIGS[name])
    blind = given["lse"] == -math.inf
    assert blind.any()
    assert given["dlse"][blind].isnan().all()
    assert not got["dq"][blind].any()
    # Nobody sees the last keys.
    _, got = check("b=1 hq=2 hkv=1 sq=30 sk=70 d=16 fp32 causal(align=top_left)", CONFIGS[name])
    assert not got["dk"][:, :, 30:].any()
    assert not got["dv"][:, :, 30:].any()


@pytest.mark.parametrize("name", ["kernel", "atomic descriptor", "ordered"])
def test_nobody_sees_anything(check: Check, name: str) -> None:
    # By a formula, and by an empty table.
    for mask in ("causal&sliding_window(-1,3)", "~full"):
        words = f"b=1 hq=2 hkv=1 sq=40 sk=20 d=16 fp32 {mask}"
        if CONFIGS[name] in legal_configs(words):
            given, got = check(words, CONFIGS[name])
            blind = given["lse"] == -math.inf
            assert blind.sum() >= 40
            assert not got["dq"][blind].any()


@pytest.mark.parametrize("name", ["kernel", "kernel single", "atomic", "ordered"])
@pytest.mark.parametrize("sizes", ["b=1 h=2 sq=0 sk=5", "b=1 h=2 sq=5 sk=0", "b=0 h=2 s=5"])
def test_no_rows_or_no_keys(check: Check, sizes: str, name: str) -> None:
    # By pointers alone: a descriptor of nothing cannot be made.
    given, got = check(f"{sizes} d=16 fp32 causal", CONFIGS[name])
    assert [got[f"d{name}"].shape for name in "qkv"] == [given[name].shape for name in "qkv"]
    assert not any(t.any() for t in got.values())


@pytest.mark.parametrize("name", ["kernel", "kernel single", "atomic", "ordered"])
def test_sequences_of_no_token_and_tokens_of_no_sequence(backward_product: typing.Any, name: str) -> None:
    # Empty ones first, in the middle and last; rows after the last belong to none.
    problem = parse_problem("b=6 hq=2 hkv=1 sq=18 sk=40 d=16 fp32 causal varlen backward")
    given, extras = backward_product.call_of(problem, ("dense",) * 3, "cpu", 0)
    lengths = {"q": (0, 13, 0, 7, 18, 0), "k": (5, 0, 0, 17, 40, 0)}
    starts = {side: torch.tensor([0, *itertools.accumulate(own)], dtype=torch.int32) for side, own in lengths.items()}
    extras = dataclasses.replace(extras, cu_seqlens_q=starts["q"], cu_seqlens_k=starts["k"])
    given = _with_outputs(problem, given, extras)
    ends = {"q": sum(lengths["q"]), "k": sum(lengths["k"])}
    for t in ("q", "do", "out"):
        given[t][ends["q"] :] = math.nan
    for t in ("k", "v"):
        given[t][ends["k"] :] = math.nan
    got = backward_product.interpreted(problem, CONFIGS[name], given, extras)
    # What no sequence owns is not written.
    for gradient, side in (("dq", "q"), ("dk", "k"), ("dv", "k")):
        if gradient != "dq" or name.startswith("kernel"):
            assert got[gradient][ends[side] :].isnan().all()
        got[gradient][ends[side] :] = 0.0
    assert not backward_product.judge(problem, given, extras, got)


def _with_outputs(problem: Problem, given: Tensors, extras: Extras) -> Tensors:
    """Return a call's tensors with out and lse as these extras make them."""
    q, k, v = (torch.nan_to_num(given[name]) for name in "qkv")
    spec = problem.spec.forward()
    out, lse = attention_reference(q, k, v, spec=spec, extras=extras, precision="float64")
    assert lse is not None
    return {**given, "out": out.to(q.dtype), "lse": lse.float(), "dlse": torch.nan_to_num(given["dlse"])}


@pytest.mark.parametrize("name", ["kernel", "ordered"])
@pytest.mark.parametrize("varlen", ["", "varlen"])
def test_nothing_is_used(backward_product: typing.Any, varlen: str, name: str) -> None:
    problem = parse_problem(f"b=3 hq=2 hkv=1 sq=21 sk=40 d=16 fp32 causal {varlen} seqused=qk sinks backward")
    given, extras = backward_product.call_of(problem, ("dense",) * 3, "cpu", 0)
    given = {name: torch.nan_to_num(t) for name, t in given.items()}
    none = torch.zeros(3, dtype=torch.int32)
    some = torch.tensor([0, 9, 0], dtype=torch.int32)
    for used_q, used_k in ((none, none), (some, none), (none, some), (some, some)):
        changed = dataclasses.replace(extras, seqused_q=used_q, seqused_k=used_k)
        hold(backward_product, problem, CONFIGS[name], _with_outputs(problem, given, changed), changed)


@pytest.mark.parametrize(
    ("mask", "name"),
    [
        ("causal", "kernel"),
        ("causal", "ordered"),
        ("causal", "atomic"),
        ("sliding_window(9,3)", "kernel single"),
        ("sliding_window(9,3)", "atomic"),
        ("document", "kernel"),
        ("document", "atomic"),
        ("prefix_lm(5)", "ordered"),
    ],
)
def test_a_packed_sequence_does_not_reach_its_neighbours(backward_product: typing.Any, mask: str, name: str) -> None:
    problem = parse_problem(f"b=3 hq=2 hkv=1 sq=21 sk=40 d=16 fp32 varlen {mask} backward")
    given, extras = backward_product.call_of(problem, ("dense",) * 3, "cpu", 0)
    clean = hold(backward_product, problem, CONFIGS[name], given, extras)
    for broken in range(3):
        rows_q = slice(*extras.cu_seqlens_q[broken : broken + 2].tolist())
        rows_k = slice(*extras.cu_seqlens_k[broken : broken + 2].tolist())
        bad = {name: t.clone() for name, t in given.items()}
        for t, rows in (("q", rows_q), ("do", rows_q), ("out", rows_q), ("k", rows_k), ("v", rows_k)):
            bad[t][rows] = math.nan
        bad["lse"][:, rows_q] = math.nan
        got = backward_product.interpreted(problem, CONFIGS[name], bad, extras)
        for gradient, rows in (("dq", rows_q), ("dk", rows_k), ("dv", rows_k)):
            others = torch.ones(len(got[gradient]), dtype=torch.bool)
            others[rows] = False
            assert torch.equal(got[gradient][others], clean[gradient][others]), gradient
            assert got[gradient][rows].isnan().any()


@pytest.mark.parametrize("name", ["kernel", "atomic", "ordered"])
@pytest.mark.parametrize("words", ["bias=fp32 dbias", "bias=fp32:unaligned dbias", "bias=input:unaligned dbias"])
def test_bias_beside_and_past_what_is_used(backward_product: typing.Any, words: str, name: str) -> None:
    problem = parse_problem(f"b=3 hq=2 hkv=1 sq=21 sk=40 d=16 fp32 full seqused=qk {words} backward")
    given, extras = backward_product.call_of(problem, ("dense",) * 3, "cpu", 2)
    clean = hold(backward_product, problem, CONFIGS[name], given, extras)
    bias = extras.bias.clone()
    for b in range(3):
        bias[b, :, int(extras.seqused_q[b]) :] = math.nan
        bias[b, :, :, int(extras.seqused_k[b]) :] = math.nan
    whole = torch.full((*bias.shape[:2], bias.shape[2] + 20, 80), math.nan, dtype=bias.dtype)
    view = whole[:, :, : bias.shape[2], 16 : 16 + bias.shape[3]]
    view.copy_(bias)
    spoilt = dataclasses.replace(extras, bias=view)
    got = backward_product.interpreted(problem, CONFIGS[name], given, spoilt)
    assert all(torch.equal(got[gradient], clean[gradient]) for gradient in clean)
    # What is not used has no gradient.
    for b in range(3):
        assert not got["dbias"][b, :, int(extras.seqused_q[b]) :].any()
        assert not got["dbias"][b, :, :, int(extras.seqused_k[b]) :].any()


@pytest.mark.parametrize("name", ["kernel"])
@pytest.mark.parametrize("sizes", list(itertools.product((1, 2), (1, 2), (1, 20), (1, 45))), ids=str)
def test_dbias_is_summed_where_the_bias_is_broadcast(
    backward_product: typing.Any, sizes: tuple[int, ...], name: str
) -> None:
    problem = parse_problem("b=2 hq=2 hkv=1 sq=20 sk=45 d=16 fp32 causal bias=fp32:unaligned dbias backward")
    given, extras = backward_product.call_of(problem, ("dense",) * 3, "cpu", 0)
    bias = torch.randn(sizes, generator=torch.Generator().manual_seed(0))
    extras = dataclasses.replace(extras, bias=bias.expand(2, 2, 20, 45))
    given = _with_outputs(problem, given, extras) | {"dbias": torch.empty(sizes)}
    assert hold(backward_product, problem, CONFIGS[name], given, extras)["dbias"].shape == sizes


@pytest.mark.parametrize("name", CONFIGS)
def test_rows_past_the_last_weigh_nothing_whatever_score_mod_makes_of_them(
    backward_product: typing.Any, name: str
) -> None:
    # There a captured tensor reads as 0: 0 / 0.
    words = "score_mod('return score / t[q_idx]', t='float32[q_idx]')"
    problem = parse_problem(f"b=1 hq=2 hkv=1 sq=33 sk=64 d=16 fp32 causal {words} backward")
    given, extras = backward_product.call_of(problem, ("dense",) * 3, "cpu", 0)
    extras = dataclasses.replace(extras, captures=(torch.linspace(0.5, 2.0, 33),))
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="invalid value encountered", category=RuntimeWarning)
        hold(backward_product, problem, CONFIGS[name], _with_outputs(problem, given, extras), extras)


@pytest.mark.parametrize("name", ["kernel", "atomic descriptor", "ordered"])
def test_without_a_gradient_of_lse(backward_product: typing.Any, name: str) -> None:
    problem = parse_problem("b=1 hq=2 hkv=1 sq=33 sk=40 d=16 fp32 causal sinks backward")
    given, extras = backward_product.call_of(problem, ("dense",) * 3, "cpu", 0)
    with_dlse = hold(backward_product, problem, CONFIGS[name], given, extras)
    del given["dlse"]
    without = hold(backward_product, problem, CONFIGS[name], given, extras)
    assert not torch.equal(with_dlse["dq"], without["dq"])
    # The gradients of lse alone.
    given["dlse"] = torch.ones_like(given["lse"])
    given["do"] = torch.zeros_like(given["do"])
    alone = hold(backward_product, problem, CONFIGS[name], given, extras)
    assert not alone["dv"].any()


@pytest.mark.parametrize("name", CONFIGS)
def test_memory(backward_product: typing.Any, name: str) -> None:
    problem = parse_problem("b=2 hq=2 hkv=1 sq=20 sk=40 d=24 dv=40 fp16 causal backward")
    results = []
    for memory in ("dense", "transposed", "sliced"):
        given, extras = backward_product.call_of(problem, (memory,) * 3, "cpu", 0)
        results.append(hold(backward_product, problem, CONFIGS[name], given, extras))
    for got in results[1:]:
        assert all(torch.equal(got[gradient], results[0][gradient]) for gradient in got)
