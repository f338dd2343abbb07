"""Entries raced again: who takes part, what moves, and what stays as it was."""

from __future__ import annotations

import dataclasses
import typing

import pytest

from flashgen.codegen import KernelConfig, KernelResources, TritonForwardConfig, render
from flashgen.errors import NoKernelError, RegistryError
from flashgen.registry import (
    Accuracy,
    Interval,
    MeasuredRange,
    Performance,
    Provenance,
    RegistryEntry,
    RunnerUp,
    file_name,
    read_file,
    write_entries,
)
from flashgen.spec import Problem, parse_problem
from flashgen.target import named_target
from flashgen.tuning import SilentObserver, retune
from flashgen.tuning.choices import kept_choices
from flashgen.tuning.events import TrialRecord
from flashgen.tuning.retuning import Reraced, RetuneReport, problem_of, retune_entries

H200 = named_target("H200")
SMALL = parse_problem("b=1 hq=2 hkv=2 s=256 d=64 fp16")
LONGER = parse_problem("b=1 hq=2 hkv=2 s=512 d=64 fp16")
# Computed by kernels alone that the interpreter can run.
PORTABLE = parse_problem("b=1 hq=2 hkv=2 s=256 d=64 dropout fp16")
HUGE = TritonForwardConfig(block_m=4096, block_n=64, num_warps=4, num_stages=2)
STALE = "0123456789abcdef"
OLD_US = 120.0


class InterruptAfter(SilentObserver):
    """Presses Ctrl-C after so many trials."""

    def __init__(self, trials: int) -> None:
        self.left = trials

    def trial(self, record: TrialRecord, best: TrialRecord | None, done: int, seconds_left: float | None) -> None:
        self.left -= 1
        if not self.left:
            raise KeyboardInterrupt


def entry_of(
    problem: Problem, config: KernelConfig, *others: KernelConfig, digest: str = "", **changes: typing.Any
) -> RegistryEntry:
    entry = RegistryEntry(
        device_name="NVIDIA H200",
        arch="sm_90",
        spec=problem.spec,
        range=MeasuredRange.of(problem.shape),
        config=config,
        origin="measured",
        resources=KernelResources(registers=100, spills=0, smem_bytes=20000),
        performance=Performance(
            median_us=OLD_US, spread=0.01, tflops=1.0, baseline="none", baseline_us=None, timing="cold-l2"
        ),
        accuracy=Accuracy(max_error=1e-4, allowed_error=1e-3),
        runners_up=tuple(RunnerUp(config=other, median_us=OLD_US) for other in others),
        provenance=Provenance(
            template_digest=digest or render(problem.spec, config).digest,
            flashgen="0.1.0",
            triton="3.5.0",
            torch="2.11.0",
            driver="570.1",
            date="2026-01-22T07:00:00Z",
            trials=40,
            seed=0,
        ),
    )
    return dataclasses.replace(entry, **changes)


def again(bench: typing.Any, *entries: RegistryEntry, **settings: typing.Any) -> RetuneReport:
    """Write the entries and race them again."""
    write_entries(bench.folder / "registry", entries)
    return retune_entries(bench.prepared(**settings))


def only(report: RetuneReport) -> Reraced:
    (result,) = report.results
    return result


def stored(bench: typing.Any, phase: typing.Any = "forward") -> tuple[RegistryEntry, ...]:
    contents = read_file(bench.folder / "registry" / file_name("NVIDIA H200", phase))
    assert contents.issues == ()
    return contents.entries


@pytest.mark.parametrize("digest", ["", STALE], ids=["current", "stale"])
def test_kept_configs_and_the_default_are_raced_and_nothing_else(bench, digest):
    default, first, second, third = bench.seeds[:4]
    bench.plan(evaluate={default: 140.0, first: 130.0, second: 100.0, third: 110.0})
    old = entry_of(SMALL, first, second, third, digest=digest)
    report = again(bench, old)
    result = only(report)
    assert (result.stale, result.note, report.interrupted, report.missing) == (bool(digest), "", False, ())
    assert sorted(bench.calls("compile")) == sorted(map(str, (default, first, second, third)))
    assert set(bench.calls("race")) == {*map(str, (default, first, second, third)), "baselines"}
    new = result.new
    assert new is not None
    assert stored(bench) == (new,)
    assert (new.config, new.performance.median_us, new.range, new.origin) == (second, 100.0, old.range, "measured")
    assert [(r.config, r.median_us) for r in new.runners_up] == [(third, 110.0), (first, 130.0), (default, 140.0)]
    assert new.provenance.template_digest == render(SMALL.spec, second).digest
    assert new.provenance.date > old.provenance.date
    assert new.provenance.triton != "3.5.0"
    # The old winner got slower, and its runner-up takes its place.
    assert (result.changed, result.old_config_us, result.gain) == (True, 130.0, OLD_US / 100.0)
    assert result.baselines == {"cudnn": 90.0}


