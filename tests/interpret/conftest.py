"""The rendered kernel on the CPU, its outputs poisoned, judged against float64."""

from __future__ import annotations

import typing
from collections.abc import Callable

import pytest
import torch

from flashgen.codegen import TritonForwardConfig
from flashgen.launch import interpret_forward
from flashgen.measure import accuracy_error, poisoned_empty
from flashgen.spec import AttentionSpec, DType, Extras, Mask, Problem, Shape

Check = Callable[..., None]


@pytest.fixture(autouse=True)
def _poisoned_outputs(monkeypatch: pytest.MonkeyPatch) -> None:
    def allocate(q: torch.Tensor, spec: AttentionSpec) -> tuple[torch.Tensor, torch.Tensor | None]:
        dtype = getattr(torch, spec.dtype.out.torch_name)
        rows = (q.shape[1], q.shape[0]) if spec.varlen else tuple(q.shape[:3])
        out = poisoned_empty((*q.shape[:-1], spec.head_dim_v), dtype, q.device)
        return out, (poisoned_empty(rows, torch.float32, q.device) if spec.lse else None)

    monkeypatch.setattr("flashgen.launch.interpreter.allocate_outputs", allocate)


_DTYPES = {
    torch.float16: DType.FP16,
    torch.bfloat16: DType.BF16,
    torch.float32: DType.FP32,
    torch.float8_e4m3fn: DType.FP8,
}


def _check(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    config: TritonForwardConfig,
    mask: Mask,
    *,
    softmax_scale: float | None = None,
    lse: bool = True,
) -> None:
    spec = AttentionSpec(dtype=_DTYPES[q.dtype], head_dim_qk=q.shape[3], head_dim_v=v.shape[3], mask=mask, lse=lse)
    shape = Shape(batch=q.shape[0], seqlen_q=q.shape[2], seqlen_k=k.shape[2], nheads_q=q.shape[1], nheads_kv=k.shape[1])
    scale = q.shape[3] ** -0.5 if softmax_scale is None else softmax_scale
    _check_problem(q, k, v, Problem(spec=spec, shape=shape), config, Extras(softmax_scale=scale))


def _check_problem(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, problem: Problem, config: TritonForwardConfig, extras: Extras
) -> tuple[torch.Tensor, torch.Tensor | None]:
    spec = problem.spec
    out, lse = interpret_forward(q, k, v, problem=problem, config=config, extras=extras)
    strides = f"strides {q.stride()} {k.stride()} {v.stride()}"
    call = f"{problem} with {config}, scale {extras.softmax_scale}, {strides}"
    assert out.dtype == getattr(torch, spec.dtype.out.torch_name), call
    assert (lse is not None) == spec.lse, call
    if lse is not None:
        assert lse.dtype == torch.float32, call
    report = accuracy_error(out, lse, q, k, v, spec=spec, extras=extras)
    assert report.ok, f"{report.reason}\n{call}"
    return out, lse


@pytest.fixture
def check() -> Check:
    """A function that interprets one call without features and holds it to the accuracy rule."""
    return typing.cast("Check", _check)


@pytest.fixture
def check_problem() -> Callable[..., tuple[torch.Tensor, torch.Tensor | None]]:
    """A function that interprets one problem, holds it to the accuracy rule and returns out and lse."""
    return _check_problem
