"""tune: what a run shows while it works and at its end, and how it exits."""

from __future__ import annotations

import dataclasses
import io
import json
import typing
from pathlib import Path

import pytest
from rich.console import Console

import flashgen.tuning
from flashgen.cli.tune import parse_seconds
from flashgen.cli.tune_view import LiveObserver
from flashgen.codegen import KernelResources
from flashgen.errors import InputError
from flashgen.measure import Rejected, Timing
from flashgen.registry import RegistryEntry
from flashgen.spec import Problem, parse_problem
from flashgen.target import named_target
from flashgen.tuning.events import (
    Observer,
    PortfolioResult,
    ProblemResult,
    ServedProblem,
    TrialRecord,
    TuneReport,
)

TUNED = "b=1 hq=2 hkv=1 s=1024 d=64 causal fp16"
DECODED = "b=16 hq=32 hkv=8 sq=1 sk=4096 d=128 full bf16 decode"


def trials(entry: RegistryEntry) -> tuple[TrialRecord, ...]:
    resources = KernelResources(registers=100, spills=0, smem_bytes=20000)
    results = (
        Timing(median_us=20.0, spread=0.01, samples=9),
        Rejected(stage="compile", reason="too big"),
        Rejected(stage="accuracy", reason="out[0] is nan"),
        Rejected(stage="compile", reason="too big"),
    )
    return tuple(
        TrialRecord(number=n, config=entry.config, resources=resources if n == 0 else None, result=result)
        for n, result in enumerate(results)
    )


def report_of(entry: RegistryEntry, *, found: bool = True, interrupted: bool = False) -> TuneReport:
    result = ProblemResult(
        problem=parse_problem(TUNED),
        entry=entry if found else None,
        trials=trials(entry),
        legal=312,
        baselines={"cudnn": 25.0},
        tied=(),
        wall_s=31.4,
        note="" if found else "every config was rejected",
    )
    return TuneReport(
        target=named_target("H200"),
        results=(result,),
        files=(Path("tuned/nvidia_h200.forward.yaml"),) if found else (),
        study="study.log",
        interrupted=interrupted,
        wall_s=31.4,
    )


def observe(observer: Observer, report: TuneReport) -> None:
    result = report.results[0]
    observer.run_started(report.target, 1, report.study, True)
    observer.problem_started(0, result.problem, 40, 2)
    observer.stage("searching")
    for done, record in enumerate(result.trials, 1):
        observer.trial(record, result.trials[0], done, 75.0)
    observer.stage("racing the finalists")
    observer.problem_finished(result)


@pytest.fixture
def fake_tune(monkeypatch: pytest.MonkeyPatch) -> typing.Callable[[TuneReport], dict[str, object]]:
    """A function that makes `flashgen.tuning.tune` return a report, and gives the arguments that it was called with."""

    def install(report: TuneReport) -> dict[str, object]:
        seen: dict[str, object] = {}

        def tune(problems: tuple[Problem, ...], *, observer: Observer, **options: object) -> TuneReport:
            seen.update(options, problems=problems)
            observe(observer, report)
            return report

        monkeypatch.setattr(flashgen.tuning, "tune", tune, raising=False)
        return seen

    return install


def test_done(run: typing.Any, fake_tune: typing.Any, entry: RegistryEntry) -> None:
    seen = fake_tune(report_of(entry))
    result = run("tune", "--shape", TUNED, "--budget", "5m", "--effort", "check", "--registry", "tuned", "--seed", "7")
    assert result.exit_code == 0, result.stderr
    row = next(line for line in result.stdout.splitlines() if "64x32" in line)
    for cell in (
        "64x32 w4 s2 pointer",
        "20",
        "300",
        "cudnn 25.0 us 1.25x",
        "4 of 312, rejected: compile 2, accuracy 1",
    ):
        assert cell in row
    assert "wrote tuned/nvidia_h200.forward.yaml" in result.stdout
    assert seen["problems"] == (parse_problem(TUNED),)
    assert (seen["budget_s"], seen["effort"], seen["registry"], seen["seed"]) == (300, "check", Path("tuned"), 7)
    assert (seen["target"], seen["device"], seen["study"], seen["workers"]) == (None, None, None, None)


