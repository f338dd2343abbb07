"""The first call of a shipped shape: one launch, of the entry's config, and nothing that tunes or times."""

from __future__ import annotations

import sys
import types
from pathlib import Path

import pytest
import torch

import flashgen
from flashgen.codegen import KernelConfig, KernelResources, RenderedKernel, constant_values
from flashgen.measure import CudaClock, HostClock
from flashgen.ops import runtime
from flashgen.ops.call import NO_TENSORS, Options
from flashgen.registry import Location, RegistryEntry, load
from flashgen.spec import AttentionSpec
from flashgen.target import GpuTarget, named_target

H200 = named_target("H200")
SHIPPED = Path(flashgen.__file__).parent / "tuned"


class Handle(str):
    """In place of Triton's compiled kernel: its name, which can be referred to weakly."""


def compiled(rendered: RenderedKernel, spec: AttentionSpec, config: KernelConfig, target: GpuTarget) -> object:
    values = constant_values(spec, config)
    entries = [
        types.SimpleNamespace(handle=Handle(config), constants=tuple(values[name] for name in entry.constants))
        for entry in rendered.plan.entries
    ]
    return types.SimpleNamespace(entries=entries, resources=KernelResources(registers=1, spills=0, smem_bytes=0))


@pytest.fixture
def launched(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The config of each kernel that is launched on a GPU that is none."""
    seen: list[str] = []
    monkeypatch.setattr("flashgen.launch.kernel.launch", lambda handle, grid, arguments: seen.append(str(handle)))
    # CPU tensors have no device index.
    monkeypatch.setattr(torch._C, "_cuda_getDevice", lambda: None, raising=False)
    monkeypatch.setattr(torch._C, "_cuda_getCurrentRawStream", lambda device: 7, raising=False)
    monkeypatch.setattr("flashgen.launch.kernel.tile_counter", lambda device, stream: torch.zeros(2, dtype=torch.int32))
    monkeypatch.setattr("flashgen.launch.forward.detect_target", lambda device: H200)
    monkeypatch.setattr(runtime, "detect_target", lambda device: H200)
    monkeypatch.setattr(runtime, "_empty_strided", None)
    monkeypatch.setattr(runtime, "compile_kernel", compiled)
    runtime._compiled.cache_clear()
    monkeypatch.setattr("flashgen.resources.shipped_registry_dir", lambda: SHIPPED)
    return seen


def shipped() -> list[RegistryEntry]:
    """Return the smallest entry of each plain spec."""
    found: dict[AttentionSpec, RegistryEntry] = {}
    entries = [located.entry for located in load([Location(path=SHIPPED, label="shipped")]).entries()]
    for entry in sorted(entries, key=lambda entry: entry.range.seqlen_q.lo * entry.range.batch.lo):
        spec = entry.spec
        if spec.phase == "forward" and not spec.features and not spec.score_mod and spec.mask.by_formula:
            found.setdefault(spec, entry)
    return [*found.values()]


def test_one_launch_and_no_other(launched: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    timed: list[object] = []
    for clock in (CudaClock, HostClock):
        monkeypatch.setattr(clock, "samples_us", lambda *given: timed.append(given))
    tuners = {name for name in sys.modules if name.startswith(("flashgen.tuning", "optuna"))}
    entries = shipped()
    assert len(entries) >= 5
    for entry in entries:
        sizes, spec = entry.range, entry.spec
        shape = (sizes.batch.lo, sizes.nheads_q.lo, sizes.seqlen_q.lo, spec.head_dim_qk)
        # Nothing reads them: memory that nobody touches costs nothing.
        q = torch.empty(shape, dtype=getattr(torch, spec.dtype.torch_name))
        kv_shape = (shape[0], sizes.nheads_kv.lo, sizes.seqlen_k.lo)
        k, v = (q.new_empty((*kv_shape, columns)) for columns in (spec.head_dim_qk, spec.head_dim_v))
        options = Options(0, 0, str(spec.mask), "", None, 0.0, 0.0, "bhsd", False, False, "", "")
        launched.clear()
        runtime.prepare(q, k, v, NO_TENSORS, options)(q, k, v, NO_TENSORS)
        assert launched == [str(entry.config)]
    assert not timed
    assert {name for name in sys.modules if name.startswith(("flashgen.tuning", "optuna"))} == tuners