def test_a_winner_that_is_still_the_best_stays(bench):
    default, first, second = bench.seeds[:3]
    bench.plan(evaluate={default: 140.0, first: 90.0, second: 100.0})
    result = only(again(bench, entry_of(SMALL, first, second)))
    assert (result.changed, result.old_config_us, result.gain) == (False, 90.0, OLD_US / 90.0)


def test_a_tie_changes_nothing(bench):
    default, first = bench.seeds[:2]
    bench.plan(evaluate={default: 100.0, first: 100.5})
    result = only(again(bench, entry_of(SMALL, first, default)))
    assert result.new is not None
    assert (result.new.config, result.changed) == (first, False)
    assert len(bench.calls("compile")) == 2


@pytest.mark.parametrize("fault", ["wrong", "hang", "abort"])
def test_a_winner_that_became_wrong_loses(bench, fault):
    default, first, second = bench.seeds[:3]
    bench.plan(evaluate={default: 140.0, first: fault, second: 100.0})
    result = only(again(bench, entry_of(SMALL, first, second)))
    assert result.new is not None
    assert (result.new.config, result.changed, result.old_config_us) == (second, True, None)
    assert first not in {runner_up.config for runner_up in result.new.runners_up}


def test_when_nothing_is_right_the_entry_stays_and_the_reason_is_said(bench):
    default, first = bench.seeds[:2]
    bench.plan(evaluate={default: "wrong", first: "wrong"})
    old = entry_of(SMALL, first)
    report = again(bench, old)
    assert (only(report).new, report.files, stored(bench)) == (None, (), (old,))
    assert only(report).note.startswith("no config passed; of 2 refused, the first")


def test_configs_that_are_illegal_today_do_not_take_part(bench):
    default, first = bench.seeds[:2]
    bench.plan(evaluate={default: 140.0, first: 100.0})
    nothing_left = entry_of(SMALL, HUGE, dataclasses.replace(HUGE, num_warps=8), digest=STALE)
    result, some_left = again(bench, nothing_left, entry_of(LONGER, HUGE, first, digest=STALE)).results
    assert (result.new, result.gain, result.changed) == (None, None, False)
    assert result.note.startswith(f"none of 2 kept configs is legal any more; the first, {HUGE}: ")
    assert some_left.new is not None
    assert (some_left.new.config, some_left.changed) == (first, True)
    assert some_left.note == "1 of 2 kept configs are not legal any more"
    assert stored(bench) == (nothing_left, some_left.new)


def test_ctrl_c_leaves_what_was_not_raced_as_it_was_and_the_same_call_goes_on(bench):
    default, first, second = bench.seeds[:3]
    bench.plan(evaluate={default: 140.0, first: 130.0, second: 100.0})
    small, longer = entry_of(SMALL, first, second), entry_of(LONGER, first, second, digest=STALE)
    report = again(bench, small, longer, observer=InterruptAfter(5))
    assert report.interrupted
    done, interrupted = report.results
    assert done.new is not None
    assert (interrupted.new, interrupted.note) == (None, "interrupted")
    assert stored(bench) == (done.new, longer)
    # Six trials in all, and one that may have been under way at the Ctrl-C: what had ended is not paid for again.
    report = retune_entries(bench.prepared())
    assert not report.interrupted
    assert len(bench.calls("evaluate")) <= 7
    assert [result.new.config for result in report.results] == [second, second]
    assert stored(bench) == tuple(result.new for result in report.results)


def test_out_of_time_leaves_the_entry_as_it_was(bench):
    default, first = bench.seeds[:2]
    bench.plan(compile={first: {"sleep_s": 30.0}})
    jobs = dataclasses.replace(bench.jobs, compile_timeout_s=60.0)
    old = entry_of(SMALL, first, default)
    result = only(again(bench, old, budget_s=4.0, jobs=jobs))
    assert (result.new, stored(bench)) == (None, (old,))
    assert result.note.startswith("out of time after 1 of 2 configs")


