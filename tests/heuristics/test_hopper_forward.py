"""What runs on Hopper where nobody tuned: its own kernels first, the portable ones after them."""

from __future__ import annotations

import pytest

from flashgen.cli.configs import short_config
from flashgen.codegen import HopperForwardConfig, TritonForwardConfig
from flashgen.codegen.constraints import check_config, shape_refusal
from flashgen.heuristics import default_configs, safe_configs
from flashgen.spec import parse_problem
from flashgen.target import known_targets, named_target

H200 = named_target("H200")


def own(text: str) -> list[HopperForwardConfig]:
    configs = default_configs(parse_problem(f"{text} bf16"), H200)
    return [config for config in configs if isinstance(config, HopperForwardConfig)]


def first(text: str) -> HopperForwardConfig:
    return own(text)[0]


_TWO = "2x64 n128 s2 registers"
_IN_TURNS = f"{_TWO} alternate"
_WIDE = "2x64 n64 s2 late rescale8 out-half"
_WIDE_HELD = "2x64 n64 s2 held rescale8 out-half overlap named"


def numbers(config: HopperForwardConfig, *names: str) -> tuple[object, ...]:
    return tuple(getattr(config, name) for name in names)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        # The order on an H200: consumers and their rows, keys, stages, then what is not as usual; see `short_config`.
        ("b=4 h=16 s=4096 d=128 full", [f"{_TWO} late overlap named", f"{_TWO} held overlap named"]),
        ("b=4 h=16 s=4096 d=128 full alibi", [f"{_TWO} late overlap named", f"{_TWO} held overlap named"]),
        ("b=16 h=16 s=1024 d=128 full", [_IN_TURNS, "2x64 n64 s2 registers"]),
        (
            "b=8 h=16 s=2048 d=128 causal",
            ["2x64 n128 s2 late named g8+32", f"{_TWO} held overlap g8+32", f"{_TWO} overlap single g8+32"],
        ),
        (
            "b=4 h=16 s=4096 d=128 causal",
            ["2x64 n128 s2 late named g4+16", f"{_TWO} held overlap g4+16", f"{_TWO} overlap single g4+16"],
        ),
        (
            "b=1 h=16 s=16384 d=128 causal",
            ["2x64 n128 s2 late named g4", f"{_TWO} held overlap g4", f"{_TWO} overlap single g4"],
        ),
        ("b=16 h=16 s=1024 d=128 causal", ["1x64 n64 s2 p2 registers g16+64", f"{_IN_TURNS} g16+64"]),
        ("b=4 h=32 s=4096 d=64 full", ["3x64 n128 s2 alternate held g4", "3x64 n128 s2 late named g4"]),
        (
            "b=4 h=32 s=4096 d=64 causal",
            ["3x64 n128 s2 overlap g8+32", f"{_TWO} late overlap named g8+32", "3x64 n128 s2 overlap named g8+32"],
        ),
        (
            "b=8 h=32 s=2048 d=64 causal",
            ["1x64 n64 s2 p3 registers g16+64", f"{_IN_TURNS} g16+64", f"{_TWO} late overlap named g16+64"],
        ),
        ("b=16 h=32 s=1024 d=64 causal", ["1x64 n64 s2 p3 registers g32+128", "1x64 n64 s2 p3 g32+128"]),
        ("b=4 h=8 s=4096 d=256 full", [_WIDE_HELD, f"{_WIDE} overlap", _WIDE]),
        ("b=4 h=8 s=4096 d=256 causal", [f"{_WIDE} g4+8", f"{_WIDE_HELD} g4+8", f"{_WIDE} overlap g4+8"]),
        ("b=8 h=8 s=2048 d=256 causal", [f"{_WIDE_HELD} g4+16", f"{_WIDE} overlap g4+16", f"{_WIDE} g4+16"]),
        ("b=4 h=16 s=4096 d=192 dv=128 causal", ["2x64 n128 s2 out-half g4+8", f"{_WIDE} g4+8"]),
    ],
)
def test_what_won_comes_first(text, expected):
    assert [short_config(config) for config in own(text)][: len(expected)] == [f"hopper {short}" for short in expected]


def test_wide_heads_rescale_rarely_and_leave_by_halves():
    for mask in ("full", "causal", "sliding_window(127,0)"):
        config = first(f"b=4 h=8 s=4096 d=256 {mask}")
        assert numbers(config, "rescale", "out_buffer", "block_n") == (8, "half", 64)


