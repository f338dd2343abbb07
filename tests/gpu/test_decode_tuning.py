"""Checking, timing and racing decode kernels on a GPU, as the tuner does."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

import flashgen.tuning
from flashgen.codegen import KernelConfig, TritonDecodeConfig
from flashgen.codegen.constraints import check_config
from flashgen.heuristics import default_configs
from flashgen.launch import detect_target
from flashgen.measure import Measurement, Rejected
from flashgen.measure.graph_clock import Rotation
from flashgen.registry import read_file
from flashgen.spec import Problem, parse_problem
from flashgen.target import GpuTarget
from flashgen.tuning import gpu_jobs

pytestmark = [pytest.mark.gpu, pytest.mark.timeout(300, method="thread")]

PROBLEMS = (
    "b=2 hq=8 hkv=2 sq=1 sk=3000 d=128 bf16 decode",
    "b=3 hq=32 hkv=8 sq=4 sk=1025 d=64 causal softcap sinks alibi fp16 decode",
    "b=2 hq=8 hkv=2 sq=1 sk=3000 d=128 append rotary=halves page=256 leftpad lse bf16 decode",
    "b=2 hq=4 hkv=4 sq=70 sk=2000 d=96 sliding_window(300,0) page=16 bf16 decode",
    "b=2 hq=16 hkv=1 sq=1 sk=2000 d=576 dv=512 shared_kv bf16 decode",
    "b=2 hq=8 hkv=2 sq=2 sk=2000 d=128 causal fp8_kv descale page=64 bf16 decode",
    "b=1 hq=6 hkv=2 sq=3 sk=500 d=192 dv=128 causal batch_idx fp32 decode",
    "b=2 hq=8 hkv=2 sq=200 sk=3000 d=128 causal bf16 decode",
)


@pytest.fixture(autouse=True)
def _own_cases() -> Iterator[None]:
    yield
    gpu_jobs.forget_cases()


def target_here() -> GpuTarget:
    return detect_target(torch.device("cuda", torch.cuda.current_device()))


def legal(problem: Problem) -> list[KernelConfig]:
    return [c for c in default_configs(problem, target_here()) if not check_config(c, problem.spec, target_here())]


def tries(problem: Problem) -> list[KernelConfig]:
    """The default, with either launch and loop where it has such, and the last resort."""
    first, *_, last = legal(problem)
    if not isinstance(first, TritonDecodeConfig):
        return [first, last]
    launch = "plain" if first.launch == "dependent" else "dependent"
    # One loop takes more shared memory of a stage.
    stages = max(1, first.num_stages - 1)
    other = dataclasses.replace(first, launch=launch, loops="single", num_stages=stages)
    return list(dict.fromkeys((first, other, last)))


@pytest.mark.parametrize("text", PROBLEMS)
def test_right_kernels_are_timed(text: str) -> None:
    problem = parse_problem(text)
    for config in tries(problem):
        outcome = gpu_jobs.evaluate(problem, config, None)
        assert isinstance(outcome, Measurement), f"{config}: {outcome}"
        assert 0 < outcome.timing.median_us < 5000


@pytest.mark.parametrize("text", PROBLEMS)
def test_variants_are_confirmed(text: str) -> None:
    problem = parse_problem(text)
    problem = dataclasses.replace(problem, spec=problem.spec.tuning_key())
    for config in tries(problem):
        assert gpu_jobs.confirm(problem, config) is None, config


def test_a_short_call_is_timed_on_caches_in_turn_and_without_host_time() -> None:
    problem = parse_problem("b=1 hq=32 hkv=8 sq=1 sk=512 d=128 bf16 decode")
    config = legal(problem)[0]
    case = gpu_jobs._own_case(problem)
    assert isinstance(gpu_jobs._timed(case, config), Rotation)
    l2_bytes = torch.cuda.get_device_properties(0).L2_cache_size
    assert len(case.calls) * problem.min_bytes() > l2_bytes
    outcome = gpu_jobs.evaluate(problem, config, None)
    assert isinstance(outcome, Measurement)
    # A launch through Triton's Python takes the host longer.
    assert outcome.timing.median_us < 30


def test_a_kernel_that_appends_nothing_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    problem = parse_problem("b=2 hq=8 hkv=2 sq=1 sk=300 d=64 append bf16 decode")
    bound = gpu_jobs._bound

    def forgetful(case: gpu_jobs.Case, config: KernelConfig) -> object:
        call, kept = bound(case, config), case.tensors["v"].clone()

        def run() -> None:
            call()
            case.tensors["v"].copy_(kept)

        return run

    monkeypatch.setattr(gpu_jobs, "_bound", forgetful)
    rejected = gpu_jobs.evaluate(problem, legal(problem)[0], None)
    assert isinstance(rejected, Rejected)
    assert "v cache" in rejected.reason


def test_finalists_race_beside_baselines() -> None:
    problem = parse_problem("b=1 hq=32 hkv=8 sq=1 sk=4096 d=128 bf16 decode")
    found = gpu_jobs.race(problem, tries(problem), 5.0, 0, True)
    assert {"0", "1"} <= found.timings.keys()
    assert found.timings.keys() - {"0", "1", "2"}


def test_a_problem_is_tuned(tmp_path: Path) -> None:
    problem = parse_problem("b=2 hq=8 hkv=2 sq=1 sk=2048 d=64 bf16 decode")
    report = flashgen.tuning.tune([problem], effort="quick", budget_s=40, registry=tmp_path, study=str(tmp_path / "s"))
    (path,) = report.files
    assert path.name.endswith(".decode.yaml")
    (entry,) = read_file(path).entries
    assert (entry.spec, entry.origin, entry.performance.timing) == (problem.spec, "measured", "cuda-graph")
