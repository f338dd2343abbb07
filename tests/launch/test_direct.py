"""The short way to launch gives Triton's C function what the public way gives it."""

from __future__ import annotations

import contextvars
import dataclasses
import functools
import inspect
import types
import typing
from collections.abc import Callable

import pytest
import torch
import triton
from triton.backends.nvidia import driver as nvidia

from flashgen.codegen import EntryPlan, KernelResources
from flashgen.compile import CompiledEntry
from flashgen.launch.descriptors import descriptor_form
from flashgen.launch.kernel import BoundKernel, loaded_on
from flashgen.spec import DType

BOXES = {"q_desc": (1, 1, 64, 32), "v_desc": (1, 1, 1, 32, 64)}
SIZES = {"q": (2, 3, 100, 32), "v": (9, 9, 3, 200, 64)}
ARGUMENTS = ("q_desc", "lse_ptr", "qk_scale", "v_desc", "tile_counter_ptr", "step_lh", "nheads_q", "sinks_ptr")
VALUES = {"qk_scale": 0.125, "step_lh": 2**40, "nheads_q": 6}
ANNOTATIONS = [object()]
SLOTS = {"q": 0, "v": 1, "lse": 2, "sinks": 3}
TYPES = {"qk_scale": "fp32", "step_lh": "i64", "nheads_q": "i32", "BLOCK_N": "constexpr"}


@dataclasses.dataclass(frozen=True)
class Map:
    """In place of a `CUtensorMap`: all that it was encoded from."""

    encoded: tuple[object, ...]


class Driver:
    """In place of Triton's driver, with PyTorch's stream."""

    def __init__(self) -> None:
        self.encoded: list[Map] = []
        encode = types.SimpleNamespace(fill_tma_descriptor=self._encode, fill_tma_descriptor_tiled=self._encode)
        self.utils = encode
        self.stream = 7

    def _encode(self, *given: typing.Any) -> Map:
        self.encoded.append(Map(tuple(tuple(part) if isinstance(part, list) else part for part in given)))
        return self.encoded[-1]

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: int) -> int:
        return self.stream

    def allocate_default_profile_scratch(self, size: int, alignment: int, stream: object) -> torch.Tensor:
        return torch.zeros(size)


class Handle:
    """In place of a compiled kernel, loaded."""

    def __init__(self, run: typing.Any, backend: str = "cuda") -> None:
        self.run = run
        self.function = 4242
        self.packed_metadata = (4, 1, 1000)
        self.metadata = types.SimpleNamespace(target=types.SimpleNamespace(backend=backend))
        self.public = 0

    def __getitem__(self, grid: tuple[int, int, int]) -> Callable[..., None]:
        self.public += 1
        return lambda *arguments: self.run(*grid, 7, 4242, self.packed_metadata, None, None, None, *arguments)


class Calls:
    """What the C function was given, tensors as their addresses."""

    def __init__(self) -> None:
        self.all: list[tuple[object, ...]] = []

    def __call__(self, *given: typing.Any) -> None:
        self.all.append(_plain(given))


def _plain(given: typing.Any) -> typing.Any:
    if isinstance(given, (list, tuple)):
        return tuple(map(_plain, given))
    return given.data_ptr() if isinstance(given, torch.Tensor) else given


def signature_of(names: tuple[str, ...]) -> dict[str, str]:
    found = {}
    for name in names:
        if name.endswith("_desc"):
            found[name] = f"tensordesc<fp16{list(BOXES[name])}>"
        else:
            found[name] = TYPES.get(name, "*fp32")
    return found | {"BLOCK_N": "constexpr"}


def launcher(calls: Calls, names: tuple[str, ...], **other: object) -> typing.Any:
    """Return the launcher of this Triton around a C function that writes down its arguments."""
    made = object.__new__(nvidia.CudaLauncher)
    sizes: dict[str, object] = dict.fromkeys(("global_scratch_size", "profile_scratch_size"), 0)
    sizes |= dict.fromkeys(("global_scratch_align", "profile_scratch_align", "num_ctas"), 1)
    known = {"launch_cooperative_grid": False, "launch_pdl": False, "gsan_enabled": False}
    known |= {"arg_annotations": ANNOTATIONS, "kernel_signature": b"signature"}
    metas = [
        {"swizzle": 3, "elem_size": 2, "elem_type": 6, "block_size": list(BOXES[name]), "fp4_padded": False}
        for name in names
        if name.endswith("_desc")
    ]
    launch = nvidia.wrap_handle_tensordesc(calls, signature_of(names), metas)
    vars(made).update({**sizes, **known, "launch": launch, **other})
    return made


