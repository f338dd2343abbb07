"""The search of one problem, with instant compilers and clocks in place of processes."""

from __future__ import annotations

import dataclasses
import itertools
import time
import typing

import optuna
import pytest

from flashgen.codegen import KernelConfig, KernelResources, TritonBackwardConfig, TritonForwardConfig
from flashgen.compile import CompileReport
from flashgen.measure import Measurement, Outcome, Rejected, Timing
from flashgen.spec import Problem, parse_problem
from flashgen.target import Software, named_target
from flashgen.tuning.candidates import SPILL_LIMIT_BYTES
from flashgen.tuning.effort import EFFORTS
from flashgen.tuning.evaluators import Final
from flashgen.tuning.events import ProblemResult, TrialRecord
from flashgen.tuning.jobs import Jobs
from flashgen.tuning.pool import Finished
from flashgen.tuning.quarantine import Quarantine, default_quarantine
from flashgen.tuning.search import ProblemSearch
from flashgen.tuning.study import ProblemStudy
from flashgen.tuning.task import Task
from flashgen.tuning.tried import Tried
from flashgen.tuning.winner import choose_winner
from flashgen.tuning.workers import WorkerResult

H200 = named_target("H200")
PROBLEM = parse_problem("b=1 hq=2 hkv=2 s=256 d=64 fp16")
SOFTWARE = Software(flashgen="0.1.0", triton="3.9.0", torch="2.13.0", driver="580.1")


def config(block_m: int = 64, stages: int = 2, **changes: typing.Any) -> TritonForwardConfig:
    return TritonForwardConfig(block_m=block_m, block_n=64, num_warps=4, num_stages=stages, **changes)


A, B, C, D = (config(block_m) for block_m in (32, 64, 128, 256))
DEEP, CAPPED, GROUPED = config(stages=3), config(maxnreg=128), config(head_group=4)  # like B


def tried(which: KernelConfig, us: float, *, spills: int = 0, smem_bytes: int = 1024) -> Tried:
    resources = KernelResources(registers=100, spills=spills, smem_bytes=smem_bytes)
    timing = Timing(median_us=us, spread=0.01, samples=9)
    return Tried(record=TrialRecord(number=0, config=which, resources=resources, result=timing))


def final_of(finalists: typing.Iterable[Tried], noise: float = 0.02) -> Final:
    return Final(timings={t.config: t.timing for t in finalists}, baselines={}, noise=noise, refused={})


@pytest.mark.parametrize(("default_us", "wins"), [(100.0, True), (100.9, True), (101.1, False), (99.0, True)])
def test_default_wins_where_it_is_as_fast(default_us, wins):
    finalists = [tried(A, 100.0), tried(B, default_us)]
    choice = choose_winner(finalists, final_of(finalists), default=B)
    assert choice is not None
    assert (choice.winner.config == B) is wins
    assert choice.tied == ((B,) if not wins else (A,))


def test_ties_go_to_fewer_spills_then_less_memory_then_the_earlier_config_in_any_order():
    by_spills = [tried(A, 100.0, spills=8), tried(B, 101.0), tried(C, 100.5, spills=4)]
    by_memory = [tried(A, 100.0, smem_bytes=9), tried(B, 101.0, smem_bytes=8), tried(C, 100.9, smem_bytes=7)]
    by_config = [tried(A, 101.0), tried(B, 100.0), tried(C, 100.0)]
    for finalists, winner in ((by_spills, B), (by_memory, C), (by_config, A)):
        for order in itertools.permutations(finalists):
            choice = choose_winner(order, final_of(order), default=D)
            assert choice is not None
            assert choice.winner.config == winner
            assert set(choice.tied) == {A, B, C} - {winner}


def test_of_a_noisy_race_wins_one_within_a_percent_of_the_fastest():
    finalists = [tried(A, 104.0), tried(B, 100.0, spills=8), tried(C, 100.9), tried(D, 101.1)]
    choice = choose_winner(finalists, final_of(finalists, noise=0.05), default=D)
    assert choice is not None
    assert choice.winner.config == C
    assert set(choice.tied) == {A, B, D}


