"""What a compiled kernel costs, read from the binary itself: no assembler is run."""

from __future__ import annotations

import re
import struct

from flashgen.codegen import KernelResources
from flashgen.errors import CompileError

# Attributes of the section .nv.info, as cuobjdump names them; each record is format, attribute, length, payload.
_FORMAT_SIZED = 0x04
_EIATTR_FRAME_SIZE = 0x11
_EIATTR_REGCOUNT = 0x2F


def cubin_resources(cubin: bytes, smem_bytes: int) -> KernelResources:
    """Return the resources written in an NVIDIA ELF binary.

    Raises:
        CompileError: if the binary is not an ELF file or names no register count.
    """
    values: dict[int, int] = {}
    data = _elf_section(cubin, b".nv.info")
    position = 0
    while position + 4 <= len(data):
        kind, attribute, length = struct.unpack_from("<BBH", data, position)
        position += 4
        if kind == _FORMAT_SIZED:
            if length == 8:
                # A function's symbol index, then its value; device functions are inlined: the maximum is the kernel's.
                values[attribute] = max(values.get(attribute, 0), struct.unpack_from("<II", data, position)[1])
            position += length
    if _EIATTR_REGCOUNT not in values:
        raise CompileError("the binary names no register count in .nv.info: not a CUDA kernel, or an unknown format")
    return KernelResources(
        registers=values[_EIATTR_REGCOUNT], spills=values.get(_EIATTR_FRAME_SIZE, 0), smem_bytes=smem_bytes
    )


def _elf_section(binary: bytes, name: bytes) -> bytes:
    if binary[:5] != b"\x7fELF\x02":
        raise CompileError("the compiled binary is not a 64-bit ELF file")
    (table,) = struct.unpack_from("<Q", binary, 40)
    entry_size, count, names_index = struct.unpack_from("<HHH", binary, 58)
    headers = [struct.unpack_from("<IIQQQQ", binary, table + i * entry_size) for i in range(count)]
    names = headers[names_index][4]
    for name_offset, _, _, _, offset, size in headers:
        start = names + name_offset
        if binary[start : binary.index(b"\0", start)] == name:
            return binary[offset : offset + size]
    raise CompileError(f"the compiled binary has no section {name.decode()}")


_AMD_FIELDS = {"registers": ("vgpr_count",), "spills": ("vgpr_spill_count", "sgpr_spill_count")}


def amdgcn_resources(assembly: str, smem_bytes: int) -> KernelResources:
    """Return the resources written in AMD assembly text (spills counted in registers, turned to bytes).

    Raises:
        CompileError: if a field is missing.
    """
    totals = {}
    for field, names in _AMD_FIELDS.items():
        found = [re.search(rf"\.{name}:\s+(\d+)", assembly) for name in names]
        if None in found:
            raise CompileError(f"the assembly names no {' or '.join(names)}")
        totals[field] = sum(int(match.group(1)) for match in found if match)
    return KernelResources(registers=totals["registers"], spills=4 * totals["spills"], smem_bytes=smem_bytes)
