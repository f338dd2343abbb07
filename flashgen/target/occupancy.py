"""How many blocks of a kernel one multiprocessor holds."""

from __future__ import annotations

import math

from flashgen.target.gpu import GpuTarget

# Of any size, on one multiprocessor; some GPUs hold fewer than others: this is what Hopper does.
_MOST_BLOCKS = 32


def resident_blocks(target: GpuTarget, num_warps: int, registers: int, smem_bytes: int) -> tuple[int, str]:
    """Return how many blocks one multiprocessor holds at a time, and what keeps it from holding more."""
    # Registers are handed out per warp in units of 256; CUDA keeps 1 KiB of shared memory of each block for itself.
    warp_registers = math.ceil(max(registers, 1) * target.warp_size / 256) * 256
    block_smem = smem_bytes + (1024 if target.backend == "cuda" else 0)
    limits = {
        "registers": target.registers_per_sm // (warp_registers * num_warps),
        "shared memory": target.smem_per_sm_bytes // block_smem if block_smem else _MOST_BLOCKS,
        "threads": min(_MOST_BLOCKS, target.max_threads_per_sm // (num_warps * target.warp_size)),
    }
    if smem_bytes > target.smem_bytes:
        limits["shared memory"] = 0
    limiter = min(limits, key=limits.__getitem__)
    return limits[limiter], limiter
