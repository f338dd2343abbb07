"""The rendered kernel on the CPU, its outputs poisoned, judged against float64."""

from __future__ import annotations

import typing
from collections.abc import Callable

import pytest
import torch

from flashgen.codegen import TritonForwardConfig
from flashgen.launch import interpret_forward
from flashgen.measure import accuracy_error, poisoned_empty
from flashgen.spec import AttentionSpec, DType, Mask, Problem, Shape

Check = Callable[..., None]


@pytest.fixture(autouse=True)
def _poisoned_outputs(monkeypatch: pytest.MonkeyPatch) -> None:
    def allocate(q: torch.Tensor, spec: AttentionSpec) -> tuple[torch.Tensor, torch.Tensor | None]:
        out = poisoned_empty((*q.shape[:3], spec.head_dim_v), q.dtype, q.device)
        return out, (poisoned_empty(tuple(q.shape[:3]), torch.float32, q.device) if spec.lse else None)

    monkeypatch.setattr("flashgen.launch.interpreter.allocate_outputs", allocate)


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
    names = {torch.float16: DType.FP16, torch.bfloat16: DType.BF16, torch.float32: DType.FP32}
    spec = AttentionSpec(dtype=names[q.dtype], head_dim_qk=q.shape[3], head_dim_v=v.shape[3], mask=mask, lse=lse)
    shape = Shape(batch=q.shape[0], seqlen_q=q.shape[2], seqlen_k=k.shape[2], nheads_q=q.shape[1], nheads_kv=k.shape[1])
    problem = Problem(spec=spec, shape=shape)
    scale = q.shape[3] ** -0.5 if softmax_scale is None else softmax_scale
    out, got_lse = interpret_forward(q, k, v, problem=problem, config=config, softmax_scale=scale)
    call = f"{problem} with {config}, scale {scale}, strides {q.stride()} {k.stride()} {v.stride()}"
    assert out.dtype == q.dtype, call
    assert (got_lse is not None) == lse, call
    if got_lse is not None:
        assert got_lse.dtype == torch.float32, call
    report = accuracy_error(out, got_lse, q, k, v, mask=mask, softmax_scale=scale)
    assert report.ok, f"{report.reason}\n{call}"


@pytest.fixture
def check() -> Check:
    """A function that interprets one call and holds it to the accuracy rule."""
    return typing.cast("Check", _check)
