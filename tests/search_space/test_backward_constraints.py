"""Each limit of backward configs refuses what is beyond it, with its numbers, and nothing that runs."""

from __future__ import annotations

import dataclasses

import pytest

from flashgen.codegen import TritonBackwardConfig
from flashgen.codegen.backward_constraints import BACKWARD_CONSTRAINTS, shared_memory_lower_bound
from flashgen.codegen.constraints import check_config, require_legal
from flashgen.errors import ConfigError
from flashgen.spec import AttentionSpec, parse_problem
from flashgen.target import named_target

Tile = tuple[int, int, int, int]  # block_m, block_n, num_warps, num_stages


def spec(words: str = "d=128 causal") -> AttentionSpec:
    return parse_problem(f"h=1 s=1 backward {words}").spec


def config(
    dkdv: Tile = (64, 128, 8, 2),
    dq: Tile | str = (128, 64, 8, 2),
    *,
    loads: str = "pointer",
    maxnreg: int = 0,
    head_group: int = 1,
    loops: str = "split",
) -> TritonBackwardConfig:
    own = (0, 0, 0, 0) if isinstance(dq, str) else dq
    return TritonBackwardConfig(
        block_m1=dkdv[0],
        block_n1=dkdv[1],
        num_warps=dkdv[2],
        num_stages=dkdv[3],
        maxnreg=maxnreg,
        dq=dq if isinstance(dq, str) else "kernel",
        block_m2=own[0],
        block_n2=own[1],
        num_warps2=own[2],
        num_stages2=own[3],
        loads=loads,
        head_group=head_group,
        loops=loops,
    )


SMALL = (32, 32, 4, 1)
REFUSED = {
    "dq_kernel_described": (config(dq=(64, 32, 0, 1)), spec(), "sm_90", "num_warps2=0: dq=kernel needs them all"),
    "block_power_of_two": (config(dq=(48, 32, 4, 1)), spec(), "sm_90", "block_m2=48"),
    "sides_fill_operands": (config((16, 64, 4, 1), "atomic"), spec("d=64 bias=bool"), "sm_90", "side of 16 is less"),
    "launch_within_limits": (config(dq=(64, 64, 4, 0)), spec(), "sm_90", "num_stages2=0 is less than 1"),
    "warps_fit_tile": (config((16, 32, 8, 1)), spec(), "sm_90", "16x32 gives 8 warps fewer than 128 scores"),
    "fp32_tile_limited": (config((32, 64, 8, 1), (64, 64, 8, 1)), spec("d=64 fp32"), "sm_90", "4096 scores"),
    "sums_in_fixed_order": (config(dq="atomic"), spec("d=64 deterministic"), "sm_90", "dq=kernel or dq=ordered"),
    "order_is_known": (config(dq="ordered"), spec("d=64 sliding_window(9,0)"), "sm_90", "sliding_window(9,0) hides"),
    "single_loop_by_formula": (config(loops="single"), spec("d=64 document"), "sm_90", "under the mask document"),
    "descriptor_needs_tma": (config(loads="descriptor"), spec("d=64"), "sm_80", "sm_80 has none"),
    "descriptor_needs_dense": (config(loads="descriptor"), spec("d=64 varlen"), "sm_90", "which varlen puts inside"),
    "descriptor_alignment": (config((64, 512, 32, 1), loads="descriptor"), spec("d=64"), "sm_90", "side of 512"),
    "maxnreg_legal": (config(maxnreg=100), spec(), "sm_90", "maxnreg=100"),
    "shared_memory_fits": (config((64, 64, 8, 3)), spec("d=256"), "sm_90", "262144 bytes"),
    "accumulators_fit_registers": (config((64, 128, 4, 1)), spec(), "sm_90", "dK and dV with tiles of 64x128 need"),
}

LEGAL = [
    (config(loads="descriptor"), spec(), "H200"),
    (config(dq="atomic", loads="descriptor"), spec(), "H200"),
    (config(dq="ordered", loads="descriptor"), spec("d=128 causal deterministic"), "H200"),
    (config(dq="ordered"), spec("d=64 prefix_lm(9) varlen"), "H200"),
    (config(), spec("d=64 causal&document deterministic"), "H200"),
    (config(loops="single"), spec("d=64 sliding_window(9,0)"), "H200"),
    (config((64, 64, 8, 1), (64, 32, 4, 2), loads="descriptor"), spec("d=256 causal"), "H200"),
    (config((32, 32, 8, 1), (64, 32, 8, 1)), spec("d=64 causal fp32"), "H200"),
    (config(SMALL, SMALL), spec("d=64 causal bias=bool dropout"), "H200"),
    (config((16, 16, 1, 1), (16, 16, 1, 1)), spec("d=64 causal bias=input dropout"), "H200"),
    (config(SMALL, SMALL), spec("d=256 causal"), "gfx942"),
    (config(SMALL, SMALL), spec("d=256 causal"), "sm_120"),
]


def test_every_constraint_has_a_case():
    assert REFUSED.keys() == BACKWARD_CONSTRAINTS.keys()


@pytest.mark.parametrize("name", REFUSED)
def test_refuses_with_its_numbers(name):
    candidate, meaning, arch, numbers = REFUSED[name]
    target = named_target(arch)
    reason = BACKWARD_CONSTRAINTS[name](candidate, meaning, target)
    assert reason is not None
    assert numbers in reason
    assert reason in check_config(candidate, meaning, target)


