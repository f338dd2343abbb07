"""Planted faults: whatever a candidate does, it costs one trial, it never wins, and the run goes on."""

from __future__ import annotations

import dataclasses
import typing

import optuna
import pytest
from optuna.storages.journal import JournalFileBackend
from optuna.trial import TrialState

from flashgen.codegen import TritonBackwardConfig
from flashgen.errors import FlashgenError
from flashgen.measure import Rejected, Timing
from flashgen.registry import Location, load
from flashgen.spec import parse_problem
from flashgen.tuning.events import ProblemResult, TuneReport

FAULTS = ("hang", "busy", "abort", "exit", "memory", "error", "sys.exit", "garbage", "nan", "wrong")


def only(report: TuneReport) -> ProblemResult:
    (result,) = report.results
    return result


def states(bench: typing.Any) -> list[TrialState]:
    """Return the states of all trials in the journal, as Optuna reads it."""
    storage = optuna.storages.JournalStorage(JournalFileBackend(str(bench.folder / "study.journal")))
    return [t.state for study in storage.get_all_studies() for t in storage.get_all_trials(study._study_id)]


def test_a_gpu_that_hangs_does_not_keep_the_others(bench):
    hangs = bench.seeds[0]
    bench.plan(evaluate={hangs: "hang"})
    result = only(bench.run(gpu=("planted:0", "planted:1"), trials=6))
    assert set(bench.calls("start")) == {"planted:0", "planted:1"}
    assert sorted(bench.calls("evaluate")) == sorted(str(trial.config) for trial in result.trials)
    last = result.trials[-1]
    assert last.config == hangs
    assert "timeout: measuring process on planted:" in last.result.reason
    assert sum(isinstance(trial.result, Timing) for trial in result.trials) == 5


def test_every_fault_costs_one_trial_and_none_wins(bench):
    seeds = bench.seeds
    evaluated = dict(zip(seeds[:10], FAULTS, strict=True))
    compiled = {
        seeds[10]: "hang",
        seeds[11]: "abort",
        seeds[12]: "garbage",
        seeds[13]: "memory",
        seeds[14]: {"smem_bytes": 1 << 20},
    }
    # The rest of the space: one is the fastest of the right ones, and one of the same binary as a wrong one.
    bench.plan(evaluate=evaluated, compile=compiled)
    result = only(bench.run(trials=24, seeds_only=False))
    outcomes = {trial.config: trial.result for trial in result.trials}
    assert len(result.trials) == len(outcomes) == 24
    refused = {config: r for config, r in outcomes.items() if isinstance(r, Rejected)}
    assert refused.keys() == evaluated.keys() | compiled.keys()
    said = {seeds.index(config): f"{r.stage}: {r.reason}" for config, r in refused.items()}
    for index, words in {
        0: "run: timeout: measuring process on planted:0 killed after 2",
        1: "run: timeout: measuring process on planted:0 killed after 2",
        2: "run: crashed: measuring process on planted:0 died of SIGABRT",
        3: "run: crashed: measuring process on planted:0 exited with code 7",
        4: "run: error: MemoryError: planted",
        5: "run: error: RuntimeError: planted",
        6: "run: error: SystemExit: 3",
        7: "run: the measurement returned 'fast'",
        8: "run: the measurement returned Measurement(timing=Timing(median_us=nan",
        9: "accuracy: at its own shape",
        10: "compile: timeout: compiling process",
        11: "compile: crashed: compiling process",
        12: "compile: the compiler returned {'registers': 'many'}",
        13: "compile: error: MemoryError: planted",
        14: f"resources: {1 << 20} bytes of shared memory of",
    }.items():
        assert said[index].startswith(words), said[index]
    right = [trial for trial in result.trials if isinstance(trial.result, Timing)]
    assert result.entry is not None
    # Whatever the search tried, another may be within the noise of the fastest.
    assert min(right, key=lambda trial: trial.result.median_us).config in (result.entry.config, *result.tied)
    assert (result.entry.origin, result.baselines) == ("measured", {"cudnn": 90.0})
    assert len(bench.calls("compile")) == len(set(bench.calls("compile"))) == 24
    assert len(bench.calls("evaluate")) == len(set(bench.calls("evaluate"))) == 19
    assert states(bench) == [TrialState.COMPLETE] * 24


