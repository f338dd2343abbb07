"""Running a `@triton.jit` function on CPU tensors through Triton's interpreter, whatever the environment says."""

from __future__ import annotations

import collections.abc
import contextlib
import threading
import typing

import numpy as np
import triton
from triton.runtime.interpreter import InterpretedFunction, _patch_lang
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
    # Triton restores what it patches in the kernel's own module; its library functions live in another one.
    library = _patch_lang(triton.language.cdiv.fn)
    try:
        yield
    finally:
        library.restore()
        JITFunction.__call__ = compiled_call
