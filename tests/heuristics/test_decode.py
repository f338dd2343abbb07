"""What decodes where nobody tuned it."""

from __future__ import annotations

import dataclasses

import pytest

from flashgen.codegen import HopperDecodeConfig, TritonDecodeConfig
from flashgen.codegen.constraints import check_config
from flashgen.heuristics import default_configs, safe_configs
from flashgen.heuristics.decode import rows_of_tile
from flashgen.spec import Problem, parse_problem
from flashgen.target import GpuTarget, known_targets, named_target

H200 = named_target("H200")
SPECS = (
    *("d=64 causal", "d=128", "d=128 causal fp16 page=16", "d=192 dv=128", "d=256", "d=576 dv=512 shared_kv"),
    *("d=576 dv=512", "d=576 dv=512 shared_kv fp8_kv", "d=128 fp8_kv descale page=1", "d=96", "d=128 tf32"),
    *("d=64 fp32", "d=512 fp32", "d=24", "d=128 append rotary=halves leftpad softcap alibi sinks lse"),
)


def problem(words: str, sizes: str = "b=1 hq=32 hkv=8 sq=1 sk=4096") -> Problem:
    return parse_problem(f"{sizes} decode {words}")


def default(asked: Problem, target: GpuTarget = H200) -> TritonDecodeConfig:
    """Return the first of the kernel that runs anywhere."""
    legal = [c for c in default_configs(asked, target) if not check_config(c, asked.spec, target)]
    return next(config for config in legal if isinstance(config, TritonDecodeConfig))


@pytest.mark.parametrize("target", known_targets(), ids=str)
@pytest.mark.parametrize("words", SPECS)
def test_every_problem_has_a_default_and_a_safe_one(words: str, target: GpuTarget) -> None:
    spec = problem(words).spec
    assert default(problem(words), target)
    assert any(not check_config(config, spec, target) for config in safe_configs("decode"))


@pytest.mark.parametrize(
    ("sizes", "rows"),
    [
        ("b=1 hq=32 hkv=8 sq=1 sk=64", 16),
        ("b=1 hq=32 hkv=8 sq=4 sk=64", 16),
        ("b=1 hq=32 hkv=8 sq=5 sk=64", 32),
        ("b=1 hq=28 hkv=4 sq=3 sk=64", 32),
        ("b=1 hq=128 hkv=1 sq=1 sk=64", 64),
        ("b=1 hq=8 hkv=8 sq=63 sk=64", 64),
        ("b=1 hq=8 hkv=8 sq=64 sk=64", 64),
        ("b=1 hq=32 hkv=8 sq=256 sk=131072", 64),
        ("b=1 h=8 sq=0 sk=64", 16),
    ],
)
def test_a_tile_holds_the_queries_of_a_group(sizes: str, rows: int) -> None:
    asked = problem("d=128", sizes)
    assert rows_of_tile(asked.shape) == default(asked).block_m == rows


def test_pages_of_less_than_a_tile_are_gathered_by_more_warps() -> None:
    whole, small = (default(problem(f"d=128 page={size}")) for size in (256, 16))
    assert (whole.loads, small.loads) == ("descriptor", "pointer")
    assert dataclasses.replace(small, loads="descriptor", num_warps=whole.num_warps) == whole
    assert small.num_warps > whole.num_warps


@pytest.mark.parametrize(
    ("sizes", "parts"),
    [
        ("b=1 hq=16 hkv=2 sq=1 sk=2048", 32),
        ("b=1 hq=32 hkv=8 sq=1 sk=4096", 16),
        ("b=16 hq=32 hkv=8 sq=1 sk=4096", 4),
        ("b=1 hq=8 hkv=8 sq=256 sk=131072", 16),
    ],
)
def test_as_many_parts_are_merged_at_once_as_there_are(sizes: str, parts: int) -> None:
    assert default(problem("d=128", sizes)).merge_parts == parts


@pytest.mark.parametrize(
    ("words", "sizes", "first"),
    [
        ("d=128 causal", "b=1 hq=32 hkv=8 sq=256 sk=8192", (128, 3, "registers")),
        ("d=128 causal page=256 lse sinks", "b=1 h=8 sq=64 sk=8192", (128, 3, "registers")),
        ("d=128 causal append rotary=pairs batch_idx", "b=1 hq=32 hkv=8 sq=256 sk=8192", (128, 3, "registers")),
        ("d=128 causal page=16", "b=1 hq=32 hkv=8 sq=256 sk=8192", (128, 3, "registers")),
        ("d=192 dv=128 causal", "b=1 h=8 sq=512 sk=8192", (128, 2, "registers")),
        ("d=256 causal", "b=1 h=8 sq=512 sk=8192", (64, 2, "shared")),
        # What the kernel for Hopper does not know, and queries that leave its rows empty.
        ("d=128 causal append leftpad", "b=1 hq=32 hkv=8 sq=256 sk=8192", None),
        ("d=128 causal page=24", "b=1 hq=32 hkv=8 sq=256 sk=8192", None),
        ("d=128 causal page=4", "b=1 hq=32 hkv=8 sq=256 sk=8192", None),
        ("d=128 causal fp8_kv descale", "b=1 hq=32 hkv=8 sq=256 sk=8192", None),
        ("d=128 causal", "b=1 hq=32 hkv=8 sq=63 sk=8192", None),
    ],
)
def test_chunks_are_for_the_kernel_of_hopper(words: str, sizes: str, first: tuple[int, int, str] | None) -> None:
    asked = problem(words, sizes)
    found = default_configs(asked, H200)
    of_hopper = [config for config in found if isinstance(config, HopperDecodeConfig)]
    assert all(not check_config(config, asked.spec, H200) for config in of_hopper)
    assert list(found[: len(of_hopper)]) == of_hopper
    got = [(config.block_n, config.num_stages, config.queries) for config in of_hopper[:1]]
    assert got == ([first] if first else [])
    # Another GPU has none of them.
    assert not any(isinstance(config, HopperDecodeConfig) for config in default_configs(asked, named_target("A100")))


def test_only_gpus_that_can_start_kernels_early_do() -> None:
    found = [default(problem("d=128"), named_target(name)).launch for name in ("A100", "H200", "MI300X")]
    assert found == ["plain", "dependent", "plain"]


def test_the_capacity_of_a_cache_changes_nothing() -> None:
    found = {default_configs(problem("d=128", f"b=4 hq=32 hkv=8 sq=1 sk={n}"), H200) for n in (1, 4096, 131072)}
    assert len(found) == 1


def test_latent_attention_reads_its_rows_once_in_two_tiles() -> None:
    latent = default(problem("d=576 dv=512 shared_kv", "b=1 hq=128 hkv=1 sq=1 sk=4096"))
    assert (latent.block_m, latent.head_tiles, latent.num_warps) == (64, 2, 8)
