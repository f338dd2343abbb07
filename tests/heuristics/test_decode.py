"""What decodes where nobody tuned it."""

from __future__ import annotations

import dataclasses

import pytest

from flashgen.codegen import TritonDecodeConfig
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
    legal = [c for c in default_configs(asked, target) if not check_config(c, asked.spec, target)]
    assert isinstance(legal[0], TritonDecodeConfig)
    return legal[0]


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


def test_only_gpus_that_can_start_kernels_early_do() -> None:
    found = [default(problem("d=128"), named_target(name)).launch for name in ("A100", "H200", "MI300X")]
    assert found == ["plain", "dependent", "plain"]


def test_the_capacity_of_a_cache_changes_nothing() -> None:
    found = {default_configs(problem("d=128", f"b=4 hq=32 hkv=8 sq=1 sk={n}"), H200) for n in (1, 4096, 131072)}
    assert len(found) == 1


def test_latent_attention_reads_its_rows_once_in_two_tiles() -> None:
    latent = default(problem("d=576 dv=512 shared_kv", "b=1 hq=128 hkv=1 sq=1 sk=4096"))
    assert (latent.block_m, latent.head_tiles, latent.num_warps) == (64, 2, 8)
