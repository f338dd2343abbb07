"""A command line to run, registries of its own, and entries to put there."""

from __future__ import annotations

import dataclasses
import typing
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from typer.testing import CliRunner

from flashgen.cli import app
from flashgen.codegen import KernelResources, TritonDecodeConfig, TritonForwardConfig, render
from flashgen.registry import (
    Accuracy,
    MeasuredRange,
    Performance,
    Provenance,
    RegistryEntry,
    clear_bundles,
    write_entries,
)
from flashgen.spec import parse_problem

Run = Callable[..., typing.Any]

TUNED = "b=1 hq=2 hkv=1 s=1024 d=64 causal fp16"
DECODED = "b=16 hq=32 hkv=8 sq=1 sk=4096 d=128 full bf16 decode"


@pytest.fixture(autouse=True)
def _own_folders(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.delenv("FLASHGEN_REGISTRY", raising=False)
    monkeypatch.setattr("flashgen.resources.user_registry_dir", lambda: tmp_path / "user")
    monkeypatch.setattr("flashgen.resources.shipped_registry_dir", lambda: tmp_path / "shipped")
    yield
    clear_bundles()


@pytest.fixture
def run() -> Run:
    """A function that runs `flashgen ARGUMENTS` in this process."""
    runner = CliRunner()
    return lambda *arguments: runner.invoke(app, [str(argument) for argument in arguments])


def make_entry(digest: str | None = None) -> RegistryEntry:
    problem = parse_problem(TUNED)
    config = TritonForwardConfig(block_m=64, block_n=32, num_warps=4, num_stages=2)
    return RegistryEntry(
        device_name="NVIDIA H200",
        arch="sm_90",
        spec=problem.spec,
        range=MeasuredRange.of(problem.shape),
        config=config,
        origin="measured",
        resources=KernelResources(registers=100, spills=0, smem_bytes=20000),
        performance=Performance(
            median_us=20.0, spread=0.01, tflops=300.0, baseline="cudnn", baseline_us=25.0, timing="cold-l2"
        ),
        accuracy=Accuracy(max_error=1e-4, allowed_error=1e-3),
        runners_up=(),
        provenance=Provenance(
            template_digest=digest or render(problem.spec, config).digest,
            flashgen="0.1.0",
            triton="3.6.0",
            torch="2.11.0",
            driver="580.1",
            date="2026-11-22T07:00:00Z",
            trials=40,
            seed=0,
        ),
    )


@pytest.fixture
def entry() -> RegistryEntry:
    """An entry that speaks of today's template."""
    return make_entry()


@pytest.fixture
def decode_entry() -> RegistryEntry:
    """An entry of decoding, whose 268.7 MB took 64 us."""
    problem = parse_problem(DECODED)
    config = TritonDecodeConfig(block_m=16, block_n=64, num_warps=4, num_stages=3)
    entry = make_entry(render(problem.spec, config).digest)
    return dataclasses.replace(
        entry,
        spec=problem.spec,
        range=MeasuredRange.of(problem.shape),
        config=config,
        performance=dataclasses.replace(entry.performance, median_us=64.0, tflops=16.78, baseline_us=80.0),
    )


@pytest.fixture
def stale_entry() -> RegistryEntry:
    """An entry measured on another template."""
    return make_entry("0123456789abcdef")


@pytest.fixture
def tuned(tmp_path: Path, entry: RegistryEntry) -> Path:
    """A folder with one registry file that holds `entry`."""
    folder = tmp_path / "tuned"
    folder.mkdir()
    write_entries(folder, [entry])
    return folder
