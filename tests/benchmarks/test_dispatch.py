"""The benchmark of dispatch runs, in processes of its own, and says what was asked for."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import torch

COMMAND = Path(__file__).parents[2] / "benchmarks" / "dispatch.py"
SHAPE = "b=1 h=2 s=64 d=64 full fp16"


def answer(*options: str) -> dict[str, object]:
    command = [sys.executable, COMMAND, "--shape", SHAPE, "--target", "sm_80", *options]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    found: dict[str, object] = json.loads(done.stdout)
    return found


def test_calls_like_earlier_ones() -> None:
    found = answer("--only", "calls", "--json")
    assert (found["shape"], found["first"]) == (SHAPE, {})
    calls = found["calls"]
    assert isinstance(calls, dict)
    with_a_gpu = ["call", "raw", "over", "allocate"] if torch.cuda.is_available() else []
    assert [*calls] == [*with_a_gpu, "before", "find", "new", "empty"]
    assert 0 < calls["find"] < calls["before"] < calls["new"]


def test_the_first_call_of_a_process() -> None:
    parts = answer("--step", "first")
    assert set(parts) == {"total", "choose", "render", "binary"} | ({"launch"} if torch.cuda.is_available() else set())
    *spent, total = sorted(float(str(ms)) for ms in parts.values())
    assert total == parts["total"]
    assert 0 < sum(spent) <= total
