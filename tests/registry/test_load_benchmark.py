"""The benchmark of loading runs, and finds what it wrote."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

COMMAND = Path(__file__).parents[2] / "benchmarks" / "registry_load.py"


def test_it_measures_loading_from_the_index() -> None:
    options = ["--entries", "30", "--specs", "3", "--repeat", "1", "--only", "first", "--only", "index", "--json"]
    done = subprocess.run([sys.executable, COMMAND, *options], capture_output=True, text=True, check=True)
    found = json.loads(done.stdout)
    assert (found["entries"], found["specs"], [*found["steps"]]) == (30, 3, ["first", "index"])
    assert found["index_bytes"] > 0
    assert all(ms > 0 for ms, _ in found["steps"].values())
