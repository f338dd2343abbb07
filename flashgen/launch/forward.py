"""Launching the forward kernel: everything that stays the same from call to call is worked out once."""

from __future__ import annotations

import math
import typing

import torch
import triton
from triton.tools.tensor_descriptor import TensorDescriptor

from flashgen.codegen import (
    KernelConfig,
    KernelPlan,
    TritonForwardConfig,
    argument_kind,
    capture_pointers,
    constant_values,
    render,
)
from flashgen.codegen.mask_plan import mask_numbers
from flashgen.compile import CompiledKernel, descriptor_dtype, descriptor_operand
from flashgen.errors import ConfigError, InputError
from flashgen.launch.arguments import descriptor_fields, entry_arguments
from flashgen.launch.operands import NAMES, Operands
from flashgen.launch.side_tensors import TENSOR_NAMES, SideTensors
from flashgen.launch.tile_table import TableShape, TileTable, tile_table
from flashgen.spec import AttentionSpec, Extras, Problem, Shape

_INT32_MAX = 2**31 - 1
_LOG2E = math.log2(math.e)


class ForwardLaunch:
    """A compiled forward kernel bound to sizes, strides and numbers; call it with tensors of exactly those.

    Args (of a call): q, k, v, out, lse (None unless the spec has it), any of them with the bound strides, and the other
    tensors of the call as `SideTensors` gives them. Nothing is checked then: the caller has.
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
    ) -> None:
        values = launch_values(problem, config, operands, extras)
        self._grid = grid_size(problem.shape, config)
        entry, built = plan.entries[0], compiled.entries[0]
        self._handle = built.handle
        self._pointers: list[tuple[int, int]] = []
        self._descriptors: list[tuple[int, int, dict[str, object]]] = []
        self._arguments: list[object] = []
        first = len(TENSOR_NAMES)
        slots = {name: slot for slot, name in enumerate(TENSOR_NAMES)}
        slots |= {name: first + index for index, name in enumerate(SideTensors(plan).names)}
        for index, name in enumerate(entry.arguments):
            kind = argument_kind(name)
            if kind == "pointer":
                self._pointers.append((index, slots[name.removesuffix("_ptr")]))
            elif kind == "descriptor":
                operand = descriptor_operand(name)
                box = entry.box(name, constant_values(problem.spec, config))
                fields = descriptor_fields(getattr(operands, operand), descriptor_dtype(name, problem.spec), box)
                self._descriptors.append((index, slots[operand], fields))
            self._arguments.append(values.get(name))
        self._arguments.extend(built.constants)

    def __call__(self, *tensors: torch.Tensor | None) -> None:
        arguments = self._arguments.copy()
        for index, slot in self._pointers:
            arguments[index] = tensors[slot]
        for index, slot, fields in self._descriptors:
            # Made without __init__: its checks of what was checked once cost 3 us a descriptor.
            descriptor = object.__new__(TensorDescriptor)
            descriptor.__dict__.update(fields)
            descriptor.base = tensors[slot]
            arguments[index] = descriptor
        launch(self._handle, self._grid, arguments)


def launch(handle: typing.Any, grid: int, arguments: typing.Sequence[object]) -> None:
    """Launch a Triton kernel on the current device and stream, around the JIT and its argument parsing."""
    hooks = triton.knobs.runtime
    if _listens(hooks.launch_enter_hook) or _listens(hooks.launch_exit_hook):
        # A profiler: take the public way, which tells it what runs.
        handle[(grid, 1, 1)](*arguments)
        return
    driver = triton.runtime.driver.active
    stream = driver.get_current_stream(driver.get_current_device())
    # `run` loads the binary on first use, so it must be read before `function`.
    run = handle.run
    run(grid, 1, 1, stream, handle.function, handle.packed_metadata, None, None, None, *arguments)


def _listens(hook: typing.Any) -> bool:
    # A chain of hooks, empty unless somebody added one; older code sets a plain function or None.
    return bool(getattr(hook, "calls", hook))


def grid_size(shape: Shape, config: KernelConfig) -> int:
    """Return the number of programs: one for each query tile of each head.

    Raises:
        InputError: if it is past what a GPU can launch, or a size past 32-bit integers.
    """
    if not isinstance(config, TritonForwardConfig):
        raise ConfigError(f"no grid for template {config.template!r}; known: {TritonForwardConfig.template}")
    grid = -(-shape.seqlen_q // config.block_m) * shape.batch * shape.nheads_q
    check_sizes(shape, grid, config.block_m)
    return grid


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
        **_score_factors(spec, extras),
        "num_heads_total": shape.batch * shape.nheads_q,
        "nheads_q": shape.nheads_q,
        "group": shape.group,
        "SEQLEN_Q": shape.seqlen_q,
        "SEQLEN_K": shape.seqlen_k,
        "max_seqlen_q": shape.seqlen_q,
        "head_group": getattr(config, "head_group", 1),
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
    for pointer, capture in zip(capture_pointers(spec), extras.captures, strict=True):
        for dim, size in enumerate(capture.shape):
            values[f"{pointer.removesuffix('_ptr')}_size{dim}"] = size
    return values


def _score_factors(spec: AttentionSpec, extras: Extras) -> dict[str, float]:
    """Return what scores are multiplied by; they end in base 2, for exp2 is what the hardware has."""
    natural = spec.score_mod is not None
    base = 1.0 if natural else _LOG2E
    if not spec.softcap:
        return {"qk_scale": extras.softmax_scale * base}
    # tanh(x) = 1 - 2 / (1 + exp(2 x)), so a capped score takes one exp2 and one division.
    return {
        "qk_scale": extras.softmax_scale * 2.0 * _LOG2E / extras.softcap,
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
    """Return every argument of the kernel by name, as a call of the `@triton.jit` function takes them.

    Args:
        tensors: as for `bind_forward`.
    """
    operands = Operands.of(tensors)
    table = forward_table(problem, config, extras, tensors["q"].device)
    side = SideTensors(plan)
    given = {**tensors, **dict(zip(side.names, side(extras, table), strict=True))}
    (entry,) = plan.entries
    return entry_arguments(
        entry,
        problem.spec,
        values=launch_values(problem, config, operands, extras),
        tensors=given,
        layouts={name: getattr(operands, name) for name in NAMES},
        constants=constant_values(problem.spec, config),
    )


def forward_table(problem: Problem, config: KernelConfig, extras: Extras, device: torch.device) -> TileTable | None:
    """Return the table of key tiles that the forward kernel walks, or None where a formula does; see `tile_table`."""
    if problem.spec.mask.by_formula or not isinstance(config, TritonForwardConfig):
        return None
    tiles = TableShape(block_m=config.block_m, block_n=config.block_n)
    return tile_table(problem, render(problem.spec, config), tiles, extras, device)


def allocate_outputs(q: torch.Tensor, spec: AttentionSpec) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Return empty out, like q with head_dim_v columns, and, where the spec has it, float32 lse.

    lse is [batch, nheads_q, seqlen_q], or [nheads_q, tokens] of packed sequences.
    """
    out = q.new_empty((*q.shape[:-1], spec.head_dim_v), dtype=getattr(torch, spec.dtype.out.torch_name))
    rows = (q.shape[1], q.shape[0]) if spec.varlen else q.shape[:3]
    return out, (q.new_empty(rows, dtype=torch.float32) if spec.lse else None)
