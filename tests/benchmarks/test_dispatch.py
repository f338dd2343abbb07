"""The benchmark of dispatch runs, in processes of its own, and says what was asked for."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

COMMAND = Path(__file__).parents[2] / "benchmarks" / "dispatch.py"
SHAPE = "b=1 h=2 s=64 d=64 full fp16"
DECODE = "decode b=2 hq=4 hkv=2 sq=1 sk=128 d=64 full fp16"
ROWS = ["call", "raw", "over", "allocate", "new", "empty", "cudnn", "flash", "fa3"]


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


def test_decoding_is_refused_without_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    command = [sys.executable, COMMAND, "--shape", DECODE, "--only", "calls"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 1
    assert "decoding is measured on a GPU alone" in done.stderr


@pytest.mark.gpu
@pytest.mark.parametrize("more", ["", " page=16 append rotary=halves"])
def test_calls_of_decoding(more: str) -> None:
    command = [sys.executable, COMMAND, "--shape", DECODE + more, "--only", "calls", "--json"]
    found = json.loads(subprocess.run(command, capture_output=True, text=True, check=True).stdout)
    calls = found["calls"]
    assert {"call", "raw", "over", "allocate", "new", "empty"} <= set(calls) <= set(ROWS)
    assert 0 < calls["allocate"] < calls["call"] < calls["new"]


@pytest.mark.gpu
def test_the_first_call_of_decoding() -> None:
    command = [sys.executable, COMMAND, "--shape", DECODE, "--step", "first"]
    parts = json.loads(subprocess.run(command, capture_output=True, text=True, check=True).stdout)
    assert set(parts) == {"total", "choose", "render", "binary", "launch"}
