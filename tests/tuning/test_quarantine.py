"""What hung or killed a process is not run again on this machine: not by another problem, not after a restart."""

from __future__ import annotations

import dataclasses
import json
import multiprocessing
import os
import typing
from pathlib import Path

import pytest

from flashgen.codegen import KernelConfig, TritonForwardConfig
from flashgen.measure import Rejected, Timing
from flashgen.spec import parse_problem
from flashgen.target import Software, named_target
from flashgen.tuning import SilentObserver
from flashgen.tuning.events import TuneReport
from flashgen.tuning.offers import MOST_CHARACTERS
from flashgen.tuning.quarantine import Quarantine, code_of, default_quarantine, read_offences

H200, H100 = named_target("H200"), named_target("H100")
HERE = Software(flashgen="1", triton="3.6.0", torch="2.11", driver="580.1")
SMALL = parse_problem("b=1 hq=2 hkv=2 s=256 d=64 fp16")
LONGER = parse_problem("b=1 hq=2 hkv=2 s=512 d=64 fp16")
CONFIG = TritonForwardConfig(block_m=64, block_n=64, num_warps=4, num_stages=2)
HUNG = Rejected(stage="run", reason="timeout: measuring process killed after 10 s\nlast words")


def outcomes(report: TuneReport, index: int = 0) -> dict[KernelConfig, Timing | Rejected]:
    return {trial.config: trial.result for trial in report.results[index].trials}


def refusals(bench: typing.Any, report: TuneReport, index: int = 0) -> dict[int, str]:
    """Return the reasons of what was refused, by the place among the seeds."""
    found = outcomes(report, index).items()
    return {bench.seeds.index(config): r.reason for config, r in found if isinstance(r, Rejected)}


def test_another_problem_does_not_meet_what_hung_or_crashed(bench):
    first, second, third, fourth, *_ = bench.seeds
    bench.plan(
        evaluate={f"256 {first}": "hang", f"256 {second}": "abort", f"256 {third}": "wrong", f"256 {fourth}": "killed"}
    )
    report = bench.run(problems=[SMALL, LONGER], trials=6)
    assert set(refusals(bench, report)) == {0, 1, 2, 3}
    said = refusals(bench, report, 1)
    # What was wrong is wrong at its own problem alone, and what somebody killed did nothing.
    assert set(said) == {0, 1}
    assert said[0].startswith("quarantined on 2")
    assert f"at {SMALL}, ended in timeout: measuring process on planted:0 killed after 2" in said[0]
    assert str(default_quarantine()) in said[0]
    assert "ended in crashed: measuring process on planted:0 died of SIGABRT (" in said[1]
    refused = outcomes(report, 1)[first]
    assert isinstance(refused, Rejected)
    assert refused.stage == "run"
    assert bench.calls("compile").count(str(first)) == 1
    # Nor does another run, with a study of its own.
    later = bench.run(problems=[parse_problem("b=1 hq=2 hkv=2 s=128 d=64 fp16")], study=str(bench.folder / "other"))
    assert set(refusals(bench, later)) == {0, 1}


def test_what_the_compiler_died_of_is_remembered(bench):
    first, second = bench.seeds[:2]
    bench.plan(compile={first: "hang", second: "garbage"})
    said = refusals(bench, bench.run(problems=[SMALL, LONGER], trials=4), 1)
    assert "ended in timeout: compiling process" in said[0]
    assert said[1].startswith("the compiler returned")


def test_breaking_the_final_comparison_is_remembered(bench):
    first, second = bench.seeds[:2]
    bench.plan(evaluate={first: 10.0, second: 11.0}, race={first: "abort"}, confirm={second: "exit"})
    said = refusals(bench, bench.run(problems=[SMALL, LONGER], trials=4), 1)
    assert "ended in in the final comparison, crashed" in said[0]
    assert "ended in with lse, crashed" in said[1]


def test_a_gpu_that_does_not_start_blames_nobody(bench):
    bench.plan(start={"planted:0": "exit"})
    with pytest.raises(Exception, match="while it started"):
        bench.run()
    assert read_offences(default_quarantine()) == ((), "")


def test_other_code_other_gpus_other_software_have_their_chance(tmp_path):
    path = tmp_path / "quarantine.json"
    Quarantine(path, H200, HERE).consider(SMALL, CONFIG, HUNG)
    again = Quarantine(path, H200, HERE)
    assert again.issue == ""
    refused = again.refusal(LONGER.spec, CONFIG)
    assert refused is not None
    assert refused.stage == "run"
    assert "killed after 10 s (" in refused.reason
    assert again.refusal(LONGER.spec, dataclasses.replace(CONFIG, num_stages=3)) is None
    for words in (
        "b=1 hq=2 hkv=2 s=256 d=128 fp16",
        "b=1 hq=2 hkv=2 s=256 d=64 bf16",
        "b=1 hq=2 hkv=2 s=8 d=64 causal fp16",
    ):
        assert again.refusal(parse_problem(words).spec, CONFIG) is None
    for target, software in (
        (H100, HERE),
        (H200, dataclasses.replace(HERE, triton="3.7.0")),
        (H200, dataclasses.replace(HERE, driver="590.1")),
    ):
        assert Quarantine(path, target, software).refusal(LONGER.spec, CONFIG) is None
    # Windows of any size are one kernel.
    narrow, wide = (parse_problem(f"b=1 hq=2 hkv=2 s=256 d=64 sliding_window({n},0) fp16").spec for n in (64, 128))
    assert code_of(narrow, CONFIG) == code_of(wide, CONFIG)