def test_beyond_the_noise_the_fastest_wins_whatever_it_spills():
    finalists = [tried(A, 110.0), tried(B, 100.0, spills=200), tried(C, 105.0)]
    choice = choose_winner(finalists, final_of(finalists), default=A)
    assert choice is not None
    assert choice.winner.config == B
    assert [t.config for t in choice.runners_up] == [C, A]


def test_the_times_of_the_race_count_and_the_refused_do_not():
    finalists = [tried(A, 100.0), tried(B, 90.0), tried(C, 95.0)]
    raced = [tried(A, 80.0), tried(C, 95.0)]
    final = dataclasses.replace(final_of(raced), refused={B: "wrong"})
    choice = choose_winner(finalists, final, default=B)
    assert choice is not None
    assert (choice.winner.config, choice.winner.timing.median_us) == (A, 80.0)
    nobody = dataclasses.replace(final, refused=dict.fromkeys((A, B, C), "wrong"))
    assert choose_winner(finalists, nobody, default=B) is None


def test_who_is_not_surely_slower_is_tied_and_the_default_among_them_wins():
    finalists = [tried(A, 100.8), tried(B, 100.0), tried(C, 100.5)]
    final = dataclasses.replace(final_of(finalists, noise=0.001), at_least={A: 0.99, B: 1.0, C: 1.01})
    choice = choose_winner(finalists, final, default=A)
    assert choice is not None
    assert (choice.winner.config, choice.tied) == (A, (B,))


class InstantPool:
    """Compiles at once, as `reports` say; configs in `stuck` never end."""

    size = 2
    busy_s = 0.0
    connections: typing.ClassVar[list[typing.Any]] = []

    def __init__(self) -> None:
        self.reports: dict[KernelConfig, dict[str, typing.Any]] = {}
        self.stuck: set[KernelConfig] = set()
        self.compiled: list[KernelConfig] = []
        self.cancelled = 0
        self._done: list[Finished[int]] = []
        self._stuck = 0

    @property
    def idle(self) -> int:
        return self.size - len(self._done) - self._stuck

    def submit(self, number, job, spec, which, target, *, timeout_s):
        self.compiled.append(which)
        if which in self.stuck:
            self._stuck += 1
            return
        facts = {"registers": 100, "spills": 0, "smem_bytes": 1024, "binary": str(which)}
        facts |= self.reports.get(which, {})
        binary = facts.pop("binary")
        report = CompileReport(resources=KernelResources(**facts), binary_hash=binary, seconds=0.0)
        self._done.append(Finished(task_id=number, outcome=WorkerResult(value=report)))

    def wait(self, timeout_s: float) -> list[Finished[int]]:
        done, self._done = self._done, []
        return done

    def cancel(self) -> None:
        self.cancelled += 1
        self._done, self._stuck = [], 0


class FakeClock:
    """Evaluates as `times` say (100 us where they are silent, refused where the text of a reason stands)."""

    origin = "measured"
    timing = staticmethod(lambda phase: "fake")
    reserve_s = 0.5
    busy_s = 0.0
    connections: typing.ClassVar[list[typing.Any]] = []

    def __init__(self) -> None:
        self.times: dict[KernelConfig, float | str] = {}
        self.evaluated: list[KernelConfig] = []
        self.unconfirmed: dict[KernelConfig, str] = {}
        self.finals: list[list[KernelConfig]] = []
        self.interrupt_at: dict[str, int] = {}
        # How many polls a candidate takes: more than one candidate is then under way.
        self.polls = 1
        self._queue: list[tuple[int, KernelConfig, int]] = []

    def _maybe_interrupt(self, where: str) -> None:
        if where in self.interrupt_at:
            self.interrupt_at[where] -= 1
            if self.interrupt_at[where] == 0:
                raise KeyboardInterrupt

    def submit(self, number, problem, which, report):
        self.evaluated.append(which)
        self._queue.append((number, which, self.polls))

    def collect(self) -> list[tuple[int, Outcome]]:
        self._maybe_interrupt("collect")
        done = [(number, self._outcome(which)) for number, which, polls in self._queue if polls == 1]
        self._queue = [(number, which, polls - 1) for number, which, polls in self._queue if polls > 1]
        return done

    def _outcome(self, which: KernelConfig) -> Outcome:
        us = self.times.get(which, 100.0)
        if isinstance(us, str):
            return Rejected(stage="accuracy", reason=us)
        timing = Timing(median_us=us, spread=0.01, samples=9)
        return Measurement(timing=timing, max_error=0.001, allowed_error=0.01)

    def cancel(self) -> None:
        self._queue.clear()

    def final(self, problem, finalists, target_ms, seed) -> Final:
        self._maybe_interrupt("final")
        self.finals.append([t.config for t in finalists])
        return final_of(finalists, noise=0.01)

    def confirmed_as(self, spec):
        return None

    def confirm(self, problem, candidate: Tried) -> Tried | Rejected:
        self._maybe_interrupt("confirm")
        reason = self.unconfirmed.get(candidate.config)
        return Rejected(stage="accuracy", reason=reason) if reason else candidate

    def close(self) -> None:
        self._queue.clear()


