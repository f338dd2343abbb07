"""A whole run of the tuner: several problems, interrupts, kills, and what is left on the disk."""

from __future__ import annotations

import dataclasses
import errno
import json
import signal
import subprocess
import sys
import time
import typing

import pytest
from optuna.storages.journal import JournalFileBackend

import flashgen.tuning.choices
from flashgen.codegen import HopperForwardConfig, TritonForwardConfig
from flashgen.errors import FlashgenError, InputError, RegistryError
from flashgen.registry import load, search_locations
from flashgen.spec import Problem, parse_problem
from flashgen.target import named_target
from flashgen.tuning import SilentObserver, tune
from flashgen.tuning.effort import EFFORTS, effort_named
from flashgen.tuning.events import TrialRecord
from flashgen.tuning.journal import open_storage
from flashgen.tuning.session import plan_run

H200 = named_target("H200")
SMALL = parse_problem("b=1 hq=2 hkv=2 s=256 d=64 fp16")
LONGER = parse_problem("b=1 hq=2 hkv=2 s=512 d=64 fp16")
BF16 = parse_problem("b=1 hq=2 hkv=2 s=256 d=64 bf16")
# Computed by kernels alone that the interpreter can run.
PORTABLE = parse_problem("b=1 hq=2 hkv=2 s=256 d=64 dropout fp16")


class Recorder(SilentObserver):
    """Keeps what a run tells, and presses Ctrl-C after `interrupt_after` trials."""

    def __init__(self, interrupt_after: int = 0) -> None:
        self.interrupt_after = interrupt_after
        self.planned: list[int] = []
        self.resumed: list[int] = []
        self.stages: list[str] = []
        self.trials: list[TrialRecord] = []

    def problem_started(self, index: int, problem: Problem, planned_trials: int, resumed_trials: int) -> None:
        self.planned.append(planned_trials)
        self.resumed.append(resumed_trials)

    def stage(self, text: str) -> None:
        self.stages.append(text)

    def trial(self, record: TrialRecord, best: TrialRecord | None, done: int, seconds_left: float | None) -> None:
        self.trials.append(record)
        if len(self.trials) == self.interrupt_after:
            raise KeyboardInterrupt


def stored(bench: typing.Any) -> list[typing.Any]:
    located = load(search_locations(bench.folder / "registry")).entries()
    return [each.entry for each in located if each.location.label == "argument"]


def test_tuning_for_real_without_a_gpu_and_again_from_its_study(tmp_path):
    def run() -> tuple[typing.Any, Recorder]:
        observer = Recorder()
        report = tune(
            [PORTABLE],
            target=H200,
            effort="check",
            budget_s=100.0,
            registry=tmp_path / "registry",
            study=str(tmp_path / "study"),
            workers=2,
            observer=observer,
        )
        return report, observer

    report, observer = run()
    (result,) = report.results
    assert (report.target, report.study, report.interrupted) == (H200, str(tmp_path / "study"), False)
    assert (observer.planned, observer.resumed, len(result.trials), result.note) == ([8], [0], 8, "")
    assert observer.stages[0] == "compiling and measuring 8 configs with 2 processes"
    assert result.legal > 500
    entry = result.entry
    assert (entry.origin, entry.arch, entry.performance.timing) == ("predicted", "sm_90", "occupancy-roofline-model")
    assert entry.provenance.driver
    assert 0 < entry.accuracy.max_error <= entry.accuracy.allowed_error
    assert entry.resources.registers > 0
    (file,) = report.files
    located = load(search_locations(tmp_path / "registry"))
    assert [each.entry for each in located.entries() if each.path == file] == [entry]
    assert not [issue for issue in located.issues if issue.path == file]
    again, observer = run()
    assert (observer.planned, observer.resumed, observer.trials) == ([8], [8], [])
    assert all(trial.resumed for trial in again.results[0].trials)
    assert again.results[0].entry.config == entry.config


def test_problems_of_one_tuning_key_are_tuned_once(bench):
    with_lse = dataclasses.replace(SMALL, spec=dataclasses.replace(SMALL.spec, lse=True))
    report = bench.run(problems=[SMALL, with_lse, SMALL, BF16], trials=2)
    assert [result.problem for result in report.results] == [SMALL, BF16]
    assert len(bench.calls("compile")) == 4
    assert {entry.spec for entry in stored(bench)} == {SMALL.spec, BF16.spec}
    assert len(report.files) == 1