def test_a_long_text_in_the_file_makes_no_reason_longer_than_a_study_keeps(tmp_path):
    path = tmp_path / "quarantine.json"
    Quarantine(path, H200, HERE).consider(SMALL, CONFIG, HUNG)
    document = json.loads(path.read_text())
    document["offences"][0]["problem"] = "score_mod(" + "x" * 5000 + ")"
    path.write_text(json.dumps(document))
    refused = Quarantine(path, H200, HERE).refusal(LONGER.spec, CONFIG)
    assert refused is not None
    assert len(refused.reason) == MOST_CHARACTERS


def test_what_is_merely_wrong_is_not_remembered(tmp_path):
    path = tmp_path / "quarantine.json"
    quarantine = Quarantine(path, H200, HERE)
    for reason in (
        "out of device memory: 2 GiB",
        "error: RuntimeError: timeout: x",
        "crashed: compiling process died of SIGKILL",
    ):
        quarantine.consider(SMALL, CONFIG, Rejected(stage="run", reason=reason))
    assert not path.exists()


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"\xff\x00",
        b"[1, 2]",
        b'{"format": 2, "offences": []}',
        b'{"format": 1, "offences": [{"code": "x"}]}',
        b'{"format": 1, "offences": 3}',
        b'{"format": 1}',
        b"[" * 100_000,
        b" " * (5 << 20),
    ],
    ids=["empty", "no text", "a list", "another format", "fields", "a number", "none", "deep", "large"],
)
def test_a_damaged_file_is_said_moved_away_and_stops_nothing(tmp_path: Path, data: bytes) -> None:
    path = tmp_path / "quarantine.json"
    path.write_bytes(data)
    quarantine = Quarantine(path, H200, HERE)
    assert quarantine.issue.startswith(f"{path} is not read (")
    assert quarantine.refusal(SMALL.spec, CONFIG) is None
    quarantine.consider(SMALL, CONFIG, HUNG)
    assert path.with_name("quarantine.json.damaged").read_bytes() == data
    (offence,), issue = read_offences(path)
    assert (offence.config, issue) == (str(CONFIG), "")


def test_a_damaged_file_is_said_once_in_a_run(bench):
    class Listener(SilentObserver):
        said: typing.ClassVar[list[str]] = []

        def stage(self, text: str) -> None:
            self.said.append(text)

    default_quarantine().parent.mkdir(parents=True, exist_ok=True)
    default_quarantine().write_text("{")
    report = bench.run(problems=[SMALL, LONGER], trials=2, observer=Listener())
    assert all(result.entry for result in report.results)
    assert sum("is not read" in text for text in Listener.said) == 1


def test_a_file_that_cannot_be_written_stops_nothing(bench, monkeypatch):
    def full(path: Path, data: bytes) -> None:
        raise OSError(28, os.strerror(28))

    monkeypatch.setattr("flashgen.tuning.quarantine.replace_file", full)
    first = bench.seeds[0]
    bench.plan(evaluate={first: "abort"})
    report = bench.run(problems=[SMALL, LONGER], trials=3)
    assert all(result.entry for result in report.results)
    assert read_offences(default_quarantine()) == ((), "")


def offend(path: Path, first: int) -> None:
    for block_n in range(first, first + 160, 16):
        quarantine = Quarantine(path, H200, HERE)
        quarantine.consider(SMALL, dataclasses.replace(CONFIG, block_n=block_n), HUNG)


def test_two_runs_lose_nothing_of_each_other(tmp_path):
    path = tmp_path / "quarantine.json"
    context = multiprocessing.get_context("fork")
    processes = [context.Process(target=offend, args=(path, first)) for first in (16, 176)]
    for process in processes:
        process.start()
    for process in processes:
        process.join(60.0)
    offences, issue = read_offences(path)
    assert (len(offences), issue) == (20, "")
    assert json.loads(path.read_text())["format"] == 1


def test_the_oldest_make_room(tmp_path, monkeypatch):
    monkeypatch.setattr("flashgen.tuning.quarantine._MAX_OFFENCES", 3)
    path = tmp_path / "quarantine.json"
    quarantine = Quarantine(path, H200, HERE)
    for stages in (2, 3, 4, 5):
        quarantine.consider(SMALL, dataclasses.replace(CONFIG, num_stages=stages), HUNG)
    kept = [offence.config for offence in read_offences(path)[0]]
    assert ["num_stages=" + config.split("num_stages=")[1][0] for config in kept] == [
        "num_stages=3",
        "num_stages=4",
        "num_stages=5",
    ]
