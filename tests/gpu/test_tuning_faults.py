"""Kernels that hang, stray, lie or eat the memory of a real GPU: each costs its trial, none wins, the GPU lives on."""

from __future__ import annotations

import collections
import itertools
import json
import multiprocessing.connection
import time
import typing
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

import flashgen
from flashgen.codegen import KernelConfig
from flashgen.compile import CompileReport, compile_job
from flashgen.launch import detect_target
from flashgen.measure import Measurement, Outcome, Rejected, Timing
from flashgen.registry import clear_bundles
from flashgen.spec import Problem, parse_problem
from flashgen.tuning import SilentObserver
from flashgen.tuning.choices import find_choices
from flashgen.tuning.effort import Effort
from flashgen.tuning.events import ProblemResult, TrialRecord
from flashgen.tuning.gpu_evaluator import GpuEvaluator
from flashgen.tuning.jobs import Jobs
from flashgen.tuning.run import Run

pytestmark = pytest.mark.gpu

PROBLEM = parse_problem("b=1 hq=2 hkv=2 s=256 d=64 fp16")
GRADIENTS = parse_problem("b=1 hq=4 hkv=2 s=256 d=64 causal bias=fp32 fp16 backward")
FAULTS = {
    "illegal access": ("run", "the GPU context is lost"),
    "wrong result": ("accuracy", "at "),
    "hang": ("run", "timeout: measuring process on cuda:0 killed after"),
    "too much memory": ("run", "out of device memory"),
    "abort": ("run", "died of SIGABRT"),
}
TIMEOUT_S = 20.0
RECOVERY_S = 10.0
EFFORT = Effort(trials=32, finalists=3, final_ms=10.0, seconds=240.0, seeds_only=True)

Tune = typing.Callable[..., ProblemResult]


class Watch(SilentObserver):
    """Keeps when each trial ended."""

    def __init__(self) -> None:
        self.ended: list[tuple[float, TrialRecord]] = []

    def trial(self, record: TrialRecord, best: TrialRecord | None, done: int, seconds_left: float | None) -> None:
        self.ended.append((time.monotonic(), record))


def seeds_of(problem: Problem) -> tuple[KernelConfig, ...]:
    return find_choices(problem, detect_target(torch.device("cuda:0")), EFFORT).seeds


@pytest.fixture
def seeds() -> tuple[KernelConfig, ...]:
    return seeds_of(PROBLEM)


@pytest.fixture
def tune(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Tune]:
    """A function that tunes the small problem, every seed of it, with planted faults by job and config."""
    monkeypatch.syspath_prepend(str(Path(__file__).parent))
    monkeypatch.setenv("FAULTY_PLAN", str(tmp_path / "plan.json"))
    # What hangs or crashes is quarantined there.
    monkeypatch.setenv("FLASHGEN_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr("flashgen.resources.shipped_registry_dir", lambda: tmp_path / "shipped")

    def run(
        plan: dict[str, dict[KernelConfig, str]], observer: Watch | None = None, problem: Problem = PROBLEM
    ) -> ProblemResult:
        words = {job: {str(config): fault for config, fault in faults.items()} for job, faults in plan.items()}
        (tmp_path / "plan.json").write_text(json.dumps(words))
        report = Run(
            target=detect_target(torch.device("cuda:0")),
            gpus=("cuda:0",),
            effort=EFFORT,
            budget_s=None,
            seed=0,
            folder=tmp_path / "registry",
            study=str(tmp_path / "study"),
            workers=4,
            observer=observer or SilentObserver(),
            jobs=Jobs(
                evaluate="faulty_gpu_jobs:evaluate",
                race="faulty_gpu_jobs:race",
                confirm="faulty_gpu_jobs:confirm",
                first_evaluate_timeout_s=TIMEOUT_S,
                evaluate_timeout_s=TIMEOUT_S / 2,
                race_timeout_s=TIMEOUT_S,
            ),
        ).tune([problem])
        assert not report.interrupted
        return report.results[0]

    yield run
    # What was loaded while the shipped registry was hidden must not serve another test.
    clear_bundles()


def assert_gpu_works() -> None:
    q, k, v = (torch.randn(1, 2, 64, 64, dtype=torch.float16, device="cuda") for _ in range(3))
    expected = torch.nn.functional.scaled_dot_product_attention(q, k, v)
    torch.testing.assert_close(flashgen.attention(q, k, v), expected, atol=5e-3, rtol=0)


def test_each_fault_costs_one_trial_and_none_wins(tune: Tune, seeds: tuple[KernelConfig, ...]) -> None:
    # In what would run untuned, and in kernels that run anywhere.
    portable = [config for config in seeds[1:] if config.template == "triton/forward"]
    planted = dict(zip((seeds[0], *portable), FAULTS, strict=False))
    watch = Watch()
    result = tune({"evaluate": planted}, watch)
    outcomes = {trial.config: trial.result for trial in result.trials}
    assert outcomes.keys() >= set(seeds)
    for config, fault in planted.items():
        stage, words = FAULTS[fault]
        refused = outcomes[config]
        assert isinstance(refused, Rejected), fault
        assert (refused.stage, words in refused.reason) == (stage, True), refused
    # Beside the planted ones nothing fails, but for what spills or has the binary of a planted one.
    known = [outcomes[config] for config in planted]
    others = [outcome for config, outcome in outcomes.items() if config not in planted and outcome not in known]
    assert all(isinstance(outcome, Timing) or outcome.stage == "resources" for outcome in others)
    assert sum(isinstance(outcome, Timing) for outcome in others) >= 3
    assert result.entry is not None
    assert result.entry.config not in planted
    assert not {runner_up.config for runner_up in result.entry.runners_up} & planted.keys()
    assert result.entry.origin == "measured"
    assert_gpu_works()
    # A fault's own time is its timeout at most; a new process and the references take the rest.
    times = [when for when, _ in watch.ended]
    assert max(after - before for before, after in itertools.pairwise(times)) < TIMEOUT_S + RECOVERY_S

    # The study remembers: the same command tries nothing again, and what failed cannot win now either.
    again = tune({})
    assert all(trial.resumed for trial in again.trials)
    assert set(collections.Counter(trial.config for trial in again.trials).values()) == {1}
    assert again.entry is not None
    assert again.entry.config not in planted


@pytest.mark.parametrize(
    "words",
    ["b=4 hq=32 hkv=8 s=4096 d=128 causal bf16", "b=2 hq=16 hkv=4 s=4096 d=128 causal bf16 backward"],
    ids=["forward", "backward"],
)
def test_the_next_candidate_has_its_result_within_seconds_of_a_fault(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], words: str
) -> None:
    problem, target = parse_problem(words), detect_target(torch.device("cuda:0"))
    monkeypatch.syspath_prepend(str(Path(__file__).parent))
    monkeypatch.setenv("FAULTY_PLAN", str(tmp_path / "plan.json"))
    right, *others = seeds_of(problem)
    planted = dict(zip(others, ("illegal access", "abort", "hang"), strict=False))
    plan = {"evaluate": {str(config): fault for config, fault in planted.items()}}
    (tmp_path / "plan.json").write_text(json.dumps(plan))
    reports = {config: compile_job(problem.spec, config, target) for config in (right, *planted)}
    evaluator = GpuEvaluator(["cuda:0"], Jobs(evaluate="faulty_gpu_jobs:evaluate"))
    try:
        evaluator.start()
        first = evaluated(evaluator, [right], problem, reports)
        recovered = {}
        for config, fault in planted.items():
            (fell, refused), (stood, timed) = evaluated(evaluator, [config, right], problem, reports)
            assert isinstance(refused, Rejected), fault
            assert isinstance(timed, Measurement), timed
            recovered[fault] = stood - fell
    finally:
        evaluator.close()
    assert isinstance(first[0][1], Measurement)
    with capsys.disabled():
        said = ", ".join(f"{fault} {seconds:.1f} s" for fault, seconds in recovered.items())
        print(f"\nfrom the end of a fault to the next result, {words}: {said}")
    assert max(recovered.values()) <= RECOVERY_S


