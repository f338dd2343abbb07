"""The benchmark of decoding at different lengths runs, and counts the bytes of the keys in use."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

COMMAND = Path(__file__).parents[2] / "benchmarks" / "decode_lengths.py"
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
SHAPE = "b=3 hq=4 hkv=2 sq=1 sk=96 d=32 full " + ("bf16" if DEVICE == "cuda" else "fp32")
SMALL = ["--short", "10", "--draws", "2", "--copy-mib", "1", "--target-ms", "1", "--device", DEVICE]


def run(*options: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, COMMAND, "--shape", SHAPE, *SMALL, *options], capture_output=True, text=True)


def test_figures_of_each_batch_and_cache() -> None:
    done = run("--page-sizes", "4,16", "--json")
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert (found["shape"], found["copy_tbps"] > 0) == (SHAPE, True)
    figures = found["figures"]
    names = [(figure["lengths"], figure["cache"]) for figure in figures]
    assert names == [
        (lengths, cache)
        for lengths in ("all alike", "one of 96", "lognormal 0", "lognormal 1")
        for cache in ("contiguous", "pages of 4", "pages of 16")
    ]
    keys = {figure["lengths"]: figure["keys"] for figure in figures}
    assert (keys["all alike"], keys["one of 96"]) == (3 * 96, 96 + 2 * 10)
    assert 3 <= keys["lognormal 0"] <= 3 * 96
    assert keys["lognormal 0"] != keys["lognormal 1"]
    itemsize = 2 if DEVICE == "cuda" else 4
    for figure in figures:
        assert figure["us"] > 0
        assert figure["anew_us"] > 0
        # K and V of two heads of 32 columns.
        bound_us = figure["keys"] * 2 * 2 * 32 * itemsize / found["copy_tbps"] * 1e-6
        assert figure["bound_us"] == pytest.approx(bound_us)


def test_pages_that_do_not_fit_are_refused() -> None:
    done = run("--page-sizes", "7,16")
    assert done.returncode == 1
    assert "--page-sizes must divide sk=96, got 7" in done.stderr
