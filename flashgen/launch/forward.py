"""Launching the forward kernel: everything that stays the same from call to call is worked out once."""

from __future__ import annotations

import math
import typing

import torch

from flashgen.codegen import (
    HopperForwardConfig,
    KernelConfig,
    KernelPlan,
    TritonForwardConfig,
    capture_pointers,
    constant_values,
    render,
)
from flashgen.codegen.mask_plan import mask_numbers
from flashgen.compile import CompiledKernel
from flashgen.errors import ConfigError, InputError
from flashgen.launch.arguments import entry_arguments
from flashgen.launch.descriptors import entry_descriptors
from flashgen.launch.device import detect_target
from flashgen.launch.kernel import TILE_COUNTER, BoundKernel
from flashgen.launch.operands import NAMES, Operands
from flashgen.launch.side_tensors import TENSOR_NAMES, SideTensors
from flashgen.launch.tile_table import TableShape, TileTable, tile_table
from flashgen.spec import AttentionSpec, Extras, Problem, Shape

_INT32_MAX = 2**31 - 1
_LOG2E = math.log2(math.e)
_LEAST_SCALE = 1e-30
# Any config of the template whose modules hold the kernel that asks a mask.
_PORTABLE = TritonForwardConfig(block_m=64, block_n=64, num_warps=4, num_stages=2)


class ForwardLaunch:
    """A compiled forward kernel bound to sizes, strides and numbers; call it with tensors of exactly those.

    Args (of a call): q, k, v, out, lse (None unless the spec has it), any of them with the bound strides, and the other
    tensors of the call as `SideTensors` gives them. Nothing is checked then: the caller has.

    Attributes:
        kernel: takes the same as one tuple, which is shorter.
    """

    def __init__(
        self,
        *,
        plan: KernelPlan,
        compiled: CompiledKernel,
        problem: Problem,
        config: KernelConfig,
        operands: Operands,
        extras: Extras,
        device: torch.device,
    ) -> None:
        (entry,), (built,) = plan.entries, compiled.entries
        layouts = {name: getattr(operands, name) for name in NAMES}
        self.kernel = BoundKernel(
            entry,
            built,
            grid=num_programs(problem.shape, config, device),
            values=launch_values(problem, config, operands, extras),
            descriptors=entry_descriptors(entry, plan, layouts, constant_values(problem.spec, config)),
            slots={name: slot for slot, name in enumerate((*TENSOR_NAMES, *SideTensors(plan).names))},
        )

    def __call__(self, *tensors: torch.Tensor | None) -> None:
        self.kernel(tensors)