def with_decoding(report: TuneReport, entry: RegistryEntry | None) -> TuneReport:
    decoded = dataclasses.replace(report.results[0], problem=parse_problem(DECODED), entry=entry)
    return dataclasses.replace(report, results=(*report.results, decoded))


def test_bytes_are_told_of_decoding_alone(
    run: typing.Any, fake_tune: typing.Any, entry: RegistryEntry, decode_entry: RegistryEntry
) -> None:
    fake_tune(report_of(entry))
    assert "TB/s" not in run("tune", "--shape", TUNED).stdout
    fake_tune(with_decoding(report_of(entry), decode_entry))
    lines = run("tune", "--shape", TUNED).stdout.splitlines()
    assert " us TFLOP/s TB/s origin " in " ".join(lines[1].split())
    (row,) = (line for line in lines if " decode " in line)
    assert row.split(" 64 ")[-1].split()[:3] == ["16.78", "4.20", "measured"]
    (row,) = (line for line in lines if "64x32" in line)
    assert row.split(" 20 ")[-1].split()[:3] == ["300", "-", "measured"]
    results = json.loads(run("tune", "--shape", TUNED, "--json").stdout)["results"]
    assert [result["tbps"] for result in results] == [None, 4.198]
    fake_tune(with_decoding(report_of(entry), None))
    (row,) = (line for line in run("tune", "--shape", TUNED).stdout.splitlines() if " decode " in line)
    assert row.split(" none ")[-1].split()[:6] == [*"-----", "4"]


def test_progress_off_a_terminal_is_a_line_a_stage(
    run: typing.Any, fake_tune: typing.Any, entry: RegistryEntry
) -> None:
    fake_tune(report_of(entry))
    lines = run("tune", "--shape", TUNED).stderr.splitlines()
    assert lines[0].startswith("tuning 1 problem(s) for NVIDIA H200 (sm_90)")
    assert lines[1].startswith("[1/1] b=1 hq=2")
    assert lines[2:4] == ["  done: searching", "  done: racing the finalists"]
    assert len(lines) == 5


def test_nothing_found_is_exit_1(run: typing.Any, fake_tune: typing.Any, entry: RegistryEntry) -> None:
    fake_tune(report_of(entry, found=False))
    result = run("tune", "--shape", TUNED)
    assert result.exit_code == 1
    assert "every config was rejected" in result.stderr


def test_interrupted_is_exit_130_and_says_what_is_saved(
    run: typing.Any, fake_tune: typing.Any, entry: RegistryEntry
) -> None:
    fake_tune(report_of(entry, interrupted=True))
    result = run("tune", "--shape", TUNED)
    assert result.exit_code == 130
    said = result.stderr.splitlines()[-1]
    assert "nvidia_h200.forward.yaml" in said
    assert "goes on from study.log" in said


def test_json_is_alone_on_stdout(run: typing.Any, fake_tune: typing.Any, entry: RegistryEntry) -> None:
    seen = fake_tune(report_of(entry))
    document = json.loads(run("tune", "--shape", TUNED, "--target", "H200", "--json").stdout)
    assert document["results"][0]["rejected"] == {"compile": 2, "accuracy": 1}
    assert document["results"][0]["entry"] == entry.as_dict()
    assert seen["target"] == named_target("H200")


def portfolio_of(entry: RegistryEntry, loss: float) -> PortfolioResult:
    served = ServedProblem(
        problem=parse_problem(TUNED), entry=entry, kernel=0, best_us=20.0 / (1 + loss), loss=loss, note=""
    )
    own = dataclasses.replace(
        served, kernel=None, loss=None, problem=parse_problem("b=8 hq=2 hkv=1 s=1024 d=64 causal fp16"), note="late"
    )
    problems = (served,) if loss <= 0.02 else (served, own)
    return PortfolioResult(spec=entry.spec, asked=1, kernels=(entry.config,), problems=problems, needed=len(problems))


