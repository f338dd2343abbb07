"""Each limit refuses what is beyond it, with its numbers, and nothing that runs."""

from __future__ import annotations

import dataclasses

import pytest

from flashgen.codegen.config import TritonForwardConfig
from flashgen.codegen.constraints import check_config, constraints_of, require_legal
from flashgen.codegen.forward_constraints import FORWARD_CONSTRAINTS, shared_memory_lower_bound
from flashgen.codegen.head_tiles import tile_widths
from flashgen.errors import ConfigError
from flashgen.spec import AttentionSpec, DType, parse_mask
from flashgen.target import named_target


def spec(head_dim: int = 128, dtype: DType = DType.BF16, head_dim_v: int | None = None) -> AttentionSpec:
    return AttentionSpec(dtype=dtype, head_dim_qk=head_dim, head_dim_v=head_dim_v or head_dim)


BYTES = AttentionSpec(dtype=DType.BF16, head_dim_qk=128, head_dim_v=128, bias="bool", dropout=True)


def config(
    block_m: int = 128,
    block_n: int = 64,
    num_warps: int = 4,
    num_stages: int = 2,
    maxnreg: int = 0,
    loads: str = "pointer",
    head_group: int = 1,
    head_tiles: int = 1,
    loops: str = "split",
) -> TritonForwardConfig:
    return TritonForwardConfig(
        block_m=block_m,
        block_n=block_n,
        num_warps=num_warps,
        num_stages=num_stages,
        maxnreg=maxnreg,
        loads=loads,
        head_group=head_group,
        head_tiles=head_tiles,
        loops=loops,
    )


REFUSED = {
    "block_power_of_two": (config(block_n=48), spec(), "sm_90", "block_n=48"),
    "keys_fill_operands": (config(block_n=16), BYTES, "sm_90", "block_n=16 is less than 32"),
    "launch_within_limits": (config(num_warps=32), spec(), "gfx942", "2048 threads"),
    "warps_fit_tile": (config(block_m=64, num_warps=8), spec(), "sm_90", "block_m=64"),
    "fp32_tile_limited": (config(block_n=128), spec(64, DType.FP32), "sm_90", "16384 scores"),
    "head_tiles_matter": (config(head_tiles=2), spec(), "sm_90", "128 and 128 are no narrower"),
    "single_loop_matters": (config(loops="single"), spec(), "sm_90", "under the mask full"),
    "descriptor_needs_tma": (config(loads="descriptor"), spec(), "sm_80", "sm_80 has none"),
    "descriptor_alignment": (config(block_m=512, num_warps=16, loads="descriptor"), spec(64), "sm_90", "side of 512"),
    "maxnreg_legal": (config(maxnreg=100), spec(), "sm_90", "maxnreg=100"),
    "shared_memory_fits": (config(num_warps=8, num_stages=3), spec(256), "sm_90", "262144 bytes"),
    "accumulator_fits_registers": (config(block_n=128), spec(), "sm_90", "272 registers a thread of 255"),
}

# Winners on an H200 (plain Triton, D=128), and what large and float32 heads leave.
LEGAL = [
    (config(num_stages=2, loads="descriptor"), spec(), "H200"),
    (config(block_m=64, num_stages=3, loads="descriptor"), spec(), "H200"),
    (config(num_warps=8, maxnreg=128, loads="descriptor"), spec(), "H200"),
    (config(num_stages=3, loads="descriptor"), spec(), "H200"),
    (config(num_warps=8), spec(256), "H200"),
    (config(block_m=64, block_n=32, num_stages=1), spec(256, DType.FP32), "sm_120"),
    (config(num_stages=1), spec(), "gfx942"),
    (config(head_tiles=2), spec(96), "H200"),
    (config(head_tiles=2), spec(64, head_dim_v=96), "H200"),
    (config(loops="single"), dataclasses.replace(spec(), mask=parse_mask("sliding_window(127,0)")), "H200"),
    (config(block_n=32), spec(64, DType.FP8), "H200"),
]


def test_every_constraint_has_a_case():
    assert REFUSED.keys() == FORWARD_CONSTRAINTS.keys()


@pytest.mark.parametrize("name", REFUSED)
def test_refuses_with_its_numbers(name):
    candidate, problem, arch, numbers = REFUSED[name]
    target = named_target(arch)
    reason = FORWARD_CONSTRAINTS[name](candidate, problem, target)
    assert reason is not None
    assert numbers in reason
    assert reason in check_config(candidate, problem, target)


@pytest.mark.parametrize(("candidate", "problem", "arch"), LEGAL, ids=str)
def test_lets_through_what_runs(candidate, problem, arch):
    assert check_config(candidate, problem, named_target(arch)) == ()
    require_legal(candidate, problem, named_target(arch))