@pytest.mark.parametrize(
    ("words", "block_n", "queries"),
    [
        # Of those of two consumers, the first.
        ("sliding_window(127,0)", 64, "registers"),
        ("sliding_window(1023,0)", 128, "shared"),
        ("chunked(256)", 64, "registers"),
        ("causal alibi", 128, "registers"),
    ],
)
def test_what_takes_registers_of_its_own_has_one_loop(words, block_n, queries):
    configs = own(f"b=4 h=16 s=4096 d=128 {words}")
    assert {config.loops for config in configs} == {"single"}
    assert numbers(configs[0], "consumers", "programs", "block_n", "queries") == (1, 2, 64, "registers")
    assert numbers(configs[1], "consumers", "block_n", "queries") == (2, block_n, queries)
    assert {config.loops for config in own("b=4 h=16 s=4096 d=128 full alibi")} == {"split"}


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        ("d=128 sliding_window(127,0)", ["2x64 n64 s3 heads registers", "1x64 n64 s2 p2 registers single"]),
        (
            "d=64 sliding_window(127,0) sinks",
            ["1x64 n64 s2 p3 single g4", "1x64 n64 s2 p4 single g4", "2x64 n64 s3 heads registers g4"],
        ),
        # No narrow window.
        ("d=128 sliding_window(1023,0)", ["1x64 n64 s2 p2 registers single", "2x64 n128 s2 single"]),
    ],
)
def test_heads_of_a_group_are_packed_under_narrow_windows(words, expected):
    found = [short_config(config) for config in own(f"b=4 hq=32 hkv=8 s=4096 {words}")]
    assert found[: len(expected)] == [f"hopper {short}" for short in expected]


@pytest.mark.parametrize("head_dim", [64, 128])
def test_heads_of_no_or_an_odd_group_are_never_packed(head_dim):
    words = f"d={head_dim} sliding_window(127,0)"
    for heads, packed in (("h=16", False), ("hq=24 hkv=8", False), ("hq=8 hkv=8", False), ("hq=48 hkv=8", True)):
        problem = parse_problem(f"b=4 {heads} s=4096 {words} bf16")
        configs = default_configs(problem, H200)
        assert any(config.heads_of_tile > 1 for config in configs) is packed
        assert all(shape_refusal(config, problem.shape) is None for config in configs)
        # All but those that pack stay.
        alike = parse_problem(f"b=4 hq=32 hkv=8 s=4096 {words} bf16")
        assert [c for c in configs if c.heads_of_tile == 1] == [
            c for c in default_configs(alike, H200) if c.heads_of_tile == 1
        ]


def test_heads_of_one_group_share_their_keys():
    alone, shared = (first(f"b=4 hq=32 hkv={hkv} s=4096 d=128 causal") for hkv in (32, 8))
    assert shared.head_group == 4 * alone.head_group
    assert first("b=1 hq=32 hkv=1 s=4096 d=128 causal").head_group == 32


@pytest.mark.parametrize(
    ("text", "consumers", "programs"),
    [
        ("b=1 h=32 s=256 d=128 full", 1, 1),  # 64 tiles of 128 rows, 128 of 64
        ("b=1 h=32 s=512 d=128 full", 1, 2),  # 128 and 256
        ("b=1 h=33 s=512 d=128 full", 2, 1),  # 132: one for each multiprocessor
        ("b=1 h=32 sq=1 sk=4096 d=128 full", 1, 1),
        ("b=1 h=4 s=512 d=256 causal", 1, 1),
        ("b=1 h=16 s=512 d=64 sliding_window(63,0)", 1, 1),
    ],
)
def test_small_grids_have_programs_of_one_consumer(text, consumers, programs):
    assert numbers(first(text), "consumers", "programs") == (consumers, programs)


@pytest.mark.parametrize(
    "words",
    [
        *("d=128 causal bf16", "d=64 full fp16", "d=96 document bf16", "d=256 sliding_window(9,9) bf16"),
        *("d=192 dv=128 causal varlen bf16", "d=16 full bf16", "d=80 causal softcap bf16"),
    ],
)
def test_every_one_is_legal_and_the_portable_ones_follow(words):
    for size in ("b=1 h=2 s=128", "b=4 h=32 s=8192"):
        problem = parse_problem(f"{size} {words}")
        configs = default_configs(problem, H200)
        written = [config for config in configs if isinstance(config, HopperForwardConfig)]
        assert written
        assert configs[: len(written)] == tuple(written)
        assert len(set(written)) == len(written)
        assert all(check_config(config, problem.spec, H200) == () for config in written)
        assert isinstance(configs[len(written)], TritonForwardConfig)
        assert configs[-len(safe_configs()) :] == safe_configs()


@pytest.mark.parametrize("words", ["fp32", "tf32", "fp8", "bias=input bf16", "dropout bf16", "seqused=k varlen bf16"])
def test_what_the_kernel_does_not_compute_stays_with_the_portable_ones(words):
    configs = default_configs(parse_problem(f"b=4 h=16 s=4096 d=128 causal {words}"), H200)
    assert all(isinstance(config, TritonForwardConfig) for config in configs)


def test_wide_and_foreign_stay_with_the_portable_ones():
    problem = parse_problem("b=4 h=16 s=4096 d=128 causal bf16")
    targets = [target for target in known_targets() if target.arch != "sm_90"]
    portable = [default_configs(problem, target) for target in targets]
    portable.append(default_configs(parse_problem("b=4 h=16 s=4096 d=512 causal bf16"), H200))
    assert all(isinstance(config, TritonForwardConfig) for configs in portable for config in configs)


def test_like_lengths_share_a_config():
    lengths = range(2100, 4000, 50)
    assert len({first(f"b=4 h=16 s={length} d=128 causal") for length in lengths}) <= 2
