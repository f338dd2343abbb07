"""What a compiled kernel takes of a GPU."""

from __future__ import annotations

import dataclasses


@dataclasses.dataclass(frozen=True, kw_only=True)
class KernelResources:
    """What one program of a kernel takes.

    Attributes:
        registers: 32-bit registers of one thread.
        spills: bytes of stack of one thread, where spilled registers live.
        smem_bytes: shared memory of one program.
    """

    registers: int
    spills: int
    smem_bytes: int
