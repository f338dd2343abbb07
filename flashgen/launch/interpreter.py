"""The same rendered kernel on CPU tensors, through Triton's interpreter: for tests and for reading, not for speed."""

from __future__ import annotations

import collections.abc
import contextlib
import dataclasses
import threading
import typing

import numpy as np
import torch
import triton
from triton.runtime.interpreter import InterpretedFunction, _patch_lang
from triton.runtime.jit import JITFunction

from flashgen.codegen import KernelConfig, render
from flashgen.compile import load_kernel
from flashgen.errors import UnsupportedError
from flashgen.launch.forward import allocate_outputs, grid_size, kernel_arguments
from flashgen.spec import DType, Problem

# The interpreter patches triton.language while it runs, so one kernel at a time.
_LOCK = threading.Lock()


def interpret_forward(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    *,
    problem: Problem,
    config: KernelConfig,
    softmax_scale: float,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Return out and lse of the kernel that `config` renders to, computed on the CPU.

    bf16 tensors are computed in float32 and rounded at the end: the interpreter's bf16 products are wrong.

    Args:
        q, k, v: CPU tensors, seen as [batch, heads, seqlen, head_dim].

    Raises:
        UnsupportedError: where this Triton and this NumPy cannot interpret together.
    """
    if problem.spec.dtype is DType.BF16:
        wide = dataclasses.replace(problem, spec=dataclasses.replace(problem.spec, dtype=DType.FP32))
        out, lse = interpret_forward(
            q.float(), k.float(), v.float(), problem=wide, config=config, softmax_scale=softmax_scale
        )
        return out.to(q.dtype), lse
    rendered = render(problem.spec, config)
    out, lse = allocate_outputs(q, problem.spec)
    if out.numel() == 0:
        return out, lse
    tensors = {"q": q, "k": k, "v": v, "out": out} | ({"lse": lse} if lse is not None else {})
    if problem.shape.seqlen_k == 0:
        return fill_unseen(out, lse)
    arguments = kernel_arguments(rendered.plan, problem, config, softmax_scale, tensors)
    run_interpreted(load_kernel(rendered), grid_size(problem.shape, config), arguments)
    return out, lse


def fill_unseen(out: torch.Tensor, lse: torch.Tensor | None) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Return the outputs of rows that see no key: out 0, lse -inf."""
    out.zero_()
    return out, (lse.fill_(float("-inf")) if lse is not None else None)


def run_interpreted(kernel: typing.Any, grid: int, arguments: typing.Mapping[str, object]) -> None:
    """Run one `@triton.jit` function over `grid` programs on CPU tensors.

    Raises:
        UnsupportedError: where this Triton and this NumPy cannot interpret together.
    """
    try:
        # Rows that see no key take the logarithm of 0, as on the GPU.
        with _LOCK, _device_functions_interpreted(), np.errstate(divide="ignore"):
            InterpretedFunction(kernel.fn)[(grid,)](**arguments)
    except Exception as error:
        if "only 0-dimensional arrays" in str(error) or "only length-1 arrays" in str(error):
            raise UnsupportedError(
                f"Triton {triton.__version__} cannot interpret loops with this NumPy; "
                "install numpy<2.4 or triton>=3.7.1"
            ) from error
        raise


@contextlib.contextmanager
def _device_functions_interpreted() -> collections.abc.Iterator[None]:
    # A kernel's own helpers, and tl.max and its like, are JIT functions that refuse to be called from Python.
    compiled_call = JITFunction.__call__

    def interpreted_call(self: typing.Any, *args: object, **kwargs: object) -> object:
        return InterpretedFunction(self.fn).rewrite()(*args, **kwargs)

    JITFunction.__call__ = interpreted_call
    # Triton restores what it patches in the kernel's own module; its library functions live in another one.
    library = _patch_lang(triton.language.cdiv.fn)
    try:
        yield
    finally:
        library.restore()
        JITFunction.__call__ = compiled_call
