"""Machines that join a run, as processes of their own: they share the work, and their end or their lies cost little."""

from __future__ import annotations

import dataclasses
import json
import os
import signal
import subprocess
import sys
import threading
import time
import typing
from pathlib import Path

import optuna
import pytest
from optuna.trial import TrialState

from flashgen.errors import FlashgenError, InputError
from flashgen.launch import software_versions
from flashgen.measure import Rejected, Timing
from flashgen.spec import parse_problem
from flashgen.target import named_target
from flashgen.tuning import SilentObserver
from flashgen.tuning.joining import Machine, join_run
from flashgen.tuning.journal import join_storage
from flashgen.tuning.offers import open_offers
from flashgen.tuning.shared_run import find_open

H200 = named_target("H200")
TRIALS = 12


class Joined:
    """A process that joined, and what it said."""

    def __init__(self, bench: typing.Any, study: str, *, gpu: str | None = "planted:0", workers: int = 1) -> None:
        script = f"""
import sys
sys.path[:0] = {[str(Path(__file__).parent), *filter(None, sys.path)]!r}
import dataclasses, json
from conftest import PLANTED
from flashgen.launch import software_versions
from flashgen.target import named_target
from flashgen.tuning.joining import Machine, join_run
gpu = {gpu!r}
machine = Machine(
    gpus=(gpu,) if gpu else (),
    target=gpu and named_target("H200"),
    software=software_versions(),
    workers={workers},
    jobs=PLANTED,
)
report = join_run(machine, {study!r}, lambda text: print(text, flush=True))
print(json.dumps(dataclasses.asdict(report)), flush=True)
"""
        self.process = subprocess.Popen(
            [sys.executable, "-c", script], stdout=subprocess.PIPE, text=True, env=os.environ.copy()
        )
        self.said: list[str] = []

    def says(self, words: str) -> str:
        """Wait for a line with these words, and return it."""
        assert self.process.stdout is not None
        for line in self.process.stdout:
            self.said.append(line.strip())
            if words in line:
                return line
        raise AssertionError(f"never said {words!r}: {self.said}")

    def report(self) -> dict[str, typing.Any]:
        """Wait for its end, and return what it did."""
        return json.loads(self.says("{"))


@pytest.fixture
def join(bench) -> typing.Iterator[typing.Callable[..., Joined]]:
    """A function that lets a machine join the bench's study, which it waits for by the time it returns."""
    machines: list[Joined] = []

    def start(study: str | None = None, **settings: typing.Any) -> Joined:
        joined = Joined(bench, study or str(bench.folder / "study.journal"), **settings)
        machines.append(joined)
        joined.says("waiting for a run")
        return joined

    yield start
    for joined in machines:
        joined.process.kill()
        joined.process.wait()


def slow(bench: typing.Any, seconds: float = 0.3) -> None:
    """Let every config take some time to compile, and be known by its time: the later seeds are faster."""
    bench.plan(
        compile={config: {"sleep_s": seconds} for config in bench.seeds},
        evaluate={config: 100.0 - index for index, config in enumerate(bench.seeds)},
    )


def assert_each_once(bench: typing.Any, result: typing.Any, trials: int = TRIALS) -> None:
    assert len(result.trials) == len({trial.config for trial in result.trials}) == trials
    evaluated = bench.calls("evaluate")
    assert len(evaluated) == len(set(evaluated)) == trials


@pytest.mark.parametrize("place", ["journal", "server"])
def test_two_machines_share_the_work_and_the_winner_is_the_same(bench, join, place, request):
    # Long enough for the others' processes to have started, on a machine that is busy.
    slow(bench, 1.0)
    study = request.getfixturevalue("server").url if place == "server" else None
    machines = [join(study), join(study)]
    (result,) = bench.run(trials=TRIALS, workers=1, study=study, shared=True).results
    done = [joined.report() for joined in machines]
    assert_each_once(bench, result)
    assert result.entry.config == bench.seeds[TRIALS - 1]
    assert not any(trial.resumed for trial in result.trials)
    assert all(report["measured"] > 0 for report in done)
    assert sum(report["measured"] for report in done) < TRIALS
    assert all(joined.process.wait(30) == 0 for joined in machines)
    assert all("the run has ended" in joined.said for joined in machines)


def test_a_machine_without_a_gpu_compiles_for_the_others(bench, join):
    slow(bench, 0.5)
    # Where even the machine that measures has the binary at once.
    joined = join(gpu=None, workers=2)
    (result,) = bench.run(trials=TRIALS, workers=1, shared=True).results
    done = joined.report()
    assert_each_once(bench, result)
    assert result.entry.config == bench.seeds[TRIALS - 1]
    assert (done["measured"], done["rejected"]) == (0, 0)
    assert done["compiled"] > 0
    compiled = bench.calls("compile")
    # What it compiled last may have been given up at the end of the run.
    assert len(compiled) == len(set(compiled)) == TRIALS