@pytest.mark.parametrize(("candidate", "meaning", "arch"), LEGAL, ids=str)
def test_lets_through_what_runs(candidate, meaning, arch):
    assert check_config(candidate, meaning, named_target(arch)) == ()
    require_legal(candidate, meaning, named_target(arch))


@pytest.mark.parametrize(
    ("candidate", "meaning", "arch", "compiled_bytes"),
    [
        # What Triton 3.9 allocated for these, compiled without a GPU.
        (config(loads="descriptor"), "d=128 causal", "sm_90", 131616),
        (config((64, 128, 8, 1), (128, 64, 8, 1)), "d=128 causal", "sm_90", 98304),
        (config((32, 128, 8, 3), (128, 64, 8, 3), loads="descriptor"), "d=128 causal", "sm_90", 164864),
        (config((64, 64, 8, 2), (64, 32, 4, 2), loads="descriptor"), "d=256 causal", "sm_90", 197632),
        (config((64, 64, 4, 2), "atomic", loads="descriptor"), "d=128 causal", "sm_90", 140288),
        (config((64, 64, 8, 3), "ordered", loads="descriptor"), "d=128 causal", "sm_90", 66560),
        (config((64, 32, 4, 2), (32, 64, 4, 2), loads="descriptor"), "d=128 causal", "sm_90", 37400),
        (config((32, 128, 8, 3), (128, 64, 8, 3)), "d=128 causal&document", "sm_90", 164352),
        (config((64, 64, 4, 2), (128, 64, 8, 2)), "d=128 causal tf32", "sm_90", 262144),
        (config(loads="descriptor"), "d=128 causal", "sm_100", 164864),
        (config((64, 64, 8, 3), (128, 64, 4, 3)), "d=128 causal", "sm_80", 131072),
        (config((32, 64, 8, 2), (128, 64, 8, 2), loads="descriptor"), "d=128 causal", "sm_120", 32792),
        (config((32, 64, 4, 2), (128, 64, 8, 2)), "d=128 causal", "gfx942", 49152),
        (config((32, 64, 8, 2), (64, 32, 8, 2)), "d=64 causal fp32", "sm_90", 57600),
    ],
)
def test_shared_memory_bound_is_below_what_the_compiler_takes(candidate, meaning, arch, compiled_bytes):
    assert shared_memory_lower_bound(candidate, spec(meaning), named_target(arch)) <= compiled_bytes


def test_shared_memory_bound_is_near_where_products_read_it():
    target = named_target("sm_90")
    for candidate, compiled_bytes in ((config(), 131584), (config((32, 128, 8, 3), (128, 64, 8, 3)), 164864)):
        assert 0 <= compiled_bytes - shared_memory_lower_bound(candidate, spec(), target) <= 1024


@pytest.mark.parametrize(
    ("candidate", "arch", "reason"),
    [
        (dataclasses.replace(config(dq="atomic"), block_m2=64), "sm_90", "block_m2=64: dq=atomic has no kernel"),
        (config((24, 64, 4, 1)), "sm_90", "block_m1=24"),
        (config((64, 8, 4, 1)), "sm_90", "block_n1=8"),
        (config(dq=(64, 20, 4, 1)), "sm_90", "block_n2=20"),
        (config((64, 64, 3, 1)), "sm_90", "num_warps=3"),
        (config(dq=(128, 128, 32, 1)), "gfx942", "2048 threads"),
        (config(head_group=0), "sm_90", "head_group=0"),
        (config((64, 64, 4, 1), maxnreg=128), "gfx942", "no meaning on gfx942"),
        (config(maxnreg=128), "sm_90", "registers a thread of 128"),
        (config((64, 64, 4, 1), (128, 128, 4, 1)), "sm_90", "dQ with tiles of 128x128 need about"),
    ],
)
def test_other_limits(candidate, arch, reason):
    assert any(reason in found for found in check_config(candidate, spec(), named_target(arch)))


@pytest.mark.parametrize(
    ("mask", "allowed"),
    [
        ("full", True),
        ("causal", True),
        ("prefix_lm(9)", True),
        ("sliding_window(-1,5)", True),
        ("sliding_window(5,-1)", False),
        ("chunked(9)", False),
        ("document", False),
        ("causal&document", False),
        ("mask_mod('return q_idx >= kv_idx')", False),
    ],
)
def test_key_tiles_wait_only_for_those_that_come(mask, allowed):
    assert (check_config(config(dq="ordered"), spec(f"d=64 {mask}"), named_target("sm_90")) == ()) is allowed


@pytest.mark.parametrize("words", ["seqused=q", "seqused=k", "varlen", "varlen seqused=qk"])
def test_descriptors_are_for_whole_tensors(words):
    (reason,) = check_config(config(loads="descriptor"), spec(f"d=64 causal {words}"), named_target("sm_90"))
    assert "past the end of a sequence" in reason
    assert check_config(config(), spec(f"d=64 causal {words}"), named_target("sm_90")) == ()


def test_a_config_of_another_phase_is_refused():
    reasons = check_config(config(), spec().forward(), named_target("H200"))
    assert reasons == ("triton/backward has no kernels of the forward phase",)
    with pytest.raises(ConfigError, match=r"dq=atomic adds in any order.*; .*sm_80 has none"):
        require_legal(config(dq="atomic", loads="descriptor"), spec("d=64 deterministic"), named_target("sm_80"))