def grid_size(shape: Shape, config: KernelConfig) -> int:
    """Return the number of tiles of work: one for each query tile of each head.

    Raises:
        InputError: if it is past what a GPU can launch, or a size past 32-bit integers.
        ConfigError: if the config is not one of a forward kernel.
    """
    if config.phase != "forward":
        raise ConfigError(f"template {config.template!r} has no forward kernel")
    ((block_m, _),) = config.blocks
    grid = -(-shape.seqlen_q // block_m) * shape.batch * (shape.nheads_q // config.heads_of_tile)
    check_sizes(shape, grid, block_m)
    return grid


def num_programs(shape: Shape, config: KernelConfig, device: torch.device) -> int:
    """Return how many programs are launched: one for each tile, or as many as stay resident where programs do.

    Raises:
        InputError: as `grid_size`; and for programs that stay, as `detect_target`.
    """
    tiles = grid_size(shape, config)
    if not isinstance(config, HopperForwardConfig):
        return tiles
    return min(tiles, detect_target(device).num_sms * config.programs)


def check_sizes(shape: Shape, grid: int, block: int) -> None:
    """Refuse what 32-bit integers cannot count.

    Raises:
        InputError: if the number of programs, or a length and a tile, reach 2**31.
    """
    if max(grid, shape.seqlen_q, shape.seqlen_k) + block > _INT32_MAX:
        raise InputError(f"{shape}: seqlens and the number of tiles must stay below 2**31; split the batch")


def launch_values(problem: Problem, config: KernelConfig, operands: Operands, extras: Extras) -> dict[str, int | float]:
    """Return the value of every scalar argument by its name in the kernel."""
    spec, shape = problem.spec, problem.shape
    values: dict[str, int | float] = {
        **score_factors(spec, extras),
        "num_heads_total": shape.batch * shape.nheads_q,
        "nheads_q": shape.nheads_q,
        "group": shape.group,
        "SEQLEN_Q": shape.seqlen_q,
        "SEQLEN_K": shape.seqlen_k,
        "max_seqlen_q": shape.seqlen_q,
        "head_group": getattr(config, "head_group", 1),
        "tail_heads": getattr(config, "tail_heads", 0),
        "step_lh": operands.q.size[2],
        **mask_numbers(spec.mask),
    }
    for name, rows in zip(NAMES, "mnnm", strict=True):
        for axis, stride in zip(("z", "h", rows), getattr(operands, name).stride, strict=False):
            values[f"stride_{name[0]}{axis}"] = stride
    if extras.bias is not None:
        for axis, size, step in zip("zhmn", extras.bias.shape, extras.bias.stride(), strict=True):
            values[f"step_b{axis}"] = step if size > 1 else 0
    if extras.alibi_slopes is not None:
        values["step_alibi_z"] = extras.alibi_slopes.stride(0) if extras.alibi_slopes.dim() == 2 else 0
    if spec.dropout:
        values["dropout_threshold"] = min(int(extras.dropout_p * 2**32), 2**32 - 1)
        values["dropout_scale"] = 1.0 / (1.0 - extras.dropout_p)
    return values | capture_sizes(spec, extras)


def capture_sizes(spec: AttentionSpec, extras: Extras) -> dict[str, int]:
    """Return the sizes of the tensors that functions capture, by their names in the kernel."""
    return {
        f"{pointer.removesuffix('_ptr')}_size{dim}": size
        for pointer, capture in zip(capture_pointers(spec), extras.captures, strict=True)
        for dim, size in enumerate(capture.shape)
    }


def score_factors(spec: AttentionSpec, extras: Extras) -> dict[str, float]:
    """Return what scores are multiplied by; they end in base 2, for exp2 is what the hardware has."""
    # Not 0: a masked score is -inf, and -inf * 0 is not a number; so small a factor makes all others equal, too.
    scale = extras.softmax_scale or _LEAST_SCALE
    natural = spec.score_mod is not None
    base = 1.0 if natural else _LOG2E
    if not spec.softcap:
        return {"qk_scale": scale * base}
    # tanh(x) = 1 - 2 / (1 + exp(2 x)), so a capped score takes one exp2 and one division.
    return {
        "qk_scale": scale * 2.0 * _LOG2E / extras.softcap,
        "softcap": extras.softcap * base,
    }


def bind_forward(
    problem: Problem,
    config: KernelConfig,
    compiled: CompiledKernel,
    extras: Extras,
    tensors: typing.Mapping[str, torch.Tensor],
) -> typing.Callable[[], None]:
    """Return a call without arguments that launches a compiled kernel on fixed tensors: what a benchmark times.

    Args:
        tensors: q, k, v, out as [batch, heads, seqlen, head_dim] views or packed [tokens, heads, head_dim], and lse
            where the spec has it.
    """
    plan = render(problem.spec, config).plan
    bound = ForwardLaunch(
        plan=plan,
        compiled=compiled,
        problem=problem,
        config=config,
        operands=Operands.of(tensors),
        extras=extras,
        device=tensors["q"].device,
    )
    side = SideTensors(plan)(extras, forward_table(problem, config, extras, tensors["q"].device))
    q, k, v, out, lse = (tensors.get(name) for name in TENSOR_NAMES)
    return lambda: bound(q, k, v, out, lse, *side)


def kernel_arguments(
    plan: KernelPlan,
    problem: Problem,
    config: KernelConfig,
    extras: Extras,
    tensors: typing.Mapping[str, torch.Tensor],
) -> dict[str, object]:
    """Return every argument of the kernel by name, as a call of the JIT function takes them.

    Args:
        tensors: as for `bind_forward`.
    """
    operands = Operands.of(tensors)
    table = forward_table(problem, config, extras, tensors["q"].device)
    side = SideTensors(plan)
    given = {**tensors, **dict(zip(side.names, side(extras, table), strict=True))}
    (entry,) = plan.entries
    if TILE_COUNTER in entry.arguments:
        given["tile_counter"] = torch.zeros(2, dtype=torch.int32, device=tensors["q"].device)
    return entry_arguments(
        entry,
        plan,
        values=launch_values(problem, config, operands, extras),
        tensors=given,
        layouts={name: getattr(operands, name) for name in NAMES},
        constants=constant_values(problem.spec, config),
    )


def forward_table(problem: Problem, config: KernelConfig, extras: Extras, device: torch.device) -> TileTable | None:
    """Return the table of key tiles that the forward kernel walks, or None where a formula does; see `tile_table`."""
    if problem.spec.mask.by_formula:
        return None
    ((block_m, block_n),) = config.blocks
    rendered = render(problem.spec, config if isinstance(config, TritonForwardConfig) else _PORTABLE)
    return tile_table(problem, rendered, TableShape(block_m=block_m, block_n=block_n), extras, device)


def allocate_outputs(q: torch.Tensor, spec: AttentionSpec) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Return empty out, like q with head_dim_v columns, and, where the spec has it, float32 lse.

    lse is [batch, nheads_q, seqlen_q], or [nheads_q, tokens] of packed sequences.
    """
    out = q.new_empty((*q.shape[:-1], spec.head_dim_v), dtype=getattr(torch, spec.dtype.out.torch_name))
    rows = (q.shape[1], q.shape[0]) if spec.varlen else q.shape[:3]
    return out, (q.new_empty(rows, dtype=torch.float32) if spec.lse else None)
