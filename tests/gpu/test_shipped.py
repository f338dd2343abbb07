"""The entries that ship with the package, on the GPU they were measured on."""

from __future__ import annotations

import dataclasses

import pytest
import torch

import flashgen
from flashgen.codegen import render
from flashgen.codegen.constraints import check_config
from flashgen.compile import compile_kernel
from flashgen.dispatch import is_stale, select
from flashgen.launch import bind_backward, bind_decode, bind_forward, detect_target, software_versions
from flashgen.measure import random_inputs
from flashgen.registry import Location, RegistryEntry, load
from flashgen.resources import shipped_registry_dir
from flashgen.spec import AttentionSpec, Problem
from flashgen.target import GpuTarget
from flashgen.tuning.gpu_cases import make_case
from flashgen.tuning.retuning import problem_of

pytestmark = pytest.mark.gpu


def shipped() -> list[RegistryEntry]:
    registry = load([Location(path=shipped_registry_dir(), label="shipped")])
    assert registry.issues == ()
    device = torch.cuda.get_device_name()
    entries = [located.entry for located in registry.entries() if located.entry.device_name == device]
    if not entries:
        pytest.skip(f"no entry ships for {device}")
    return entries


def target_here() -> GpuTarget:
    return detect_target(torch.device("cuda", torch.cuda.current_device()))


def of_every_kind(entries: list[RegistryEntry]) -> list[RegistryEntry]:
    """Return one entry of each spec and template, the one with the fewest queries."""
    found: dict[tuple[AttentionSpec, str], RegistryEntry] = {}
    for entry in sorted(entries, key=lambda entry: entry.range.seqlen_q.lo * entry.range.batch.lo):
        found.setdefault((entry.spec, entry.config.template), entry)
    return list(found.values())


def test_entries_are_fresh_and_legal() -> None:
    for entry in shipped():
        assert is_stale(entry) is None
        assert check_config(entry.config, entry.spec, target_here()) == ()


def test_a_shipped_shape_gets_its_own_entry() -> None:
    registry = load([Location(path=shipped_registry_dir(), label="shipped")])
    software = software_versions()
    for entry in shipped():
        selection = select(problem_of(entry), target_here(), registry=registry, software=software)
        measured = (entry.provenance.triton, entry.provenance.driver)
        rung = "exact" if measured == (software.triton, software.driver) else "other software"
        if entry.origin == "predicted":
            rung = "predicted"
        assert selection.rung == rung, str(selection)
        assert selection.config == entry.config
        assert selection.distance == 0


def test_a_call_finds_its_entry() -> None:
    forward = [entry for entry in shipped() if entry.spec.phase == "forward"]
    plain = [entry for entry in forward if not entry.spec.features and entry.spec.mask.by_formula]
    for entry in of_every_kind(plain)[:3]:
        q, k, v = random_inputs(problem_of(entry), device="cuda", seed=0)
        selection = flashgen.explain(q, k, v, mask=entry.spec.mask, score_mod=entry.spec.score_mod)
        assert selection.config == entry.config
        assert selection.distance == 0


def written_most(spec: AttentionSpec) -> AttentionSpec:
    """Return the spec of the variant that writes more: lse, or the gradient of a bias of numbers."""
    if spec.phase != "backward":
        return dataclasses.replace(spec, lse=True)
    return dataclasses.replace(spec, dbias=spec.bias not in ("none", "bool"))


def test_shipped_configs_are_right() -> None:
    for entry in of_every_kind(shipped()):
        spec, config = written_most(entry.spec), entry.config
        problem = Problem(spec=spec, shape=problem_of(entry).shape)
        case = make_case(problem, device=torch.device("cuda"), seed=0, whole=False)
        compiled = compile_kernel(render(spec, config), spec.structure(), config, target_here())
        bind = {"forward": bind_forward, "backward": bind_backward, "decode": bind_decode}[spec.phase]
        bind(problem, config, compiled, case.extras, case.tensors)()
        report = case.judge()
        assert report.ok, f"{report.reason}\n{config} for {problem}"