@pytest.mark.parametrize("fault", ["hang", "abort", "error", "garbage"])
def test_breaking_the_final_comparison_loses_it(bench, fault):
    first, second, third, _ = bench.seeds[:4]
    bench.plan(evaluate={first: 10.0, second: 11.0, third: 12.0}, race={first: fault})
    result = only(bench.run())
    assert result.entry is not None
    assert result.entry.config == second
    assert [runner_up.config for runner_up in result.entry.runners_up] == [third]
    assert len(result.trials) == 4


def test_a_baseline_that_breaks_the_comparison_is_left_out(bench):
    bench.plan(evaluate={bench.seeds[1]: 10.0}, race={"baselines": "abort"})
    result = only(bench.run())
    assert result.entry is not None
    assert (result.entry.config, result.baselines) == (bench.seeds[1], {})
    assert result.entry.performance.baseline_us is None


@pytest.mark.parametrize("fault", ["wrong", "abort", "garbage"])
def test_wrong_with_lse_loses(bench, fault):
    first, second = bench.seeds[1:3]
    bench.plan(evaluate={first: 10.0, second: 11.0}, confirm={first: fault})
    result = only(bench.run())
    assert result.entry is not None
    assert result.entry.config == second


@pytest.fixture
def portable(bench):
    """The same for what only kernels compute that the interpreter can run."""
    return dataclasses.replace(bench, problem=parse_problem("b=1 hq=2 hkv=2 s=256 d=64 dropout fp16"))


def test_wrong_in_the_interpreter_loses(portable):
    bench = portable
    best = only(bench.run(gpu=None)).entry
    assert best is not None
    assert best.origin == "predicted"
    leaders = [best.config, *(runner_up.config for runner_up in best.runners_up)]
    assert set(bench.calls("interpret")) == set(map(str, leaders))
    faults = dict(zip(leaders, ("hang", "abort", "garbage"), strict=True))
    bench.plan(interpret=faults)
    fourth = only(bench.run(gpu=None)).entry
    assert fourth is not None
    assert fourth.config not in leaders
    assert (fourth.accuracy.max_error, fourth.accuracy.allowed_error) == (0.001, 0.01)


def test_a_wrong_kernel_is_caught_by_the_real_interpreter(portable):
    bench = portable
    jobs = dataclasses.replace(bench.jobs, interpret="planted_jobs:interpret_corrupted", interpret_timeout_s=60.0)
    first, second = bench.seeds[:2]
    # Fewer registers, more programs on a multiprocessor: the model ranks it first.
    bench.plan(compile={first: {"registers": 32}, second: {"registers": 250}}, interpret={first: "wrong"})
    result = only(bench.run(gpu=None, jobs=jobs, trials=2))
    ranked = sorted(result.trials, key=lambda trial: trial.result.median_us)
    assert ranked[0].config == first
    assert result.entry is not None
    assert result.entry.config == second
    assert 0 < result.entry.accuracy.max_error < result.entry.accuracy.allowed_error


def test_nothing_right_is_no_entry_and_a_reason(bench):
    bench.plan(evaluate=dict.fromkeys(bench.seeds[:3], "wrong"))
    report = bench.run(trials=3)
    result = only(report)
    assert (result.entry, report.files, report.interrupted) == (None, (), False)
    assert result.note.startswith(f"no config passed; of 3 refused, the first, {bench.seeds[0]}: at its own shape")


def test_nothing_right_in_the_interpreter_is_no_entry_and_a_reason(portable):
    bench = portable
    bench.plan(interpret=dict.fromkeys(bench.seeds[:3], "wrong"))
    result = only(bench.run(gpu=None, trials=3))
    assert result.entry is None
    assert "of 3 refused" in result.note
    assert result.note.endswith(": planted")


