"""A process that joins a run on a real GPU: another one if there is one, the same otherwise."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from flashgen.measure import Rejected, Timing
from flashgen.spec import parse_problem
from flashgen.tuning import tune

pytestmark = pytest.mark.gpu

PROBLEM = parse_problem("b=2 hq=8 hkv=8 s=1024 d=64 causal fp16")


def test_a_process_that_joined_measures_its_share(tmp_path: Path) -> None:
    study = str(tmp_path / "study.journal")
    device = "cuda:1" if torch.cuda.device_count() > 1 else "cuda:0"
    options = ["--study", study, "--device", device, "--workers", "4", "--json"]
    command = [sys.executable, "-c", "from flashgen.cli import main; main()", "join", *options]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as joined:
        assert joined.stderr is not None
        assert "waiting for a run" in joined.stderr.readline()
        try:
            report = tune([PROBLEM], device="cuda:0", budget_s=120.0, registry=tmp_path, study=study, workers=4)
        finally:
            said = joined.communicate(timeout=60)
            joined.kill()
    (result,) = report.results
    assert joined.returncode == 0, said
    document = json.loads(said[0])
    assert document["configs"]["measured"] > 0, said
    assert f"measuring on {device}" in said[1]
    assert len({trial.config for trial in result.trials}) == len(result.trials) == 96
    nonsense = [t for t in result.trials if isinstance(t.result, Rejected) and "makes no sense" in t.result.reason]
    assert not nonsense
    assert sum(isinstance(trial.result, Timing) for trial in result.trials) > 24
    assert result.entry is not None
    assert result.entry.origin == "measured"