class Listener:
    def __init__(self) -> None:
        self.said: list[str] = []
        self.bests: list[float | None] = []

    def problem_started(self, index, problem, planned_trials, resumed_trials) -> None:
        self.said.append(f"started {planned_trials} {resumed_trials}")

    def stage(self, text: str) -> None:
        self.said.append(text)

    def trial(self, record, best, done, seconds_left) -> None:
        assert seconds_left is not None
        assert seconds_left >= 0
        self.bests.append(best and best.result.median_us)

    def problem_finished(self, result) -> None:
        self.said.append("finished")


@dataclasses.dataclass
class Bench:
    """One search over in-memory trials; `run` may be called again, as a resumed run would."""

    configs: list[KernelConfig] = dataclasses.field(default_factory=lambda: [A, B, C, D])
    pool: InstantPool = dataclasses.field(default_factory=InstantPool)
    clock: FakeClock = dataclasses.field(default_factory=FakeClock)
    listener: Listener = dataclasses.field(default_factory=Listener)
    storage: optuna.storages.BaseStorage = dataclasses.field(default_factory=optuna.storages.InMemoryStorage)
    problem: Problem = PROBLEM
    interrupted: bool = False

    def run(self, planned: int | None = None, seconds: float = 30.0, default: KernelConfig | None = None):
        study = ProblemStudy(
            self.storage,
            problem=self.problem,
            target=H200,
            how="fake",
            configs=self.configs,
            seeds=self.configs,
            seed=0,
            n_quasi_random=0,
        )
        task = Task(
            problem=self.problem,
            target=H200,
            effort=EFFORTS["check"],
            legal=len(self.configs),
            planned=len(self.configs) if planned is None else planned,
            default=default or self.configs[0],
            deadline=time.monotonic() + seconds,
            software=SOFTWARE,
            seed=0,
        )
        search = ProblemSearch(
            task,
            study=study,
            pool=self.pool,
            evaluator=self.clock,
            observer=self.listener,
            jobs=Jobs(),
            quarantine=Quarantine(default_quarantine(), H200, SOFTWARE),
        )
        result = search.run(0)
        self.interrupted = search.interrupted
        return result

    def states(self) -> list[str]:
        (study,) = self.storage.get_all_studies()
        return [trial.state.name for trial in self.storage.get_all_trials(study._study_id)]


def results(result: ProblemResult) -> dict[KernelConfig, float | str]:
    return {t.config: t.result.reason if isinstance(t.result, Rejected) else t.result.median_us for t in result.trials}


def winner(result: ProblemResult) -> KernelConfig:
    assert result.entry is not None, result.note
    return result.entry.config


def test_the_fastest_right_one_wins_and_the_entry_says_how():
    bench = Bench()
    bench.clock.times = {A: 100.0, B: 90.0, C: "max error 0.3", D: 95.0}
    result = bench.run(default=A)
    assert (winner(result), result.note, result.tied, result.legal) == (B, "", (), 4)
    entry = result.entry
    assert (entry.origin, entry.performance.timing, entry.performance.baseline) == ("measured", "fake", "none")
    assert [r.config for r in entry.runners_up] == [D, A]
    assert (entry.provenance.trials, entry.provenance.driver, entry.provenance.seed) == (4, "580.1", 0)
    assert results(result) == {A: 100.0, B: 90.0, C: "max error 0.3", D: 95.0}
    assert bench.listener.said == [
        "started 4 0",
        "compiling and measuring 4 configs with 2 processes",
        "comparing the best 3",
        "finished",
    ]
    assert bench.listener.bests == [100.0, 90.0, 90.0, 90.0]


