"""Calls on a GPU, their outputs poisoned, judged against float64."""

from __future__ import annotations

import contextlib
import typing
from collections.abc import Callable, Iterator

import pytest
import torch

import flashgen
from flashgen.measure import accuracy_error, random_extras, random_inputs
from flashgen.ops import run_problem
from flashgen.spec import AttentionSpec, Extras, Mask, Problem, parse_dtype, parse_problem

Check = Callable[..., torch.Tensor]


@contextlib.contextmanager
def _poisoned_memory() -> Iterator[None]:
    """Make PyTorch fill what `empty` gives with NaN, so that an element no kernel writes fails every comparison."""
    before = torch.are_deterministic_algorithms_enabled(), torch.is_deterministic_algorithms_warn_only_enabled()
    torch.use_deterministic_algorithms(True)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(before[0], warn_only=before[1])


def _check(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    mask: Mask,
    *,
    layout: typing.Literal["bhsd", "bshd"] = "bhsd",
    softmax_scale: float | None = None,
    **options: typing.Any,
) -> torch.Tensor:
    with _poisoned_memory():
        out, lse = flashgen.attention(
            q, k, v, mask=mask, layout=layout, softmax_scale=softmax_scale, return_lse=True, **options
        )
    call = f"q {tuple(q.shape)} {q.stride()} k {tuple(k.shape)} {k.stride()} v {tuple(v.shape)} {v.stride()} {q.dtype}"
    assert out.shape == (*q.shape[:3], v.shape[3]), call
    assert out.dtype == q.dtype, call
    assert lse.dtype == torch.float32, call
    q, k, v, rows_last = (t if layout == "bhsd" else t.transpose(1, 2) for t in (q, k, v, out))
    spec = AttentionSpec(
        dtype=parse_dtype(str(q.dtype)), head_dim_qk=q.shape[3], head_dim_v=v.shape[3], mask=mask, lse=True
    )
    scale = spec.default_scale if softmax_scale is None else softmax_scale
    report = accuracy_error(rows_last, lse, q, k, v, spec=spec, extras=Extras(softmax_scale=scale))
    assert report.ok, f"{report.reason}\n{call} {mask} {layout} scale {scale}"
    return out


def _check_problem(problem: Problem | str, *, seed: int = 0, layout: typing.Literal["bhsd", "bshd"] = "bhsd") -> None:
    problem = parse_problem(problem) if isinstance(problem, str) else problem
    q, k, v = random_inputs(problem, device="cuda", seed=seed, layout=layout)
    extras = random_extras(problem, device="cuda", seed=seed)
    given = (q, k, v) if problem.spec.varlen else tuple(t if layout == "bhsd" else t.transpose(1, 2) for t in (q, k, v))
    with _poisoned_memory():
        out, lse = run_problem(given[0], given[1], given[2], problem, extras, layout=layout)
    if layout == "bshd" and not problem.spec.varlen:
        out = out.transpose(1, 2)
    report = accuracy_error(out, lse, q, k, v, spec=problem.spec, extras=extras)
    assert report.ok, f"{report.reason}\n{problem} seed {seed} {layout}"


@pytest.fixture
def check_problem() -> Callable[..., None]:
    """A function that runs a problem on random inputs and extras and holds it to the accuracy rule."""
    assert bool(torch.isnan(_poison_probe())), "PyTorch no longer poisons new memory: the tests would miss holes"
    return _check_problem


@pytest.fixture
def check() -> Check:
    """A function that runs one call, holds it to the accuracy rule and returns its out."""
    assert bool(torch.isnan(_poison_probe())), "PyTorch no longer poisons new memory: the tests would miss holes"
    return _check


def _poison_probe() -> torch.Tensor:
    with _poisoned_memory():
        return torch.zeros(1, device="cuda").new_empty((1,))
