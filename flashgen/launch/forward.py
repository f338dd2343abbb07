"""Launching the forward kernel: everything that stays the same from call to call is worked out once."""

from __future__ import annotations

import dataclasses
import math
import typing

import torch
import triton
from triton.tools.tensor_descriptor import TensorDescriptor

from flashgen.codegen import KernelConfig, TritonForwardConfig, argument_kind, constant_values, render
from flashgen.codegen.plan import ForwardPlan
from flashgen.compile import STRIDE_ALIGNMENT, CompiledKernel, descriptor_block
from flashgen.errors import ConfigError, InputError
from flashgen.spec import AttentionSpec, Problem, Shape

_TENSOR_SLOTS = {"q": 0, "k": 1, "v": 2, "out": 3, "lse": 4}
_INT32_MAX = 2**31 - 1


@dataclasses.dataclass(frozen=True, kw_only=True)
class Operands:
    """Strides of Q, K, V and out, each seen as [batch, heads, seqlen, head_dim], in elements."""

    q: tuple[int, ...]
    k: tuple[int, ...]
    v: tuple[int, ...]
    out: tuple[int, ...]

    @classmethod
    def of(cls, tensors: typing.Mapping[str, torch.Tensor], problem: Problem) -> Operands:
        """Return the normalised strides of the tensors q, k, v and out."""
        strides = {name: tensors[name].stride() for name in ("q", "k", "v", "out")}
        return cls(**strides).normalised(problem)

    def sizes(self, problem: Problem, name: str) -> tuple[int, int, int, int]:
        """Return [batch, heads, seqlen, head_dim] of one operand."""
        shape, spec = problem.shape, problem.spec
        heads = shape.nheads_q if name in ("q", "out") else shape.nheads_kv
        seqlen = shape.seqlen_q if name in ("q", "out") else shape.seqlen_k
        head_dim = spec.head_dim_qk if name in ("q", "k") else spec.head_dim_v
        return (shape.batch, heads, seqlen, head_dim)

    def normalised(self, problem: Problem) -> Operands:
        """Return the strides with those of dimensions of size 1, which are never walked, made harmless."""
        return Operands(
            **{
                name: tuple(
                    stride if size != 1 or axis == 3 else self.sizes(problem, name)[3]
                    for axis, (size, stride) in enumerate(
                        zip(self.sizes(problem, name), getattr(self, name), strict=True)
                    )
                )
                for name in ("q", "k", "v", "out")
            }
        )

    def refusal(self, config: KernelConfig, itemsize: int) -> str | None:
        """Return why a config cannot read these strides, or None."""
        if not isinstance(config, TritonForwardConfig) or config.loads != "descriptor":
            return None
        for name in ("q", "k", "v", "out"):
            strides = getattr(self, name)
            if any(stride <= 0 or stride * itemsize % 16 for stride in strides[:3]):
                return f"descriptor loads need positive strides of whole 16 bytes, {name} has {list(strides)}"
        return None


def readable(tensor: torch.Tensor) -> bool:
    """Return whether kernels can read a tensor's strides in place: 1 for the last, multiples of 8 for the others."""
    strides = tensor.stride()
    return strides[-1] == 1 and all(
        stride % STRIDE_ALIGNMENT == 0 for stride, size in zip(strides, tensor.shape[:-1], strict=False) if size != 1
    )


class ForwardLaunch:
    """A compiled forward kernel bound to sizes, strides and scale; call it with tensors of exactly those.

    Args (of a call): q, k, v, out, and lse (None unless the spec has it), any of them views with the bound strides.
    Nothing is checked then: the caller has.
    """

    def __init__(
        self,
        *,
        plan: ForwardPlan,
        compiled: CompiledKernel,
        problem: Problem,
        config: KernelConfig,
        operands: Operands,
        softmax_scale: float,
    ) -> None:
        values = launch_values(problem, config, operands, softmax_scale)
        self._grid = grid_size(problem.shape, config)
        self._handle = compiled.handle
        self._pointers: list[tuple[int, int]] = []
        self._descriptors: list[tuple[int, int, dict[str, object]]] = []
        self._arguments: list[object] = []
        for index, name in enumerate(plan.arguments):
            kind = argument_kind(name)
            if kind == "pointer":
                self._pointers.append((index, _TENSOR_SLOTS[name.removesuffix("_ptr")]))
            elif kind == "descriptor":
                fields = descriptor_fields(name, problem, config, operands)
                self._descriptors.append((index, _TENSOR_SLOTS[name.removesuffix("_desc")], fields))
            self._arguments.append(values.get(name))
        self._arguments.extend(compiled.constants)

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
    if max(grid, shape.seqlen_q, shape.seqlen_k) + config.block_m > _INT32_MAX:
        raise InputError(f"{shape}: seqlens and the number of tiles must stay below 2**31; split the batch")
    return grid