def test_what_the_compiler_refutes_is_rejected_where_it_is_compiled(bench, join):
    slow(bench)
    bench.plan(
        compile={config: {"sleep_s": 0.3, "smem_bytes": 1 << 20} for config in bench.seeds[1::2]}
        | {config: {"sleep_s": 0.3} for config in bench.seeds[::2]}
        | {bench.seeds[2]: "abort"}
    )
    joined = join(gpu=None, workers=2)
    (result,) = bench.run(trials=TRIALS, workers=1, shared=True).results
    done = joined.report()
    assert done["rejected"] > 0
    refused = {trial.config: trial.result for trial in result.trials if isinstance(trial.result, Rejected)}
    assert refused.keys() == {*bench.seeds[1:TRIALS:2], bench.seeds[2]}
    assert {rejected.stage for rejected in refused.values()} == {"resources", "compile"}
    assert len(bench.calls("evaluate")) == TRIALS - len(refused)


def test_a_run_that_ranks_by_a_model_has_its_compiling_shared(bench, join):
    slow(bench)
    bench = dataclasses.replace(bench, problem=parse_problem("b=1 hq=2 hkv=2 s=256 d=64 dropout fp16"))
    bench.plan(compile={config: {"sleep_s": 0.3} for config in bench.seeds})
    joined = join()
    (result,) = bench.run(gpu=None, trials=8, workers=1, shared=True).results
    assert "measuring nothing: the run ranks by a model" in " ".join(joined.said) + joined.says("measuring nothing")
    assert joined.report()["compiled"] > 0
    assert (result.entry.origin, len(result.trials)) == ("predicted", 8)


class Killer(SilentObserver):
    """Kills a machine after so many trials."""

    def __init__(self, joined: Joined, after: int) -> None:
        self._joined, self._left = joined, after

    def trial(self, record, best, done, seconds_left):
        self._left -= 1
        if self._left == 0:
            self._joined.process.kill()


def test_a_machine_that_is_killed_costs_its_trials_a_second_try_and_nothing_else(bench, join):
    slow(bench, 0.3)
    joined = join(workers=2)
    jobs = dataclasses.replace(bench.jobs, idle_s=1.5)
    start = time.monotonic()
    (result,) = bench.run(trials=TRIALS, workers=1, jobs=jobs, shared=True, observer=Killer(joined, 5)).results
    assert time.monotonic() - start < 30.0
    assert len(result.trials) == len({trial.config for trial in result.trials}) == TRIALS
    assert all(isinstance(trial.result, Timing) for trial in result.trials)
    assert result.entry.config == bench.seeds[TRIALS - 1]
    # At most what it compiled and measured at that moment was done again.
    assert len(bench.calls("compile")) <= TRIALS + 5
    assert set(states(bench)) <= {TrialState.COMPLETE, TrialState.FAIL}


def states(bench: typing.Any) -> list[TrialState]:
    storage = join_storage(str(bench.folder / "study.journal"))
    return [t.state for study in storage.get_all_studies() for t in storage.get_all_trials(study._study_id)]


def coordinator(bench: typing.Any, trials: int) -> subprocess.Popen[str]:
    """Start the bench's run in another process, which prints each trial that it was told."""
    script = f"""
import sys
sys.path[:0] = {[str(Path(__file__).parent), *filter(None, sys.path)]!r}
from pathlib import Path
import flashgen.resources
from conftest import Bench
from flashgen.tuning import SilentObserver

class Printer(SilentObserver):
    def trial(self, record, best, done, seconds_left):
        print(record.config, flush=True)

flashgen.resources.shipped_registry_dir = lambda: Path({str(bench.folder / "shipped")!r})
Bench(folder=Path({str(bench.folder)!r})).run(trials={trials}, workers=1, shared=True, observer=Printer())
"""
    return subprocess.Popen([sys.executable, "-c", script], stdout=subprocess.PIPE, text=True, env=os.environ.copy())


def test_a_run_that_is_killed_and_started_again_keeps_its_machines(bench, join):
    slow(bench)
    joined = join()
    with coordinator(bench, TRIALS) as process:
        assert process.stdout is not None
        told = [process.stdout.readline().strip() for _ in range(4)]
        process.kill()
        told += process.stdout.read().splitlines()
    (result,) = bench.run(trials=TRIALS, workers=1, shared=True).results
    done = joined.report()
    assert "the run has ended" in joined.said
    assert len(result.trials) == len({trial.config for trial in result.trials}) == TRIALS
    assert set(told) <= {str(trial.config) for trial in result.trials if trial.resumed}
    assert result.entry.config == bench.seeds[TRIALS - 1]
    assert done["measured"] > 0
    # One here and one there at the most, and what was told as the run was killed.
    assert len(bench.calls("evaluate")) <= TRIALS + 3


