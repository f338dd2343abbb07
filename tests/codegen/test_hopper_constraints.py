"""Each limit of the forward kernel for Hopper refuses what is beyond it, with its numbers, and nothing that runs."""

from __future__ import annotations

import dataclasses

import pytest

from flashgen.codegen import HopperForwardConfig, TritonForwardConfig
from flashgen.codegen.constraints import (
    check_config,
    constraints_of,
    interpreter_refusal,
    require_legal,
    shape_refusal,
)
from flashgen.codegen.hopper_constraints import HOPPER_CONSTRAINTS, shared_memory_lower_bound
from flashgen.errors import ConfigError
from flashgen.spec import AttentionSpec, parse_problem
from flashgen.target import known_targets, named_target

H200 = named_target("H200")


def spec(words: str = "d=128 full bf16") -> AttentionSpec:
    return parse_problem(f"b=1 h=8 s=4096 {words}").spec


def config(**numbers: int | str) -> HopperForwardConfig:
    usual = HopperForwardConfig(consumers=2, block_n=128, num_warps=4, num_stages=2)
    return dataclasses.replace(usual, **numbers)


IN_REGISTERS = config(queries="registers")
WIDE = config(block_n=64, convert="late", rescale=8, out_buffer="half")

REFUSED = {
    "runs_on_hopper": (config(), spec(), "A100", "NVIDIA A100-SXM4-80GB is sm_80"),
    "elements_of_16_bits": (config(), spec("d=128 fp8"), "H200", "not of fp8"),
    "features_known": (config(), spec("d=128 bias=input dropout bf16"), "H200", "dropout, bias=input"),
    "head_dims_fit_product": (config(), spec("d=512 bf16"), "H200", "512 is more than 256"),
    "roles_within_limits": (config(num_warps=8), spec(), "H200", "num_warps=8 is not 4"),
    "numbers_within_limits": (config(num_stages=1), spec(), "H200", "num_stages=1 is not from 2 to 4"),
    "groups_have_heads": (config(head_group=0), spec(), "H200", "head_group=0 is less than 1"),
    "block_power_of_two": (config(block_n=96), spec(), "H200", "block_n=96 is not a power of two of at least 32"),
    "table_rows_power_of_two": (config(consumers=3), spec("d=64 document bf16"), "H200", "have 192 rows"),
    "heads_share_keys": (config(consumers=1, pack="heads"), spec(), "H200", "2 consumers or more, got 1"),
    "turns_need_others": (config(consumers=1, turns="alternate"), spec(), "H200", "2 consumers or more, got 1"),
    "half_diagonal_exists": (config(diagonal="half"), spec(), "H200", "a causal or prefix mask by formula, got full"),
    "single_loop_matters": (config(loops="single"), spec(), "H200", "same kernel as split under the mask full"),
    "out_buffer_fits": (config(out_buffer="queries"), spec("d=192 dv=128 bf16"), "H200", "those of Q are (128, 64)"),
    "descriptor_alignment": (config(block_n=512), spec("d=64 bf16"), "H200", "512 is more than the 256 that a bulk"),
    "product_fits_registers": (config(consumers=3, block_n=64), spec("d=256"), "H200", "needs 158 registers, .*128"),
    "shared_memory_fits": (config(), spec("d=256 bf16"), "H200", "at least 393616 bytes"),
    "accumulators_fit_registers": (
        *(config(consumers=3, queries="registers"), spec("d=64 bf16"), "H200"),
        "128 of scores, queries=registers, need about 168 registers a thread, a consumer's have 160",
    ),
}

