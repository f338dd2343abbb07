"""The study: nothing told is lost, nothing is tried twice, and damage is said, not guessed at."""

from __future__ import annotations

import contextlib
import dataclasses
import errno
import itertools
import json
import os
import signal
import typing
from pathlib import Path

import optuna
import pytest
from optuna.storages.journal import JournalFileBackend
from optuna.trial import TrialState

from flashgen.codegen import KernelConfig, KernelResources, TritonForwardConfig
from flashgen.errors import FlashgenError, InputError
from flashgen.measure import Rejected, Timing
from flashgen.spec import parse_problem
from flashgen.target import named_target
from flashgen.tuning.choices import find_choices
from flashgen.tuning.effort import EFFORTS
from flashgen.tuning.events import TrialRecord
from flashgen.tuning.journal import open_storage
from flashgen.tuning.study import ProblemStudy, _varied
from flashgen.tuning.tried import FAILED_US, Tried

H200 = named_target("H200")
PROBLEM = parse_problem("b=1 hq=2 hkv=2 s=256 d=64 fp16")
CONFIGS = [
    TritonForwardConfig(block_m=m, block_n=n, num_warps=4, num_stages=s)
    for m in (64, 128)
    for n in (32, 64, 128)
    for s in (1, 2)
]
RESOURCES = KernelResources(registers=100, spills=0, smem_bytes=4096)


def study_in(storage: optuna.storages.BaseStorage, **changes: typing.Any) -> ProblemStudy:
    options = {
        "problem": PROBLEM,
        "target": H200,
        "how": "cold-l2, triton 3, driver 5",
        "configs": CONFIGS,
        "seeds": CONFIGS[:2],
        "seed": 0,
        "n_quasi_random": 4,
    }
    return ProblemStudy(storage, **{**options, **changes})


@contextlib.contextmanager
def opened(path: Path, **changes: typing.Any) -> typing.Iterator[ProblemStudy]:
    with open_storage(str(path)) as storage:
        yield study_in(storage, **changes)


def tried(number: int, config: KernelConfig, us: float | None = 50.0) -> Tried:
    result = Rejected(stage="accuracy", reason="wrong") if us is None else Timing(median_us=us, spread=0.02, samples=9)
    record = TrialRecord(number=number, config=config, resources=RESOURCES, result=result)
    return Tried(record=record, max_error=0.001, allowed_error=0.01, binary_hash=f"hash {number}")


def try_some(study: ProblemStudy, count: int) -> list[Tried]:
    """Ask and tell `count` times; every third config is rejected."""
    told = []
    for index in range(count):
        number, config = study.ask()
        told.append(tried(number, config, None if index % 3 == 2 else 50.0 + index))
        study.tell(told[-1])
    return told


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "folder" / "study.journal"


def test_seeds_come_first_and_no_config_twice(path):
    with opened(path) as study:
        asked = [trial.config for trial in try_some(study, len(CONFIGS))]
        assert asked[:2] == CONFIGS[:2]
        assert sorted(asked) == sorted(CONFIGS)
        assert study.remaining() == 0


def test_same_seed_asks_the_same(tmp_path):
    asked = []
    for name in ("a", "b"):
        with opened(tmp_path / name) as study:
            asked.append([trial.config for trial in try_some(study, 9)])
    assert asked[0] == asked[1]


def test_reopening_gives_back_what_was_told_and_goes_on(path):
    with opened(path) as study:
        told = try_some(study, 5)
    with opened(path) as study:
        resumed = study.finished()
        assert [dataclasses.replace(t, record=dataclasses.replace(t.record, resumed=False)) for t in resumed] == told
        assert all(trial.record.resumed for trial in resumed)
        assert study.remaining() == len(CONFIGS) - 5
        more = {trial.config for trial in try_some(study, len(CONFIGS) - 5)}
    assert more == set(CONFIGS) - {trial.config for trial in told}


def test_failures_are_finite_values_that_optuna_reads(path):
    with opened(path) as study:
        try_some(study, 6)
    storage = optuna.storages.JournalStorage(JournalFileBackend(str(path)))
    (name,) = optuna.get_all_study_names(storage)
    loaded = optuna.load_study(study_name=name, storage=storage)
    assert [trial.state for trial in loaded.trials] == [TrialState.COMPLETE] * 6
    assert [trial.value for trial in loaded.trials] == [50.0, 51.0, FAILED_US, 53.0, 54.0, FAILED_US]
    assert loaded.best_trial.params["block_m"] == CONFIGS[0].block_m


def test_unfinished_and_abandoned_count_as_untried(path):
    with opened(path) as study:
        told = try_some(study, 2)
        abandoned = [study.ask()[1] for _ in range(3)]
        study.abandon()
        study.abandon()
        killed = [study.ask()[1] for _ in range(2)]
        assert study.remaining() == len(CONFIGS) - 4
    with opened(path) as study:
        assert [trial.config for trial in study.finished()] == [trial.config for trial in told]
        assert study.remaining() == len(CONFIGS) - 2
        assert {*abandoned, *killed} <= {trial.config for trial in try_some(study, len(CONFIGS) - 2)}


@pytest.mark.parametrize(
    "changes",
    [
        {"problem": parse_problem("b=1 hq=2 hkv=2 s=512 d=64 fp16")},
        {"target": named_target("H100")},
        {"how": "cold-l2, triton 4, driver 5"},
        {"configs": CONFIGS[:-1]},
    ],
    ids=lambda changes: next(iter(changes)),
)
def test_another_question_is_another_study(path, changes):
    with opened(path) as study:
        try_some(study, 3)
    with opened(path, **changes) as study:
        assert study.finished() == ()
    with opened(path) as study:
        assert len(study.finished()) == 3


