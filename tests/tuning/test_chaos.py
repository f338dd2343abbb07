"""What the machine does to a run, rather than a candidate: kills, full disks, clocks that jump, no memory."""

from __future__ import annotations

import datetime
import itertools
import json
import signal
import time
import typing

import optuna
import pytest
import torch

from flashgen.codegen import TritonForwardConfig
from flashgen.errors import FlashgenError
from flashgen.measure import Measurement, Rejected, Timing
from flashgen.registry import load, search_locations
from flashgen.spec import parse_problem
from flashgen.tuning import SilentObserver, gpu_jobs, winner
from flashgen.tuning.events import TrialRecord

CONFIG = TritonForwardConfig(block_m=16, block_n=16, num_warps=1, num_stages=1)
HOUR = datetime.timedelta(hours=1)


class Watch(SilentObserver):
    """Keeps when each trial ended."""

    def __init__(self) -> None:
        self.ended: list[tuple[float, TrialRecord]] = []

    def trial(self, record: TrialRecord, best: TrialRecord | None, done: int, seconds_left: float | None) -> None:
        assert seconds_left is None or 0.0 <= seconds_left <= 60.0
        self.ended.append((time.monotonic(), record))


def test_a_killed_worker_costs_one_trial_and_seconds(bench):
    first, second, third = bench.seeds[:3]
    bench.plan(evaluate={first: "killed", second: "abort"}, compile={third: "killed"})
    watch = Watch()
    (result,) = bench.run(trials=8, observer=watch).results
    refused = {r.config: r.result for _, r in watch.ended if isinstance(r.result, Rejected)}
    assert set(refused) == {first, second, third}
    assert "measuring process on planted:0 died of SIGKILL" in refused[first].reason
    assert "died of SIGKILL" in refused[third].reason
    assert len(result.trials) == 8
    assert result.entry is not None
    # A kill takes no time of its own: what follows is the new process.
    gaps = [after - before for (before, _), (after, _) in itertools.pairwise(watch.ended)]
    assert max(gaps) < 10.0


# Half a line of the journal, and then nothing more.
IN_A_WRITE = """
import os, signal
from optuna.storages.journal import JournalFileBackend
whole = JournalFileBackend.append_logs

def half(self, logs, count=[0]):
    count[0] += 1
    if count[0] < 14:
        return whole(self, logs)
    os.symlink(self._file_path, self._file_path + ".lock")
    with open(self._file_path, "ab") as file:
        file.write(b'{"op_code": 6, "worker_id": "')
    os.kill(os.getpid(), signal.SIGKILL)

JournalFileBackend.append_logs = half
"""
IN_THE_REGISTRY = """
import os, signal
import flashgen.registry.files

def torn(path, data):
    (path.parent / f".{path.name}.1.tmp").write_bytes(data[: len(data) // 2])
    os.kill(os.getpid(), signal.SIGKILL)

flashgen.registry.files.replace_file = torn
"""


@pytest.mark.parametrize(("moment", "least"), [(IN_A_WRITE, 2), (IN_THE_REGISTRY, 8)], ids=["journal", "registry"])
def test_kill_9_in_the_middle_of_a_write(bench, moment, least):
    with bench.child(gpu="planted:0", trials=8, before=moment) as process:
        assert process.stdout is not None
        told = process.stdout.read().splitlines()
    assert process.returncode == -signal.SIGKILL
    assert least <= len(told) <= 8
    (result,) = bench.run(trials=8).results
    resumed = {str(trial.config) for trial in result.trials if trial.resumed}
    assert set(told) <= resumed
    assert len(resumed) <= len(told) + 1
    assert result.entry is not None
    located = load(search_locations(bench.folder / "registry"))
    assert [each.entry for each in located.entries() if each.location.label == "argument"] == [result.entry]
    assert all(json.loads(line) for line in (bench.folder / "study.journal").read_text().splitlines())


def test_kill_9_in_the_final_comparison(bench):
    bench.plan(race=dict.fromkeys(bench.seeds[:4], "hang"), evaluate={bench.seeds[0]: 10.0})
    with bench.child(gpu="planted:0", trials=4) as process:
        assert process.stdout is not None
        told = [process.stdout.readline().strip() for _ in range(4)]
        until = time.monotonic() + 30.0
        while not bench.calls("race") and time.monotonic() < until:
            time.sleep(0.05)
        process.send_signal(signal.SIGKILL)
    bench.plan(evaluate={bench.seeds[0]: 10.0})
    (result,) = bench.run(trials=4).results
    assert {str(trial.config) for trial in result.trials if trial.resumed} == set(told)
    assert result.entry is not None
    assert result.entry.config == bench.seeds[0]


