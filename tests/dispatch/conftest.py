"""Registries made by hand: an entry to a folder, so that every one has a place of its own in the search path."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Callable
from pathlib import Path

import pytest

from flashgen.codegen import KernelConfig, KernelResources, TritonForwardConfig, render
from flashgen.registry import (
    Accuracy,
    Interval,
    Location,
    MeasuredRange,
    Origin,
    Performance,
    Provenance,
    Registry,
    RegistryEntry,
    load,
    write_entries,
)
from flashgen.spec import AttentionSpec, DType, causal
from flashgen.target import Software

SOFTWARE = Software(flashgen="0.1.0", triton="3.9.0", torch="2.13.0", driver="580.1")
SPEC = AttentionSpec(dtype=DType.BF16, head_dim_qk=128, head_dim_v=128, mask=causal())
CONFIG = TritonForwardConfig(block_m=128, block_n=64, num_warps=8, num_stages=2)

MakeEntry = Callable[..., RegistryEntry]
MakeRegistry = Callable[..., Registry]


def _interval(size: int | tuple[int, int]) -> Interval:
    lo, hi = size if isinstance(size, tuple) else (size, size)
    return Interval(lo=lo, hi=hi)


def _make_entry(
    seqlen: int | tuple[int, int] = 4096,
    *,
    seqlen_q: int | tuple[int, int] | None = None,
    batch: int | tuple[int, int] = 4,
    nheads_q: int | tuple[int, int] = 32,
    nheads_kv: int = 8,
    spec: AttentionSpec = SPEC,
    config: KernelConfig = CONFIG,
    device_name: str = "NVIDIA H200",
    arch: str = "sm_90",
    origin: Origin = "measured",
    software: Software = SOFTWARE,
    digest: str | None = None,
) -> RegistryEntry:
    return RegistryEntry(
        device_name=device_name,
        arch=arch,
        spec=spec,
        range=MeasuredRange(
            batch=_interval(batch),
            nheads_q=_interval(nheads_q),
            nheads_kv=_interval(nheads_kv),
            seqlen_q=_interval(seqlen if seqlen_q is None else seqlen_q),
            seqlen_k=_interval(seqlen),
        ),
        config=config,
        origin=origin,
        resources=KernelResources(registers=168, spills=0, smem_bytes=98304),
        performance=Performance(
            median_us=500.0, spread=0.01, tflops=600.0, baseline="cudnn", baseline_us=550.0, timing="cold-l2"
        ),
        accuracy=Accuracy(max_error=1e-3, allowed_error=2e-3),
        runners_up=(),
        provenance=Provenance(
            template_digest=render(spec, config).digest if digest is None else digest,
            date="2026-11-22T07:00:00Z",
            trials=10,
            seed=0,
            **dataclasses.asdict(software),
        ),
    )


@pytest.fixture
def make_entry() -> MakeEntry:
    """A function that builds an entry for `b=4 hq=32 hkv=8 s=4096 d=128 causal bf16` on an H200, and variants of it."""
    return _make_entry


@pytest.fixture
def make_registry(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> MakeRegistry:
    """A function that loads the registry of entries given in search order."""
    monkeypatch.setenv("FLASHGEN_CACHE", str(tmp_path / "cache"))

    number = itertools.count()

    def make(*entries: RegistryEntry) -> Registry:
        locations = []
        for entry in entries:
            folder = tmp_path / f"registry{next(number)}"
            write_entries(folder, [entry])
            locations.append(Location(path=folder, label="argument"))
        registry = load(locations)
        assert registry.issues == ()
        return registry

    return make


@pytest.fixture
def software() -> Software:
    """The versions that entries are measured under unless they say otherwise."""
    return SOFTWARE
