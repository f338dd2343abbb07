"""Running a `@triton.jit` function on CPU tensors through Triton's interpreter, whatever the environment says."""

from __future__ import annotations

import collections.abc
import contextlib
import threading
import typing

import numpy as np
import triton
from triton._C.libtriton import ir
from triton.runtime.interpreter import InterpretedFunction, InterpreterBuilder, _patch_lang
from triton.runtime.jit import JITFunction

from flashgen.errors import UnsupportedError

# The interpreter patches triton.language while it runs, so one kernel at a time.
_LOCK = threading.Lock()


def run_interpreted(kernel: typing.Any, grid: tuple[int, ...], arguments: typing.Mapping[str, object]) -> None:
    """Run one `@triton.jit` function over a grid of programs on CPU tensors.

    Raises:
        UnsupportedError: where this Triton and this NumPy cannot interpret together.
    """
    try:
        # Rows that see no key take the logarithm of 0, as on the GPU.
        with _LOCK, _device_functions_interpreted(), np.errstate(divide="ignore"):
            InterpretedFunction(kernel.fn)[grid](**arguments)
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
    # The interpreter knows every use of descriptors but this one.
    known = "create_descriptor_reduce" in vars(InterpreterBuilder)
    if not known:
        InterpreterBuilder.create_descriptor_reduce = _descriptor_reduce
    # Triton restores what it patches in the kernel's own module; its library functions live in another one.
    library = _patch_lang(triton.language.cdiv.fn)
    try:
        yield
    finally:
        library.restore()
        JITFunction.__call__ = compiled_call
        if not known:
            del InterpreterBuilder.create_descriptor_reduce


def _descriptor_reduce(
    self: typing.Any, kind: object, descriptor: typing.Any, value: typing.Any, offsets: typing.Any
) -> None:
    """Add a tile of float32 to memory through a descriptor."""
    if kind != ir.DESCRIPTOR_REDUCE_KIND.ADD:
        raise NotImplementedError(f"descriptors reduce by addition only in the interpreter, got {kind}")
    pointers, mask = descriptor.materialize_pointers(offsets)
    relaxed, scope = ir.MEM_SEMANTIC.RELAXED, ir.MEM_SYNC_SCOPE.GPU
    self.create_atomic_rmw(ir.ATOMIC_OP.FADD, pointers, value, mask, relaxed, scope)
