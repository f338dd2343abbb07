"""What a backward config must keep to, see `flashgen.codegen.constraints`: one named predicate per limit."""

from __future__ import annotations

import typing

from flashgen.codegen.config import TritonBackwardConfig
from flashgen.codegen.head_tiles import next_power_of_two
from flashgen.codegen.limits import (
    LEAST_KEYS_OF_BYTES,
    ROWS_PER_WARP,
    SPARE_REGISTERS,
    alignment_reason,
    has_tensor_memory,
    launch_reason,
    loads_bytes,
    maxnreg_reason,
    register_limit,
    shared_memory_reason,
    side_reason,
    tma_reason,
)
from flashgen.codegen.mask_plan import plan_mask
from flashgen.spec import AttentionSpec, DType
from flashgen.target import GpuTarget

Constraint = typing.Callable[[TritonBackwardConfig, AttentionSpec, GpuTarget], "str | None"]

_MAX_FP32_TILE = 64 * 32  # scores of one tile; five ieee float32 products are unrolled FMAs
_SCORES_PER_WARP = ROWS_PER_WARP * 8  # of the smallest product


class _Kernel(typing.NamedTuple):
    """One of the two large kernels: what its programs own, and what a step of their loops takes."""

    suffix: str
    block_m: int
    block_n: int
    num_warps: int
    num_stages: int
    maxnreg: int

    @property
    def own(self) -> int:
        """Rows of one program: keys of the kernel of dK and dV, queries of that of dQ."""
        return self.block_m if self.suffix else self.block_n

    @property
    def step(self) -> int:
        """Rows of the other side in one step."""
        return self.block_n if self.suffix else self.block_m


def _kernels(config: TritonBackwardConfig) -> tuple[_Kernel, ...]:
    dkdv = _Kernel("", config.block_m1, config.block_n1, config.num_warps, config.num_stages, config.maxnreg)
    if config.dq != "kernel":
        return (dkdv,)
    return (dkdv, _Kernel("2", config.block_m2, config.block_n2, config.num_warps2, config.num_stages2, 0))


def dq_kernel_described(config: TritonBackwardConfig, spec: AttentionSpec, target: GpuTarget) -> str | None:
    """The numbers of dQ's own kernel are given where there is one, and are 0 elsewhere."""
    numbers = {name: getattr(config, name) for name in ("block_m2", "block_n2", "num_warps2", "num_stages2")}
    wrong = [f"{name}={number}" for name, number in numbers.items() if (number > 0) != (config.dq == "kernel")]
    if not wrong:
        return None
    needs = "needs them all" if config.dq == "kernel" else "has no kernel of its own for them, they must be 0"
    return f"{', '.join(wrong)}: dq={config.dq} {needs}"


def block_power_of_two(config: TritonBackwardConfig, spec: AttentionSpec, target: GpuTarget) -> str | None:
    """Tiles have power-of-two sides of at least 16, as `tl.dot` needs."""
    reason = side_reason("block_m1", config.block_m1) or side_reason("block_n1", config.block_n1)
    if reason is None and config.dq == "kernel":
        reason = side_reason("block_m2", config.block_m2) or side_reason("block_n2", config.block_n2)
    return reason


def sides_fill_operands(config: TritonBackwardConfig, spec: AttentionSpec, target: GpuTarget) -> str | None:
    """Tiles have sides of 32 at least where bytes are loaded into the scores, see `loads_bytes`.

    Every side is summed over by some product of P or dS.
    """
    if not loads_bytes(spec):
        return None
    side = min(min(kernel.block_m, kernel.block_n) for kernel in _kernels(config))
    if side < LEAST_KEYS_OF_BYTES:
        return f"a tile side of {side} is less than {LEAST_KEYS_OF_BYTES}, with bytes loaded into the scores"
    return None


