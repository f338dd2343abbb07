"""One kernel with all of its arguments but the tensors, launched by the shortest way that this Triton offers."""

from __future__ import annotations

import copy
import dataclasses
import typing
import weakref
from collections.abc import Callable, Mapping, Sequence

import torch
import triton

from flashgen.codegen import EntryPlan, argument_kind
from flashgen.compile import CompiledEntry, descriptor_operand
from flashgen.launch.descriptors import DescriptorForm
from flashgen.launch.direct import DirectLaunch, Encode, direct_launch
from flashgen.launch.tile_counter import counter_is_shared, tile_counter

TILE_COUNTER = "tile_counter_ptr"
_KEPT_MAPS = 256
_KEPT_LAUNCHES = 256

_hooks = triton.knobs.runtime

# Of a call: a sequence or a mapping, and where a tensor is found in it.
_Tensors = typing.Any
_Slot = typing.Any
_Direct = Callable[[_Tensors, "tuple[int, ...] | None"], None]


@dataclasses.dataclass(frozen=True, kw_only=True)
class LaunchAttributes:
    """What a launch asks of CUDA.

    Attributes:
        cooperative: that all programs run at once, or none.
        dependent: that it begins while what is before it on the stream ends; see `gdc_wait` in the kernel.
    """

    cooperative: bool = False
    dependent: bool = False

    def of(self, handle: typing.Any) -> typing.Any:
        """Return a loaded kernel that is launched so: itself, or a twin with a launcher of its own."""
        if self == LaunchAttributes():
            return handle
        twin = copy.copy(handle)
        # Read first: it loads the binary, which the twin shares.
        run = handle.run
        twin.module, twin.function = handle.module, handle.function
        twin._run = copy.copy(run)
        twin._run.launch_cooperative_grid = self.cooperative
        twin._run.launch_pdl = self.dependent
        return twin


class BoundKernel:
    """A compiled kernel bound to a grid and numbers; call it with tensors of the sizes and strides bound.

    The first call, which binds it to its device, takes Triton's launcher and finds out what that does, see
    `direct_launch`; later calls do no more than that, with their own addresses.
    """

    def __init__(
        self,
        entry: EntryPlan,
        built: CompiledEntry,
        *,
        grid: int,
        values: Mapping[str, int | float],
        descriptors: Mapping[str, DescriptorForm],
        slots: Mapping[str, int] | Mapping[str, str],
        attributes: LaunchAttributes = LaunchAttributes(),
    ) -> None:
        """Bind.

        Args:
            entry: the kernel.
            built: the same, compiled.
            grid: the number of programs.
            values: its numbers by name.
            descriptors: its descriptors by name.
            slots: where each tensor is found among those of a call, by the tensor's name.
            attributes: what launches ask of CUDA.
        """
        self._handle = built.handle
        self._attributes = attributes
        self._grid = grid
        self._arguments: list[object] = [values.get(name) for name in entry.arguments]
        self._arguments += built.constants
        self._pointers: list[tuple[int, _Slot]] = []
        self._descriptors: list[tuple[int, _Slot, DescriptorForm]] = []
        self._counter: int | None = None
        for index, name in enumerate(entry.arguments):
            kind = argument_kind(name)
            if name == TILE_COUNTER:
                self._counter = index
            elif kind == "pointer":
                self._pointers.append((index, slots[name.removesuffix("_ptr")]))
            elif kind == "descriptor":
                self._descriptors.append((index, slots[descriptor_operand(name)], descriptors[name]))
        self._device: int | None = None
        self._direct: _Direct | None = None

    def __call__(self, tensors: _Tensors, addresses: tuple[int, ...] | None = None) -> None:
        """Launch on the current stream.

        Args:
            tensors: of the call, at the slots bound.
            addresses: of those that the kernel takes, in the order of their slots, from who has read them anyway.
        """
        if self._direct is None or _is_watched():
            self._launch(tensors)
        else:
            self._direct(tensors, addresses)

    def _launch(self, tensors: _Tensors) -> None:
        device = torch._C._cuda_getDevice()
        first = self._device is None
        if first:
            self._handle, self._device = self._attributes.of(loaded_on(self._handle, device)), device
        arguments = self._arguments.copy()
        for index, slot in self._pointers:
            arguments[index] = tensors[slot]
        for index, slot, form in self._descriptors:
            arguments[index] = form.of(tensors[slot])
        if self._counter is not None:
            arguments[self._counter] = tile_counter(device, torch._C._cuda_getCurrentRawStream(device))
        launch(self._handle, self._grid, arguments)
        if first and self._grid:
            self._direct = self._find_direct(arguments, device)

    def _find_direct(self, arguments: Sequence[object], device: int) -> _Direct | None:
        counter = () if self._counter is None else (self._counter,)
        found = direct_launch(
            self._handle,
            self._grid,
            arguments,
            [*(index for index, _ in self._pointers), *counter],
            [index for index, _, _ in self._descriptors],
        )
        if found is None:
            return None
        slots = [slot for _, slot in self._pointers]
        forms = [(slot, form) for _, slot, form in self._descriptors]
        return _replay(found, device, slots, forms)


