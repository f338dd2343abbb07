"""What stands behind the torch op: select, compile and bind once for each kind of call, then only launch."""

from __future__ import annotations

import collections.abc
import dataclasses
import functools
import logging
import typing
from pathlib import Path

import torch

from flashgen.codegen import KernelConfig, render
from flashgen.codegen.constraints import interpreter_refusal
from flashgen.compile import CompiledKernel, compile_kernel
from flashgen.dispatch import Selection, select
from flashgen.errors import CompileError, FlashgenError
from flashgen.launch import (
    ForwardLaunch,
    Operands,
    SideTensors,
    detect_target,
    fill_unseen,
    forward_table,
    readable,
    software_versions,
)
from flashgen.ops.call import Options, Tensors, decode_config, heads_first
from flashgen.ops.checks import extras_of, problem_of
from flashgen.ops.decode_call import DecodeOptions
from flashgen.ops.lengths import check_cuts
from flashgen.ops.unseen import unseen_outputs
from flashgen.registry import Registry, generation, load, search_locations
from flashgen.spec import AttentionSpec, Extras, Problem
from flashgen.target import GpuTarget

logger = logging.getLogger("flashgen")

Outputs = tuple[torch.Tensor, "torch.Tensor | None"]
Addresses = tuple[int, int, int]
# Around PyTorch's dispatcher, as the code that Inductor generates does; half the time of `torch.empty`.
_empty_strided: collections.abc.Callable[[tuple[int, ...], tuple[int, ...], torch.dtype], torch.Tensor] | None
_empty_strided = getattr(torch._C._dynamo.guards, "_empty_strided_cuda", None)


class Runner(typing.Protocol):
    """Runs calls of one kind."""

    def __call__(
        self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, tensors: Tensors, addresses: Addresses | None = None
    ) -> Outputs:
        """Return out and lse; `addresses` are those of Q, K and V, from who has read them anyway."""
        ...


_Change = collections.abc.Callable[[torch.Tensor, torch.Tensor, torch.Tensor], tuple[torch.Tensor, ...]]


@functools.lru_cache(maxsize=16)
def _load_registry(path: Path | None, generation_number: int) -> Registry:
    registry = load(search_locations(path))
    for issue in registry.issues:
        logger.warning("skipped in the registry: %s", issue)
    return registry


def registry_for(path: str) -> Registry:
    """Return the registry of the search path, with `path` first unless it is empty; read once."""
    return _load_registry(Path(path) if path else None, generation())


def prepare(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, tensors: Tensors, options: Options) -> Runner:
    """Return a function that runs calls of exactly these shapes, strides and options on this device.

    Raises:
        InputError, ConfigError, NoKernelError: see `problem_of` and `select`.
        FlashgenError: inside a CUDA graph capture, where nothing may be compiled.
    """
    problem = problem_of(q, k, v, tensors, options)
    extras = extras_of(problem, tensors, options)
    if nothing_to_see(q, k, problem):
        return functools.partial(run_unseen, problem=problem, layout=options.layout)
    if extras.softmax_scale < 0:
        # The kernels' running maximum assumes a scale of at least 0; a sign is exact to move into Q.
        positive = options._replace(softmax_scale=-extras.softmax_scale)
        return _with_inputs(lambda q, k, v: (negated(q), k, v), positive)
    unreadable = tuple(not readable(t) for t in (q, k, v))
    if any(unreadable):
        say_copied(", ".join(name for name, copied in zip("qkv", unreadable, strict=True) if copied))
        return _with_inputs(
            lambda *inputs: tuple(
                t.contiguous() if copied else t for t, copied in zip(inputs, unreadable, strict=True)
            ),
            options,
        )
    selection = choose(problem, detect_target(q.device), options, operands_of(q, k, v, problem, options.layout))
    return _Bound(selection, q, k, v, extras, options)


def nothing_to_see(q: torch.Tensor, k: torch.Tensor, problem: Problem) -> bool:
    """Return whether a call has no query, or no key that any query could see."""
    shape = problem.shape
    return 0 in (shape.batch, shape.seqlen_q, shape.seqlen_k, q.numel(), k.numel())


