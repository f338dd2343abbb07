"""Entries to store, and a machine without registries of its own."""

from __future__ import annotations

import dataclasses
import random
import typing
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from flashgen.codegen.config import TritonForwardConfig
from flashgen.codegen.kernel_resources import KernelResources
from flashgen.registry import (
    Accuracy,
    MeasuredRange,
    Origin,
    Performance,
    Provenance,
    RegistryEntry,
    RunnerUp,
    clear_bundles,
)
from flashgen.spec import AttentionSpec, DType, Shape, causal, full

MakeEntry = Callable[..., RegistryEntry]


@pytest.fixture(autouse=True)
def _own_folders(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setenv("FLASHGEN_CACHE", str(tmp_path / "cache"))
    monkeypatch.delenv("FLASHGEN_REGISTRY", raising=False)
    monkeypatch.setattr("flashgen.resources.user_registry_dir", lambda: tmp_path / "user")
    monkeypatch.setattr("flashgen.resources.shipped_registry_dir", lambda: tmp_path / "shipped")
    yield
    clear_bundles()


def _make_entry(
    seqlen: int = 4096,
    *,
    median_us: float = 123.456,
    date: str = "2026-11-22T07:00:00Z",
    origin: Origin = "measured",
    device_name: str = "NVIDIA H200",
    arch: str = "sm_90",
    head_dim: int = 128,
) -> RegistryEntry:
    config = TritonForwardConfig(block_m=128, block_n=64, num_warps=8, num_stages=3, loads="descriptor")
    return RegistryEntry(
        device_name=device_name,
        arch=arch,
        spec=AttentionSpec(dtype=DType.BF16, head_dim_qk=head_dim, head_dim_v=head_dim, mask=causal()),
        range=MeasuredRange.of(Shape(batch=4, seqlen_q=seqlen, seqlen_k=seqlen, nheads_q=32, nheads_kv=8)),
        config=config,
        origin=origin,
        resources=KernelResources(registers=168, spills=0, smem_bytes=98304),
        performance=Performance(
            median_us=median_us, spread=0.00123456, tflops=612.34, baseline="cudnn", baseline_us=None, timing="cold-l2"
        ),
        accuracy=Accuracy(max_error=1.23456e-05, allowed_error=0.0023),
        runners_up=(RunnerUp(config=dataclasses.replace(config, num_stages=2), median_us=130.0),),
        provenance=Provenance(
            template_digest="1234567890123456",
            flashgen="0.1.0",
            triton="3.10",
            torch="2.13.0",
            driver="580.126.09",
            date=date,
            trials=120,
            seed=0,
        ),
    )


@pytest.fixture
def make_entry() -> MakeEntry:
    """A function that builds an entry; a seqlen makes a key."""
    return _make_entry


@pytest.fixture
def random_entries() -> Callable[[random.Random, int], list[RegistryEntry]]:
    """A function that draws entries with many equal keys, dates and origins."""

    def draw(rng: random.Random, count: int) -> list[RegistryEntry]:
        origins = typing.get_args(Origin)
        drawn = [
            _make_entry(
                rng.choice((128, 256, 512)),
                median_us=rng.choice((10.0, 20.0, 30.0)),
                date=rng.choice(("2026-11-22T07:00:00Z", "2026-11-22T07:00:01Z")),
                origin=rng.choice(origins),
            )
            for _ in range(count)
        ]
        masks = (full(), causal("top_left"))
        return [
            dataclasses.replace(e, spec=dataclasses.replace(e.spec, mask=rng.choice(masks), softcap=rng.random() < 0.3))
            for e in drawn
        ]

    return draw
