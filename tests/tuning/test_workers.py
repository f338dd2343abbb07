"""Planted faults: whatever a candidate does to its process, the pool reports it and goes on."""

from __future__ import annotations

import _thread
import collections
import ctypes
import itertools
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from flashgen.errors import WorkerError
from flashgen.tuning.pool import Finished, Pool
from flashgen.tuning.workers import Outcome, Worker, WorkerFailure, WorkerResult

PATIENT_S = 60.0


class UnpicklableError(Exception):
    def __init__(self) -> None:
        super().__init__("holds a lock")
        self.lock = _thread.allocate_lock()


def raise_unpicklable() -> None:
    raise UnpicklableError


def fail_assertion() -> None:
    os.write(2, b"loading\nkernel.cpp:7: Assertion `rank == 2' failed.\n" + b"#0 frame\n" * 9)
    os.abort()


def fork_and_hang() -> None:
    child = os.fork()
    Path(os.environ["FAULT_FILE"]).write_text(str(child or os.getpid()))
    time.sleep(PATIENT_S)


def leave_note() -> None:
    with open(os.environ["FAULT_FILE"], "a") as file:
        file.write("set up\n")


def stand_by() -> None:
    with open(os.environ["FAULT_FILE"], "a") as file:
        file.write("stands by\n")


def square_wrongly(value: int) -> int:
    return value * value + 1


@pytest.fixture(autouse=True)
def _workers_can_import_this_file(monkeypatch):
    monkeypatch.syspath_prepend(str(Path(__file__).parents[2]))


@pytest.fixture
def worker():
    worker = Worker("worker under test")
    yield worker
    worker.kill()


def call(worker: Worker, *request: object) -> Outcome:
    return worker.call(*request, timeout_s=PATIENT_S)


def is_alive(pid: int) -> bool:
    try:
        state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except OSError:
        return False
    return state not in "ZX"


def dies_within(pid: int, seconds: float) -> bool:
    until = time.monotonic() + seconds
    while is_alive(pid) and time.monotonic() < until:
        time.sleep(0.05)
    return not is_alive(pid)


HANG_IN_C = (collections.deque, itertools.count(), 0)  # endless, and no other Python thread gets to run

