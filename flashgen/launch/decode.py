"""Launching the decode kernel: everything that stays the same from step to step is worked out once."""

from __future__ import annotations

import math
import typing
import weakref

import torch

from flashgen.codegen import (
    DecodeConfig,
    HopperDecodeConfig,
    KernelConfig,
    KernelPlan,
    TritonDecodeConfig,
    constant_values,
    render,
)
from flashgen.codegen.head_tiles import tile_widths
from flashgen.codegen.hopper_config import ROWS_OF_CONSUMER
from flashgen.codegen.hopper_plan import HEAD_TILES
from flashgen.codegen.mask_plan import mask_numbers
from flashgen.compile import CompiledKernel
from flashgen.errors import ConfigError
from flashgen.launch.append_rows import AppendLaunch
from flashgen.launch.arguments import entry_arguments
from flashgen.launch.decode_grid import DecodeGrid, decode_grid, num_counters, waits_for_each_other
from flashgen.launch.decode_operands import DecodeOperands
from flashgen.launch.descriptors import entry_descriptors
from flashgen.launch.device import detect_target
from flashgen.launch.forward import capture_sizes, score_factors
from flashgen.launch.kernel import BoundKernel, LaunchAttributes
from flashgen.launch.side_tensors import SideHolder, SideTensors
from flashgen.launch.tile_counter import arrival_counters
from flashgen.spec import Extras, Problem

# Of a call, besides what `SideTensors` collects.
_TENSORS = ("q", "k", "v", "out", "lse", "partial", "arrivals")
# Of bound calls, by device; gone with the last of them.
_scratch: weakref.WeakValueDictionary[torch.device, torch.Tensor] = weakref.WeakValueDictionary()


class DecodeLaunch:
    """A compiled decode kernel bound to sizes, strides and numbers; call it with tensors of exactly those.

    A module of two kernels appends in the first of them.

    Nothing is checked in a call: the caller has. Calls in a row on one stream share the counters by which programs
    learn of each other; the scratch memory is each call's own.

    Attributes:
        partial_size: float32 elements of the scratch memory `partial` that a call takes.
    """

    def __init__(
        self,
        *,
        plan: KernelPlan,
        compiled: CompiledKernel,
        problem: Problem,
        config: DecodeConfig,
        operands: DecodeOperands,
        extras: Extras,
        device: torch.device,
    ) -> None:
        *appends, (entry, built) = zip(plan.entries, compiled.entries, strict=True)
        target = detect_target(device)
        grid = decode_grid(problem.shape, config, extras.num_splits, target.num_sms)
        together = waits_for_each_other(grid, config, built.resources, target)
        self._side = SideTensors(plan)
        self._counters = num_counters(problem.shape, config)
        self.partial_size = partial_size(problem, config, grid)
        values = decode_values(problem, config, operands, extras, grid, waits=together)
        slots = {name: slot for slot, name in enumerate((*_TENSORS, *self._side.names))}
        layouts = operands.layouts
        self._append = AppendLaunch(*appends[0], problem, values, slots) if appends else None
        if self._append is not None:
            slots |= self._append.slots
            layouts |= self._append.layouts
        self._kernel = BoundKernel(
            entry,
            built,
            grid=grid.programs,
            values=values,
            descriptors=entry_descriptors(entry, plan, layouts, constant_values(problem.spec, config)),
            slots=slots,
            attributes=LaunchAttributes(
                cooperative=together,
                dependent=isinstance(config, TritonDecodeConfig) and config.launch == "dependent",
            ),
        )

    def __call__(
        self,
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        out: torch.Tensor,
        lse: torch.Tensor | None,
        partial: torch.Tensor,
        extras: SideHolder,
    ) -> None:
        """Launch on the current stream; `partial` is float32 scratch memory of `partial_size`, of any content."""
        device = torch._C._cuda_getDevice()
        arrivals = arrival_counters(device, torch._C._cuda_getCurrentRawStream(device), self._counters)
        tensors = (q, k, v, out, lse, partial, arrivals, *self._side(extras, None))
        if self._append is not None:
            tensors = self._append(tensors)
        self._kernel(tensors)


def partial_size(problem: Problem, config: DecodeConfig, grid: DecodeGrid) -> int:
    """Return how many float32 a launch needs for partial outputs: two tiles of rows for each program."""
    rows, width = config.blocks[0][0], problem.spec.head_dim_v
    if isinstance(config, HopperDecodeConfig):
        rows, width = ROWS_OF_CONSUMER * config.consumers, sum(tile_widths(problem.spec, HEAD_TILES)[1])
    return max(1, grid.programs * 2 * rows * (width + 1))