# Winners on an H200, what ships beside them, and what other head dimensions and features leave.
LEGAL = [
    (config(queries="registers", turns="alternate"), "d=128 full bf16"),
    (config(queries="registers", diagonal="half", head_group=8, tail_heads=32), "d=128 causal bf16"),
    (config(consumers=3, turns="alternate", head_group=4), "d=64 full bf16"),
    (config(consumers=3, head_group=8, tail_heads=32), "d=64 causal bf16"),
    (config(queries="registers", turns="alternate", head_group=16, tail_heads=64), "d=64 causal bf16"),
    (WIDE, "d=256 full bf16"),
    (dataclasses.replace(WIDE, head_group=8, tail_heads=24), "d=256 causal bf16"),
    (dataclasses.replace(WIDE, tiles="overlap"), "d=256 causal bf16"),
    (config(consumers=1, block_n=64), "d=256 full bf16"),
    (config(consumers=1, programs=2, block_n=64, queries="registers"), "d=128 causal bf16"),
    (config(queries="registers"), "d=96 causal fp16"),
    (config(consumers=3, block_n=64), "d=96 causal fp16"),
    (config(out_buffer="half"), "d=192 dv=128 causal bf16"),
    (config(block_n=64), "d=192 full bf16"),
    (config(out_buffer="queries"), "d=160 full bf16"),
    (config(queries="registers"), "d=80 full bf16"),
    (config(block_n=64, loops="single"), "d=128 sliding_window(127,0) bf16"),
    (config(diagonal="half"), "d=128 prefix_lm(100) bf16"),
    (config(diagonal="half"), "d=128 causal varlen softcap sinks alibi lse bf16"),
    (config(), "d=128 causal&document varlen bf16"),
    (config(consumers=1, programs=4, block_n=64, loops="single"), "d=64 sliding_window(127,0) bf16"),
    (config(queries="registers", loops="single", tiles="overlap", head_group=8, tail_heads=32), "d=128 causal bf16"),
    (config(pack="heads", block_n=64, num_stages=3, queries="registers"), "d=128 sliding_window(127,0) bf16"),
    (config(pack="heads", diagonal="half"), "d=128 causal varlen softcap sinks alibi lse bf16"),
    (config(pack="heads"), "d=128 mask_mod('return (q_idx + kv_idx) % 3 != b') bf16"),
    # The rows of a tile are those of one consumer, a power of two of them.
    (config(pack="heads", consumers=3), "d=64 document bf16"),
]


def test_every_constraint_has_a_case():
    assert REFUSED.keys() == HOPPER_CONSTRAINTS.keys()
    assert constraints_of("gluon/hopper_forward").predicates == HOPPER_CONSTRAINTS


@pytest.mark.parametrize("name", REFUSED)
def test_refuses_with_its_numbers(name):
    candidate, problem, gpu, numbers = REFUSED[name]
    reason = HOPPER_CONSTRAINTS[name](candidate, problem, named_target(gpu))
    assert reason is not None
    first, *more = numbers.split(".*")
    assert first in reason
    assert all(number in reason for number in more)
    assert reason in check_config(candidate, problem, named_target(gpu))


@pytest.mark.parametrize(("candidate", "words"), LEGAL, ids=str)
def test_lets_through_what_runs(candidate, words):
    assert check_config(candidate, spec(words), H200) == ()
    require_legal(candidate, spec(words), named_target("H100"))


@pytest.mark.parametrize("target", known_targets(), ids=str)
def test_runs_on_hopper_alone(target):
    legal = check_config(IN_REGISTERS, spec(), target) == ()
    assert legal is (target.arch == "sm_90")


@pytest.mark.parametrize(
    ("numbers", "words", "reason"),
    [
        ({"consumers": 0}, "d=64 bf16", "consumers=0 is not from 1 to 3"),
        ({"consumers": 4}, "d=64 bf16", "consumers=4 is not from 1 to 3"),
        ({"programs": 0}, "d=64 bf16", "programs=0 is less than 1"),
        ({"programs": 2}, "d=64 bf16", "a product of 128 columns needs 90 registers, a thread starts with 80"),
        ({"programs": 2}, "d=128 bf16", "2 programs need at least 396064 bytes of shared memory"),
        ({"maxnreg": 168}, "d=64 bf16", "maxnreg=168 is not 0"),
        ({"num_stages": 5}, "d=64 bf16", "num_stages=5"),
        ({"head_group": 0}, "d=64 bf16", "head_group=0"),
        ({"rescale": 9}, "d=64 bf16", "rescale=9 is more than 8"),
        ({"block_n": 16}, "d=64 bf16", "block_n=16 is not a power of two of at least 32"),
        ({"block_n": 256}, "d=128 bf16", "256 of scores"),
        ({"pack": "heads"}, "d=64 mask_mod('return (q_idx + kv_idx) % 3 != h') bf16", "differs by head"),
        ({"diagonal": "half", "block_n": 64}, "d=64 causal bf16", "needs block_n=128, got 64"),
        ({"diagonal": "half", "turns": "alternate"}, "d=64 causal bf16", "turns=alternate needs equal ones"),
        ({"diagonal": "half"}, "d=64 sliding_window(9,0) bf16", "got sliding_window(9,0)"),
        ({"diagonal": "half"}, "d=64 causal&document bf16", "by formula, got"),
        ({"out_buffer": "queries", "tiles": "overlap"}, "d=64 bf16", "while tiles=overlap needs the next Q"),
        ({"out_buffer": "half"}, "d=80 bf16", "halves a tile 16 columns wide"),
        ({}, "d=64 fp32", "not of fp32"),
        ({}, "d=64 tf32", "not of tf32"),
        ({}, "d=64 varlen seqused=qk bf16", "does not know seqused=qk"),
        ({}, "d=64 fp8 descale", "does not know descale"),
    ],
)
def test_other_limits(numbers, words, reason):
    assert any(reason in found for found in check_config(config(**numbers), spec(words), H200))


