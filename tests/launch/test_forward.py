"""What a launch is made of: strides that can be read, the grid, and every argument in its place."""

from __future__ import annotations

import dataclasses
import math
import types
import typing

import pytest
import torch

from flashgen.codegen import ForwardPlan, TritonForwardConfig, constant_values, render
from flashgen.compile import CompiledKernel
from flashgen.errors import InputError
from flashgen.launch import ForwardLaunch, Operands, allocate_outputs, bind_forward, grid_size, readable
from flashgen.launch.forward import kernel_arguments, launch_values
from flashgen.spec import Problem, Shape, parse_problem

CONFIG = TritonForwardConfig(block_m=64, block_n=32, num_warps=4, num_stages=2, head_group=3)
DESCRIPTOR = dataclasses.replace(CONFIG, loads="descriptor")
PROBLEM = parse_problem("b=2 hq=6 hkv=2 sq=130 sk=77 d=64 dv=40 causal fp16 lse")


def tensors_for(problem: Problem) -> dict[str, torch.Tensor]:
    spec, shape = problem.spec, problem.shape
    dtype = getattr(torch, spec.dtype.torch_name)
    q = torch.zeros(shape.batch, shape.seqlen_q, shape.nheads_q, spec.head_dim_qk, dtype=dtype).transpose(1, 2)
    k = torch.zeros(shape.batch, shape.nheads_kv, shape.seqlen_k, spec.head_dim_qk, dtype=dtype)
    v = torch.zeros(shape.batch, shape.nheads_kv, shape.seqlen_k, spec.head_dim_v, dtype=dtype)
    out, lse = allocate_outputs(q, spec)
    return {"q": q, "k": k, "v": v, "out": out} | ({"lse": lse} if lse is not None else {})


def test_outputs() -> None:
    tensors = tensors_for(PROBLEM)
    assert (tensors["out"].shape, tensors["out"].dtype) == ((2, 6, 130, 40), torch.float16)
    assert (tensors["lse"].shape, tensors["lse"].dtype) == ((2, 6, 130), torch.float32)
    without = dataclasses.replace(PROBLEM.spec, lse=False)
    assert allocate_outputs(tensors["q"], without)[1] is None


@pytest.mark.parametrize(
    ("text", "block_m", "grid"),
    [
        ("b=2 hq=6 hkv=2 sq=130 sk=77 d=64", 64, 3 * 12),
        ("b=2 hq=6 hkv=2 sq=128 sk=77 d=64", 64, 2 * 12),
        ("b=1 hq=1 hkv=1 sq=1 sk=1 d=64", 128, 1),
        ("b=1 hq=1 hkv=1 sq=0 sk=1 d=64", 128, 0),
    ],
)
def test_grid(text: str, block_m: int, grid: int) -> None:
    assert grid_size(parse_problem(text).shape, dataclasses.replace(CONFIG, block_m=block_m)) == grid


@pytest.mark.parametrize(
    ("batch", "seqlen_q", "seqlen_k"), [(1, 2**31, 1), (1, 1, 2**31), (1, 2**31 - 64, 1), (2**26, 2**12, 1)]
)
def test_sizes_past_32_bits(batch: int, seqlen_q: int, seqlen_k: int) -> None:
    shape = Shape(batch=batch, seqlen_q=seqlen_q, seqlen_k=seqlen_k, nheads_q=1, nheads_kv=1)
    with pytest.raises(InputError, match=r"below 2\*\*31; split the batch"):
        grid_size(shape, CONFIG)


def test_scalars() -> None:
    tensors = tensors_for(PROBLEM)
    operands = Operands.of(tensors, PROBLEM)
    values = launch_values(PROBLEM, CONFIG, operands, 0.3)
    assert values.pop("qk_scale") == pytest.approx(0.3 * math.log2(math.e))
    assert values == {
        "num_heads_total": 12, "nheads_q": 6, "group": 3, "SEQLEN_Q": 130, "SEQLEN_K": 77, "head_group": 3,
        # bshd queries; dense keys and values; out like q.
        "stride_qz": 130 * 6 * 64, "stride_qh": 64, "stride_qm": 6 * 64,
        "stride_kz": 2 * 77 * 64, "stride_kh": 77 * 64, "stride_kn": 64,
        "stride_vz": 2 * 77 * 40, "stride_vh": 77 * 40, "stride_vn": 40,
        "stride_oz": tensors["out"].stride(0), "stride_oh": tensors["out"].stride(1),
        "stride_om": tensors["out"].stride(2),
    }  # fmt: skip