def test_a_range_stays_and_its_smallest_sizes_stand_for_it(bench):
    sizes = MeasuredRange.of(SMALL.shape)
    wide = dataclasses.replace(sizes, seqlen_q=Interval(lo=256, hi=512), seqlen_k=Interval(lo=256, hi=512))
    old = entry_of(SMALL, *bench.seeds[:2], range=wide)
    assert problem_of(old) == SMALL
    result = only(again(bench, old))
    assert result.new is not None
    assert result.new.range == wide
    no_shape = dataclasses.replace(sizes, nheads_q=Interval(lo=3, hi=4), nheads_kv=Interval(lo=2, hi=2))
    odd = entry_of(SMALL, *bench.seeds[:2], range=no_shape)
    results = again(bench, odd).results
    assert [result.note.startswith("no problem stands for its range") for result in results] == [False, True]


def test_a_later_date_stays_later(bench):
    # As after a clock that went back: where both are merged, the new one must win.
    old = entry_of(SMALL, bench.seeds[1], bench.seeds[2])
    ahead = dataclasses.replace(old, provenance=dataclasses.replace(old.provenance, date="2999-12-31T23:59:58Z"))
    result = only(again(bench, ahead))
    assert result.new is not None
    assert result.new.provenance.date == "2999-12-31T23:59:59Z"
    assert stored(bench) == (result.new,)


def test_both_phases_and_no_other_gpu(bench):
    backward = dataclasses.replace(bench, problem=parse_problem("b=1 hq=2 hkv=2 s=256 d=64 fp16 backward"))
    gradients = entry_of(backward.problem, *backward.seeds[:2])
    elsewhere = entry_of(SMALL, *bench.seeds[:2], device_name="NVIDIA H100 80GB HBM3")
    report = again(bench, entry_of(SMALL, *bench.seeds[:2]), gradients, elsewhere)
    assert [result.old.spec.phase for result in report.results] == ["forward", "backward"]
    assert len(report.files) == 2
    assert stored(bench, "backward") == (report.results[1].new,)


def test_only_what_was_asked_for(bench):
    small, longer = entry_of(SMALL, *bench.seeds[:2]), entry_of(LONGER, *bench.seeds[:2])
    write_entries(bench.folder / "registry", [small, longer])
    with_lse = dataclasses.replace(LONGER, spec=dataclasses.replace(LONGER.spec, lse=True))
    report = retune_entries(bench.prepared(), [with_lse, PORTABLE])
    assert only(report).old == longer
    assert report.missing == (PORTABLE,)
    assert stored(bench) == (small, only(report).new)
    with pytest.raises(NoKernelError, match=r"no entry for NVIDIA H200 .*registry that covers b=1 .*dropout"):
        retune_entries(bench.prepared(), [PORTABLE])


def test_no_registry_is_said_and_none_is_made(bench):
    with pytest.raises(NoKernelError, match="no entry for NVIDIA H200"):
        retune(target=H200, registry=bench.folder / "none", study=str(bench.folder / "study"))
    assert not (bench.folder / "none").exists()


def test_a_damaged_registry_is_left_alone(bench):
    (path,) = write_entries(bench.folder / "registry", [entry_of(SMALL, *bench.seeds[:2])])
    path.write_bytes(path.read_bytes()[:-40])
    damaged = path.read_bytes()
    with pytest.raises(RegistryError, match="left untouched"):
        retune_entries(bench.prepared())
    assert path.read_bytes() == damaged
    assert bench.calls("compile") == []


def test_without_a_gpu_predictions_are_ranked_again_and_measurements_stay(bench):
    portable = dataclasses.replace(bench, problem=PORTABLE)
    narrow, wide = portable.seeds[1], portable.seeds[4]
    measured = entry_of(SMALL, *bench.seeds[:2])
    predicted = entry_of(PORTABLE, narrow, wide, origin="predicted")
    results = {result.old.origin: result for result in again(bench, measured, predicted, gpu=None).results}
    assert results["measured"].new is None
    assert results["measured"].note.startswith("it was measured, which a prediction does not replace")
    new = results["predicted"].new
    assert new is not None
    assert (new.config, new.origin, new.accuracy.allowed_error) == (wide, "predicted", 0.01)
    assert [runner_up.config for runner_up in new.runners_up] == [portable.seeds[0], narrow]
    assert set(bench.calls("interpret")) == {str(config) for config in (wide, narrow, portable.seeds[0])}
    assert set(stored(bench)) == {measured, new}


def test_the_order_of_kept_configs_is_that_of_trying_and_makes_no_other_study(bench):
    default, first, second = bench.seeds[:3]
    one = kept_choices(SMALL, H200, (second, first))
    other = kept_choices(SMALL, H200, (first, default, second))
    assert one.seeds == (second, first, default)
    assert other.seeds == (first, default, second)
    assert one.configs == other.configs
