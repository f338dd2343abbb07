"""Reading binaries that are not what a compiler writes."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from flashgen.codegen import KernelResources
from flashgen.compile import CompiledKernel, amdgcn_resources, cubin_resources
from flashgen.errors import CompileError


def test_amd_text() -> None:
    text = (
        "    .sgpr_count:     30\n    .sgpr_spill_count: 2\n    .vgpr_count:     122\n    .vgpr_spill_count: 3\n"
        "    .agpr_count:     7\n"
    )
    # Five registers of four bytes.
    assert amdgcn_resources(text, 4096) == KernelResources(registers=122, spills=20, smem_bytes=4096)


@pytest.mark.parametrize("missing", ["vgpr_count", "vgpr_spill_count", "sgpr_spill_count"])
def test_amd_text_without_a_field(missing: str) -> None:
    text = "".join(f".{n}: 1\n" for n in ("vgpr_count", "vgpr_spill_count", "sgpr_spill_count") if n != missing)
    with pytest.raises(CompileError, match=missing):
        amdgcn_resources(text, 0)


@pytest.mark.parametrize("binary", [b"", b"\x7fELF", b"\x7fELF\x01" + bytes(100), b"not a binary at all" * 10])
def test_what_is_no_elf_file(binary: bytes) -> None:
    with pytest.raises(CompileError, match="not a 64-bit ELF file"):
        cubin_resources(binary, 0)


def test_what_is_no_cuda_binary(build: Callable[..., CompiledKernel]) -> None:
    with pytest.raises(CompileError, match=r"no section \.nv\.info"):
        cubin_resources(build("gfx942").entries[0].handle.asm["hsaco"], 0)


def test_shared_memory_is_passed_through(build: Callable[..., CompiledKernel]) -> None:
    assert cubin_resources(build("sm_80").entries[0].handle.asm["cubin"], 12345).smem_bytes == 12345
