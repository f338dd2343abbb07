"""Backward modules for absent GPUs: their kernels, what these cost, and what their loads and sums become."""

from __future__ import annotations

import functools
import re

import pytest

from flashgen.codegen import TritonBackwardConfig, constant_values, render
from flashgen.codegen.config import QueryGradient
from flashgen.codegen.kernel_config import Loads
from flashgen.compile import CompiledEntry, CompiledKernel, compile_job, compile_kernel
from flashgen.spec import parse_problem
from flashgen.target import named_target


@functools.cache
def build(
    arch: str, dq: QueryGradient = "kernel", loads: Loads = "pointer", words: str = "causal fp16", block: int = 32
) -> CompiledKernel:
    """Compile a small module (D=64) once a session."""
    spec = parse_problem(f"h=1 s=1 d=64 {words} backward").spec
    config = config_of(dq, loads, block)
    return compile_kernel(render(spec, config), spec.structure(), config, named_target(arch))


def config_of(dq: QueryGradient, loads: Loads = "pointer", block: int = 32) -> TritonBackwardConfig:
    own = {"block_m2": 64, "block_n2": block, "num_warps2": 4, "num_stages2": 1} if dq == "kernel" else {}
    return TritonBackwardConfig(block_m1=block, block_n1=64, num_warps=4, num_stages=2, dq=dq, loads=loads, **own)


def entry_of(compiled: CompiledKernel, name: str) -> CompiledEntry:
    return next(entry for entry in compiled.entries if entry.name == name)


def ptx(compiled: CompiledKernel, name: str = "attn_bwd_dkdv") -> str:
    text = entry_of(compiled, name).handle.asm["ptx"]
    assert isinstance(text, str)
    return text


@pytest.mark.parametrize(
    ("arch", "dq", "loads"),
    [
        ("sm_80", "kernel", "pointer"),
        ("sm_80", "atomic", "pointer"),
        ("sm_80", "ordered", "pointer"),
        ("sm_90", "kernel", "pointer"),
        ("sm_90", "kernel", "descriptor"),
        ("sm_90", "atomic", "descriptor"),
        ("sm_90", "ordered", "descriptor"),
        ("gfx942", "kernel", "pointer"),
    ],
)
def test_compiles_for_an_absent_gpu(arch: str, dq: QueryGradient, loads: Loads) -> None:
    compiled, target = build(arch, dq, loads), named_target(arch)
    names = ["attn_bwd_delta", "attn_bwd_dkdv", *(["attn_bwd_dq"] if dq == "kernel" else [])]
    assert [entry.name for entry in compiled.entries] == names
    for entry in compiled.entries:
        assert 8 <= entry.resources.registers <= (512 if target.backend == "hip" else 255)
        assert entry.resources.spills == 0, entry.name
        assert entry.resources.smem_bytes == entry.handle.metadata.shared <= target.smem_bytes
        assert entry.handle.metadata.num_warps == 4
    # The worst of all, each by itself.
    worst = [max(getattr(e.resources, f) for e in compiled.entries) for f in ("registers", "spills", "smem_bytes")]
    assert [getattr(compiled.resources, f) for f in ("registers", "spills", "smem_bytes")] == worst
    assert re.fullmatch("[0-9a-f]{16}", compiled.binary_hash)


def test_each_kernel_has_its_own_constants_and_options() -> None:
    compiled, config = build("sm_80"), config_of("kernel")
    spec = parse_problem("h=1 s=1 d=64 causal fp16 backward").spec
    values = constant_values(spec, config)
    for entry, plan in zip(compiled.entries, render(spec, config).plan.entries, strict=True):
        assert entry.constants == tuple(values[name] for name in plan.constants)
    assert entry_of(compiled, "attn_bwd_dkdv").handle.metadata.num_stages == config.num_stages
    assert entry_of(compiled, "attn_bwd_dq").handle.metadata.num_stages == config.num_stages2


def test_sums_of_dq_become_bulk_reductions_atomics_or_nothing() -> None:
    described = ptx(build("sm_90", "atomic", "descriptor"))
    assert "cp.reduce.async.bulk.tensor" in described
    assert not _float_atomics(described)
    for loads in ("pointer", "descriptor"):
        own = ptx(build("sm_90", "kernel", loads))
        assert "cp.reduce" not in own
        assert not _float_atomics(own)
    assert _float_atomics(ptx(build("sm_80", "atomic")))
    # Whoever waits for its turn must see what was added before, which bulk copies do not promise.
    ordered = ptx(build("sm_90", "ordered", "descriptor"))
    assert "cp.reduce" not in ordered
    assert _float_atomics(ordered)
    assert re.search(r"(ld|atom)\.\S*acquire", ordered)
    assert re.search(r"(atom|red)\.\S*release", ordered)


def _float_atomics(text: str) -> list[str]:
    return re.findall(r"(?:atom|red)\.\S*add\S*\.f32", text)


def test_descriptors_become_bulk_copies() -> None:
    for name in ("attn_bwd_dkdv", "attn_bwd_dq"):
        assert "cp.async.bulk.tensor" in ptx(build("sm_90", "kernel", "descriptor"), name)
        assert "cp.async.bulk.tensor" not in ptx(build("sm_90", "kernel", "pointer"), name)


def test_hopper_uses_its_matrix_unit() -> None:
    for name in ("attn_bwd_dkdv", "attn_bwd_dq"):
        assert "wgmma.mma_async" in ptx(build("sm_90"), name)


def test_dense_rows_are_loaded_sixteen_bytes_at_a_time() -> None:
    # What the promises on alignment are for: without them every element is a load of its own.
    for name in ("attn_bwd_dkdv", "attn_bwd_dq"):
        assert "ld.global.v4.b32" in ptx(build("sm_80", "kernel"), name)
    assert "ld.global.v4.b32" in ptx(build("sm_80", "kernel"), "attn_bwd_delta")


@pytest.mark.parametrize(
    "words",
    [
        "causal varlen seqused=qk bf16",
        "document dropout alibi bf16",
        "full softcap score_mod('return where(keep[kv_idx], score * score, 0.0)', keep='bool[kv_idx]') bf16",
        "causal bias=input dbias bf16",
        "sliding_window(9,3) bias=bool:unaligned tf32",
    ],
)
def test_features_compile(words: str) -> None:
    compiled = build("sm_90", "kernel", "pointer", words)
    assert ("attn_bwd_dbias" in [entry.name for entry in compiled.entries]) == ("dbias" in words)


def test_hash_tells_modules_apart() -> None:
    others = [build("sm_80"), build("sm_80", "atomic"), build("sm_80", "ordered"), build("sm_90")]
    others.append(build("sm_80", block=64))
    assert len({compiled.binary_hash for compiled in others}) == len(others)


def test_job_reports_what_the_module_has() -> None:
    spec = parse_problem("h=1 s=1 d=64 causal fp16 backward").spec
    report, compiled = compile_job(spec, config_of("kernel"), named_target("sm_80")), build("sm_80")
    assert (report.resources, report.binary_hash) == (compiled.resources, compiled.binary_hash)