def evaluated(
    evaluator: GpuEvaluator,
    configs: typing.Sequence[KernelConfig],
    problem: Problem,
    reports: dict[KernelConfig, CompileReport],
) -> list[tuple[float, Outcome]]:
    """Return what became of configs, in order, and when."""
    for number, config in enumerate(configs):
        evaluator.submit(number, problem, config, reports[config])
    ended: list[tuple[float, Outcome]] = []
    until = time.monotonic() + 300.0
    while len(ended) < len(configs):
        assert time.monotonic() < until
        multiprocessing.connection.wait(evaluator.connections, 0.05)
        # Killing what hangs is part of what follows.
        now = time.monotonic()
        ended += [(now, outcome) for _, outcome in evaluator.collect()]
    return ended


def test_faults_at_the_very_end_lose_the_win(tune: Tune) -> None:
    first = tune({}).entry
    assert first is not None
    best, second = first.config, first.runners_up[0].config
    entry = tune({"race": {best: "hang"}, "confirm": {second: "illegal access"}}).entry
    assert entry is not None
    assert entry.config not in (best, second)
    assert best not in {runner_up.config for runner_up in entry.runners_up}
    assert_gpu_works()


def test_a_wrong_gradient_of_any_kind_costs_one_trial_and_never_wins(tune: Tune) -> None:
    seeds = seeds_of(GRADIENTS)
    planted = dict(zip(seeds, ("dq", "dk", "dv", "illegal access", "hang"), strict=False))
    result = tune({"evaluate": planted}, problem=GRADIENTS)
    outcomes = {trial.config: trial.result for trial in result.trials}
    for config, fault in planted.items():
        refused = outcomes[config]
        assert isinstance(refused, Rejected), fault
        if refused.stage == "resources":
            continue
        stage, words = FAULTS.get(fault, ("accuracy", f": {fault}["))
        assert (refused.stage, words in refused.reason) == (stage, True), refused
    known = [outcomes[config] for config in planted]
    others = [outcome for config, outcome in outcomes.items() if config not in planted and outcome not in known]
    assert all(isinstance(outcome, Timing) or outcome.stage == "resources" for outcome in others), others
    assert sum(isinstance(outcome, Timing) for outcome in others) >= 3
    assert result.entry is not None
    assert result.entry.config not in planted
    assert result.entry.spec == GRADIENTS.spec
    assert_gpu_works()
    # The gradient of the bias is other code, which is checked last.
    best = result.entry.config
    again = tune({"confirm": {best: "dbias"}}, problem=GRADIENTS)
    assert again.entry is not None
    assert again.entry.config not in {best, *planted}
