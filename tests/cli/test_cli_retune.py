"""retune: what moved, as a table and as JSON, and how it exits."""

from __future__ import annotations

import dataclasses
import json
import typing
from pathlib import Path

import pytest

import flashgen.tuning
from flashgen.registry import RegistryEntry, read_file, write_entries
from flashgen.spec import Problem, parse_problem
from flashgen.target import named_target
from flashgen.tuning import Observer, Reraced, RetuneReport

TUNED = "b=1 hq=2 hkv=1 s=1024 d=64 causal fp16"
OTHER = "b=1 hq=2 hkv=1 s=512 d=64 causal fp16"


def raced(entry: RegistryEntry, us: float = 16.0, **changes: typing.Any) -> RegistryEntry:
    """Return what a race made of an entry."""
    performance = dataclasses.replace(entry.performance, median_us=us)
    provenance = dataclasses.replace(entry.provenance, triton="3.9.0", date="2026-12-01T00:00:00Z")
    return dataclasses.replace(entry, performance=performance, provenance=provenance, **changes)


def moved(entry: RegistryEntry, **changes: typing.Any) -> Reraced:
    other = dataclasses.replace(entry.config, num_stages=3)
    values: dict[str, typing.Any] = {
        "old": entry,
        "stale": True,
        "new": raced(entry, config=other),
        "old_config_us": 24.0,
        "baselines": {"cudnn": 25.0},
        "note": "",
    }
    return Reraced(**(values | changes))


def report_of(*results: Reraced, **changes: typing.Any) -> RetuneReport:
    report = RetuneReport(
        target=named_target("H200"),
        results=results,
        missing=(),
        files=(Path("tuned/nvidia_h200.forward.yaml"),),
        study="study.log",
        interrupted=False,
        wall_s=3.1,
    )
    return dataclasses.replace(report, **changes)


@pytest.fixture
def fake_retune(monkeypatch: pytest.MonkeyPatch) -> typing.Callable[[RetuneReport], dict[str, object]]:
    """A function that makes `flashgen.tuning.retune` return a report, and gives the arguments it was called with."""

    def install(report: RetuneReport) -> dict[str, object]:
        seen: dict[str, object] = {}

        def retune(problems: tuple[Problem, ...] | None, *, observer: Observer, **options: object) -> RetuneReport:
            seen.update(options, problems=problems)
            observer.run_started(report.target, len(report.results), report.study, True)
            return report

        monkeypatch.setattr(flashgen.tuning, "retune", retune, raising=False)
        return seen

    return install


def test_help_teaches_by_example(run: typing.Any) -> None:
    result = run("retune", "--help")
    assert result.exit_code == 0
    assert "Example: flashgen retune" in result.stdout


def test_says_what_moved(run: typing.Any, fake_retune: typing.Any, entry: RegistryEntry) -> None:
    same = moved(entry, stale=False, new=raced(entry, 20.0), old_config_us=20.0)
    seen = fake_retune(report_of(moved(entry), same))
    result = run("retune", "--registry", "tuned", "--budget", "5m", "--workers", "2")
    assert result.exit_code == 0, result.stderr
    changed, stayed = (line for line in result.stdout.splitlines() if "64x32 w4 s2" in line)
    for cell in ("64x32 w4 s3 pointer", "triton 3.6.0, driver 580.1, stale", "24", "16", "1.25x", "changed"):
        assert cell in changed
    assert "stale" not in stayed
    assert stayed.split()[-2:] == ["1.00x", "same"]
    assert "2 entries raced again: 1 changed their winner; 0 kept as they were" in result.stdout
    assert "wrote tuned/nvidia_h200.forward.yaml" in result.stdout
    assert result.stderr.startswith("re-racing 2 problem(s) for NVIDIA H200 (sm_90)")
    assert (seen["problems"], seen["registry"], seen["budget_s"], seen["workers"]) == (None, Path("tuned"), 300, 2)
    assert (seen["target"], seen["device"], seen["study"]) == (None, None, None)


def test_only_the_problems_named(run: typing.Any, fake_retune: typing.Any, entry: RegistryEntry) -> None:
    seen = fake_retune(report_of(moved(entry), missing=(parse_problem(OTHER),)))
    result = run("retune", "--shape", TUNED, "--shape", OTHER, "--target", "H200")
    assert seen["problems"] == (parse_problem(TUNED), parse_problem(OTHER))
    assert seen["target"] == named_target("H200")
    assert f"no entry covers {parse_problem(OTHER)}: `flashgen tune` makes one" in result.stderr


def test_what_stayed_as_it_was_is_said_and_exit_1(
    run: typing.Any, fake_retune: typing.Any, entry: RegistryEntry
) -> None:
    kept = moved(entry, new=None, old_config_us=None, baselines={}, note="none of 2 kept configs is legal any more")
    fake_retune(report_of(kept, files=()))
    result = run("retune")
    assert result.exit_code == 1
    assert "1 kept as they were" in result.stdout
    assert "kept as it was: none of 2 kept configs is legal any more" in result.stderr


def test_interrupted_is_exit_130(run: typing.Any, fake_retune: typing.Any, entry: RegistryEntry) -> None:
    kept = moved(entry, new=None, old_config_us=None, note="interrupted")
    fake_retune(report_of(moved(entry), kept, interrupted=True))
    result = run("retune")
    assert result.exit_code == 130
    assert "goes on from study.log" in result.stderr.splitlines()[-1]


def test_json_is_alone_on_stdout(run: typing.Any, fake_retune: typing.Any, entry: RegistryEntry) -> None:
    result = moved(entry)
    fake_retune(report_of(result, moved(entry, new=None, note="why")))
    document = json.loads(run("retune", "--json").stdout)
    first, second = document["results"]
    assert (first["old"], first["new"]) == (entry.as_dict(), result.new.as_dict())
    assert (first["gain"], first["changed"], first["old_config_us"], first["stale"]) == (1.25, True, 24.0, True)
    assert (second["new"], second["gain"], second["note"]) == (None, None, "why")


def test_nothing_to_race_is_exit_3(run: typing.Any, tmp_path: Path) -> None:
    result = run("retune", "--target", "H200", "--registry", tmp_path / "none")
    assert result.exit_code == 3
    assert "no entry for NVIDIA H200" in result.stderr


def test_a_stale_prediction_is_ranked_again_for_real(
    run: typing.Any, stale_entry: RegistryEntry, tmp_path: Path
) -> None:
    (path,) = write_entries(tmp_path / "tuned", [dataclasses.replace(stale_entry, origin="predicted")])
    arguments = ("retune", "--target", "H200", "--registry", tmp_path / "tuned", "--study", tmp_path / "study")
    result = run(*arguments, "--json")
    assert result.exit_code == 0, result.stderr
    (found,) = json.loads(result.stdout)["results"]
    assert found["stale"]
    (entry,) = read_file(path).entries
    assert found["new"] == entry.as_dict()
    shown = json.loads(run("show", "--registry", tmp_path / "tuned", "--json").stdout)["entries"]
    assert [each["state"] for each in shown] == ["current"]