def test_a_wall_clock_that_jumps_moves_no_deadline(bench, monkeypatch):
    jumps = itertools.cycle((0, 1, -1, 0, -24))
    right_time = time.time

    class Jumping(datetime.datetime):
        @classmethod
        def now(cls, tz: datetime.tzinfo | None = None) -> typing.Any:
            return datetime.datetime.now(tz) + next(jumps) * HOUR

    monkeypatch.setattr(time, "time", lambda: right_time() + next(jumps) * HOUR.total_seconds())
    monkeypatch.setattr(optuna.storages.journal._storage, "datetime", Jumping)
    shim = type("shim", (), {**vars(datetime), "datetime": Jumping})
    monkeypatch.setattr(winner, "datetime", shim)
    bench.plan(evaluate={bench.seeds[0]: "hang"})
    start, watch = time.monotonic(), Watch()
    (result,) = bench.run(trials=6, observer=watch).results
    assert time.monotonic() - start < 40.0
    assert (len(result.trials), result.note) == (6, "")
    refused = [r for _, r in watch.ended if isinstance(r.result, Rejected)]
    assert [(r.config, r.result.reason[:53]) for r in refused] == [
        (bench.seeds[0], "timeout: measuring process on planted:0 killed after ")
    ]
    assert result.entry is not None
    dates = [result.entry.provenance.date]
    located = load(search_locations(bench.folder / "registry"))
    assert not [issue for issue in located.issues if str(bench.folder) in str(issue)]
    # The same search again: an entry is later than the one that it replaces, whatever the clock says.
    for _ in range(3):
        (again,) = bench.run(trials=6).results
        assert all(trial.resumed for trial in again.trials)
        (kept,) = [
            each.entry
            for each in load(search_locations(bench.folder / "registry")).entries()
            if each.location.label == "argument"
        ]
        dates.append(kept.provenance.date)
    assert dates == sorted(dates)


@pytest.mark.parametrize("job", ["compile", "evaluate"])
def test_a_full_disk_in_a_worker_blames_no_config(bench, job):
    bench.plan(**{job: {bench.seeds[1]: "full disk"}})
    with pytest.raises(
        FlashgenError, match=r"No space left on device.*the trials are kept.*run the same command again"
    ):
        bench.run()
    bench.plan()
    (result,) = bench.run().results
    assert all(isinstance(trial.result, Timing) for trial in result.trials)


@pytest.mark.parametrize("refusals", [1, 2])
def test_no_memory_on_the_gpu_is_a_result_after_another_attempt(monkeypatch, refusals):
    attempts = iter(range(10))
    right = Measurement(timing=Timing(median_us=1.0, spread=0.0, samples=1), max_error=0.0, allowed_error=1.0)

    def full(*args: object) -> Measurement:
        if next(attempts) < refusals:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 1 EiB.\nGPU 0 has ...")
        return right

    monkeypatch.setattr(gpu_jobs, "_checked_and_timed", full)
    monkeypatch.setattr(gpu_jobs, "_context_is_lost", lambda: False)
    outcome = gpu_jobs.evaluate(parse_problem("b=1 hq=1 hkv=1 s=16 d=16 fp16"), CONFIG, None)
    refused = Rejected(stage="run", reason="out of device memory: CUDA out of memory. Tried to allocate 1 EiB.")
    assert outcome == (right if refusals == 1 else refused)


def test_a_full_disk_beside_the_gpu_is_raised(monkeypatch):
    def full(problem: object, config: object) -> None:
        raise FlashgenError("block_m=16: OSError: [Errno 28] No space left on device")

    monkeypatch.setattr(gpu_jobs, "check_awkward", full)
    monkeypatch.setattr(gpu_jobs, "_context_is_lost", lambda: False)
    with pytest.raises(FlashgenError, match="No space left"):
        gpu_jobs.evaluate(parse_problem("b=1 hq=1 hkv=1 s=16 d=16 fp16"), CONFIG, None)