@pytest.mark.parametrize("config", [CONFIG, DESCRIPTOR], ids=["pointer", "descriptor"])
@pytest.mark.parametrize("lse", [False, True])
def test_bound_arguments_are_those_of_the_kernel(
    config: TritonForwardConfig, lse: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    launched: list[tuple[object, int, list[object]]] = []
    monkeypatch.setattr("flashgen.launch.forward.launch", lambda *call: launched.append(call))
    problem = dataclasses.replace(PROBLEM, spec=dataclasses.replace(PROBLEM.spec, lse=lse))
    tensors = tensors_for(problem)
    plan = render(problem.spec, config).plan
    constants = tuple(constant_values(problem.spec, config)[name] for name in plan.constants)
    compiled = typing.cast("CompiledKernel", types.SimpleNamespace(handle="handle", constants=constants))
    bind_forward(problem, config, compiled, 0.3, tensors)()
    ((handle, grid, arguments),) = launched
    assert (handle, grid) == ("handle", 36)
    want = kernel_arguments(plan, problem, config, 0.3, tensors)
    assert list(want) == [*plan.arguments, *plan.constants]
    assert len(arguments) == len(want)
    for (name, expected), got in zip(want.items(), arguments, strict=True):
        if name.endswith("_ptr"):
            assert got is expected is tensors[name.removesuffix("_ptr")], name
        elif name.endswith("_desc"):
            assert got.base is expected.base is tensors[name.removesuffix("_desc")], name  # type: ignore[attr-defined]
            assert got.__dict__ == expected.__dict__, name
        else:
            assert got == expected, name


def test_a_bound_launch_takes_other_tensors_each_time(monkeypatch: pytest.MonkeyPatch) -> None:
    launched: list[list[object]] = []
    monkeypatch.setattr("flashgen.launch.forward.launch", lambda handle, grid, arguments: launched.append(arguments))
    plan: ForwardPlan = render(PROBLEM.spec, DESCRIPTOR).plan
    tensors = tensors_for(PROBLEM)
    bound = ForwardLaunch(
        plan=plan,
        compiled=typing.cast("CompiledKernel", types.SimpleNamespace(handle=None, constants=())),
        problem=PROBLEM,
        config=DESCRIPTOR,
        operands=Operands.of(tensors, PROBLEM),
        softmax_scale=0.3,
    )
    calls = [list(tensors_for(PROBLEM).values()) for _ in range(2)]
    for call in calls:
        bound(*call)
    # Made anew each time: a launch that is still queued keeps its own.
    for arguments, call in zip(launched, calls, strict=True):
        assert all(arguments[i].base is call[i] for i in range(4))  # type: ignore[attr-defined]


def test_readable() -> None:
    t = torch.zeros(2, 3, 10, 16)
    assert readable(t)
    assert readable(t.transpose(1, 2))
    assert readable(t[:, :1].expand(-1, 3, -1, -1))
    assert readable(torch.zeros(2, 3, 10, 40)[..., :16])
    assert not readable(t.transpose(2, 3))
    assert not readable(torch.zeros(2, 3, 10, 17)[..., :16])
    assert not readable(torch.zeros(2, 3, 10, 32)[..., ::2])
    assert not readable(torch.zeros(2, 3, 10, 1).expand(-1, -1, -1, 16))
    # A stride that is never walked does not matter.
    assert readable(torch.as_strided(t, (1, 1, 10, 16), (3, 5, 16, 1)))


def test_descriptors_refuse_strides_that_hardware_cannot_walk() -> None:
    operands = Operands.of(tensors_for(PROBLEM), PROBLEM)
    assert operands.refusal(DESCRIPTOR, 2) is None
    for strides in ((0, 128, 64, 1), (128, 0, 64, 1), (1024, 128, 0, 1), (1024, 128, 68, 1)):
        for name in ("q", "k", "v", "out"):
            odd = dataclasses.replace(operands, **{name: strides})
            assert odd.refusal(CONFIG, 2) is None
            reason = odd.refusal(DESCRIPTOR, 2)
            assert reason is not None
            assert f"{name} has {list(strides)}" in reason
    # 68 float32 are 17 times 16 bytes.
    assert dataclasses.replace(operands, q=(1024, 128, 68, 1)).refusal(DESCRIPTOR, 4) is None


def test_strides_of_single_elements_are_made_harmless() -> None:
    problem = parse_problem("b=1 hq=1 hkv=1 sq=10 sk=1 d=16 fp16")
    q = torch.as_strided(torch.zeros(160), (1, 1, 10, 16), (3, 0, 16, 1))
    k = torch.as_strided(torch.zeros(160), (1, 1, 1, 16), (0, 0, 0, 1))
    operands = Operands.of({"q": q, "k": k, "v": k, "out": q}, problem)
    assert operands == Operands(q=(16, 16, 16, 1), k=(16, 16, 16, 1), v=(16, 16, 16, 1), out=(16, 16, 16, 1))
    assert operands.refusal(DESCRIPTOR, 2) is None
