"""Triton's interpreter with less to do for each operation of a kernel, which does the same."""

from __future__ import annotations

import dataclasses
import typing

import numpy as np
import pytest
from triton.runtime import interpreter


def install(patch: pytest.MonkeyPatch) -> None:
    """Leave out what took half of the time of an interpreted kernel."""
    builder = interpreter.interpreter_builder
    # For each sum and product of integers it interprets six operations to find an overflow, and then, since it is not
    # debugging, asserts nothing.
    assert not builder.options.debug
    patch.setattr(builder, "options", dataclasses.replace(builder.options, sanitize_overflow=False))
    patch.setattr(interpreter, "_get_np_dtype", _remembered(interpreter._get_np_dtype))


def _remembered(np_dtype_of: typing.Callable[[typing.Any], np.dtype[typing.Any]]) -> typing.Any:
    """Return a function that makes Triton's table of NumPy's types once for each of its scalars, not at every call."""
    known: dict[str, np.dtype[typing.Any]] = {}

    def remembered(dtype: typing.Any) -> np.dtype[typing.Any]:
        name = dtype.scalar.name
        if name not in known:
            known[name] = np_dtype_of(dtype)
        return known[name]

    return remembered
