"""What stands behind the torch op: select, compile and bind once for each kind of call, then only launch."""

from __future__ import annotations

import collections.abc
import dataclasses
import functools
import logging
import math
from pathlib import Path

import torch

from flashgen.codegen import KernelConfig, render
from flashgen.compile import CompiledKernel, compile_kernel
from flashgen.dispatch import Selection, select
from flashgen.errors import CompileError, FlashgenError, InputError
from flashgen.launch import (
    ForwardLaunch,
    Operands,
    detect_target,
    fill_unseen,
    readable,
    software_versions,
)
from flashgen.ops.checks import Layout, heads_first, problem_of
from flashgen.registry import Registry, generation, load, search_locations
from flashgen.spec import AttentionSpec, Mask, Problem
from flashgen.target import GpuTarget

logger = logging.getLogger("flashgen")

Outputs = tuple[torch.Tensor, "torch.Tensor | None"]
Runner = collections.abc.Callable[[torch.Tensor, torch.Tensor, torch.Tensor], Outputs]


@functools.lru_cache(maxsize=16)
def _load_registry(path: Path | None, generation_number: int) -> Registry:
    registry = load(search_locations(path))
    for issue in registry.issues:
        logger.warning("skipped in the registry: %s", issue)
    return registry


def registry_for(path: str | None) -> Registry:
    """Return the registry of the search path, with `path` first where one is given; read once."""
    return _load_registry(Path(path) if path else None, generation())


@dataclasses.dataclass(frozen=True, kw_only=True)
class Options:
    """What a call asks for besides its tensors."""

    mask: Mask
    softmax_scale: float
    layout: Layout
    return_lse: bool
    config: KernelConfig | None = None
    registry: str | None = None


def prepare(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, options: Options) -> Runner:
    """Return a function that runs calls of exactly these shapes, strides and options on this device.

    Raises:
        InputError, ConfigError, NoKernelError: see `problem_of` and `select`.
        FlashgenError: inside a CUDA graph capture, where nothing may be compiled.
    """
    layout = options.layout
    problem = problem_of(q, k, v, mask=options.mask, layout=layout, lse=options.return_lse)
    if not math.isfinite(options.softmax_scale):
        raise InputError(f"softmax_scale must be a finite number, got {options.softmax_scale}")
    if problem.shape.seqlen_k == 0 or q.numel() == 0:
        return functools.partial(_run_unseen, problem=problem)
    if options.softmax_scale < 0:
        # The kernels' running maximum assumes a scale of at least 0; a sign is exact to move into Q.
        positive = dataclasses.replace(options, softmax_scale=-options.softmax_scale)
        return _with_inputs(lambda q, k, v: (-q, k, v), positive)
    unreadable = tuple(not readable(t) for t in (q, k, v))
    if any(unreadable):
        say_copied(", ".join(name for name, copied in zip("qkv", unreadable, strict=True) if copied))
        return _with_inputs(
            lambda *tensors: tuple(
                t.contiguous() if copied else t for t, copied in zip(tensors, unreadable, strict=True)
            ),
            options,
        )
    operands = operands_of(q, k, v, problem, layout)
    selection = choose(problem, detect_target(q.device), options, operands)
    launch = ForwardLaunch(
        plan=render(problem.spec, selection.config).plan,
        compiled=compiled_kernel(problem.spec, selection.config, selection.target),
        problem=problem,
        config=selection.config,
        operands=operands,
        softmax_scale=options.softmax_scale,
    )
    return _Bound(launch, problem, q)


def operands_of(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, problem: Problem, layout: Layout) -> Operands:
    """Return the strides that a kernel meets: of the tensors, or of the dense copies that are made first."""
    out = torch.empty((*q.shape[:3], v.shape[3]), device="meta")
    met = {"q": q, "k": k, "v": v, "out": out}
    dense = {name: t if readable(t) else torch.empty(t.shape, device="meta") for name, t in met.items()}
    return Operands.of({name: heads_first(t, layout) for name, t in dense.items()}, problem)


def _with_inputs(change: collections.abc.Callable[..., tuple[torch.Tensor, ...]], options: Options) -> Runner:
    """Return a runner that changes the tensors first; what they become is prepared on its own first call."""
    runners: dict[tuple[object, ...], Runner] = {}

    def run(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> Outputs:
        q, k, v = change(q, k, v)
        key = (q.stride(), k.stride(), v.stride())
        if key not in runners:
            runners[key] = prepare(q, k, v, options)
        return runners[key](q, k, v)

    return run


def choose(problem: Problem, target: GpuTarget, options: Options, operands: Operands | None = None) -> Selection:
    """Return the selection for a call; with `operands`, only configs that can read them and compile."""

    def usable(candidate: KernelConfig) -> str | None:
        if operands is None:
            return None
        reason = operands.refusal(candidate, problem.spec.dtype.itemsize)
        return reason or _compile_refusal(problem.spec, candidate, target)

    return select(
        problem,
        target,
        registry=registry_for(options.registry),
        software=software_versions(),
        config=options.config,
        usable=usable,
    )


@functools.lru_cache(maxsize=1024)
def compiled_kernel(spec: AttentionSpec, config: KernelConfig, target: GpuTarget) -> CompiledKernel:
    """Return a kernel compiled for a target; once a process.

    Raises:
        CompileError: if Triton refuses it.
        FlashgenError: inside a CUDA graph capture.
    """
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

    def __init__(self, launch: ForwardLaunch, problem: Problem, q: torch.Tensor) -> None:
        self._launch = launch
        self._device = q.device
        self._out_size = (*q.shape[:3], problem.spec.head_dim_v)
        self._like_q = q.is_contiguous() and self._out_size == q.shape
        self._lse_size = _lse_size(problem)
        self._index = q.device.index

    def __call__(self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> Outputs:
        # The cheaper of the two where it gives the same.
        out = torch.empty_like(q) if self._like_q else q.new_empty(self._out_size)
        lse = q.new_empty(self._lse_size, dtype=torch.float32) if self._lse_size else None
        if torch._C._cuda_getDevice() == self._index:
            self._launch(q, k, v, out, lse)
        else:
            with torch.cuda.device(self._device):
                self._launch(q, k, v, out, lse)
        return out, lse


def _lse_size(problem: Problem) -> tuple[int, ...] | None:
    shape = problem.shape
    return (shape.batch, shape.nheads_q, shape.seqlen_q) if problem.spec.lse else None


def _run_unseen(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, *, problem: Problem) -> Outputs:
    """Return the outputs of a call without any key or without any query: nothing to launch."""
    out = q.new_empty((*q.shape[:3], problem.spec.head_dim_v))
    lse_size = _lse_size(problem)
    return fill_unseen(out, q.new_empty(lse_size, dtype=torch.float32) if lse_size else None)


@functools.lru_cache(maxsize=8)
def say_copied(names: str) -> None:
    """Log, once for each set of names, that inputs are copied before the launch."""
    logger.warning(
        "%s: copied before the launch, here and in later calls like it; kernels read a contiguous last dimension, "
        "other strides that are multiples of 8 elements, and 16-byte aligned storage in place",
        names,
    )