def test_a_config_that_fails_its_check_never_wins():
    bench = Bench()
    bench.clock.times = {A: "wrong", B: 1.0, C: 50.0}
    bench.clock.unconfirmed = {B: "wrong with lse", C: "likewise"}
    result = bench.run()
    assert winner(result) == D
    assert bench.clock.finals == [[B, C, D]]


def test_when_all_finalists_are_refused_the_next_ones_are_compared():
    bench = Bench()
    bench.clock.times = {A: 4.0, B: 3.0, C: 2.0, D: 1.0}
    bench.clock.unconfirmed = {B: "x", C: "x", D: "x"}
    assert winner(bench.run(default=D)) == A
    assert bench.clock.finals == [[D, C, B], [A]]
    bench.clock.unconfirmed = dict.fromkeys(bench.configs, "wrong with lse")
    result = bench.run()
    assert result.entry is None
    assert result.note == f"no config passed; of 4 refused, the first, {D}: wrong with lse"


def test_the_default_is_compared_even_when_it_is_slow():
    bench = Bench()
    bench.clock.times = {A: 400.0, B: 3.0, C: 2.0, D: 1.0}
    assert winner(bench.run(default=A)) == D
    assert bench.clock.finals == [[D, C, B, A]]


def test_a_resumed_search_pays_for_nothing_twice():
    bench = Bench()
    bench.clock.times = {B: 90.0}
    first = bench.run(planned=3)
    second = bench.run(planned=3)
    assert len(bench.pool.compiled) == len(bench.clock.evaluated) == 3
    assert winner(first) == winner(second) == B
    assert [trial.resumed for trial in second.trials] == [True] * 3
    assert bench.listener.said[-3:] == ["started 3 3", "comparing the best 3", "finished"]
    third = bench.run(planned=4)
    assert [trial.resumed for trial in third.trials] == [True, True, True, False]
    assert sorted(bench.pool.compiled) == sorted(bench.configs)


@pytest.mark.parametrize("polls", [1, 4], ids=["one after the other", "at the same time"])
@pytest.mark.parametrize("outcome", [70.0, "wrong"])
def test_equal_binaries_are_timed_once(polls, outcome):
    bench = Bench(configs=[B, DEEP, CAPPED, GROUPED])
    bench.pool.reports = {which: {"binary": "same"} for which in bench.configs}
    bench.clock.polls = polls
    bench.clock.times = {B: outcome, GROUPED: 80.0}
    result = bench.run()
    # What changes the grid or the launch is another matter.
    assert bench.clock.evaluated == [B, GROUPED]
    assert results(result) == {B: outcome, DEEP: outcome, CAPPED: outcome, GROUPED: 80.0}
    assert bench.states() == ["COMPLETE"] * 4


def test_equal_binaries_of_several_kernels_are_timed_once():
    shallow, deep, second, grid = (
        TritonBackwardConfig(
            block_m1=64, block_n1=64, num_warps=4, num_stages=s, block_m2=m2, block_n2=64, num_warps2=4, num_stages2=s2
        )
        for s, m2, s2 in ((1, 64, 1), (2, 64, 1), (1, 64, 3), (1, 128, 1))
    )
    bench = Bench(configs=[shallow, deep, second, grid], problem=parse_problem("b=1 h=2 s=256 d=64 fp16 backward"))
    bench.pool.reports = {which: {"binary": "same"} for which in bench.configs}
    bench.run()
    assert bench.clock.evaluated == [shallow, grid]


def test_equal_binaries_of_an_earlier_run_are_known():
    bench = Bench(configs=[B, DEEP])
    bench.pool.reports = {which: {"binary": "same"} for which in bench.configs}
    bench.run(planned=1)
    result = bench.run(planned=2)
    assert bench.clock.evaluated == [B]
    assert [trial.resumed for trial in result.trials] == [True, False]


def test_too_much_shared_memory_is_dropped_before_the_gpu():
    bench = Bench()
    bench.pool.reports = {A: {"smem_bytes": H200.smem_bytes + 1}, B: {"smem_bytes": H200.smem_bytes}}
    result = bench.run()
    assert A not in bench.clock.evaluated
    assert B in bench.clock.evaluated
    assert results(result)[A] == f"{H200.smem_bytes + 1} bytes of shared memory of {H200.smem_bytes}"