def decode_values(
    problem: Problem,
    config: DecodeConfig,
    operands: DecodeOperands,
    extras: Extras,
    grid: DecodeGrid,
    *,
    waits: bool,
) -> dict[str, int | float]:
    """Return the value of every scalar argument by its name in the kernel; `waits`: programs do for each other."""
    spec, shape = problem.spec, problem.shape
    values: dict[str, int | float] = {
        **score_factors(spec, extras),
        "batch": shape.batch,
        "nheads_q": shape.nheads_q,
        "nheads_kv": shape.nheads_kv,
        "group": shape.group,
        "SEQLEN_Q": shape.seqlen_q,
        "splits": grid.splits,
        "lanes": grid.lanes,
        "waits": int(waits),
        "min_blocks": config.min_blocks,
        "step_pages": operands.step_pages,
        "step_rotary": operands.step_rotary,
        "rotary_dim": operands.rotary_dim,
        "seqlen_new": 0 if operands.k_new is None else operands.k_new.size[2],
        **mask_numbers(spec.mask),
        **capture_sizes(spec, extras),
    }
    if isinstance(config, HopperDecodeConfig):
        # Rows of one entry to the next: what it can read has such, see `DecodeOperands.refusal`.
        values["rows_k"], values["rows_v"] = (t.stride[0] // t.stride[2] for t in (operands.k, operands.v))
    named = {"q": operands.q, "k": operands.k, "v": operands.v, "o": operands.out}
    for name, layout in named.items():
        for axis, stride in zip("zhm" if name in "qo" else "zhn", layout.stride, strict=False):
            values[f"stride_{name}{axis}"] = stride
    for name, new in (("k", operands.k_new), ("v", operands.v_new)):
        for axis, stride in zip("zhn", () if new is None else new.stride, strict=False):
            values[f"stride_{name}_new_{axis}"] = stride
    if extras.alibi_slopes is not None:
        values["step_alibi_z"] = extras.alibi_slopes.stride(0) if extras.alibi_slopes.dim() == 2 else 0
    return values


def bind_decode(
    problem: Problem,
    config: KernelConfig,
    compiled: CompiledKernel,
    extras: Extras,
    tensors: typing.Mapping[str, torch.Tensor],
) -> typing.Callable[[], None]:
    """Return a call without arguments that launches a compiled kernel on fixed tensors: what a benchmark times.

    What is bound on one device shares its scratch memory, as the calls of a model do: made one after the other, never
    on two streams at once.

    Args:
        tensors: q and out as [batch, nheads_q, seqlen_q, head_dim] views, the caches k and v as [entries or pages,
            nheads_kv, rows, head_dim] views, and lse where the spec has it.

    Raises:
        ConfigError: if the config is not one of a decode kernel.
    """
    if not isinstance(config, DecodeConfig):
        raise ConfigError(f"template {config.template!r} has no decode kernel")
    q, k, v, out = (tensors[name] for name in ("q", "k", "v", "out"))
    bound = DecodeLaunch(
        plan=render(problem.spec, config).plan,
        compiled=compiled,
        problem=problem,
        config=config,
        operands=DecodeOperands.of(tensors, extras),
        extras=extras,
        device=q.device,
    )
    partial = _shared_scratch(q.device, bound.partial_size)
    return lambda: bound(q, k, v, out, tensors.get("lse"), partial, extras)


def poison_scratch() -> None:
    """Fill the scratch memory of bound calls with NaN: what a launch reads before it has written it shows."""
    for scratch in _scratch.values():
        scratch.fill_(math.nan)


def _shared_scratch(device: torch.device, size: int) -> torch.Tensor:
    found = _scratch.get(device)
    if found is None or found.numel() < size:
        found = _scratch[device] = torch.full((size,), math.nan, dtype=torch.float32, device=device)
    return found


def decode_arguments(
    plan: KernelPlan,
    problem: Problem,
    config: TritonDecodeConfig,
    extras: Extras,
    tensors: typing.Mapping[str, torch.Tensor],
    num_sms: int,
) -> tuple[int, dict[str, object]]:
    """Return the number of programs, and every argument of the kernel by name, as a call of the JIT function takes it.

    Args:
        tensors: as for `bind_decode`.
        num_sms: multiprocessors of the GPU, or what stands for them.
    """
    operands = DecodeOperands.of(tensors, extras)
    grid = decode_grid(problem.shape, config, extras.num_splits, num_sms)
    side = SideTensors(plan)
    device = tensors["q"].device
    given = {
        **tensors,
        **dict(zip(side.names, side(extras, None), strict=True)),
        # No number: what a kernel reads before it is written shows.
        "partial": torch.full((partial_size(problem, config, grid),), float("nan"), device=device),
        "arrivals": torch.zeros(num_counters(problem.shape, config), dtype=torch.int32, device=device),
    }
    (entry,) = plan.entries
    arguments = entry_arguments(
        entry,
        plan,
        # One program after the other: whoever waited would wait forever.
        values=decode_values(problem, config, operands, extras, grid, waits=False),
        tensors=given,
        layouts=operands.layouts,
        constants=constant_values(problem.spec, config),
    )
    return grid.programs, arguments