def test_winners_are_tried_first_on_the_next_problem_and_in_the_next_study(bench):
    winner = bench.seeds[3]
    bench.plan(evaluate={winner: 10.0})
    report = bench.run(problems=[SMALL, LONGER], trials=4, workers=1)
    assert [result.entry.config for result in report.results] == [winner, winner]
    assert bench.calls("compile")[4] == str(winner)
    other = dataclasses.replace(bench, folder=bench.folder / "other")
    other.folder.mkdir()
    report = other.run(problems=[SMALL], trials=1, folder=bench.folder / "registry")
    assert [trial.config for trial in report.results[0].trials] == [winner]


def test_what_an_earlier_problem_left_behind_is_not_the_next_ones(bench):
    bench.plan(compile={f"fp16 {config}": {"sleep_s": 9.0} for config in bench.seeds})
    jobs = dataclasses.replace(bench.jobs, compile_timeout_s=60.0)
    first, second = bench.run(problems=[SMALL, BF16], trials=4, budget_s=17.0, jobs=jobs).results
    assert (first.trials, first.entry) == ((), None)
    assert first.note.startswith("out of time after 0 of 4 configs")
    # The planted compiler gives bf16 kernels 101 registers, fp16 ones 100.
    assert [trial.resources.registers for trial in second.trials] == [101] * 4
    bench.plan()
    first, second = bench.run(problems=[SMALL, BF16], trials=4).results
    assert [trial.resources.registers for trial in first.trials] == [100] * 4
    assert [trial.resumed for trial in second.trials] == [True] * 4


def test_a_budget_is_a_deadline_for_all_problems_together(bench):
    bench.plan(compile={config: {"sleep_s": 0.5} for config in bench.seeds})
    start = time.monotonic()
    # All of them would take two workers 8 s for each problem; the first are through in 5 s on a busy machine, too.
    report = bench.run(problems=[SMALL, LONGER], trials=32, budget_s=10.0)
    assert time.monotonic() - start < 20.0
    assert len(report.results) == 2
    assert all(result.entry and "out of time after" in result.note for result in report.results)


def test_an_impossible_problem_does_not_stop_the_others(bench, monkeypatch):
    usual = flashgen.tuning.choices.default_configs

    def defaults(problem, target):
        huge = TritonForwardConfig(block_m=4096, block_n=64, num_warps=4, num_stages=2)
        return (huge,) if problem == BF16 else usual(problem, target)

    monkeypatch.setattr(flashgen.tuning.choices, "default_configs", defaults)
    observer = Recorder()
    impossible, possible = bench.run(problems=[BF16, SMALL], observer=observer).results
    assert (impossible.entry, impossible.legal, impossible.trials) == (None, 0, ())
    assert impossible.note.startswith(f"no config is legal for {BF16}")
    assert possible.entry is not None
    assert observer.planned == [0, 4]


def test_ctrl_c_writes_the_best_so_far_and_the_same_call_goes_on(bench):
    # Far apart, and the best is not the first: which three end first is up to the compiling processes.
    bench.plan(evaluate={config: 10.0 * 2**-rank for rank, config in enumerate(bench.seeds)})
    report = bench.run(problems=[SMALL, BF16], trials=6, observer=Recorder(interrupt_after=3))
    (result,) = report.results
    assert report.interrupted
    assert result.note.startswith("interrupted")
    assert result.entry.config == min(result.trials, key=lambda trial: trial.result.median_us).config
    assert stored(bench) == [result.entry]
    assert len(result.trials) == 3
    observer = Recorder()
    report = bench.run(problems=[SMALL, BF16], trials=6, observer=observer)
    assert (report.interrupted, observer.resumed, len(observer.trials)) == (False, [3, 0], 9)
    measured = bench.calls("evaluate")
    assert all(measured.count(str(trial.config)) == len((SMALL, BF16)) for trial in result.trials)


def test_ctrl_c_without_a_gpu_checks_the_best_so_far(bench):
    report = bench.run(gpu=None, problems=[PORTABLE], observer=Recorder(interrupt_after=2))
    entry = report.results[0].entry
    assert report.interrupted
    assert entry.origin == "predicted"
    assert entry.accuracy.allowed_error == 0.01
    assert bench.calls("interpret") == [str(entry.config)]


