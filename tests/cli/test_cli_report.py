"""report: the page, the charts, the document, and how it exits."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from flashgen.codegen import KernelResources, TritonForwardConfig
from flashgen.measure import Timing
from flashgen.spec import parse_problem
from flashgen.target import named_target
from flashgen.tuning.events import TrialRecord
from flashgen.tuning.journal import open_storage
from flashgen.tuning.study import ProblemStudy
from flashgen.tuning.tried import Tried

# As `tuned` holds an entry for.
PROBLEM = "b=1 hq=2 hkv=1 sq=1024 sk=1024 forward d=64 causal fp16"


@pytest.fixture
def study(tmp_path: Path, entry) -> Path:
    """A study of two trials: the config of `entry`, and another one."""
    path = tmp_path / "study.journal"
    configs = [entry.config, TritonForwardConfig(block_m=128, block_n=64, num_warps=8, num_stages=2)]
    with open_storage(str(path)) as storage:
        problem_study = ProblemStudy(
            storage,
            problem=parse_problem(PROBLEM),
            target=named_target("H200"),
            how="cold-l2, triton 3.6.0, driver 580.1",
            configs=configs,
            seeds=configs,
            seed=0,
            n_quasi_random=0,
        )
        for us in (21.0, 30.0):
            number, config = problem_study.ask()
            timing = Timing(median_us=us, spread=0.01, samples=9)
            resources = KernelResources(registers=100, spills=0, smem_bytes=20000)
            record = TrialRecord(number=number, config=config, resources=resources, result=timing)
            problem_study.tell(Tried(record=record))
    return path


def test_page_and_charts(run, study, tuned, tmp_path):
    page, figures = tmp_path / "out.html", tmp_path / "figures"
    result = run("report", study, "--registry", tuned, "--out", page, "--png", figures)
    assert result.exit_code == 0, result.output
    wrote = [line.removeprefix("wrote ") for line in result.stdout.splitlines()]
    assert wrote[0] == str(page)
    assert sorted(wrote[1:]) == sorted(map(str, figures.iterdir()))
    text = page.read_text(encoding="utf-8")
    assert "1.25x" in text
    assert "cudnn" in text


def test_the_page_goes_to_the_current_folder(run, study, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    result = run("report", study)
    assert result.stdout == "wrote report.html\n"
    assert (tmp_path / "report.html").stat().st_size > 10_000


def test_json_is_one_document_and_no_page(run, study, tuned, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    result = run("report", study, "--registry", tuned, "--json", "--problem", "b=1 hq=2 hkv=1 s=1024 d=64 causal fp16")
    assert result.exit_code == 0, result.output
    (problem,) = json.loads(result.stdout)["problems"]
    assert problem["winner"]["raced_us"] == 20.0
    assert problem["winner"]["name"] == "64x32 w4 s2 pointer"
    assert not (tmp_path / "report.html").exists()


def test_the_default_study_is_that_of_tune(run, monkeypatch, tmp_path):
    monkeypatch.setenv("FLASHGEN_CACHE", str(tmp_path / "cache"))
    result = run("report", "--target", "A100")
    assert result.exit_code == 2
    assert str(tmp_path / "cache" / "studies" / "sm_80.journal") in result.stderr
    assert not (tmp_path / "cache" / "studies").exists()


def test_a_problem_that_is_not_in_it(run, study):
    result = run("report", study, "--shape", "b=1 h=2 s=64 d=64")
    assert result.exit_code == 2
    assert f"it holds: {PROBLEM}" in result.stderr
