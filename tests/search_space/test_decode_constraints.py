"""Each limit of decode configs refuses what is beyond it, with its numbers, and nothing that runs."""

from __future__ import annotations

import dataclasses

import pytest

from flashgen.codegen import TritonDecodeConfig
from flashgen.codegen.constraints import check_config, require_legal
from flashgen.codegen.decode_constraints import DECODE_CONSTRAINTS, shared_memory_lower_bound
from flashgen.errors import ConfigError
from flashgen.spec import AttentionSpec, parse_problem
from flashgen.target import named_target


def spec(words: str = "d=128") -> AttentionSpec:
    return parse_problem(f"h=1 sq=1 sk=64 decode {words}").spec


def config(
    block_m: int = 16,
    block_n: int = 64,
    num_warps: int = 4,
    num_stages: int = 2,
    maxnreg: int = 0,
    loads: str = "pointer",
    head_tiles: int = 1,
    programs: int = 2,
    min_blocks: int = 1,
) -> TritonDecodeConfig:
    return TritonDecodeConfig(
        block_m=block_m,
        block_n=block_n,
        num_warps=num_warps,
        num_stages=num_stages,
        maxnreg=maxnreg,
        loads=loads,
        head_tiles=head_tiles,
        programs=programs,
        min_blocks=min_blocks,
    )


LATENT = "d=576 dv=512 shared_kv"
DESCRIPTOR = config(loads="descriptor")
REFUSED = {
    "block_power_of_two": (config(block_m=24), spec(), "sm_90", "block_m=24"),
    "launch_within_limits": (config(min_blocks=0), spec(), "sm_90", "min_blocks=0 is less than 1"),
    "keys_fill_operands": (config(block_n=16), spec("d=128 fp8_kv"), "sm_90", "block_n=16 is less than 32, with K"),
    "head_tiles_matter": (config(head_tiles=2), spec(), "sm_90", "128 and 128 are no narrower"),
    "shared_tiles_match": (config(), spec(LATENT), "sm_90", "K into 1024 columns, V is the first 512"),
    "warps_split_tile": (config(block_n=32, num_warps=8), spec(), "sm_90", "16x32 gives 8 warps fewer than 128"),
    "fp32_tile_limited": (config(128, 64, 8), spec("d=64 fp32"), "sm_90", "8192 scores"),
    "descriptor_needs_tma": (DESCRIPTOR, spec(), "sm_80", "sm_80 has none"),
    "descriptor_needs_whole_tiles": (DESCRIPTOR, spec("d=128 page=16"), "sm_90", "of 16 keys, not 64"),
    "descriptor_alignment": (config(16, 512, loads="descriptor"), spec("d=64"), "sm_90", "side of 512"),
    "launch_supported": (dataclasses.replace(config(), launch="dependent"), spec(), "sm_80", "launch=dependent needs"),
    "maxnreg_legal": (config(maxnreg=100), spec(), "sm_90", "maxnreg=100"),
    "shared_memory_fits": (config(block_n=128, num_stages=5), spec(), "sm_90", "262144 bytes"),
    "accumulator_fits_registers": (config(64, head_tiles=2), spec(LATENT), "sm_90", "304 registers a thread of 255"),
}

LEGAL = [
    (config(num_stages=3), spec(), "H200"),
    (config(loads="descriptor", num_stages=3), spec(), "H200"),
    (config(loads="descriptor"), spec("d=128 page=256"), "H200"),
    (config(), spec("d=128 page=1"), "H200"),
    # Warps share the rows of a narrow tile.
    (config(num_warps=8), spec("d=64"), "H200"),
    (config(64, 64, 8, 2, head_tiles=2), spec(LATENT), "H200"),
    (config(16, 32, 4, 3, head_tiles=2), spec(f"{LATENT} fp8_kv"), "H200"),
    (config(128, 64, 8, 2, loads="descriptor", head_tiles=2), spec("d=192 dv=128"), "H200"),
    (config(16, 32, 8, 1), spec("d=256 fp32"), "H200"),
    (config(16, 32, 4, 1), spec("d=256"), "gfx942"),
    (config(16, 32, 4, 2), spec("d=256"), "sm_120"),
    (config(16, 32, 4, 2, loads="descriptor"), spec("d=128 fp8_kv descale"), "sm_120"),
]


def test_every_constraint_has_a_case() -> None:
    assert REFUSED.keys() == DECODE_CONSTRAINTS.keys()


@pytest.mark.parametrize("name", REFUSED)
def test_refuses_with_its_numbers(name: str) -> None:
    candidate, meaning, arch, numbers = REFUSED[name]
    target = named_target(arch)
    reason = DECODE_CONSTRAINTS[name](candidate, meaning, target)
    assert reason is not None
    assert numbers in reason
    assert reason in check_config(candidate, meaning, target)


@pytest.mark.parametrize(("candidate", "meaning", "arch"), LEGAL, ids=str)
def test_lets_through_what_runs(candidate: TritonDecodeConfig, meaning: AttentionSpec, arch: str) -> None:
    assert check_config(candidate, meaning, named_target(arch)) == ()
    require_legal(candidate, meaning, named_target(arch))


@pytest.mark.parametrize(
    ("candidate", "words", "arch", "reason"),
    [
        (config(block_n=8), "d=128", "sm_90", "block_n=8"),
        (config(programs=0), "d=128", "sm_90", "programs=0 is less than 1"),
        (dataclasses.replace(config(), merge_parts=12), "d=128", "sm_90", "merge_parts=12 is not a power of two"),
        (config(num_warps=3), "d=128", "sm_90", "num_warps=3"),
        (config(num_stages=0), "d=128", "sm_90", "num_stages=0"),
        (config(head_tiles=3), "d=96", "sm_90", "head_tiles=3"),
        (config(loads="descriptor", head_tiles=2), f"{LATENT} page=16", "sm_90", "one page each, of 16 keys"),
        (config(loads="descriptor"), "d=24 fp16 page=96", "sm_90", "one page each, of 96 keys, not 64"),
        (config(maxnreg=128), "d=128", "gfx942", "no meaning on gfx942"),
    ],
)
def test_other_limits(candidate: TritonDecodeConfig, words: str, arch: str, reason: str) -> None:
    reasons = check_config(candidate, spec(words), named_target(arch))
    assert any(reason in found for found in reasons)


def test_rows_of_8_bits_are_half_as_long() -> None:
    target = named_target("sm_90")
    wide, narrow = (shared_memory_lower_bound(config(num_stages=3), spec(w), target) for w in ("d=128", "d=128 fp8_kv"))
    assert (wide, narrow) == (2 * 64 * 256 * 2, 2 * 64 * 256)
    shared = config(num_stages=2, head_tiles=2)
    assert shared_memory_lower_bound(shared, spec(LATENT), target) == 64 * 576 * 2


def test_a_config_of_another_phase_is_refused() -> None:
    forward = dataclasses.replace(spec(), phase="forward")
    assert check_config(config(), forward, named_target("H200")) == (
        "triton/decode has no kernels of the forward phase",
    )
    with pytest.raises(ConfigError, match=r"sm_80 has none.*; loads=descriptor takes tiles from one page"):
        require_legal(DESCRIPTOR, spec("d=64 page=16"), named_target("sm_80"))
