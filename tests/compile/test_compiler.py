"""Cross-compiling without a GPU, and what the binaries say they cost."""

from __future__ import annotations

import dataclasses
import importlib.util
import os
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from flashgen.codegen import KernelResources, TritonForwardConfig, constant_values, render
from flashgen.compile import CompiledKernel, compile_job, compile_kernel
from flashgen.errors import CompileError
from flashgen.spec import AttentionSpec, DType, causal
from flashgen.target import named_target

Build = Callable[..., CompiledKernel]

SPEC = AttentionSpec(dtype=DType.FP16, head_dim_qk=64, head_dim_v=64, mask=causal(), lse=True)
CONFIG = TritonForwardConfig(block_m=64, block_n=32, num_warps=4, num_stages=2)
# 64 registers a thread of output and 128 of scores: too much for 255.
SPILLING = {"block_m": 128, "block_n": 128}


@pytest.mark.parametrize(
    ("arch", "dtype", "loads"),
    [
        ("sm_80", "fp16", "pointer"),
        ("sm_90", "bf16", "pointer"),
        ("sm_90", "bf16", "descriptor"),
        ("sm_100", "bf16", "pointer"),
        ("sm_120", "fp16", "pointer"),
        ("gfx942", "fp16", "pointer"),
        ("gfx950", "bf16", "pointer"),
    ],
)
def test_compiles_for_an_absent_gpu(build: Build, arch: str, dtype: str, loads: str) -> None:
    compiled = build(arch, dtype, loads=loads)
    target = named_target(arch)
    assert 24 <= compiled.resources.registers <= 255
    assert compiled.resources.spills == 0
    assert compiled.resources.smem_bytes == compiled.entries[0].handle.metadata.shared
    # One K and one V tile of 32 x 64 elements at least.
    assert 2 * 32 * 64 * 2 <= compiled.resources.smem_bytes <= target.smem_bytes
    assert compiled.entries[0].handle.metadata.num_warps == 4
    assert compiled.entries[0].handle.metadata.target.arch == (arch if target.backend == "hip" else target.capability)
    assert compiled.entries[0].constants == (64, 64, 64, 64, 64, 32)
    assert re.fullmatch("[0-9a-f]{16}", compiled.binary_hash)


def test_dense_rows_are_loaded_sixteen_bytes_at_a_time(build: Build) -> None:
    # What the promises on alignment are for: without them every element is a load of its own.
    copies = re.findall(
        r"cp\.async\.c[ag]\.shared\.global.*?, (?:0x)?([0-9a-f]+)", build("sm_80").entries[0].handle.asm["ptx"]
    )
    assert copies
    assert {int(size, 16) for size in copies} == {16}


def test_descriptors_become_bulk_copies(build: Build) -> None:
    assert "cp.async.bulk.tensor" in build("sm_90", "bf16", loads="descriptor").entries[0].handle.asm["ptx"]
    assert "cp.async.bulk.tensor" not in build("sm_90", "bf16").entries[0].handle.asm["ptx"]


def test_hopper_uses_its_matrix_unit(build: Build) -> None:
    assert "wgmma.mma_async" in build("sm_90", "bf16").entries[0].handle.asm["ptx"]


def test_fused_multiply_add_is_asked_for(build: Build) -> None:
    assert build("sm_80").entries[0].handle.metadata.enable_fp_fusion is True


def _cuobjdump(cubin: bytes, folder: Path) -> dict[str, int]:
    found = importlib.util.find_spec("triton")
    assert found is not None
    assert found.origin is not None
    tool = Path(found.origin).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    path = folder / "kernel.cubin"
    path.write_bytes(cubin)
    result = subprocess.run([tool, "-res-usage", path], capture_output=True, text=True, timeout=60, check=True)
    line = next(line for line in result.stdout.splitlines() if "REG:" in line)
    return {name: int(value) for name, value in re.findall(r"([A-Z]+):(\d+)", line)}