def test_a_winner_that_only_a_gpu_can_run_is_said_to_be_unchecked(bench):
    (result,) = bench.run(gpu=None, trials=6).results
    tried = {trial.config.template for trial in result.trials}
    assert tried == {"gluon/hopper_forward", "triton/forward"}
    assert isinstance(result.entry.config, HopperForwardConfig)
    assert (result.entry.accuracy.max_error, result.entry.accuracy.allowed_error) == (0.0, 0.0)
    assert result.note.startswith("the winner was not checked: gluon/hopper_forward is written in Gluon")
    assert all(call.startswith("triton/forward") for call in bench.calls("interpret"))
    assert stored(bench) == [result.entry]


def test_a_registry_that_cannot_be_written_is_said_before_tuning(bench):
    (bench.folder / "file").touch()
    with pytest.raises(RegistryError, match=r"file/registry cannot be written .*nothing was tuned"):
        bench.run(folder=bench.folder / "file" / "registry")
    assert bench.calls("compile") == []


def test_a_damaged_registry_is_said_before_tuning(bench):
    (path,) = bench.run(trials=2).files
    path.write_bytes(b"entries: [")
    compiled = len(bench.calls("compile"))
    with pytest.raises(RegistryError, match="left untouched and nothing was tuned"):
        bench.run(trials=4)
    assert path.read_bytes() == b"entries: ["
    assert len(bench.calls("compile")) == compiled


def test_a_registry_that_is_damaged_meanwhile_is_left_alone_and_the_trials_are_kept(bench):
    (path,) = bench.run(trials=2).files
    good = path.read_bytes()

    class Vandal(SilentObserver):
        def stage(self, text: str) -> None:
            path.write_bytes(b"entries: [")

    with pytest.raises(RegistryError, match="left untouched"):
        bench.run(trials=4, observer=Vandal())
    assert path.read_bytes() == b"entries: ["
    path.write_bytes(good)
    observer = Recorder()
    report = bench.run(trials=4, observer=observer)
    assert (observer.resumed, observer.trials, report.files) == ([4], [], (path,))


def test_a_full_disk_keeps_the_trials(bench, monkeypatch):
    append = JournalFileBackend.append_logs
    observer = Recorder()

    def fill(self: JournalFileBackend, logs: list[dict[str, typing.Any]]) -> None:
        # Not at a size: how many trials are under way by then depends on how fast they compile.
        if len(observer.trials) >= 3:
            raise OSError(errno.ENOSPC, "No space left on device")
        append(self, logs)

    with monkeypatch.context() as patch:
        patch.setattr(JournalFileBackend, "append_logs", fill)
        with pytest.raises(FlashgenError, match=r"No space left on device.*make room, then run the same command"):
            bench.run(trials=12, observer=observer)
    assert 0 < len(observer.trials) < 12
    resumed = Recorder()
    bench.run(trials=12, observer=resumed)
    assert resumed.resumed == [len(observer.trials)]


def test_a_study_in_use_is_refused(bench):
    with open_storage(str(bench.folder / "study.journal")), pytest.raises(FlashgenError, match="another flashgen tune"):
        bench.run()
    assert bench.calls("compile") == []


def test_kill_9_loses_one_trial_at_most(bench):
    bench.plan(compile={config: {"sleep_s": 0.05} for config in bench.seeds})
    with bench.child(gpu=None, trials=12) as process:
        assert process.stdout is not None
        told = [process.stdout.readline().strip() for _ in range(5)]
        process.send_signal(signal.SIGKILL)
        told += process.stdout.read().splitlines()
    assert process.returncode == -signal.SIGKILL
    observer = Recorder()
    report = bench.run(gpu=None, trials=12, workers=1, observer=observer)
    (result,) = report.results
    resumed = [str(trial.config) for trial in result.trials if trial.resumed]
    # The trial that was told last may have been killed before it was printed.
    assert resumed[: len(told)] == told
    assert len(resumed) <= len(told) + 1
    assert len(result.trials) == 12
    compiled = bench.calls("compile")
    assert len(compiled) <= 13
    assert all(compiled.count(config) == 1 for config in told)
    assert result.entry is not None
    assert all(json.loads(line) for line in (bench.folder / "study.journal").read_text().splitlines())