def test_a_portfolio_tells_each_loss_and_how_many_kernels_it_takes(
    run: typing.Any, fake_tune: typing.Any, entry: RegistryEntry
) -> None:
    found = dataclasses.replace(report_of(entry), portfolios=(portfolio_of(entry, 0.25), portfolio_of(entry, 0.01)))
    seen = fake_tune(found)
    result = run("tune", "--shape", TUNED, "--portfolio", "1")
    assert result.exit_code == 0, result.stderr
    assert seen["portfolio"] == 1
    rows = [line.split() for line in result.stdout.splitlines() if line.startswith((" b=", "b=")) and "%" in line]
    assert [row[-1] for row in rows] == ["25.0%", "1.0%"]
    (own,) = (line for line in result.stdout.splitlines() if "its own" in line)
    assert own.split()[-1] == "-"
    assert f"{entry.spec}: 2% not reached; 2% takes 2 kernel(s), 1 allowed" in result.stdout
    assert f"{entry.spec}: every problem is within 2% of its best; 2% takes 1 kernel(s)" in result.stdout
    assert "late" in result.stderr
    document = json.loads(run("tune", "--shape", TUNED, "--portfolio", "1", "--json").stdout)
    first, second = document["portfolios"]
    assert (first["reached"], first["needed"], second["reached"], second["needed"]) == (False, 2, True, 1)
    assert first["kernels"] == [entry.config.as_dict()]
    assert [problem["loss"] for problem in first["problems"]] == [0.25, None]


def test_without_a_portfolio_the_report_has_none(run: typing.Any, fake_tune: typing.Any, entry: RegistryEntry) -> None:
    seen = fake_tune(report_of(entry))
    assert "portfolios" not in json.loads(run("tune", "--shape", TUNED, "--json").stdout)
    assert seen["portfolio"] is None
    assert run("tune", "--shape", TUNED, "--portfolio", "0").exit_code == 2


def test_live_view_shows_the_best_and_the_time_left(entry: RegistryEntry) -> None:
    screen = Console(file=io.StringIO(), force_terminal=True, width=140, color_system=None)
    observer = LiveObserver(screen)
    report = report_of(entry)
    with screen.capture() as shown, observer.live:
        observe(observer, report)
        observer.live.refresh()
    text = shown.get()
    for part in ("64x32 w4 s2 pointer", "racing the finalists", "4/40", "about 1:15 left", "[1/1] b=1 hq=2"):
        assert part in text
    assert "TB/s" not in text


def test_live_view_tells_the_bytes_of_decoding(entry: RegistryEntry, decode_entry: RegistryEntry) -> None:
    screen = Console(file=io.StringIO(), force_terminal=True, width=140, color_system=None)
    observer = LiveObserver(screen)
    result = dataclasses.replace(
        report_of(entry).results[0], problem=parse_problem(DECODED), entry=decode_entry, trials=trials(decode_entry)
    )
    with screen.capture() as shown, observer.live:
        observe(observer, dataclasses.replace(report_of(entry), results=(result,)))
        observer.live.refresh()
    text = " ".join(shown.get().split())
    assert " us TFLOP/s TB/s registers " in text
    # 268.7 MB in 20 us.
    assert "13.43" in text


@pytest.mark.parametrize(("text", "seconds"), [("90s", 90), ("5m", 300), ("1h30m", 5400), ("45", 45), ("0.5h", 1800)])
def test_budget_text(text: str, seconds: float) -> None:
    assert parse_seconds(text) == seconds


@pytest.mark.parametrize("text", ["", "0", "m", "5 m", "-5m", "5d", "1.5"])
def test_budget_nonsense(text: str) -> None:
    with pytest.raises(InputError, match="--budget"):
        parse_seconds(text)