@pytest.mark.parametrize("numbers", [{}, SPILLING], ids=["small", "spilling"])
@pytest.mark.parametrize("arch", ["sm_80", "sm_90"])
def test_resources_are_those_of_cuobjdump(build: Build, tmp_path: Path, arch: str, numbers: dict[str, int]) -> None:
    compiled = build(arch, **numbers)
    usage = _cuobjdump(compiled.entries[0].handle.asm["cubin"], tmp_path)
    assert (compiled.resources.registers, compiled.resources.spills) == (usage["REG"], usage["STACK"])


def test_a_config_that_spills_says_so(build: Build) -> None:
    resources = build("sm_80", **SPILLING).resources
    assert resources.registers >= 250
    assert resources.spills > 0


def test_a_register_limit_is_kept(build: Build) -> None:
    free, limited = build("sm_80").resources, build("sm_80", maxnreg=128).resources
    assert limited.registers <= 128 < free.registers


def test_hash_tells_machine_code_apart(build: Build) -> None:
    assert build("sm_80", head_group=4).binary_hash == build("sm_80").binary_hash
    others = [
        build("sm_80"),
        build("sm_80", "bf16"),
        build("sm_120"),
        build("sm_90", "bf16"),
        build("sm_80", **SPILLING),
    ]
    assert len({kernel.binary_hash for kernel in others}) == len(others)


def test_a_refused_kernel_is_a_compile_error() -> None:
    config = dataclasses.replace(CONFIG, block_m=48)
    with pytest.raises(CompileError, match="power of 2") as caught:
        compile_kernel(render(SPEC, config), SPEC, config, named_target("sm_80"))
    assert "block_m=48" in str(caught.value)
    assert "sm_80" in str(caught.value)


def test_an_assembler_error_is_a_compile_error_and_prints_nothing(capfd: pytest.CaptureFixture[str]) -> None:
    # ptxas refuses: a warpgroup product of this tile needs more registers. Stdout belongs to the caller's JSON.
    config = dataclasses.replace(CONFIG, block_m=128, block_n=128, maxnreg=64)
    with pytest.raises(CompileError, match="registers"):
        compile_kernel(render(SPEC, config), SPEC, config, named_target("sm_90"))
    assert capfd.readouterr().out[:80] == ""


def test_job_reports_what_the_kernel_has(build: Build) -> None:
    compiled = build("sm_80")
    report = compile_job(SPEC, CONFIG, named_target("sm_80"))
    assert (report.resources, report.binary_hash) == (compiled.resources, compiled.binary_hash)
    assert isinstance(report.resources, KernelResources)
    assert report.seconds > 0


def test_descriptor_blocks() -> None:
    spec = dataclasses.replace(SPEC, head_dim_qk=72, head_dim_v=40)
    config = dataclasses.replace(CONFIG, loads="descriptor")
    (entry,) = render(spec, config).plan.entries
    constants = constant_values(spec, config)
    blocks = {name: entry.box(name, constants) for name in ("q_desc", "k_desc", "v_desc", "out_desc")}
    assert blocks == {
        "q_desc": (1, 1, 64, 128), "k_desc": (1, 1, 32, 128), "v_desc": (1, 1, 32, 64), "out_desc": (1, 1, 64, 64),
    }  # fmt: skip


def test_compiling_needs_no_torch() -> None:
    code = (
        "import sys; sys.modules['torch'] = None\n"
        "from flashgen.codegen import TritonForwardConfig, render\n"
        "from flashgen.compile import compile_kernel\n"
        "from flashgen.spec import parse_problem\n"
        "from flashgen.target import named_target\n"
        "spec = parse_problem('h=1 s=1 d=64 causal fp16 lse').spec\n"
        "config = TritonForwardConfig(block_m=64, block_n=32, num_warps=4, num_stages=2)\n"
        "print(compile_kernel(render(spec, config), spec, config, named_target('sm_80')).resources.registers)\n"
    )
    root = Path(__file__).parents[2]
    path = os.pathsep.join(filter(None, [os.environ.get("PYTHONPATH"), str(root)]))
    result = subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
        env={**os.environ, "PYTHONPATH": path},
    )
    assert result.returncode == 0, result.stderr
    assert int(result.stdout) >= 24