def bind(handle: Handle, names: tuple[str, ...] = ARGUMENTS) -> BoundKernel:
    entry = EntryPlan(name="attn_fwd", arguments=names, constants=("BLOCK_N",), pointer_types=())
    built = CompiledEntry(
        name="attn_fwd",
        handle=handle,
        constants=(64,),
        resources=KernelResources(registers=1, spills=0, smem_bytes=1),
    )
    forms = {
        f"{name}_desc": descriptor_form((size, _strides(size)), BOXES[f"{name}_desc"], DType.FP16, gluon=name == "v")
        for name, size in SIZES.items()
    }
    return BoundKernel(entry, built, grid=132, values=VALUES, descriptors=forms, slots=SLOTS)


def _strides(size: tuple[int, ...]) -> tuple[int, ...]:
    return torch.empty(size, device="meta").stride()


def tensors() -> tuple[torch.Tensor, ...]:
    """Return Q, V, lse and sinks at new addresses; only those matter."""
    return tuple(torch.empty(1024, dtype=torch.float16) for _ in SLOTS)


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch) -> Driver:
    made = Driver()
    monkeypatch.setattr(triton.runtime.driver, "_active", made)
    monkeypatch.setattr(torch._C, "_cuda_getDevice", lambda: 0, raising=False)
    monkeypatch.setattr(torch._C, "_cuda_getCurrentRawStream", lambda device: made.stream, raising=False)
    monkeypatch.setattr("torch.cuda.is_current_stream_capturing", lambda: False)
    zeros = functools.partial(torch.zeros, dtype=torch.int32)
    monkeypatch.setattr("flashgen.launch.tile_counter._zeros", lambda device, count: zeros(count))
    monkeypatch.setattr("flashgen.launch.tile_counter.outside_pools", lambda make, device: make())
    monkeypatch.setattr("flashgen.launch.tile_counter._counters", {})
    return made


@pytest.mark.parametrize("names", [ARGUMENTS, ("lse_ptr", "nheads_q", "sinks_ptr")], ids=["descriptors", "pointers"])
def test_the_short_way_gives_the_same_arguments(
    names: tuple[str, ...], gpu: Driver, monkeypatch: pytest.MonkeyPatch
) -> None:
    short, public = Calls(), Calls()
    kept = [tensors() for _ in range(4)]
    order = [0, 1, 0, 2, 3, 3, 1]

    def launch_all(calls: Calls) -> BoundKernel:
        kernel = bind(Handle(launcher(calls, names)), names)
        for number, which in enumerate(order):
            gpu.stream = 7 + number % 2
            kernel(kept[which])
        return kernel

    assert launch_all(short)._direct is not None
    monkeypatch.setattr("flashgen.launch.kernel.direct_launch", lambda *given: None)
    assert launch_all(public)._direct is None
    assert len(short.all) == len(order)
    # Finding out launches nothing, and what is launched is equal in type and value.
    assert repr(short.all) == repr(public.all)
    assert short.all == public.all
    assert len(set(map(repr, short.all))) > 4


def test_addresses_that_come_again_are_not_encoded_again(gpu: Driver) -> None:
    calls = Calls()
    kernel = bind(Handle(launcher(calls, ARGUMENTS)))
    first, second = tensors(), tensors()
    for given in (first, first, second, first):
        kernel(given)
    before = len(gpu.encoded)
    for given in (first, second, first):
        kernel(given)
    assert len(gpu.encoded) == before
    # One tensor at another address is one map.
    kernel((first[0], second[1].clone(), *first[2:]))
    assert len(gpu.encoded) == before + 1
    assert [encoded.encoded[0] for encoded in maps_of(calls.all[-1])] == [
        first[0].data_ptr(),
        gpu.encoded[-1].encoded[0],
    ]


def maps_of(call: tuple[object, ...]) -> list[Map]:
    return [value for value in values_of(call) if isinstance(value, Map)]