def test_a_line_written_in_part_is_removed(path):
    with opened(path) as study:
        try_some(study, 3)
    whole = path.read_bytes()
    path.write_bytes(whole + b'{"op_code":4,"worker_id":"')
    with opened(path) as study:
        assert len(study.finished()) == 3
        try_some(study, 1)
    assert path.read_bytes().startswith(whole)
    assert all(json.loads(line) for line in path.read_bytes().splitlines())


def test_killed_in_the_first_line_starts_over(path):
    path.parent.mkdir()
    path.write_bytes(b'{"op_co')
    with opened(path) as study:
        assert study.finished() == ()


def test_the_lock_of_a_killed_run_is_removed(path):
    with opened(path) as study:
        try_some(study, 1)
    os.symlink(path, f"{path}.lock")
    with opened(path) as study:
        assert len(try_some(study, 1)) == 1


DAMAGE = {
    "garbage at the end": lambda data: data + b"\x00\xff garbage\n",
    "garbage in the middle": lambda data: data.replace(b"\n", b"\n{]\n", 2),
    "json that is no record": lambda data: data + b'{"no":"record"}\n',
    "another file": lambda data: b"model: weights",
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_a_damaged_journal_is_refused_and_left_alone(path, damage):
    with opened(path) as study:
        try_some(study, 3)
    data = DAMAGE[damage](path.read_bytes())
    path.write_bytes(data)
    with pytest.raises(InputError, match="move it away or name another"), opened(path):
        pass
    assert path.read_bytes() == data


def test_a_trial_of_someone_else_is_refused(path):
    with opened(path) as study:
        try_some(study, 2)
    path.write_bytes(path.read_bytes().replace(b"max_error", b"other_key"))
    with opened(path) as study, pytest.raises(InputError, match=r"damaged.*max_error.*move it away"):
        study.finished()


def test_a_study_that_cannot_be_made_is_refused(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(InputError, match="cannot be opened"), opened(tmp_path / "file" / "study"):
        pass
    with pytest.raises(InputError, match="cannot be opened"), open_storage("nosuch://host/database"):
        pass


def test_a_database_works_too(tmp_path):
    url = f"sqlite:///{tmp_path / 'study.db'}"
    with open_storage(url) as storage:
        told = try_some(study_in(storage), 3)
    with open_storage(url) as storage:
        assert [trial.config for trial in study_in(storage).finished()] == [trial.config for trial in told]


def test_two_runs_on_one_journal_are_refused(path, monkeypatch):
    with opened(path):
        with pytest.raises(FlashgenError, match="another flashgen tune is using the study"), opened(path):
            pass
        # The same file by another name.
        monkeypatch.chdir(path.parent)
        with pytest.raises(FlashgenError, match="another flashgen tune"), opened(Path(path.name)):
            pass
    with opened(path) as study:
        assert study.finished() == ()


def test_a_full_disk_is_said_and_keeps_the_trials(path, monkeypatch):
    append = JournalFileBackend.append_logs
    with opened(path) as study:
        told = try_some(study, 3)
        number, config = study.ask()

        def full(self: JournalFileBackend, logs: list[dict[str, typing.Any]]) -> None:
            with open(path, "ab") as file:
                file.write(json.dumps(logs[0]).encode()[:20])
            raise OSError(errno.ENOSPC, "No space left on device")

        monkeypatch.setattr(JournalFileBackend, "append_logs", full)
        with pytest.raises(FlashgenError, match=r"No space left on device.*trials so far are kept"):
            study.tell(tried(number, config))
        size = path.stat().st_size
        study.abandon()
        assert path.stat().st_size == size
    monkeypatch.setattr(JournalFileBackend, "append_logs", append)
    with opened(path) as study:
        assert [trial.config for trial in study.finished()] == [trial.config for trial in told]
        assert config in {trial.config for trial in try_some(study, len(CONFIGS) - 3)}


def test_ctrl_c_in_the_middle_of_a_write_waits_for_its_end(path, monkeypatch):
    append = JournalFileBackend.append_logs
    with opened(path) as study:
        number, config = study.ask()

        def interrupted(self: JournalFileBackend, logs: list[dict[str, typing.Any]]) -> None:
            signal.raise_signal(signal.SIGINT)
            append(self, logs)

        with monkeypatch.context() as patch:
            patch.setattr(JournalFileBackend, "append_logs", interrupted)
            with pytest.raises(KeyboardInterrupt):
                study.tell(tried(number, config))
        assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
        assert [each.config for each in study.finished()] == [config]
        try_some(study, 1)


def test_what_differs_in_two_ways_at_once_names_another_study():
    found = _varied(PROBLEM.spec, find_choices(PROBLEM, H200, EFFORTS["full"]).configs)
    assert {config.template for config in found} == {"gluon/hopper_forward", "triton/forward"}
    assert len(found) < 60
    words = [config.as_dict() for config in found if config.template == "gluon/hopper_forward"]
    assert {(w["tiles"], w["turns"]) for w in words} == set(
        itertools.product(("apart", "overlap"), ("alternate", "free"))
    )
    assert {(w["consumers"], w["queries"]) for w in words} >= {(1, "registers"), (2, "registers"), (2, "shared")}
