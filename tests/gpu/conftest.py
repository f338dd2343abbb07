"""Calls on a GPU, their outputs poisoned, judged against float64."""

from __future__ import annotations

import contextlib
import typing
from collections.abc import Callable, Iterator

import pytest
import torch

import flashgen
from flashgen.measure import accuracy_error
from flashgen.spec import Mask

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
    scale = q.shape[3] ** -0.5 if softmax_scale is None else softmax_scale
    call = f"q {tuple(q.shape)} {q.stride()} k {tuple(k.shape)} {k.stride()} v {tuple(v.shape)} {v.stride()} {q.dtype}"
    assert out.shape == (*q.shape[:3], v.shape[3]), call
    assert out.dtype == q.dtype, call
    assert lse.dtype == torch.float32, call
    q, k, v, rows_last = (t if layout == "bhsd" else t.transpose(1, 2) for t in (q, k, v, out))
    report = accuracy_error(rows_last, lse, q, k, v, mask=mask, softmax_scale=scale)
    assert report.ok, f"{report.reason}\n{call} {mask} {layout} scale {scale}"
    return out


@pytest.fixture
def check() -> Check:
    """A function that runs one call, holds it to the accuracy rule and returns its out."""
    assert bool(torch.isnan(_poison_probe())), "PyTorch no longer poisons new memory: the tests would miss holes"
    return _check


def _poison_probe() -> torch.Tensor:
    with _poisoned_memory():
        return torch.zeros(1, device="cuda").new_empty((1,))