def test_only_so_many_maps_are_kept(gpu: Driver, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("flashgen.launch.kernel._KEPT_MAPS", 4)
    monkeypatch.setattr("flashgen.launch.kernel._KEPT_LAUNCHES", 5)
    calls = Calls()
    kernel = bind(Handle(launcher(calls, ARGUMENTS)))
    kept = [tensors() for _ in range(11)]
    for given in (*kept, *kept):
        kernel(given)
    used = inspect.getclosurevars(kernel._direct).nonlocals
    assert 0 < len(used["kept"]) <= 5
    fill = inspect.getclosurevars(used["arguments"]).nonlocals["fill"]
    maps = inspect.getclosurevars(fill).nonlocals["maps"]
    assert len(maps) == 2
    assert all(0 < len(known) <= 4 for _, _, known, _ in maps)
    assert len(calls.all) == 22
    assert calls.all[:11] == calls.all[11:]


def test_captured_launches_are_not_kept(gpu: Driver, monkeypatch: pytest.MonkeyPatch) -> None:
    made: list[torch.Tensor] = []

    def zeros(device: int, count: int) -> torch.Tensor:
        made.append(torch.zeros(count, dtype=torch.int32))
        return made[-1]

    monkeypatch.setattr("flashgen.launch.tile_counter._zeros", zeros)
    calls = Calls()
    kernel = bind(Handle(launcher(calls, ARGUMENTS)))
    given = tensors()
    kernel(given)
    kernel(given)
    with monkeypatch.context() as capture:
        capture.setattr("torch.cuda.is_current_stream_capturing", lambda: True)
        kernel(given)
        kernel(given)
    kernel(given)
    # Outside one counter for the stream, inside each launch its own.
    assert len(made) == 3
    counters = [counter.data_ptr() for counter in made]
    used = [next(value for value in values_of(call) if value in counters) for call in calls.all]
    assert used == [counters[0], counters[0], counters[1], counters[2], counters[0]]


def values_of(call: tuple[object, ...]) -> tuple[object, ...]:
    return call[-1] if isinstance(call[-1], tuple) else call


def test_a_caller_s_addresses_are_those_of_the_tensors(gpu: Driver) -> None:
    calls = Calls()
    kernel = bind(Handle(launcher(calls, ARGUMENTS)))
    kept = [tensors() for _ in range(3)]
    for given in (kept[0], *kept):
        kernel(given)
    for given in kept:
        kernel(given, tuple(t.data_ptr() for t in given))
    assert calls.all[1:4] == calls.all[4:]
    # Kept under the same keys: nothing was made anew.
    assert kernel._direct is not None
    assert len(inspect.getclosurevars(kernel._direct).nonlocals["kept"]) == 3


def check_public(handle: Handle, calls: Calls, gpu: Driver) -> None:
    """Launch twice; both must take Triton's own launcher, and arrive."""
    kernel = bind(handle)
    for _ in range(2):
        kernel(tensors())
    assert kernel._direct is None
    assert len(calls.all) == 2
    assert len(gpu.encoded) >= 4


def test_another_wrapper_is_left_alone(gpu: Driver) -> None:
    calls = Calls()
    usual = launcher(calls, ARGUMENTS).launch
    check_public(Handle(launcher(calls, ARGUMENTS, launch=lambda *given: usual(*given))), calls, gpu)


def test_another_launcher_is_left_alone(gpu: Driver) -> None:
    calls = Calls()
    check_public(Handle(launcher(calls, ARGUMENTS).__call__), calls, gpu)


def test_other_hardware_is_left_alone(gpu: Driver) -> None:
    calls = Calls()
    check_public(Handle(launcher(calls, ARGUMENTS), backend="hip"), calls, gpu)


@pytest.mark.parametrize("scratch", ["global_scratch_size", "profile_scratch_size"])
def test_kernels_that_need_scratch_memory_get_it_each_time(scratch: str, gpu: Driver) -> None:
    calls = Calls()

    def check() -> None:
        triton.set_allocator(lambda size, alignment, stream: torch.zeros(size))
        if hasattr(triton.runtime._allocation, "set_profile_allocator"):
            triton.runtime._allocation.set_profile_allocator(lambda size, alignment, stream: torch.zeros(size))
        check_public(Handle(launcher(calls, ARGUMENTS, **{scratch: 64})), calls, gpu)

    # Allocators are set for a context.
    contextvars.copy_context().run(check)


def test_a_profiler_sees_every_launch(gpu: Driver, monkeypatch: pytest.MonkeyPatch) -> None:
    calls = Calls()
    handle = Handle(launcher(calls, ARGUMENTS))
    kernel = bind(handle)
    kernel(tensors())
    kernel(tensors())
    assert handle.public == 0
    with monkeypatch.context() as profiler:
        profiler.setattr(triton.knobs.runtime.launch_enter_hook, "calls", [print])
        kernel(tensors())
        assert handle.public == 1
    kernel(tensors())
    assert handle.public == 1
    assert len(calls.all) == 4


def test_each_device_loads_the_kernel_for_itself() -> None:
    class Loaded(Handle):
        def __init__(self) -> None:
            super().__init__(None)
            self.module, self._run = "module", "launcher"

    first, second = Loaded(), Loaded()
    assert loaded_on(first, 1) is first
    twin = loaded_on(first, 0)
    assert (twin.module, twin.function, twin._run) == (None, None, None)
    assert twin.packed_metadata == first.packed_metadata
    assert (first.module, first.function) == ("module", 4242)
    assert loaded_on(first, 0) is twin
    assert loaded_on(first, 1) is first
    assert loaded_on(second, 0) is second
