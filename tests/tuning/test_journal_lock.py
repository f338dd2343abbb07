"""The lock on a journal: kept from nobody alive, taken from the dead, and never followed by half a line."""

from __future__ import annotations

import json
import os
import threading
import time
from pathlib import Path

import optuna
import pytest
from optuna.storages.journal import JournalFileBackend
from optuna.study import StudyDirection
from optuna.trial import TrialState

from flashgen.tuning import journal_lock
from flashgen.tuning.journal import join_storage, open_storage
from flashgen.tuning.journal_lock import JournalLock
from flashgen.tuning.offers import claim, give_up, hand_in, put_back


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "study.journal"


def line(number: int) -> dict[str, int]:
    return {"op_code": 10, "number": number}


def test_lines_of_many_writers_are_all_there_and_whole(path):
    def write(first: int) -> None:
        backend = JournalFileBackend(str(path), lock_obj=JournalLock(str(path)))
        for number in range(first, first + 20):
            backend.append_logs([line(number)])

    writers = [threading.Thread(target=write, args=(20 * index,)) for index in range(8)]
    for writer in writers:
        writer.start()
    for writer in writers:
        writer.join()
    assert sorted(json.loads(text)["number"] for text in path.read_text().splitlines()) == list(range(160))
    assert not os.path.lexists(f"{path}.lock")


def test_a_lock_that_is_held_is_waited_for_when_a_run_begins(path):
    with open_storage(str(path)) as storage:
        storage.create_new_study([StudyDirection.MINIMIZE], "one")
    holder = JournalLock(str(path))
    holder.acquire()
    ended: list[float] = []

    def write() -> None:
        time.sleep(0.5)
        with path.open("ab") as file:
            file.write(b'{"op_code":0,"worker_id":"x","study_name":"two","directions":[1]}\n')
        ended.append(time.monotonic())
        holder.release()

    writer = threading.Thread(target=write)
    writer.start()
    with open_storage(str(path)) as storage:
        assert time.monotonic() >= ended[0]
        assert [study.study_name for study in storage.get_all_studies()] == ["one", "two"]
    writer.join()


def test_the_lock_of_a_dead_machine_is_taken_after_some_seconds(path, monkeypatch):
    monkeypatch.setattr(journal_lock, "STALE_S", 0.3)
    os.symlink(path, f"{path}.lock")
    start = time.monotonic()
    JournalLock(str(path)).acquire()
    assert 0.3 <= time.monotonic() - start < 20.0


def test_who_lost_the_lock_does_not_take_it_from_the_next(path, monkeypatch):
    monkeypatch.setattr(journal_lock, "STALE_S", 0.1)
    slow, next_one = JournalLock(str(path)), JournalLock(str(path))
    slow.acquire()
    next_one.acquire()
    slow.release()
    assert os.path.lexists(f"{path}.lock")
    next_one.release()
    assert not os.path.lexists(f"{path}.lock")


def test_half_a_line_is_gone_before_the_next_is_written(path):
    backend = JournalFileBackend(str(path), lock_obj=JournalLock(str(path)))
    backend.append_logs([line(1)])
    # As a full disk leaves it.
    with path.open("ab") as file:
        file.write(b'{"op_code":4,"worker_id":"')
    backend.append_logs([line(2)])
    assert list(backend.read_logs(0)) == [line(1), line(2)]
    path.write_bytes(b'{"op')
    backend.append_logs([line(3)])
    assert path.read_bytes() == b'{"op_code":10,"number":3}\n'


@pytest.mark.parametrize("place", ["journal", "server"])
def test_a_trial_is_claimed_by_one(path, place, request):
    study = request.getfixturevalue("server").url if place == "server" else str(path)
    with open_storage(study) as storage:
        study_id = storage.create_new_study([StudyDirection.MINIMIZE], "one")
        waiting = optuna.trial.create_trial(state=TrialState.WAITING)
        trials = [storage.create_new_trial(study_id, template_trial=waiting) for _ in range(30)]
        won: list[int] = []
        together = threading.Barrier(4)

        def take() -> None:
            mine = join_storage(study)
            for trial in trials:
                together.wait()
                if claim(mine, trial):
                    won.append(trial)

        machines = [threading.Thread(target=take) for _ in range(4)]
        for machine in machines:
            machine.start()
        for machine in machines:
            machine.join()
        assert sorted(won) == trials


@pytest.mark.parametrize("place", ["memory", "journal", "server"])
def test_what_was_given_up_takes_no_answer(path, place, request):
    if place == "memory":
        run = machine = optuna.storages.InMemoryStorage()
        check(run, machine)
        return
    study = request.getfixturevalue("server").url if place == "server" else str(path)
    with open_storage(study) as run:
        check(run, join_storage(study))


def check(run: optuna.storages.BaseStorage, machine: optuna.storages.BaseStorage) -> None:
    study_id = run.create_new_study([StudyDirection.MINIMIZE], "one")
    waiting = optuna.trial.create_trial(state=TrialState.WAITING)
    first, second, third = (run.create_new_trial(study_id, template_trial=waiting) for _ in range(3))
    assert claim(machine, first)
    assert not claim(run, first)
    assert give_up(run, first)
    assert not hand_in(machine, first, "told", "x", 1.0)
    assert not put_back(machine, first, None)
    assert not claim(machine, first)
    assert claim(machine, second)
    assert put_back(machine, second, None)
    assert claim(run, second)
    assert claim(machine, third)
    assert hand_in(machine, third, "told", "x", 1.0)
    assert not give_up(run, third)
    trials = run.get_all_trials(study_id)
    assert [t.state for t in trials] == [TrialState.FAIL, TrialState.RUNNING, TrialState.COMPLETE]
    assert (trials[2].value, trials[2].user_attrs) == (1.0, {"told": "x"})