FAULTS = {
    "sleep": ((time.sleep, PATIENT_S), 0.5, "timeout", "killed after 0.5 s"),
    "busy loop in C": (HANG_IN_C, 0.5, "timeout", "killed after 0.5 s"),
    "abort": ((os.abort,), PATIENT_S, "crashed", "died of SIGABRT"),
    "segmentation fault": ((ctypes.string_at, 0), PATIENT_S, "crashed", "died of SIGSEGV"),
    "exit": ((os._exit, 3), PATIENT_S, "crashed", "exited with code 3"),
    "assertion": ((fail_assertion,), PATIENT_S, "crashed", "Assertion `rank == 2' failed."),
    "no memory": ((bytearray, 1 << 62), PATIENT_S, "error", "MemoryError"),
    "sys.exit": ((sys.exit, 4), PATIENT_S, "error", "SystemExit: 4"),
    "unpicklable result": ((_thread.allocate_lock,), PATIENT_S, "error", "the result does not pickle: TypeError"),
    "unpicklable exception": ((raise_unpicklable,), PATIENT_S, "error", "UnpicklableError: holds a lock"),
    "missing function": (("math:no_such",), PATIENT_S, "error", "AttributeError"),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_fault_is_reported_and_the_worker_goes_on(worker, fault):
    request, timeout_s, kind, detail = FAULTS[fault]
    assert call(worker, os.getpid) == WorkerResult(value=worker.pid)
    before = worker.pid
    outcome = worker.call(*request, timeout_s=timeout_s)
    assert isinstance(outcome, WorkerFailure)
    assert (outcome.kind, detail in outcome.detail) == (kind, True), outcome
    assert call(worker, abs, -1) == WorkerResult(value=1)
    assert (worker.pid == before) == (kind == "error")
    assert is_alive(before) == (kind == "error")


def test_wrong_and_huge_results_pass_unchanged(worker):
    assert call(worker, square_wrongly, 3) == WorkerResult(value=10)
    assert call(worker, bytes, 100_000_000) == WorkerResult(value=bytes(100_000_000))


def test_a_pool_full_of_faults_loses_no_task():
    faults = [
        request for request, *_ in (FAULTS[name] for name in ("abort", "exit", "no memory", "unpicklable result"))
    ]
    with Pool[int](2) as pool:
        pool.submit(-1, time.sleep, PATIENT_S, timeout_s=0.5)
        for index in range(12):
            function, *args = faults[index // 3] if index % 3 == 0 else (square_wrongly, index)
            pool.submit(index, function, *args, timeout_s=PATIENT_S)
        assert (pool.pending, pool.idle) == (13, 0)
        finished: list[Finished[int]] = []
        while pool.pending:
            finished += pool.wait(PATIENT_S)
        assert (pool.pending, pool.idle) == (0, 2)
    outcomes = {task.task_id: task.outcome for task in finished}
    assert len(finished) == len(outcomes) == 13
    failed = {task_id: outcome.kind for task_id, outcome in outcomes.items() if isinstance(outcome, WorkerFailure)}
    assert failed == {-1: "timeout", 0: "crashed", 3: "crashed", 6: "error", 9: "error"}
    assert outcomes[7] == WorkerResult(value=50)


def test_waiting_is_bounded_and_closing_is_quick():
    started = time.monotonic()
    with Pool[str](2) as pool:
        assert pool.wait(PATIENT_S) == []
        for name in "abc":
            pool.submit(name, time.sleep, PATIENT_S, timeout_s=PATIENT_S)
        assert pool.wait(0.2) == []
        assert pool.pending == 3
    assert pool.pending == 0
    assert time.monotonic() - started < 0.5 * PATIENT_S


def test_cancelled_tasks_never_come_back(monkeypatch):
    with Pool[int](2) as pool:
        for index in range(4):
            pool.submit(index, time.sleep, PATIENT_S, timeout_s=PATIENT_S)
        monkeypatch.setattr("flashgen.tuning.workers._GRACE_S", 0.5)
        pool.cancel()
        assert (pool.pending, pool.idle) == (0, 0)
        pool.submit(0, square_wrongly, 2, timeout_s=PATIENT_S)
        assert pool.wait(PATIENT_S) == [Finished(task_id=0, outcome=WorkerResult(value=5))]
        assert pool.wait(0.0) == []


def test_a_cancelled_task_may_end_and_spares_its_worker_another_start():
    with Pool[int](1) as pool:
        pool.submit(0, os.getpid, timeout_s=PATIENT_S)
        (before,) = pool.wait(PATIENT_S)
        pool.submit(1, time.sleep, 0.3, timeout_s=PATIENT_S)
        pool.cancel()
        pool.submit(2, os.getpid, timeout_s=PATIENT_S)
        assert pool.wait(PATIENT_S) == [Finished(task_id=2, outcome=before.outcome)]


def test_deadline_kills_the_children_too(tmp_path):
    note = tmp_path / "child"
    worker = Worker("forking", env={"FAULT_FILE": str(note)})
    outcome = worker.call(fork_and_hang, timeout_s=2.0)
    assert isinstance(outcome, WorkerFailure)
    assert dies_within(int(note.read_text()), 3.0)


def test_setup_runs_once_in_each_process_before_the_first_request(tmp_path):
    note = tmp_path / "note"
    worker = Worker("set up", setup=leave_note, env={"FAULT_FILE": str(note)})
    assert call(worker, note.read_text) == WorkerResult(value="set up\n")
    assert call(worker, note.read_text) == WorkerResult(value="set up\n")
    call(worker, os.abort)
    assert call(worker, note.read_text) == WorkerResult(value="set up\n" * 2)
    worker.kill()


def test_setup_that_raises_is_an_error_of_each_request():
    worker = Worker("broken", setup="math:no_such")
    for _ in range(2):
        outcome = call(worker, abs, 1)
        assert isinstance(outcome, WorkerFailure)
        assert outcome.kind == "error"
        assert outcome.detail.startswith("broken could not be set up: AttributeError")
        assert worker.pid is None


def test_setup_that_crashes_or_hangs_is_reported():
    crashing = Worker("crashing", setup=os.abort)
    outcome = call(crashing, abs, 1)
    assert outcome == WorkerFailure(kind="crashed", detail="crashing died of SIGABRT while it started", at_start=True)
    hanging = Worker("hanging", setup=signal.pause, start_timeout_s=1.0)
    outcome = call(hanging, abs, 1)
    assert outcome == WorkerFailure(kind="timeout", detail="hanging killed after 1 s while it started", at_start=True)


@pytest.fixture
def guarded(tmp_path, monkeypatch):
    """A worker with another process standing by; what both were called with is in the file FAULT_FILE."""
    monkeypatch.setenv("FAULT_FILE", str(tmp_path / "notes"))
    worker = Worker("guarded", setup=leave_note, stand_by=stand_by)
    yield worker
    worker.close()


def notes() -> list[str]:
    return Path(os.environ["FAULT_FILE"]).read_text().split("\n")[:-1]


def test_who_stands_by_takes_over_and_another_stands_by(guarded):
    assert call(guarded, abs, -1) == WorkerResult(value=1)
    for _ in range(3):
        before = guarded.pid
        spare = guarded._spare.popen.pid
        assert isinstance(call(guarded, os._exit, 3), WorkerFailure)
        assert call(guarded, os.getpid) == WorkerResult(value=spare)
        assert spare != before
    assert notes().count("set up") == 4
    assert notes().count("stands by") >= 3
    first, second = guarded.pid, guarded._spare.popen.pid
    guarded.close()
    assert dies_within(first, 5.0)
    assert dies_within(second, 5.0)


def test_who_stood_by_and_died_blames_no_request(guarded):
    call(guarded, abs, -1)
    os.kill(guarded._spare.popen.pid, signal.SIGKILL)
    guarded.kill()
    outcome = call(guarded, abs, -1)
    assert isinstance(outcome, WorkerFailure)
    assert outcome.at_start
    assert call(guarded, abs, -2) == WorkerResult(value=2)


def test_nobody_stands_by_for_a_worker_that_never_answered(guarded):
    call(guarded, os._exit, 3)
    assert guarded._spare is None


def test_worker_imports_only_what_the_function_needs(worker):
    outcome = call(worker, "builtins:eval", "sorted(__import__('sys').modules)")
    assert isinstance(outcome, WorkerResult)
    assert not {"torch", "triton", "optuna", "pytest", "numpy"} & set(outcome.value)


@pytest.mark.parametrize("request_text", ["time.sleep, 60", "collections.deque, itertools.count(), 0"])
def test_worker_dies_with_a_killed_parent(request_text):
    script = (
        "import collections, itertools, time\n"
        "from flashgen.tuning.workers import Worker, pack_request\n"
        "worker = Worker('orphan')\n"
        "worker.call(abs, 1, timeout_s=60)\n"
        f"worker.begin(pack_request({request_text}), timeout_s=60)\n"
        "print(worker.pid, flush=True)\n"
        "time.sleep(60)\n"
    )
    env_path = os.pathsep.join(path for path in sys.path if path)
    with subprocess.Popen(
        [sys.executable, "-c", f"import sys; sys.path[:0] = {env_path.split(os.pathsep)!r}\n{script}"],
        stdout=subprocess.PIPE,
        text=True,
    ) as parent:
        assert parent.stdout is not None
        pid = int(parent.stdout.readline())
        assert is_alive(pid)
        parent.kill()
    assert dies_within(pid, 5.0)


def test_interrupting_the_terminal_leaves_the_worker_alive(worker):
    call(worker, abs, 1)
    assert worker.pid is not None
    os.kill(worker.pid, signal.SIGINT)
    assert call(worker, os.getpid) == WorkerResult(value=worker.pid)


def test_refuses_what_cannot_cross(worker):
    with pytest.raises(WorkerError, match="top level of a module"):
        call(worker, lambda: 1)
    with pytest.raises(WorkerError, match="at least 1 worker"):
        Pool(0)
