"""Runners of recent calls: found for tensors just like those of the call that they were kept for, and no others."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch

from flashgen.ops.call import Options
from flashgen.ops.recent import RecentRunners
from flashgen.ops.runtime import Outputs, Runner
from flashgen.registry import clear_bundles, generation

Given = tuple[torch.Tensor, torch.Tensor, torch.Tensor]
CAUSAL = Options(0, 0, "causal", "", None, 0.0, 0.0, "bhsd", False, False, "", "")


def given(seqlen: int = 64, *, batch: int = 2, dtype: torch.dtype = torch.float16) -> Given:
    q, k, v = (torch.zeros(batch, heads, seqlen, 32, dtype=dtype) for heads in (4, 2, 2))
    return q, k, v


def runner() -> Runner:
    def run(*tensors: object) -> Outputs:
        raise AssertionError("nothing is run here")

    return run


def test_what_was_kept_is_found_for_the_like() -> None:
    kept, first, second = RecentRunners(), runner(), runner()
    assert kept.find(given(), CAUSAL) is None
    kept.keep(given(), CAUSAL, first)
    kept.keep(given(128), CAUSAL, second)
    # Other tensors, of the same kind.
    assert kept.find(given(), CAUSAL) is first
    assert kept.find(given(128), CAUSAL) is second


@pytest.mark.parametrize(
    "change",
    [
        lambda q, k, v: (q[:1], k, v),
        lambda q, k, v: (q, k[:, :, :63], v),
        lambda q, k, v: (q, k, v[..., :16]),
        lambda q, k, v: (q.bfloat16(), k.bfloat16(), v.bfloat16()),
        # The same sizes, other strides.
        lambda q, k, v: (q.transpose(1, 2).contiguous().transpose(1, 2), k, v),
        lambda q, k, v: (q, k, torch.zeros(4, 2, 64, 32, dtype=v.dtype)[::2]),
        lambda q, k, v: (q.to("meta"), k.to("meta"), v.to("meta")),
    ],
    ids=["batch", "keys", "columns", "dtype", "order", "step", "device"],
)
def test_nothing_is_found_for_others(change: Callable[..., Given]) -> None:
    kept = RecentRunners()
    kept.keep(given(), CAUSAL, runner())
    assert kept.find(change(*given()), CAUSAL) is None
    assert kept.find(given(), CAUSAL._replace(return_lse=True)) is None


def test_registries_that_change_make_it_forget() -> None:
    kept = RecentRunners()
    kept.keep(given(), CAUSAL, runner())
    before = generation()
    clear_bundles()
    assert generation() > before
    assert kept.find(given(), CAUSAL) is None
    later = runner()
    kept.keep(given(), CAUSAL, later)
    assert kept.find(given(), CAUSAL) is later


def test_float32_depends_on_more_than_the_tensors() -> None:
    kept = RecentRunners()
    kept.keep(given(dtype=torch.float32), CAUSAL, runner())
    assert kept.find(given(dtype=torch.float32), CAUSAL) is None


def test_the_first_few_kinds_stay() -> None:
    kept, runners = RecentRunners(), [runner() for _ in range(6)]
    for batch, one in enumerate(runners, 1):
        kept.keep(given(batch=batch), CAUSAL, one)
    found = [kept.find(given(batch=batch), CAUSAL) for batch in range(1, 7)]
    assert found == [*runners[:4], None, None]


def test_a_pytorch_without_such_guards_keeps_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delattr("torch._C._dynamo.guards.TensorGuards")
    kept = RecentRunners()
    kept.keep(given(), CAUSAL, runner())
    assert kept.find(given(), CAUSAL) is None