def launch_within_limits(config: TritonBackwardConfig, spec: AttentionSpec, target: GpuTarget) -> str | None:
    """A program has a power of two of warps and at most 1024 threads; pipelines and head group hold at least one."""
    for kernel in _kernels(config):
        reason = launch_reason(kernel.num_warps, kernel.num_stages, target, kernel.suffix)
        if reason is not None:
            return reason
    if config.head_group < 1:
        return f"head_group={config.head_group} is less than 1"
    return None


def warps_fit_tile(config: TritonBackwardConfig, spec: AttentionSpec, target: GpuTarget) -> str | None:
    """Every warp has 16 x 8 scores of its own; not so for fp32, where many warps keep a tile in registers."""
    if spec.dtype is DType.FP32:
        return None
    for kernel in _kernels(config):
        if kernel.block_m * kernel.block_n < _SCORES_PER_WARP * kernel.num_warps:
            tile = f"{kernel.block_m}x{kernel.block_n}"
            return f"a tile of {tile} gives {kernel.num_warps} warps fewer than {_SCORES_PER_WARP} scores each"
    return None


def fp32_tile_limited(config: TritonBackwardConfig, spec: AttentionSpec, target: GpuTarget) -> str | None:
    """Tiles of float32 stay small: beyond 64x32 scores they compile for minutes and spill."""
    if spec.dtype is not DType.FP32:
        return None
    for kernel in _kernels(config):
        tile = kernel.block_m * kernel.block_n
        if tile > _MAX_FP32_TILE:
            sides = f"{kernel.block_m}x{kernel.block_n}"
            return f"a {sides} tile of fp32 has {tile} scores, more than {_MAX_FP32_TILE}"
    return None


def sums_in_fixed_order(config: TritonBackwardConfig, spec: AttentionSpec, target: GpuTarget) -> str | None:
    """Key tiles that add to dQ in any order give other bits each time."""
    if config.dq == "atomic" and spec.deterministic:
        return "dq=atomic adds in any order, and the gradients must be deterministic: dq=kernel or dq=ordered"
    return None


def order_is_known(config: TritonBackwardConfig, spec: AttentionSpec, target: GpuTarget) -> str | None:
    """A key tile can wait for the one before it only where that one sees the same queries, and more."""
    if config.dq != "ordered":
        return None
    mask = plan_mask(spec.mask.structure())
    if mask.table or mask.left_edge:
        return f"dq=ordered would wait for ever for key tiles that the mask {spec.mask} hides"
    return None


def single_loop_by_formula(config: TritonBackwardConfig, spec: AttentionSpec, target: GpuTarget) -> str | None:
    """A single loop masks every tile of an interval; a table of tiles lists masked ones apart."""
    if config.loops == "single" and plan_mask(spec.mask.structure()).table:
        return f"loops=single is the same kernel as split under the mask {spec.mask}"
    return None


def descriptor_needs_tma(config: TritonBackwardConfig, spec: AttentionSpec, target: GpuTarget) -> str | None:
    """Descriptors pay only where they are hardware bulk copies."""
    return tma_reason(target) if config.loads == "descriptor" else None


def descriptor_needs_dense(config: TritonBackwardConfig, spec: AttentionSpec, target: GpuTarget) -> str | None:
    """Rows past the end of a sequence must be read as 0, which descriptors do at the end of a tensor alone."""
    if config.loads == "descriptor" and (spec.varlen or spec.seqused):
        what = "varlen" if spec.varlen else f"seqused={spec.seqused}"
        return f"loads=descriptor reads past the end of a sequence, which {what} puts inside of a tensor"
    return None


def descriptor_alignment(config: TritonBackwardConfig, spec: AttentionSpec, target: GpuTarget) -> str | None:
    """A bulk copy moves rows of a multiple of 16 bytes in boxes of at most 256 a side."""
    if config.loads != "descriptor":
        return None
    sides = max(max(kernel.block_m, kernel.block_n) for kernel in _kernels(config))
    return alignment_reason(spec, max(sides, *_widths(spec)))


