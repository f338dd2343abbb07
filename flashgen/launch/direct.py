"""Calling the C function under Triton's launcher: what it is given is found out once, then only replayed.

Triton's launcher, in Python, takes every descriptor apart and encodes it in each launch. The C function under it takes
the parts, pointers as plain numbers, and the same encoded maps as often as one likes. Which argument goes where differs
between Triton versions, so nothing is assumed: the launcher runs twice with a recorder in place of the C function and
marks in place of the pointers and the stream. What the calls have in common stays, and what is neither equal nor ours
refuses the whole: then each launch takes the public way.
"""

from __future__ import annotations

import collections.abc
import copy
import dataclasses
import inspect
import logging
import types
import typing

from flashgen.errors import UnsupportedError

logger = logging.getLogger("flashgen")

Encode = collections.abc.Callable[[typing.Any], object]


@dataclasses.dataclass(frozen=True, kw_only=True)
class DirectLaunch:
    """How the C function under a kernel's launcher is called.

    Attributes:
        function: what is called: `before`, the stream's handle, then `after` and the list of the kernel's values where
            `nested`, else the values one by one.
        before: arguments before the stream.
        after: arguments between it and the list.
        nested: whether the kernel's values are one argument.
        values: of the kernel, pointers and maps of descriptors among them at the positions that the next two name.
        pointers: where the addresses go, in the order of the kernel's pointer arguments.
        maps: where the encoded descriptors go, in the order of the kernel's descriptor arguments.
        encoders: what encodes each of them.
    """

    function: collections.abc.Callable[..., object]
    before: tuple[object, ...]
    after: tuple[object, ...]
    nested: bool
    values: list[object]
    pointers: tuple[int, ...]
    maps: tuple[int, ...]
    encoders: tuple[Encode, ...]


@dataclasses.dataclass(frozen=True, kw_only=True)
class _Record:
    before: tuple[object, ...]
    after: tuple[object, ...]
    nested: bool
    values: list[object]
    pointers: tuple[int, ...]


def direct_launch(
    handle: typing.Any,
    grid: int,
    arguments: collections.abc.Sequence[object],
    pointers: collections.abc.Sequence[int],
    descriptors: collections.abc.Sequence[int],
) -> DirectLaunch | None:
    """Return how to launch a compiled kernel directly, or None where this Triton's launcher is not understood.

    Args:
        handle: Triton's compiled kernel, loaded on the current device.
        grid: the number of programs.
        arguments: of a launch that succeeded.
        pointers: which of them are tensors.
        descriptors: which of them are tensor descriptors.
    """
    try:
        return _find_out(handle, grid, arguments, pointers, descriptors)
    except Exception as error:
        # Whatever another version does differently, the public way stands.
        logger.info("launching through Triton's own launcher, which takes longer: %s: %s", type(error).__name__, error)
        return None


def _find_out(
    handle: typing.Any,
    grid: int,
    arguments: collections.abc.Sequence[object],
    pointers: collections.abc.Sequence[int],
    descriptors: collections.abc.Sequence[int],
) -> DirectLaunch:
    _expect(handle.metadata.target.backend == "cuda", "pointers as numbers are known of CUDA alone")
    launcher = handle.run
    inner = launcher.launch
    names = _names_used_by(inner) if descriptors else {}
    function = names["launcher"] if descriptors else inner
    first, second = (_record(handle, grid, arguments, pointers) for _ in range(2))
    fixed = [*zip(first.before + first.after, second.before + second.after, strict=True)]
    _expect(all(_same(a, b) for a, b in fixed), "something is allocated for each launch")
    _expect(first.pointers == second.pointers, "pointers change places")
    changing = (index for index, pair in enumerate(zip(first.values, second.values, strict=True)) if not _same(*pair))
    maps = tuple(index for index in changing if index not in first.pointers)
    _expect(len(maps) == len(descriptors), f"{len(maps)} values change where {len(descriptors)} descriptors do")
    takers = [_taker(names, number) for number in range(len(maps))]
    for index, take_apart, argument in zip(maps, takers, descriptors, strict=True):
        (encoded, *rest), there = take_apart(arguments[argument]), first.values[index:]
        alike = type(encoded) is type(there[0]) and rest == there[1 : len(rest) + 1]
        _expect(alike, "descriptors are taken apart in another way")
    return DirectLaunch(
        function=function,
        before=first.before,
        after=first.after,
        nested=first.nested,
        values=first.values,
        pointers=first.pointers,
        maps=maps,
        encoders=tuple(_encoder(take_apart) for take_apart in takers),
    )


def _record(
    handle: typing.Any,
    grid: int,
    arguments: collections.abc.Sequence[object],
    pointers: collections.abc.Sequence[int],
) -> _Record:
    """Return what the C function is given, without calling it."""
    stream, marked = object(), list(arguments)
    marks = [object() for _ in pointers]
    for index, mark in zip(pointers, marks, strict=True):
        marked[index] = mark
    calls: list[tuple[object, ...]] = []
    shadow = copy.copy(handle.run)
    shadow.launch = _around(shadow.launch, lambda *given: calls.append(given))
    shadow(grid, 1, 1, stream, handle.function, handle.packed_metadata, None, None, None, *marked)
    (call,) = calls
    at = _position(call, stream)
    nested = isinstance(call[-1], (list, tuple))
    values = typing.cast("list[object]", [*call[-1]] if isinstance(call[-1], (list, tuple)) else [*call[at + 1 :]])
    return _Record(
        before=call[:at],
        after=call[at + 1 : -1] if nested else (),
        nested=nested,
        values=values,
        pointers=tuple(_position(values, mark) for mark in marks),
    )


def _around(launch: typing.Any, recorder: collections.abc.Callable[..., object]) -> typing.Any:
    """Return Triton's wrapper that takes descriptors apart around another function; without a wrapper, the latter."""
    if not isinstance(launch, types.FunctionType) or "launcher" not in launch.__code__.co_freevars:
        return recorder
    assert launch.__closure__ is not None
    names = launch.__code__.co_freevars
    cells = (
        types.CellType(recorder) if name == "launcher" else cell
        for name, cell in zip(names, launch.__closure__, strict=True)
    )
    return types.FunctionType(launch.__code__, launch.__globals__, launch.__name__, launch.__defaults__, tuple(cells))


def _names_used_by(wrapper: typing.Any) -> dict[str, typing.Any]:
    used = inspect.getclosurevars(wrapper)
    return {**used.globals, **used.nonlocals}


def _taker(
    names: collections.abc.Mapping[str, typing.Any], number: int
) -> collections.abc.Callable[[typing.Any], list[object]]:
    """Return what takes the descriptor of this number apart, its encoded map first, as Triton's wrapper does."""
    take_apart, about = names["make_tensordesc_arg"], names["tensordesc_meta"][number]
    # After the descriptor and what is known of it come the launch's other arguments, in some versions.
    others = (None,) * (len(inspect.signature(take_apart).parameters) - 2)
    return lambda descriptor: take_apart(descriptor, about, *others)


def _encoder(take_apart: collections.abc.Callable[[typing.Any], list[object]]) -> Encode:
    return lambda descriptor: take_apart(descriptor)[0]


def _position(values: collections.abc.Sequence[object], wanted: object) -> int:
    (index,) = (index for index, value in enumerate(values) if value is wanted)
    return index


def _same(first: object, second: object) -> bool:
    if first is second:
        return True
    return type(first) is type(second) and isinstance(first, (int, float, str)) and first == second


def _expect(condition: bool, otherwise: str) -> None:
    if not condition:
        raise UnsupportedError(otherwise)
