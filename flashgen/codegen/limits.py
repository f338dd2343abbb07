"""Limits of GPUs and of Triton that the configs of every template meet; a reason is a sentence, or None."""

from __future__ import annotations

from flashgen.codegen.head_tiles import tile_widths
from flashgen.spec import AttentionSpec
from flashgen.target import GpuTarget

LEAST_KEYS_OF_BYTES = 32
"""Side of a tile, for one lane of a matrix operand to hold 8 elements."""
ROWS_PER_WARP = 16
"""Rows of the smallest matrix-unit tile, NVIDIA's mma and AMD's mfma alike."""
SPARE_REGISTERS = 16
"""Of a thread, for addresses and what there is one of in each row; what else a loop holds can be spilled cheaply."""

_BYTES = frozenset({"bool", "int8", "uint8"})
_MAX_THREADS = 1024  # of one program
_MAX_DESCRIPTOR_BOX = 256  # elements along one axis of a bulk copy
_MAX_REGISTERS = {"cuda": 255, "hip": 512}  # of one thread; 512 counts AMD's accumulation registers


def side_reason(name: str, size: int, least: int = 16) -> str | None:
    """Return why a tile cannot have a side of this size."""
    if size < least or size & (size - 1):
        return f"{name}={size} is not a power of two of at least {least}"
    return None


def launch_reason(num_warps: int, num_stages: int, target: GpuTarget, suffix: str = "") -> str | None:
    """Return why a kernel cannot be launched so; `suffix` ends the names that the config has for these numbers."""
    if num_warps < 1 or num_warps & (num_warps - 1):
        return f"num_warps{suffix}={num_warps} is not a power of two"
    threads = num_warps * target.warp_size
    if threads > _MAX_THREADS:
        return f"{num_warps} warps of {target.warp_size} are {threads} threads, more than {_MAX_THREADS}"
    if num_stages < 1:
        return f"num_stages{suffix}={num_stages} is less than 1"
    return None


def maxnreg_reason(maxnreg: int, num_warps: int, target: GpuTarget) -> str | None:
    """Return why a register limit is not one that ptxas takes and that leaves room for a program."""
    if maxnreg == 0:
        return None
    if target.backend == "hip":
        return f"maxnreg={maxnreg} has no meaning on {target.arch}; only 0 is allowed"
    if not 64 <= maxnreg <= 255 or maxnreg % 8:
        return f"maxnreg={maxnreg} is neither 0 nor a multiple of 8 from 64 to 248"
    threads = target.warp_size * num_warps
    if threads * maxnreg > target.registers_per_sm:
        return (
            f"maxnreg={maxnreg} takes {threads * maxnreg} registers for {threads} threads of {target.registers_per_sm}"
        )
    return None


def register_limit(num_warps: int, maxnreg: int, target: GpuTarget) -> int:
    """Return how many registers a thread can have."""
    threads = max(num_warps, 1) * target.warp_size
    limit = min(_MAX_REGISTERS[target.backend], target.registers_per_sm // threads)
    return min(limit, maxnreg or limit)


def shared_memory_reason(needed: int, target: GpuTarget) -> str | None:
    """Return why a program cannot have so many bytes of shared memory."""
    if needed > target.smem_bytes:
        return f"needs at least {needed} bytes of shared memory, {target.device_name} has {target.smem_bytes}"
    return None


def tma_reason(target: GpuTarget) -> str | None:
    """Return why descriptors are no hardware bulk copies, which alone makes them pay."""
    return None if target.has_tma else f"loads=descriptor needs bulk copies (sm_90 and later), {target.arch} has none"


def alignment_reason(spec: AttentionSpec, box: int, copy: str = "loads=descriptor") -> str | None:
    """Return why bulk copies cannot move rows of the spec's head dimensions in boxes with this largest side.

    `copy` is what the config calls them.
    """
    for name, dims in (("head_dim_qk", spec.head_dim_qk), ("head_dim_v", spec.head_dim_v)):
        if dims * spec.kv_dtype.itemsize % 16:
            return f"rows of {name}={dims} {spec.kv_dtype} are not a multiple of 16 bytes, as {copy} needs"
    if box > _MAX_DESCRIPTOR_BOX:
        return f"a tile side of {box} is more than the {_MAX_DESCRIPTOR_BOX} that {copy} moves at once"
    return None


def accumulator_reason(
    rows: int, keys: int, columns_v: int, num_warps: int, maxnreg: int, target: GpuTarget, *, in_tensor_memory: bool
) -> str | None:
    """Return why the float32 scores and output of a tile do not fit the registers of its threads.

    Tensor memory holds both; registers then see one at a time, for the softmax or the rescale.
    """
    threads = max(num_warps, 1) * target.warp_size
    columns = max(columns_v, keys) if in_tensor_memory else columns_v + keys
    needed = rows * columns // threads + SPARE_REGISTERS
    limit = register_limit(num_warps, maxnreg, target)
    if needed > limit:
        return f"accumulators of {rows}x{columns} need about {needed} registers a thread of {limit}"
    return None


def head_tiles_reason(most: int, spec: AttentionSpec) -> str | None:
    """Return why a head dimension cannot be cut into so many tiles: into two only where that is narrower than one."""
    if most not in (1, 2):
        return f"head_tiles={most} is neither 1 nor 2"
    cut = any(len(widths) == 2 for widths in tile_widths(spec, 2))
    if most == 2 and not cut:
        return f"head dimensions {spec.head_dim_qk} and {spec.head_dim_v} are no narrower as two tiles"
    return None


def has_tensor_memory(target: GpuTarget) -> bool:
    """Return whether products may leave their sums in tensor memory, outside of the registers."""
    return target.capability // 10 == 10


def loads_bytes(spec: AttentionSpec) -> bool:
    """Return whether bytes are loaded into the scores or the mask.

    Triton 3.6 lays the operands of a product out by the narrowest load behind them: with a boolean bias and dropout in
    8 elements of a lane, which a side of 16 does not fill, and the products are wrong (seen on an H200).
    """
    captures = [capture for leaf in spec.mask.leaves for capture in leaf.captures]
    captures += spec.score_mod.captures if spec.score_mod else ()
    return spec.bias == "bool" or any(capture.dtype in _BYTES for capture in captures)