def negated(q: torch.Tensor) -> torch.Tensor:
    """Return -q; PyTorch negates no 8-bit numbers, so of those the sign bit is turned."""
    if q.dtype.itemsize > 1:
        return -q
    return (q.view(torch.uint8) ^ 0x80).view(q.dtype)


def operands_of(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, problem: Problem, layout: str) -> Operands:
    """Return the strides that a kernel meets: of the tensors, or of the dense copies that are made first."""
    out = torch.empty((*q.shape[:-1], v.shape[-1]), device="meta")
    met = {"q": q, "k": k, "v": v, "out": out}
    dense = {name: t if readable(t) else torch.empty(t.shape, device="meta") for name, t in met.items()}
    return Operands.of({name: heads_first(t, layout) for name, t in dense.items()})


def _with_inputs(change: _Change, options: Options) -> Runner:
    """Return a runner that changes Q, K and V first; what they become is prepared on its own first call."""
    runners: dict[tuple[object, ...], Runner] = {}

    def run(
        q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, tensors: Tensors, addresses: Addresses | None = None
    ) -> Outputs:
        q, k, v = change(q, k, v)
        key = (q.stride(), k.stride(), v.stride())
        if key not in runners:
            runners[key] = prepare(q, k, v, tensors, options)
        return runners[key](q, k, v, tensors)

    return run


class Layouts(typing.Protocol):
    """How the tensors of a call lie in memory."""

    def refusal(self, config: KernelConfig, spec: AttentionSpec) -> str | None:
        """Return why a config cannot run on these layouts, or None."""
        ...


def choose(
    problem: Problem, target: GpuTarget, options: Options | DecodeOptions, layouts: Layouts | None = None
) -> Selection:
    """Return the selection for a call; with `layouts`, only configs that can read them and compile."""

    def usable(candidate: KernelConfig) -> str | None:
        if layouts is None:
            # On the CPU, through the interpreter.
            return interpreter_refusal(candidate)
        return layouts.refusal(candidate, problem.spec) or _compile_refusal(problem.spec, candidate, target)

    return select(
        problem,
        target,
        registry=registry_for(options.registry),
        software=software_versions(),
        config=decode_config(options.config),
        usable=usable,
    )


def compiled_kernel(spec: AttentionSpec, config: KernelConfig, target: GpuTarget) -> CompiledKernel:
    """Return a kernel compiled for a target, once a process; one serves all numbers of a mask.

    Raises:
        CompileError: if Triton refuses it.
        FlashgenError: inside a CUDA graph capture.
    """
    return _compiled(spec.structure(), config, target)


@functools.lru_cache(maxsize=1024)
def _compiled(spec: AttentionSpec, config: KernelConfig, target: GpuTarget) -> CompiledKernel:
    if torch.cuda.is_available() and torch.cuda.is_current_stream_capturing():
        raise FlashgenError(
            f"no kernel for {spec} is ready and none can be compiled inside a CUDA graph capture; call "
            "flashgen.warmup([...]) with this problem, or flashgen.attention once on these tensors, before the capture"
        )
    return compile_kernel(render(spec, config), spec, config, target)


def _compile_refusal(spec: AttentionSpec, config: KernelConfig, target: GpuTarget) -> str | None:
    try:
        compiled = compiled_kernel(spec, config, target)
    except CompileError as error:
        return str(error).splitlines()[0]
    needed = compiled.resources.smem_bytes
    if needed > target.smem_bytes:
        return f"needs {needed} bytes of shared memory, {target.device_name} has {target.smem_bytes}"
    return None