def test_ctrl_c_of_the_process_saves_and_says_so(bench):
    bench.plan(compile={config: {"sleep_s": 0.05} for config in bench.seeds})
    with bench.child(gpu="planted:0", trials=12) as process:
        assert process.stdout is not None
        told = [process.stdout.readline().strip() for _ in range(3)]
        process.send_signal(signal.SIGINT)
        rest = process.stdout.read().splitlines()
    assert (process.returncode, rest[-1]) == (0, "interrupted 1")
    assert {str(entry.config) for entry in stored(bench)} <= {*told, *rest}
    assert len(stored(bench)) == 1


@pytest.mark.parametrize(
    ("call", "words"),
    [
        ({"problems": []}, "at least one problem"),
        ({"problems": ["b=1 h=2"]}, "must give hq="),
        ({"effort": "max"}, "allowed: check, quick, full"),
        ({"budget_s": 0.0}, "above 0 seconds"),
        ({"device": "cuda:0", "target": H200}, "not both"),
        ({"device": "tpu"}, "or 'all'; got 'tpu'"),
    ],
    ids=["problems", "text", "effort", "budget", "device and target", "device"],
)
def test_bad_calls_are_refused(tmp_path, call, words):
    with pytest.raises(InputError, match=words):
        tune(**{"problems": [SMALL], "registry": tmp_path, "study": str(tmp_path / "study"), **call})
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("device", "expected"),
    [
        (None, ("cuda:0",)),
        ("cuda", ("cuda:0",)),
        ("cuda:1,cuda:0,cuda:1", ("cuda:1", "cuda:0")),
        ("all", ("cuda:0", "cuda:1")),
        ("cpu", ()),
    ],
)
def test_several_gpus_of_one_kind_are_taken(two_gpus, tmp_path, device, expected):
    run = planned(tmp_path, device)
    assert run.gpus == expected
    assert run.target == H200


def test_gpus_of_two_kinds_or_none_are_refused(two_gpus, tmp_path, monkeypatch):
    with pytest.raises(InputError, match="'cuda:2' is not here; there are 2 GPUs"):
        planned(tmp_path, "cuda:0,cuda:2")
    kinds = {0: H200, 1: named_target("A100")}
    monkeypatch.setattr("flashgen.tuning.session.detect_target", lambda device: kinds[device.index])
    with pytest.raises(InputError, match="one kind of GPU at a time"):
        planned(tmp_path, "all")


@pytest.fixture
def two_gpus(monkeypatch):
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    monkeypatch.setattr("torch.cuda.device_count", lambda: 2)
    monkeypatch.setattr("flashgen.tuning.session.detect_target", lambda device: H200)


def planned(folder, device):
    effort = effort_named("check")
    where = {"registry": folder, "study": str(folder / "study"), "workers": None, "observer": None}
    return plan_run(target=None, device=device, effort=effort, budget_s=None, seed=0, **where)


def test_what_the_winner_is_confirmed_with_is_compiled_while_the_best_are_raced(bench):
    (result,) = bench.run(trials=6).results
    assert result.entry is not None
    finalists = {result.entry.config, *(runner_up.config for runner_up in result.entry.runners_up)}
    # The last ones may not have begun when all was over.
    ahead = bench.calls("ahead: compile")
    assert ahead
    assert set(ahead) <= {str(config) for config in finalists}
    assert len(result.trials) == len(bench.calls("compile")) == 6
    assert result.wall_s > result.compile_s > 0
    assert result.wall_s > result.measure_s > 0


def test_efforts_grow():
    levels = [effort_named(name) for name in ("check", "quick", "full")]
    assert levels == list(EFFORTS.values())
    for field in ("trials", "finalists", "final_ms", "seconds"):
        values = [getattr(level, field) for level in levels]
        assert values == sorted(set(values))
    assert [level.seeds_only for level in levels] == [True, False, False]


def test_without_optuna_tuning_says_what_to_install():
    code = (
        "import sys; sys.modules['optuna'] = None\n"
        "import flashgen\n"
        "flashgen.attention\n"
        "try:\n    flashgen.tune\n"
        "except flashgen.FlashgenError as error:\n    print(type(error).__name__, error)\n"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120, check=True)
    assert result.stdout.startswith("MissingDependencyError tuning needs optuna")
    assert "pip install" in result.stdout
