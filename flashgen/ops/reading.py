"""Plain functions as mods, read once for each of the values that they use."""

from __future__ import annotations

import collections
import dataclasses
import numbers
import types

import torch

from flashgen.spec.mods import ModFunction, Role, read_mod

_KEPT = 256
_MAX_DEPTH = 8
# Their attributes are functions that nobody rebinds.
_FIXED_MODULES = ("torch", "math")
_known: collections.OrderedDict[object, tuple[ModFunction, tuple[int, ...]]] = collections.OrderedDict()


class _Unknown(Exception):
    """A function uses something that may change unseen."""


def read_once(function: types.FunctionType, role: Role) -> ModFunction:
    """Return `read_mod(function, role)`, from memory where the code and all values that it uses are the same.

    Tensors are no part of what is remembered: each call gets its own.

    Raises:
        InputError: see `read_mod`.
    """
    tensors: list[torch.Tensor] = []
    try:
        key = (role, _print_of(function, tensors, 0))
        found = _known.get(key)
    except (_Unknown, TypeError, ValueError):
        # Also a cell without a value, or a number that has no hash.
        return read_mod(function, role)
    if found is not None:
        mod, slots = found
        return dataclasses.replace(mod, tensors=tuple(tensors[slot] for slot in slots))
    mod = read_mod(function, role)
    slots = tuple(_slot(tensor, tensors) for tensor in mod.tensors)
    if -1 not in slots:
        _known[key] = mod.without_tensors(), slots
        if len(_known) > _KEPT:
            _known.popitem(last=False)
    return mod


def _slot(wanted: object, tensors: list[torch.Tensor]) -> int:
    return next((index for index, tensor in enumerate(tensors) if tensor is wanted), -1)


def _print_of(value: object, tensors: list[torch.Tensor], depth: int) -> object:
    """Return what tells a value from others that would be read differently; tensors are collected."""
    if isinstance(value, torch.Tensor):
        slot = _slot(value, tensors)
        if slot < 0:
            slot = len(tensors)
            tensors.append(value)
        return "tensor", slot, value.dtype, value.dim()
    if value is None or isinstance(value, (numbers.Number, types.BuiltinFunctionType, type)):
        return type(value), value
    if isinstance(value, types.ModuleType) and value.__name__ in _FIXED_MODULES:
        return value.__name__
    if depth > _MAX_DEPTH:
        raise _Unknown
    if isinstance(value, tuple):
        return tuple(_print_of(item, tensors, depth + 1) for item in value)
    if isinstance(value, types.FunctionType):
        if value.__module__.partition(".")[0] == "torch" and value.__closure__ is None:
            return value
        return _function_print(value, tensors, depth)
    raise _Unknown


def _function_print(function: types.FunctionType, tensors: list[torch.Tensor], depth: int) -> object:
    code = function.__code__
    used: list[object] = [cell.cell_contents for cell in function.__closure__ or ()]
    used += [function.__globals__[name] for name in code.co_names if name in function.__globals__]
    used += [*(function.__defaults__ or ()), *(function.__kwdefaults__ or {}).values()]
    found = tuple(name in function.__globals__ for name in code.co_names)
    return code, function.__qualname__, found, tuple(_print_of(value, tensors, depth + 1) for value in used)