def test_ctrl_c_gives_back_at_once(bench, join):
    slow(bench, 0.5)
    joined = join(workers=2)

    def press() -> None:
        joined.says("helping")
        # Until it compiles.
        time.sleep(1.5)
        joined.process.send_signal(signal.SIGINT)

    pressing = threading.Thread(target=press)
    pressing.start()
    jobs = dataclasses.replace(bench.jobs, idle_s=60.0)
    start = time.monotonic()
    (result,) = bench.run(trials=TRIALS, workers=1, jobs=jobs, shared=True).results
    pressing.join()
    done = joined.report()
    assert done["interrupted"]
    assert done["given_back"] > 0
    # Nobody waited for it.
    assert time.monotonic() - start < 40.0
    assert_each_once(bench, result)


def machine(bench: typing.Any, **changes: typing.Any) -> Machine:
    settings: dict[str, typing.Any] = {
        "gpus": ("planted:0",),
        "target": H200,
        "software": software_versions(),
        "workers": 1,
        "jobs": bench.jobs,
    }
    return Machine(**{**settings, **changes})


class Visited(SilentObserver):
    """Lets machines join in the middle of a run, in this process, and keeps what each says."""

    def __init__(self, bench: typing.Any, machines: dict[str, Machine]) -> None:
        self._study = str(bench.folder / "study.journal")
        self._machines = machines
        self.said: dict[str, str] = {}

    def trial(self, record, best, done, seconds_left):
        for name, visitor in self._machines.items() if done == 1 else ():
            try:
                join_run(visitor, self._study, self._say)
            except (FlashgenError, StopAsyncIteration) as error:
                self.said[name] = str(error)

    def _say(self, text: str) -> None:
        # It would wait for the end of this run.
        raise StopAsyncIteration(text)


def test_a_machine_that_differs_says_what_it_does_not_do_and_why(bench):
    here = software_versions()
    machines = {
        "gpu": machine(bench, target=named_target("H100")),
        "no gpu": machine(bench, gpus=(), target=None),
        "driver": machine(bench, software=dataclasses.replace(here, driver="1.2")),
        "triton": machine(bench, software=dataclasses.replace(here, triton="2.0")),
        "alike": machine(bench),
    }
    observer = Visited(bench, machines)
    bench.run(trials=2, workers=1, shared=True, observer=observer)
    for name, words in {
        "gpu": "measuring nothing: its GPU is a NVIDIA H100 80GB HBM3 (sm_90)",
        "no gpu": "measuring nothing: no GPU in use",
        "driver": f"measuring nothing: its driver is 1.2, the run's {here.driver}",
        "triton": "cannot help: with Triton 2.0 it would build and time other binaries than the run with",
        "alike": "compiling in 1 processes, measuring on planted:0",
    }.items():
        assert words in observer.said[name]


def test_a_machine_with_other_code_does_nothing(bench, monkeypatch):
    monkeypatch.setattr("flashgen.tuning.joining.code_digest", lambda: "0123")
    observer = Visited(bench, {"code": machine(bench)})
    bench.run(trials=2, workers=1, shared=True, observer=observer)
    assert "digest 0123) is other code than the run's" in observer.said["code"]


class Liar(SilentObserver):
    """Claims what is on offer after a trial of the run's own, and hands in the next lie."""

    def __init__(self, bench: typing.Any, lies: dict[str, tuple[object, list[typing.Any] | None]]) -> None:
        self._study = str(bench.folder / "study.journal")
        self._lies = dict(lies)
        # Of whose config what was told.
        self.told: dict[str, str] = {}

    def trial(self, record, best, done, seconds_left):
        storage = join_storage(self._study)
        found = find_open(storage)
        for offer in open_offers(storage, found[0]) if found and self._lies else ():
            trial_id = storage.get_trial_id_from_study_id_trial_number(found[0], offer.number)
            assert storage.set_trial_state_values(trial_id, TrialState.RUNNING)
            name, (text, values) = self._lies.popitem()
            self.told[str(offer.config)] = name
            told = text(offer.config) if callable(text) else text
            storage.set_trial_user_attr(trial_id, "flashgen", told)
            storage.set_trial_state_values(trial_id, TrialState.COMPLETE, values)


def measured(config: typing.Any, **changes: object) -> str:
    timing = {"median_us": 1e-3, "spread": 0.0, "samples": 9}
    timing |= {key: changes.pop(key) for key in list(changes) if key in timing}
    told = {
        "config": config.as_dict(),
        "resources": {"registers": 1, "spills": 0, "smem_bytes": 0},
        "max_error": 0.0,
        "allowed_error": 0.0,
        "binary_hash": "x",
        "timing": timing,
    }
    return json.dumps({**told, **changes})


