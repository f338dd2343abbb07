"""Triton's interpreter with less to do for each operation of a kernel, which does the same."""

from __future__ import annotations

import dataclasses
import functools
import typing

import numpy as np
import pytest
from triton.language import core
from triton.language.semantic import TritonSemantic
from triton.runtime import interpreter

from flashgen.launch import interpreted

Pair = tuple[core.tensor, core.tensor]


def install(patch: pytest.MonkeyPatch) -> None:
    """Leave out what took most of the time of an interpreted kernel."""
    builder = interpreter.interpreter_builder
    # For each sum and product of integers it interprets six operations to find an overflow, and then, since it is not
    # debugging, asserts nothing.
    assert not builder.options.debug
    patch.setattr(builder, "options", dataclasses.replace(builder.options, sanitize_overflow=False))
    patch.setattr(interpreter, "_get_np_dtype", _remembered_np_dtype(interpreter._get_np_dtype))
    patch.setattr(core.tensor, "__init__", _tensor_like_another(core.tensor.__init__))
    patch.setattr(core.block_type, "__init__", _type_like_another(core.block_type.__init__))
    patch.setattr(TritonSemantic, "broadcast_impl_value", _left_if_alike(TritonSemantic.broadcast_impl_value))
    # Made anew for each call of a function on the device, which reads its signature; Triton keeps what it rewrites.
    patch.setattr(interpreted, "InterpretedFunction", functools.cache(interpreted.InterpretedFunction))


def _remembered_np_dtype(np_dtype_of: typing.Callable[[typing.Any], np.dtype[typing.Any]]) -> typing.Any:
    """Return a function that makes Triton's table of NumPy's types once for each of its scalars, not at every call."""
    known: dict[str, np.dtype[typing.Any]] = {}

    def remembered(dtype: typing.Any) -> np.dtype[typing.Any]:
        name = dtype.scalar.name
        if name not in known:
            known[name] = np_dtype_of(dtype)
        return known[name]

    return remembered


def _tensor_like_another(make: typing.Callable[..., None]) -> typing.Any:
    """Return what makes a tensor with what another one of its shape has: its sizes as constants, and their product."""
    known: dict[tuple[int, ...], dict[str, object]] = {}

    def made(self: core.tensor, handle: object, type: core.dtype) -> None:
        shape = _sizes(type)
        if shape in known:
            vars(self).update(known[shape], handle=handle, type=type, dtype=type.scalar)
        else:
            make(self, handle, type)
            own = ("handle", "type", "dtype")
            known[shape] = {name: value for name, value in vars(self).items() if name not in own}

    return made


def _type_like_another(make: typing.Callable[..., None]) -> typing.Any:
    """Return what makes the type of a block with what another one of its shape and of that type's name has."""
    known: dict[tuple[object, ...], dict[str, object]] = {}

    def made(self: core.block_type, element_ty: core.dtype, shape: typing.Sequence[typing.Any]) -> None:
        key = (element_ty.name, *shape)
        if not all(type(size) is int for size in key[1:]):
            make(self, element_ty, shape)
        elif key in known:
            vars(self).update(known[key], element_ty=element_ty)
        else:
            make(self, element_ty, shape)
            known[key] = dict(vars(self))

    return made


def _left_if_alike(broadcast: typing.Callable[..., Pair]) -> typing.Any:
    """Return a function that broadcasts only what differs in shape."""

    def broadcasted(self: TritonSemantic, lhs: core.tensor, rhs: core.tensor) -> Pair:
        if lhs.type.is_block() == rhs.type.is_block() and _sizes(lhs.type) == _sizes(rhs.type):
            return lhs, rhs
        return broadcast(self, lhs, rhs)

    return broadcasted


def _sizes(type: core.dtype) -> tuple[int, ...]:
    return tuple(type.shape) if type.is_block() else ()