@pytest.mark.parametrize(
    ("candidate", "problem", "arch", "compiled_bytes"),
    [
        # What Triton 3.9 allocated for these, compiled without a GPU.
        (config(num_stages=2, loads="descriptor"), spec(), "sm_90", 98336),
        (config(num_stages=3), spec(), "sm_90", 131072),
        (config(num_stages=1), spec(), "sm_90", 49152),
        (config(num_warps=8, num_stages=2, loads="descriptor"), spec(256), "sm_90", 196640),
        (config(block_m=64, block_n=128, num_stages=4), spec(256), "sm_100", 558080),
        (config(num_stages=3), spec(), "sm_80", 98304),
        (config(num_stages=2), spec(), "sm_120", 65536),
        (config(num_stages=2), spec(), "gfx942", 32768),
        (config(block_m=64, block_n=128, num_stages=1), spec(192, DType.FP32, 64), "gfx942", 65536),
    ],
)
def test_shared_memory_bound_is_below_what_the_compiler_takes(candidate, problem, arch, compiled_bytes):
    bound = shared_memory_lower_bound(candidate, problem, named_target(arch))
    assert bound <= compiled_bytes
    if named_target(arch).has_wgmma:
        assert compiled_bytes - bound <= 64


@pytest.mark.parametrize(
    ("candidate", "arch", "reason"),
    [
        (config(maxnreg=128), "gfx942", "no meaning on gfx942"),
        (config(maxnreg=56), "sm_90", "multiple of 8"),
        (config(block_m=256, num_warps=16, maxnreg=168), "sm_90", "86016 registers"),
        (config(maxnreg=128), "sm_90", "registers a thread of 128"),
        (config(num_warps=3), "sm_90", "num_warps=3"),
        (config(num_stages=0), "sm_90", "num_stages=0"),
        (config(head_group=0), "sm_90", "head_group=0"),
        (config(head_tiles=0), "sm_90", "head_tiles=0 is neither 1 nor 2"),
        (config(head_tiles=3), "sm_90", "head_tiles=3 is neither 1 nor 2"),
    ],
)
def test_other_limits_of_a_launch(candidate, arch, reason):
    assert any(reason in found for found in check_config(candidate, spec(), named_target(arch)))


def test_products_of_fp8_sum_over_32():
    # As the compiler says: "K >= 32".
    assert tile_widths(spec(16, DType.FP8), 1) == ((32,), (16,))
    assert tile_widths(spec(80, DType.FP8), 2) == ((64, 32), (64, 16))
    assert tile_widths(spec(48, DType.FP8), 2) == ((64,), (32, 16))
    assert tile_widths(spec(48), 2) == ((32, 16), (32, 16))
    narrow = config(block_n=16)
    assert check_config(narrow, spec(64), named_target("sm_90")) == ()
    reasons = check_config(narrow, spec(64, DType.FP8), named_target("sm_90"))
    assert reasons == ("block_n=16 is not a power of two of at least 32",)


@pytest.mark.parametrize(
    ("mask", "allowed"),
    [
        ("causal", False),
        ("sliding_window(-1,5)", False),
        ("prefix_lm(9)", False),
        ("document", False),
        ("sliding_window(9,0)&document", False),
        ("chunked(9)", True),
        ("dilated_window(9,0,2)", True),
        ("causal&chunked(9)", True),
        ("sliding_window(9,-1)", True),
    ],
)
def test_one_loop_is_for_masks_with_two_edges(mask, allowed):
    masked = dataclasses.replace(spec(64), mask=parse_mask(mask))
    assert (check_config(config(loops="single"), masked, named_target("sm_90")) == ()) is allowed


def test_tiles_of_the_head_dimension_count_for_what_they_are():
    target = named_target("sm_90")
    one, two = (shared_memory_lower_bound(config(head_tiles=n), spec(96), target) for n in (1, 2))
    assert two == one * 3 // 4
    (reason,) = check_config(config(block_n=128), spec(96), target)
    assert "128x256 need about 272 registers" in reason
    assert check_config(config(block_n=128, head_tiles=2), spec(96), target) == ()


def test_tensor_memory_takes_the_accumulators_on_blackwell():
    wide = config(block_n=128)
    assert check_config(wide, spec(), named_target("sm_100")) == ()
    assert check_config(wide, spec(), named_target("sm_90")) != ()


def test_require_legal_lists_every_reason():
    with pytest.raises(ConfigError, match=r"block_n=48 .*; .*num_stages=0 .*; .*sm_80 has none"):
        require_legal(config(block_n=48, num_stages=0, loads="descriptor"), spec(), named_target("sm_80"))


def test_a_config_of_another_phase_is_refused():
    reasons = check_config(config(), spec().backward(), named_target("H200"))
    assert reasons == ("triton/forward has no kernels of the backward phase",)


def test_an_unknown_template_lists_the_known():
    with pytest.raises(
        ConfigError, match=r"'triton/sideways'; known: triton/forward, gluon/hopper_forward, triton/backward"
    ):
        constraints_of("triton/sideways")