def launch_values(
    problem: Problem, config: KernelConfig, operands: Operands, softmax_scale: float
) -> dict[str, int | float]:
    """Return the value of every scalar argument by its name in the kernel."""
    shape = problem.shape
    values: dict[str, int | float] = {
        # Scores are kept in base 2: exp2 is what the hardware has.
        "qk_scale": softmax_scale * math.log2(math.e),
        "num_heads_total": shape.batch * shape.nheads_q,
        "nheads_q": shape.nheads_q,
        "group": shape.group,
        "SEQLEN_Q": shape.seqlen_q,
        "SEQLEN_K": shape.seqlen_k,
        "head_group": getattr(config, "head_group", 1),
    }
    for name, rows in (("q", "m"), ("k", "n"), ("v", "n"), ("out", "m")):
        for axis, stride in zip(("z", "h", rows), getattr(operands, name), strict=False):
            values[f"stride_{name[0]}{axis}"] = stride
    return values


def descriptor_fields(name: str, problem: Problem, config: KernelConfig, operands: Operands) -> dict[str, object]:
    """Return the fields of the `TensorDescriptor` argument `name`, all but its base tensor."""
    operand = name.removesuffix("_desc")
    prototype = TensorDescriptor(
        torch.empty(0, dtype=getattr(torch, problem.spec.dtype.torch_name)),
        list(operands.sizes(problem, operand)),
        list(getattr(operands, operand)),
        list(descriptor_block(name, problem.spec, config)),
    )
    return dict(prototype.__dict__)


def bind_forward(
    problem: Problem,
    config: KernelConfig,
    compiled: CompiledKernel,
    softmax_scale: float,
    tensors: typing.Mapping[str, torch.Tensor],
) -> typing.Callable[[], None]:
    """Return a call without arguments that launches a compiled kernel on fixed tensors: what a benchmark times.

    Args:
        tensors: q, k, v, out as [batch, heads, seqlen, head_dim] views, and lse where the spec has it.
    """
    operands = Operands.of(tensors, problem)
    bound = ForwardLaunch(
        plan=render(problem.spec, config).plan,
        compiled=compiled,
        problem=problem,
        config=config,
        operands=operands,
        softmax_scale=softmax_scale,
    )
    q, k, v, out, lse = (tensors.get(name) for name in _TENSOR_SLOTS)
    return lambda: bound(q, k, v, out, lse)


def kernel_arguments(
    plan: ForwardPlan,
    problem: Problem,
    config: KernelConfig,
    softmax_scale: float,
    tensors: typing.Mapping[str, torch.Tensor],
) -> dict[str, object]:
    """Return every argument of the kernel by name, as a call of the `@triton.jit` function takes them.

    Args:
        tensors: q, k, v, out as [batch, heads, seqlen, head_dim] views, and lse where the spec has it.
    """
    operands = Operands.of(tensors, problem)
    values: dict[str, object] = dict(launch_values(problem, config, operands, softmax_scale))
    arguments: dict[str, object] = {}
    for name in plan.arguments:
        kind = argument_kind(name)
        if kind == "pointer":
            arguments[name] = tensors[name.removesuffix("_ptr")]
        elif kind == "descriptor":
            fields = descriptor_fields(name, problem, config, operands)
            fields["base"] = tensors[name.removesuffix("_desc")]
            arguments[name] = TensorDescriptor(**typing.cast("dict[str, typing.Any]", fields))
        else:
            arguments[name] = values[name]
    return arguments | constant_values(problem.spec, config)


def allocate_outputs(q: torch.Tensor, spec: AttentionSpec) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Return empty out [batch, nheads_q, seqlen_q, head_dim_v] and, where the spec has it, float32 lse."""
    out = q.new_empty((*q.shape[:3], spec.head_dim_v))
    return out, (q.new_empty(q.shape[:3], dtype=torch.float32) if spec.lse else None)