def test_a_gpu_that_recovers_late_costs_no_trial(bench):
    result = only(bench.run(jobs=dataclasses.replace(bench.jobs, start="planted_jobs:start_at_third_attempt")))
    assert result.entry is not None
    assert all(isinstance(trial.result, Timing) for trial in result.trials)


def test_a_gpu_that_is_gone_blames_no_config(bench):
    bench.plan(start={"planted:0": "exit"})
    with pytest.raises(
        FlashgenError, match=r"measuring process on planted:0 exited with code 7 while it started.*run the same"
    ):
        bench.run()
    assert TrialState.COMPLETE not in states(bench)
    bench.plan()
    assert len(only(bench.run()).trials) == 4


@pytest.fixture
def backward(bench):
    """The same for gradients."""
    return dataclasses.replace(bench, problem=parse_problem("b=1 hq=2 hkv=2 s=256 d=64 bias=input fp16 backward"))


def test_gradients_are_tuned_like_anything_else(backward):
    first, second, third = backward.seeds[1:4]
    backward.plan(
        evaluate={first: 10.0, second: 11.0, third: "wrong"},
        confirm={first: "wrong"},
        compile={backward.seeds[0]: "abort"},
    )
    report = backward.run(trials=6)
    entry = only(report).entry
    assert entry is not None
    assert entry.config == second
    assert isinstance(entry.config, TritonBackwardConfig)
    assert entry.spec == backward.problem.spec
    assert (entry.origin, entry.performance.baseline) == ("measured", "cudnn")
    flops, us = backward.problem.flops(), entry.performance.median_us
    assert entry.performance.tflops == pytest.approx(flops / us / 1e6, rel=1e-3)
    assert [path.name for path in report.files] == ["nvidia_h200.backward.yaml"]
    assert {first, third} & {runner_up.config for runner_up in entry.runners_up} == set()
    (found,) = load([Location(path=backward.folder / "registry", label="argument")]).candidates(entry.spec)
    assert found.entry == entry


def test_a_bias_that_has_no_right_gradient_is_said(backward):
    backward.plan(confirm=dict.fromkeys(backward.seeds[:3], "abort"))
    result = only(backward.run(trials=3))
    assert result.entry is None
    assert "with dbias, crashed: measuring process on planted:0 died of SIGABRT" in result.note


def test_deterministic_gradients_are_never_added_in_any_order(backward):
    spec = dataclasses.replace(backward.problem.spec, deterministic=True)
    strict = dataclasses.replace(backward.problem, spec=spec)
    atomic = next(config for config in backward.seeds if config.dq == "atomic")
    backward.plan(evaluate={atomic: 10.0})
    free, fixed = backward.run(trials=16, problems=[backward.problem, strict]).results
    assert free.entry.config == atomic
    assert fixed.entry.config.dq != "atomic"
    assert {trial.config.dq for trial in fixed.trials} == {"kernel", "ordered"}


def test_phases_tuned_together_give_each_other_no_seeds(backward):
    forward = dataclasses.replace(backward.problem, spec=backward.problem.spec.forward())
    report = backward.run(trials=3, problems=[forward, backward.problem])
    templates = [{trial.config.template for trial in result.trials} for result in report.results]
    assert templates == [{"triton/forward"}, {"triton/backward"}]
    assert len(report.files) == 2


def test_a_wrong_gradient_is_caught_by_the_real_interpreter(backward):
    jobs = dataclasses.replace(backward.jobs, interpret="planted_jobs:interpret_corrupted", interpret_timeout_s=60.0)
    first, second = backward.seeds[:2]
    backward.plan(compile={first: {"registers": 32}, second: {"registers": 250}}, interpret={first: "wrong"})
    result = only(backward.run(gpu=None, jobs=jobs, trials=2))
    assert result.entry is not None
    assert result.entry.config == second
    assert result.entry.origin == "predicted"
    assert 0 < result.entry.accuracy.max_error < result.entry.accuracy.allowed_error