def _replay(
    direct: DirectLaunch,
    device: int,
    slots: Sequence[_Slot],
    forms: Sequence[tuple[_Slot, DescriptorForm]],
) -> _Direct:
    """Return a function that launches directly; a pointer past the slots is that of the tile counter.

    All that one launch has of its own are addresses and the stream. PyTorch's allocator gives the same few addresses
    again and again, so the values of past launches are kept by them.
    """
    function, before, after, nested = direct.function, direct.before, direct.after, direct.nested
    fill = _filling(direct, slots, forms)
    counter = direct.pointers[-1] if len(direct.pointers) > len(slots) else None
    addressed = sorted({*slots, *(slot for slot, _ in forms)})
    stream_of = torch._C._cuda_getCurrentRawStream
    kept: dict[tuple[int, ...], tuple[object, ...]] = {}

    def arguments(tensors: _Tensors, stream: int, count: torch.Tensor | None) -> tuple[object, ...]:
        values = fill(tensors)
        if counter is not None and count is not None:
            values[counter] = count.data_ptr()
        return (*before, stream, *after, values) if nested else (*before, stream, *values)

    def run(tensors: _Tensors, addresses: tuple[int, ...] | None) -> None:
        stream = stream_of(device)
        count: torch.Tensor | None = None
        if counter is not None and not counter_is_shared(stream):
            # Held until the launch is queued.
            count = tile_counter(device, stream)
            function(*arguments(tensors, stream, count))
            return
        key = (stream, *(addresses or [tensors[slot].data_ptr() for slot in addressed]))
        given = kept.get(key)
        if given is None:
            if len(kept) >= _KEPT_LAUNCHES:
                kept.clear()
            if counter is not None:
                count = tile_counter(device, stream)
            given = kept[key] = arguments(tensors, stream, count)
        function(*given)

    return run


def _filling(
    direct: DirectLaunch, slots: Sequence[_Slot], forms: Sequence[tuple[_Slot, DescriptorForm]]
) -> Callable[[_Tensors], list[object]]:
    """Return what makes the kernel's values of a call's tensors, all but the tile counter."""
    template = direct.values
    pointers = tuple(zip(direct.pointers, slots, strict=False))
    maps = tuple(
        (position, slot, *_kept_maps(form, encode))
        for position, encode, (slot, form) in zip(direct.maps, direct.encoders, forms, strict=True)
    )

    def fill(tensors: _Tensors) -> list[object]:
        values = template.copy()
        for position, slot in pointers:
            values[position] = tensors[slot].data_ptr()
        for position, slot, known, encode in maps:
            base = tensors[slot]
            values[position] = known.get(base.data_ptr()) or encode(base)
        return values

    return fill


def _kept_maps(form: DescriptorForm, encode: Encode) -> tuple[dict[int, object], Callable[[torch.Tensor], object]]:
    """Return encoded descriptors by address, and what adds that of a tensor and returns it.

    Sizes and strides are the form's, so an address is all that one map has of its own.
    """
    known: dict[int, object] = {}

    def add(base: torch.Tensor) -> object:
        if len(known) >= _KEPT_MAPS:
            known.clear()
        made = known[base.data_ptr()] = encode(form.of(base))
        return made

    return known, add


def launch(handle: typing.Any, grid: int, arguments: Sequence[object]) -> None:
    """Launch a Triton kernel on the current device and stream, around the JIT and its argument parsing."""
    if _is_watched():
        # A profiler: take the public way, which tells it what runs.
        handle[(grid, 1, 1)](*arguments)
        return
    driver = triton.runtime.driver.active
    stream = driver.get_current_stream(driver.get_current_device())
    # `run` loads the binary on first use, so it must be read before `function`.
    run = handle.run
    run(grid, 1, 1, stream, handle.function, handle.packed_metadata, None, None, None, *arguments)


def _is_watched() -> bool:
    enter, leave = _hooks.launch_enter_hook, _hooks.launch_exit_hook
    try:
        return bool(enter.calls or leave.calls)
    except AttributeError:
        # Chains of hooks are empty unless somebody added one; older code sets a plain function or None.
        return bool(getattr(enter, "calls", enter) or getattr(leave, "calls", leave))


# What each compiled kernel was loaded as, by device; None stands for itself, which must not keep itself alive.
_loaded: weakref.WeakKeyDictionary[typing.Any, dict[int, typing.Any]] = weakref.WeakKeyDictionary()


def loaded_on(handle: typing.Any, device: int) -> typing.Any:
    """Return a compiled kernel for launches on a device: itself on the first that asks, a twin on each other one.

    Triton loads the binary of a kernel once, into the context of the device that is current then.
    """
    twins = _loaded.setdefault(handle, {})
    if device not in twins:
        twins[device] = _unloaded(handle) if twins else None
    return twins[device] or handle


def _unloaded(handle: typing.Any) -> typing.Any:
    twin = copy.copy(handle)
    twin.module = twin.function = twin._run = None
    return twin