def test_spilling_is_dropped_where_others_pass():
    bench = Bench()
    bench.pool.reports = {A: {"spills": SPILL_LIMIT_BYTES + 4}, B: {"spills": SPILL_LIMIT_BYTES}}
    bench.clock.times = {A: 1.0, B: 50.0}
    result = bench.run()
    assert A not in bench.clock.evaluated
    assert B in bench.clock.evaluated
    assert results(result)[A] == f"{SPILL_LIMIT_BYTES + 4} bytes of registers spilled"
    assert winner(result) == B


def test_where_everything_spills_the_least_spilling_are_measured_first():
    # float32 at D=128 on sm_90: the best of 14 configs spills 456 bytes.
    bench = Bench()
    bench.pool.reports = {A: {"spills": 7176}, B: {"spills": 576}, C: {"spills": 2920}, D: {"spills": 456}}
    bench.clock.times = {B: 50.0, C: 40.0}
    result = bench.run()
    assert bench.clock.evaluated == [D, B, C, A]
    assert winner(result) == C


def test_where_those_that_do_not_spill_are_wrong_the_others_are_measured():
    bench = Bench()
    bench.pool.reports = {which: {"spills": 1000} for which in (B, C, D)}
    bench.clock.times = {A: "wrong", C: 50.0}
    assert winner(bench.run()) == C


def test_out_of_patience_they_are_measured_beside_what_still_compiles():
    bench = Bench(configs=[A, B])
    bench.pool.reports = {A: {"spills": 1000}}
    bench.pool.stuck = {B}
    result = bench.run(seconds=1.0)
    assert winner(result) == A
    assert result.note == "out of time after 1 of 2 configs"


def test_what_is_unfinished_is_dropped_and_untried():
    bench = Bench()
    bench.pool.stuck = {B, C}
    start = time.monotonic()
    result = bench.run(seconds=1.0)
    assert time.monotonic() - start < 10.0
    assert result.note == "out of time after 1 of 4 configs"
    assert (winner(result), bench.pool.cancelled) == (A, 1)
    assert sorted(bench.states()) == ["COMPLETE", "FAIL", "FAIL"]
    bench.pool.stuck = set()
    assert len(bench.run().trials) == 4
    assert bench.pool.compiled.count(A) == 1


def test_no_time_at_all_is_said():
    result = Bench().run(seconds=0.0)
    assert (result.entry, result.trials) == (None, ())
    assert "no config was tried in time" in result.note


@pytest.mark.parametrize("where", [{"collect": 2}, {"final": 1}, {"confirm": 1}])
def test_an_interrupt_keeps_the_best_so_far(where):
    bench = Bench()
    bench.clock.times = {A: 100.0, B: 50.0, C: 45.0}
    bench.clock.unconfirmed = {C: "wrong with lse"}
    bench.clock.interrupt_at = where
    result = bench.run(default=A)
    assert bench.interrupted
    assert winner(result) == B
    assert result.note == "interrupted: the best so far, without the final comparison"
    assert bench.listener.said[-1] == "finished"
    assert set(bench.states()) <= {"COMPLETE", "FAIL"}
    bench.clock.interrupt_at = {}
    resumed = bench.run()
    assert all(bench.clock.evaluated.count(trial.config) == 1 for trial in result.trials)
    assert sum(trial.resumed for trial in resumed.trials) == len(result.trials)


def test_an_interrupt_where_it_is_as_fast_the_default_stays():
    bench = Bench()
    bench.clock.times = {A: 100.9, B: 100.0}
    bench.clock.interrupt_at = {"final": 1}
    assert winner(bench.run(planned=2, default=A)) == A


def test_an_interrupt_before_anything_passed_is_no_entry():
    bench = Bench()
    bench.clock.interrupt_at = {"collect": 1}
    result = bench.run()
    assert bench.interrupted
    assert (result.entry, result.note) == (None, "interrupted; no config was tried in time")


def test_an_interrupt_twice_leaves_at_once_and_keeps_the_trials():
    bench = Bench()
    bench.clock.interrupt_at = {"final": 1, "confirm": 1}
    result = bench.run()
    assert bench.interrupted
    assert result.entry is None
    assert bench.states() == ["COMPLETE"] * 4