def maxnreg_legal(config: TritonBackwardConfig, spec: AttentionSpec, target: GpuTarget) -> str | None:
    """A register limit is one that ptxas takes and that leaves room for one program on a multiprocessor."""
    return maxnreg_reason(config.maxnreg, config.num_warps, target)


def shared_memory_fits(config: TritonBackwardConfig, spec: AttentionSpec, target: GpuTarget) -> str | None:
    """What each kernel keeps in shared memory, and what is on its way there, fits that of one program."""
    return shared_memory_reason(shared_memory_lower_bound(config, spec, target), target)


def shared_memory_lower_bound(config: TritonBackwardConfig, spec: AttentionSpec, target: GpuTarget) -> int:
    """Return the fewest bytes of shared memory that Triton can take for the larger of the kernels.

    Asynchronous products (Hopper, Blackwell) read a program's own tiles, K and V or Q and dO, from shared memory, and a
    stage of the others while the next ones fill. A synchronous product has moved its tiles to registers: there its own
    need not stay, and one stage less is in flight. The transposed operands of tf32 are such.
    """
    row = sum(_widths(spec)) * spec.dtype.itemsize
    needed = 0
    for kernel in _kernels(config):
        # Loops that wait for their turn, or look their tiles up, are pipelined less or not at all.
        waits = (config.dq == "ordered" and not kernel.suffix) or not spec.mask.by_formula
        stages = 1 if waits else kernel.num_stages
        if _products_are_async(kernel, spec, target):
            needed = max(needed, (kernel.own + stages * kernel.step) * row)
        else:
            needed = max(needed, (stages - 1) * kernel.step * row)
    return needed


def _products_are_async(kernel: _Kernel, spec: AttentionSpec, target: GpuTarget) -> bool:
    """Return whether Triton picks the matrix instructions that whole warpgroups issue from shared memory."""
    whole_warpgroups = kernel.own >= 64 and kernel.num_warps >= 4
    return whole_warpgroups and spec.dtype.itemsize == 2 and (target.has_wgmma or has_tensor_memory(target))


def accumulators_fit_registers(config: TritonBackwardConfig, spec: AttentionSpec, target: GpuTarget) -> str | None:
    """The float32 sums of a program and the tiles P and dP, which dS is made of, fit the registers of its threads."""
    width_qk, width_v = _widths(spec)
    for kernel in _kernels(config):
        sums = kernel.own * (width_qk if kernel.suffix else width_qk + width_v)
        tiles = 2 * kernel.block_m * kernel.block_n
        # Tensor memory holds the sums, and a tile at a time comes to the registers.
        in_tensor_memory = has_tensor_memory(target) and _products_are_async(kernel, spec, target)
        threads = max(kernel.num_warps, 1) * target.warp_size
        needed = (tiles if in_tensor_memory else sums + tiles) // threads + SPARE_REGISTERS
        limit = register_limit(kernel.num_warps, kernel.maxnreg, target)
        if needed > limit:
            what = "dQ" if kernel.suffix else "dK and dV"
            tile = f"{kernel.block_m}x{kernel.block_n}"
            return f"{what} with tiles of {tile} need about {needed} registers a thread of {limit}"
    return None


def _widths(spec: AttentionSpec) -> tuple[int, int]:
    return next_power_of_two(spec.head_dim_qk), next_power_of_two(spec.head_dim_v)


BACKWARD_CONSTRAINTS: dict[str, Constraint] = {
    predicate.__name__: predicate
    for predicate in (
        dq_kernel_described,
        block_power_of_two,
        sides_fill_operands,
        launch_within_limits,
        warps_fit_tile,
        fp32_tile_limited,
        sums_in_fixed_order,
        order_is_known,
        single_loop_by_formula,
        descriptor_needs_tma,
        descriptor_needs_dense,
        descriptor_alignment,
        maxnreg_legal,
        shared_memory_fits,
        accumulators_fit_registers,
    )
}