@pytest.mark.parametrize(
    ("candidate", "words", "compiled_bytes"),
    [
        # What Triton 3.6 allocated for these.
        (IN_REGISTERS, "d=128 full bf16", 197088),
        (config(consumers=1), "d=128 full bf16", 164268),
        (config(consumers=3), "d=64 causal bf16", 115208),
        (config(consumers=3, num_stages=3), "d=64 causal bf16", 148040),
        (WIDE, "d=256 full bf16", 229856),
        (config(out_buffer="half"), "d=192 dv=128 causal bf16", 229920),
        (config(out_buffer="queries"), "d=160 full bf16", 205360),
        (config(block_n=64), "d=192 full bf16", 197232),
        (config(consumers=3, block_n=32), "d=16 causal bf16", 16904),
    ],
)
def test_shared_memory_bound_is_below_what_the_compiler_takes(candidate, words, compiled_bytes):
    bound = shared_memory_lower_bound(candidate, spec(words))
    assert bound <= compiled_bytes
    assert compiled_bytes - bound <= 256 or candidate.block_n == 32


@pytest.mark.parametrize(
    ("candidate", "words"),
    [
        # Triton 3.6 spills nothing here.
        (config(consumers=1, queries="registers", out_buffer="queries"), "d=160 full bf16"),
        (config(consumers=3), "d=64 causal bf16"),
        (config(consumers=3, queries="registers"), "d=32 full bf16"),
        (config(queries="registers", out_buffer="half"), "d=192 dv=128 full bf16"),
        (config(programs=3, consumers=1, block_n=64, queries="registers"), "d=64 causal bf16"),
        (config(programs=4, consumers=1, block_n=64), "d=32 causal bf16"),
    ],
)
def test_what_does_not_spill_is_not_refused_for_its_registers(candidate, words):
    assert HOPPER_CONSTRAINTS["accumulators_fit_registers"](candidate, spec(words), H200) is None
    assert HOPPER_CONSTRAINTS["product_fits_registers"](candidate, spec(words), H200) is None


@pytest.mark.parametrize(
    ("heads", "consumers", "refused"),
    [
        *(("h=16", 2, True), ("hq=24 hkv=8", 2, True), ("hq=20 hkv=4", 2, True), ("hq=8 hkv=2", 3, True)),
        *(("hq=16 hkv=8", 2, False), ("hq=12 hkv=1", 2, False), ("hq=24 hkv=8", 3, False), ("hq=12 hkv=2", 3, False)),
    ],
)
def test_the_heads_of_a_tile_divide_the_group(heads, consumers, refused):
    shape = parse_problem(f"b=1 {heads} s=4096 d=64 causal bf16").shape
    packed = config(consumers=consumers, pack="heads")
    reason = f"a tile has {consumers} query heads of one group, which a group of {shape.group} does not divide into"
    assert shape_refusal(packed, shape) == (reason if refused else None)
    # That is of a shape: the spec knows no heads.
    assert check_config(packed, spec("d=64 causal bf16"), H200) == ()
    others = (config(consumers=consumers), TritonForwardConfig(block_m=64, block_n=64, num_warps=4, num_stages=2))
    assert all(shape_refusal(other, shape) is None for other in others)


def test_packed_tiles_have_the_rows_of_one_consumer():
    for consumers in (2, 3):
        rows, heads = (config(consumers=consumers, pack=pack) for pack in ("rows", "heads"))
        assert (rows.block_m, rows.heads_of_tile) == (64 * consumers, 1)
        assert (heads.block_m, heads.heads_of_tile) == (64, consumers)
        assert heads.blocks == ((64, 128),)


def test_a_gradient_is_another_phase():
    reasons = check_config(config(), spec("d=128 backward bf16"), H200)
    assert reasons == ("gluon/hopper_forward has no kernels of the backward phase",)


def test_require_legal_lists_every_reason():
    with pytest.raises(ConfigError, match=r"consumers=0 .*; .*num_stages=1 .*; .*block_n=96"):
        require_legal(config(consumers=0, num_stages=1, block_n=96), spec(), H200)


def test_the_interpreter_runs_no_gluon():
    assert "needs a GPU" in (interpreter_refusal(config()) or "")
    assert interpreter_refusal(TritonForwardConfig(block_m=64, block_n=64, num_warps=4, num_stages=2)) is None