LIES: dict[str, tuple[object, list[typing.Any] | None]] = {
    "nothing": (None, None),
    "no json": ("{", [1.0]),
    "deep": ("[" * 100_000, [1.0]),
    "a list": ("[]", [float("nan")]),
    "two values": ("{}", [1.0, 2.0]),
    "no time": (lambda config: measured(config, median_us=float("nan")), [float("nan")]),
    "no positive time": (lambda config: measured(config, median_us=-1.0), [-1.0]),
    "words": (lambda config: measured(config, median_us="fast"), ["fast"]),
    "no resources": (lambda config: measured(config, resources=None), [1e-3]),
    "mad resources": (
        lambda config: measured(config, resources={"registers": -1, "spills": 0, "smem_bytes": 0}),
        [1e-3],
    ),
    "another config": (lambda config: measured(dataclasses.replace(config, num_stages=7)), [1e-3]),
}


def test_garbage_is_a_rejection_and_never_wins(bench, monkeypatch):
    monkeypatch.setattr("flashgen.tuning.sharing._POLL_S", 0.0)
    liar = Liar(bench, LIES)
    trials = 3 * len(LIES)
    (result,) = bench.run(trials=trials, seeds_only=False, workers=1, shared=True, observer=liar).results
    assert sorted(liar.told.values()) == sorted(LIES)
    outcomes = {str(trial.config): trial.result for trial in result.trials}
    assert len(outcomes) == trials
    rejected = {config: outcome for config, outcome in outcomes.items() if isinstance(outcome, Rejected)}
    assert rejected.keys() == liar.told.keys()
    for outcome in rejected.values():
        assert outcome.reason.startswith("what a machine that joined told of it makes no sense: ")
    assert str(result.entry.config) not in liar.told
    # And the study goes on afterwards.
    again = bench.run(trials=trials + 1, seeds_only=False, workers=1).results[0]
    assert sum(trial.resumed for trial in again.trials) == trials


def test_a_lie_that_makes_sense_is_found_out_at_the_end(bench):
    liar = Liar(bench, {"fast": (measured, [1e-3])})
    (result,) = bench.run(trials=6, workers=1, shared=True, observer=liar).results
    (told,) = liar.told
    lie = next(trial for trial in result.trials if str(trial.config) == told)
    assert lie.result.median_us == 1e-3
    # It got into the final comparison, whose times are the run's own.
    assert told in bench.calls("race")
    assert result.entry.performance.median_us > 50.0


def test_what_others_offer_or_compile_is_read_with_care(bench):
    bench.run(trials=3, workers=1, shared=True)
    storage = join_storage(str(bench.folder / "study.journal"))
    (name,) = optuna.get_all_study_names(storage)
    study_id = storage.get_study_id_from_name(name)
    for attributes in (
        {"offer": "x"},
        {"offer": {"template": 3}},
        {"offer": bench.seeds[0].as_dict(), "compiled": "{"},
    ):
        trial = optuna.trial.create_trial(state=TrialState.WAITING, user_attrs=attributes)
        storage.create_new_trial(study_id, template_trial=trial)
    assert open_offers(storage, study_id) == []
    storage.set_study_user_attr(study_id, "flashgen run", {"state": "open", "run": 3})
    assert find_open(storage) is None
    # The next run clears them away.
    assert len(bench.run(trials=4, workers=1, shared=True).results[0].trials) == 4


def test_a_run_that_is_not_shared_offers_nothing(bench):
    bench.run(trials=3, workers=1)
    storage = join_storage(str(bench.folder / "study.journal"))
    assert all(not study.user_attrs for study in storage.get_all_studies())
    assert not any(
        "offer" in t.user_attrs for s in storage.get_all_studies() for t in storage.get_all_trials(s._study_id)
    )


def test_a_file_that_is_no_journal_is_refused_and_left_as_it_is(tmp_path):
    (tmp_path / "notes").write_text("garbage\n")
    with pytest.raises(InputError, match=r"cannot be opened .*it is not an Optuna journal"):
        join_storage(str(tmp_path / "notes"))
    assert (tmp_path / "notes").read_text() == "garbage\n"


@pytest.mark.parametrize("study", ["sqlite:///{folder}/study.db", "mysql://host/x"])
def test_databases_that_let_two_claim_one_trial_are_refused(bench, study):
    with pytest.raises(InputError, match="a journal file on a shared folder, or a PostgreSQL"):
        join_run(machine(bench), study.format(folder=bench.folder), print)


def test_a_server_that_is_not_there_is_said_without_its_password(bench):
    url = f"postgresql+psycopg://tuner:secret@/x?host={bench.folder}"
    with pytest.raises(InputError, match=r"tuner:\*\*\*@.* cannot be opened") as caught:
        join_run(machine(bench), url, print)
    assert "secret" not in str(caught.value)
