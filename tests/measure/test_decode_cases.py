"""Random calls of decoding, and what judges the outputs and caches that a kernel leaves behind."""

from __future__ import annotations

import dataclasses
import math

import pytest
import torch

from flashgen.errors import InputError
from flashgen.measure import (
    CacheOracle,
    DecodeCall,
    Oracle,
    append_to_cache,
    awkward_decode_shapes,
    decode_reference,
    random_decode_call,
)
from flashgen.spec import parse_problem

SIZES = "b=6 hq=6 hkv=2 sq=2 sk=50 d=32 decode"
WORDS = [
    "causal bf16",
    "causal page=8 append bf16",
    "append rotary=pairs leftpad batch_idx fp16",
    "append rotary=pairs rotary_fp32 fp16",
    "causal leftpad sinks fp32",
    "fp8_kv descale page=16 bf16",
    "append rotary=halves page=1 causal fp32",
]


def make_call(words: str, *, ragged: bool = True, seed: int = 0) -> DecodeCall:
    return random_decode_call(parse_problem(f"{SIZES} {words}"), device="cpu", seed=seed, ragged=ragged)


def plain(call: DecodeCall) -> tuple[torch.Tensor, torch.Tensor]:
    return decode_reference(call.q, call.k, call.v, spec=call.problem.spec, extras=call.extras, precision="input")


@pytest.mark.parametrize("words", WORDS)
@pytest.mark.parametrize("ragged", [True, False])
@pytest.mark.parametrize("seed", [0, 1])
def test_calls_are_sound_and_only_unused_rows_are_nan(words: str, ragged: bool, seed: int) -> None:
    call = make_call(words, ragged=ragged, seed=seed)
    out, lse = plain(call)
    assert not out.isnan().any()
    assert not lse.isnan().any()
    assert call.extras.cache_seqlens is not None
    lengths = call.extras.cache_seqlens.tolist()
    padded = 0 if call.extras.cache_leftpad is None else int(call.extras.cache_leftpad.sum())
    used = int((~call.k.float().isnan()).sum())
    assert used == (sum(lengths) - padded) * call.problem.shape.nheads_kv * 32
    appended = 0 if call.extras.k_new is None else call.extras.k_new.shape[2]
    assert max(lengths) + appended == 50
    assert (0 in lengths) == ragged
    report = Oracle(call.q, call.k, call.v, spec=call.problem.spec, extras=call.extras).judge(out, lse)
    assert report.ok, report.reason


@pytest.mark.parametrize("words", ["causal bf16", "append rotary=halves fp32", "fp8_kv page=16 bf16"])
def test_layouts_and_seeds_give_the_same_and_other_numbers(words: str) -> None:
    problem = parse_problem(f"{SIZES} {words}")
    one, again, other = (random_decode_call(problem, device="cpu", seed=seed) for seed in (0, 0, 1))
    assert torch.equal(one.q, again.q)
    assert not torch.equal(one.q, other.q)
    assert torch.equal(plain(one)[0], plain(again)[0])
    rows_first = random_decode_call(problem, device="cpu", seed=0, layout="bshd")
    assert rows_first.k.shape == one.k.shape
    assert rows_first.k.transpose(1, 2).is_contiguous()


def test_lengths_are_those_asked_for() -> None:
    problem = parse_problem(f"{SIZES} causal bf16")
    asked = [50, 3, 0, 1, 50, 7]
    call = random_decode_call(problem, device="cpu", seed=0, lengths=asked)
    assert call.extras.cache_seqlens is not None
    assert call.extras.cache_seqlens.tolist() == asked
    for wrong in ([51, *asked[1:]], asked[1:]):
        with pytest.raises(InputError, match="must be 6 from 0 to 50"):
            random_decode_call(problem, device="cpu", seed=0, lengths=wrong)


def test_copies_have_caches_of_their_own() -> None:
    problem = parse_problem("b=1 hq=2 hkv=1 sq=1 sk=9 d=64 dv=32 decode shared_kv bf16")
    call = random_decode_call(problem, device="cpu", seed=0)
    first, second = call.copies(2)
    assert first is call
    assert second.v.data_ptr() == second.k.data_ptr() != call.k.data_ptr()
    assert torch.equal(plain(second)[0], plain(call)[0])


@pytest.mark.parametrize("fault", ["factor", "element", "hole"])
def test_a_wrong_output_is_found(fault: str) -> None:
    call = make_call("causal page=8 bf16")
    oracle = Oracle(call.q, call.k, call.v, spec=call.problem.spec, extras=call.extras)
    out, lse = plain(call)
    assert oracle.judge(out, lse).ok
    if fault == "factor":
        out *= 1.05
    else:
        out[0, 3, 1, 5] = math.nan if fault == "hole" else 9.0
    report = oracle.judge(out, lse)
    assert not report.ok
    assert report.reason.startswith("out")


@pytest.mark.parametrize("words", [words for words in WORDS if "append" in words])
def test_caches_after_the_call_are_judged(words: str) -> None:
    call = make_call(words)
    oracle = CacheOracle(call)
    assert "k cache" in oracle.fault()
    append_to_cache(call.k, call.v, spec=call.problem.spec, extras=call.extras)
    assert oracle.fault() == ""
    assert call.extras.cache_seqlens is not None
    finite = (~call.v.isnan()).nonzero()
    for index, value in ((finite[0], 7.0), (finite[-1], math.nan)):
        kept = call.v[tuple(index)].clone()
        call.v[tuple(index)] = value
        assert "v cache" in oracle.fault()
        call.v[tuple(index)] = kept
    hidden = call.k.isnan().nonzero()[0]
    call.k[tuple(hidden)] = 0.0
    assert "should be nan" in oracle.fault()


def test_a_rotated_key_may_be_rounded_otherwise_and_no_more() -> None:
    call = make_call("append rotary=halves bf16")
    oracle = CacheOracle(call)
    append_to_cache(call.k, call.v, spec=call.problem.spec, extras=call.extras)
    assert call.extras.cache_seqlens is not None
    row = int(call.extras.cache_seqlens[0])
    largest = int(call.k[0, 0, row].abs().argmax())
    call.k.view(torch.int16)[0, 0, row, largest] += 1
    assert oracle.fault() == ""
    call.k.view(torch.int16)[0, 0, row, largest] += 2
    assert "k cache" in oracle.fault()


def test_unused_entries_of_a_ragged_page_table_are_no_pages() -> None:
    call = make_call("page=8 bf16")
    assert call.extras.page_table is not None
    assert call.extras.cache_seqlens is not None
    used = (call.extras.cache_seqlens + 7) // 8
    assert torch.equal((call.extras.page_table >= 0).sum(dim=1), used)
    even = make_call("page=8 bf16", ragged=False).extras.page_table
    assert even is not None
    assert len(even.flatten().unique()) == even.numel()


def test_awkward_shapes_cross_tiles_and_groups() -> None:
    problem = parse_problem("b=1 hq=32 hkv=8 sq=1 sk=4096 d=128 causal decode")
    shapes = awkward_decode_shapes(problem, 16, 64)
    assert {shape.group for shape in shapes} >= {1, 3, 4, 6, 8}
    assert {1, 63, 64, 65} <= {shape.seqlen_k for shape in shapes}
    assert any(shape.seqlen_q * shape.group > 16 for shape in shapes)
    for shape in shapes:
        small = dataclasses.replace(problem, shape=shape)
        random_decode_call(small, device="cpu", seed=0, ragged=True)
