"""Launches without a GPU: what would be launched is written down."""

from __future__ import annotations

import types
import typing

import pytest
import torch

from flashgen.codegen import KernelConfig, constant_values, render
from flashgen.compile import CompiledKernel
from flashgen.launch import bind_forward
from flashgen.launch.forward import kernel_arguments
from flashgen.measure import poisoned_outputs, random_extras, random_inputs
from flashgen.spec import Problem

Launched = list[tuple[object, int, list[typing.Any]]]


class Handle(str):
    """In place of Triton's compiled kernel: its name, which can be referred to weakly."""


def _fake_compiled(problem: Problem, config: KernelConfig) -> CompiledKernel:
    values = constant_values(problem.spec, config)
    entries = [
        types.SimpleNamespace(
            handle=Handle(entry.name),
            constants=tuple(values[name] for name in entry.constants),
        )
        for entry in render(problem.spec, config).plan.entries
    ]
    return typing.cast("CompiledKernel", types.SimpleNamespace(entries=tuple(entries)))


@pytest.fixture
def fake_compiled() -> typing.Callable[..., CompiledKernel]:
    """A function that returns the compiled kernels of a problem and a config with names as handles."""
    return _fake_compiled


@pytest.fixture
def one_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """PyTorch's words for a current GPU, number 0, and its stream, number 7."""
    monkeypatch.setattr(torch._C, "_cuda_getDevice", lambda: 0, raising=False)
    monkeypatch.setattr(torch._C, "_cuda_getCurrentRawStream", lambda device: 7, raising=False)


@pytest.fixture
def launched(monkeypatch: pytest.MonkeyPatch, one_gpu: None) -> Launched:
    """Handle, grid and arguments of every launch by the public way."""
    calls: Launched = []
    monkeypatch.setattr("flashgen.launch.kernel.launch", lambda *call: calls.append(call))
    return calls


@pytest.fixture
def bound_arguments(launched: Launched) -> typing.Callable[..., tuple[int, dict[str, typing.Any]]]:
    """A function that binds a forward kernel, holds its arguments to those by name, and returns grid and arguments."""
    return lambda problem, config: _check_bound(problem, config, launched)


def _check_bound(problem: Problem, config: KernelConfig, launched: Launched) -> tuple[int, dict[str, typing.Any]]:
    q, k, v = random_inputs(problem, device="cpu", seed=0)
    out, lse_tensor = poisoned_outputs(problem, device="cpu")
    tensors = {"q": q, "k": k, "v": v, "out": out} | ({"lse": lse_tensor} if lse_tensor is not None else {})
    extras = random_extras(problem, device="cpu", seed=2)
    plan = render(problem.spec, config).plan
    launched.clear()
    bind_forward(problem, config, _fake_compiled(problem, config), extras, tensors)()
    ((handle, grid, arguments),) = launched
    assert handle == "attn_fwd"
    want = kernel_arguments(plan, problem, config, extras, tensors)
    names = [*plan.entries[0].arguments, *plan.entries[0].constants]
    assert sorted(want) == sorted(names)
    assert len(arguments) == len(want)
    for name, got in zip(names, arguments, strict=True):
        expected = want[name]
        if name == "tile_counter_ptr":
            assert torch.equal(got, expected)
        elif name.endswith("_ptr"):
            assert got is expected is not None, name
            assert name[:-4] not in tensors or got is tensors[name[:-4]], name
        elif name.endswith("_desc"):
            operand = name.removesuffix("_desc").removesuffix("_1")
            assert got.base is expected.base is tensors[operand], name
            assert type(got) is type(expected), name
            assert got.__dict__ == expected.__dict__, name
        else:
            assert type(got) in (int, float), name
            assert got == expected, name
    return grid, dict(zip(names, arguments, strict=True))