class _Bound:
    """A launch bound to one kind of call; allocates the outputs."""

    def __init__(
        self,
        selection: Selection,
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        extras: Extras,
        options: Options,
    ) -> None:
        problem, config = selection.problem, selection.config
        spec = problem.spec
        plan = render(spec, config).plan
        self._side_tensors = SideTensors(plan)
        self._kernel = ForwardLaunch(
            plan=plan,
            compiled=compiled_kernel(spec, config, selection.target),
            problem=problem,
            config=config,
            operands=operands_of(q, k, v, problem, options.layout),
            extras=extras,
            device=q.device,
        ).kernel
        self._problem = problem
        self._config = config
        self._options = options
        self._device = q.device
        self._index = q.device.index
        self._out = NewTensor((*q.shape[:-1], spec.head_dim_v), getattr(torch, spec.dtype.out.torch_name))
        self._lse = NewTensor(lse_size(q, problem, options.layout), torch.float32) if spec.lse else None
        # A call of nothing but Q, K and V asks for none of the work that other tensors make.
        self._side = extras_need_side(extras) or not spec.mask.by_formula

    def __call__(
        self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, tensors: Tensors, addresses: Addresses | None = None
    ) -> Outputs:
        if torch._C._cuda_getDevice() != self._index:
            with torch.cuda.device(self._device):
                return self(q, k, v, tensors, addresses)
        out = self._out(q)
        lse = None if self._lse is None else self._lse(q)
        if not self._side:
            if addresses is not None:
                made = (out.data_ptr(),) if lse is None else (out.data_ptr(), lse.data_ptr())
                self._kernel((q, k, v, out, lse), addresses + made)
            else:
                self._kernel((q, k, v, out, lse))
            return out, lse
        extras = extras_of(self._problem, tensors, self._options)
        if extras.cu_seqlens_q is not None and not sequences_fill(q, k, tensors, self._options)[0]:
            # A kernel writes the rows of sequences alone.
            fill_unseen(out, lse)
        table = forward_table(self._problem, self._config, extras, self._device)
        self._kernel((q, k, v, out, lse, *self._side_tensors(extras, table)))
        return out, lse


class NewTensor:
    """Makes contiguous tensors of one size on the current GPU."""

    def __init__(self, size: tuple[int, ...], dtype: torch.dtype) -> None:
        # Its short way takes a plain tuple alone.
        self._size = tuple(size)
        self._stride = torch.empty(size, device="meta").stride()
        self._dtype = dtype

    def __call__(self, like: torch.Tensor) -> torch.Tensor:
        """Return a new tensor on the device of another, which is the current one."""
        # PyTorch fills new memory where it is asked to be deterministic; its short way does not.
        if _empty_strided is None or torch._C._get_deterministic_algorithms():
            return like.new_empty(self._size, dtype=self._dtype)
        return _empty_strided(self._size, self._stride, self._dtype)


def sequences_fill(q: torch.Tensor, k: torch.Tensor, tensors: Tensors, options: Options) -> tuple[bool, bool]:
    """Check where packed sequences lie, and return whether every query, and every key, surely belongs to one.

    Raises:
        InputError: see `check_cuts`.
    """
    assert tensors.cu_seqlens_q is not None
    assert tensors.cu_seqlens_k is not None
    keys = check_cuts("cu_seqlens_k", tensors.cu_seqlens_k, k.shape[0], options.max_seqlen_k)
    return check_cuts("cu_seqlens_q", tensors.cu_seqlens_q, q.shape[0], options.max_seqlen_q), keys


def extras_need_side(extras: Extras) -> bool:
    """Return whether a call has tensors besides Q, K and V."""
    values = (getattr(extras, field.name) for field in dataclasses.fields(extras))
    return any(isinstance(value, torch.Tensor) or (isinstance(value, tuple) and value) for value in values)


def lse_size(q: torch.Tensor, problem: Problem, layout: str) -> tuple[int, ...]:
    """Return the shape of lse, [batch, nheads_q, seqlen_q] or packed [nheads_q, tokens]."""
    q = heads_first(q, layout)
    return (q.shape[1], q.shape[0]) if problem.spec.varlen else tuple(q.shape[:3])


def run_unseen(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    tensors: Tensors,
    addresses: Addresses | None = None,
    *,
    problem: Problem,
    layout: str,
) -> Outputs:
    """Return the outputs of a call without any key or without any query: nothing to launch."""
    spec = problem.spec
    out = q.new_empty((*q.shape[:-1], spec.head_dim_v), dtype=getattr(torch, spec.dtype.out.torch_name))
    lse = q.new_empty(lse_size(q, problem, layout), dtype=torch.float32) if spec.lse else None
    return unseen_outputs(out, lse, tensors)


@functools.lru_cache(maxsize=8)
def say_copied(names: str) -> None:
    """Log, once for each set of names, that inputs are copied before the launch."""
    logger.warning(
        "%s: copied before the launch, here and in later calls like it; kernels read a contiguous last dimension, "
        "other strides that are multiples of 8 elements, and 16-byte aligned storage in place",
        names,
    )
