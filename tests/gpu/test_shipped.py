"""The entries that ship with the package, on the GPU they were measured on."""

from __future__ import annotations

import pytest
import torch

import flashgen
from flashgen.codegen.constraints import check_config
from flashgen.dispatch import is_stale
from flashgen.launch import detect_target, software_versions
from flashgen.measure import accuracy_error, sampled_heads, take_heads
from flashgen.registry import Location, RegistryEntry, load
from flashgen.registry.entry import RANGE_AXES
from flashgen.resources import shipped_registry_dir
from flashgen.spec import Problem, Shape

pytestmark = pytest.mark.gpu


def shipped() -> list[RegistryEntry]:
    registry = load([Location(path=shipped_registry_dir(), label="shipped")])
    assert registry.issues == ()
    device = torch.cuda.get_device_name()
    entries = [located.entry for located in registry.entries() if located.entry.device_name == device]
    if not entries:
        pytest.skip(f"no entry ships for {device}")
    return entries


def problem_of(entry: RegistryEntry) -> Problem:
    sizes = {name: getattr(entry.range, name).lo for name in RANGE_AXES}
    return Problem(spec=entry.spec, shape=Shape(**sizes))


def tensors_of(problem: Problem) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    shape, spec = problem.shape, problem.spec
    generator = torch.Generator(device="cuda").manual_seed(0)

    def normal(heads: int, seqlen: int, dim: int) -> torch.Tensor:
        dtype = getattr(torch, spec.dtype.torch_name)
        return torch.randn(shape.batch, heads, seqlen, dim, generator=generator, device="cuda", dtype=dtype)

    return (
        normal(shape.nheads_q, shape.seqlen_q, spec.head_dim_qk),
        normal(shape.nheads_kv, shape.seqlen_k, spec.head_dim_qk),
        normal(shape.nheads_kv, shape.seqlen_k, spec.head_dim_v),
    )


def test_entries_are_fresh_and_legal() -> None:
    target = detect_target(torch.device("cuda", torch.cuda.current_device()))
    for entry in shipped():
        assert is_stale(entry) is None
        assert check_config(entry.config, entry.spec, target) == ()


def test_a_shipped_shape_gets_its_own_entry() -> None:
    software = software_versions()
    for entry in shipped()[:6]:
        selection = flashgen.explain(*tensors_of(problem_of(entry)), mask=entry.spec.mask)
        measured = (entry.provenance.triton, entry.provenance.driver)
        rung = "exact" if measured == (software.triton, software.driver) else "other software"
        if entry.origin == "predicted":
            rung = "predicted"
        assert selection.rung == rung, str(selection)
        assert selection.config == entry.config
        assert selection.distance == 0


def test_shipped_configs_are_right() -> None:
    for entry in shipped()[:6]:
        problem = problem_of(entry)
        q, k, v = tensors_of(problem)
        mask = entry.spec.mask
        out, lse = flashgen.attention(q, k, v, mask=mask, config=entry.config, return_lse=True)
        pairs = sampled_heads(problem.shape.batch, problem.shape.nheads_q, 2, seed=0)
        sample = take_heads(pairs, q, k, v, out, lse)
        report = accuracy_error(
            sample.out,
            sample.lse,
            sample.q,
            sample.k,
            sample.v,
            mask=mask,
            softmax_scale=problem.spec.default_scale,
        )
        assert report.ok, f"{report.reason}\n{entry.config} for {problem}"
