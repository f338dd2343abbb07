"""Portfolios: every finalist on every problem of its spec, and a few kernels for them all."""

from __future__ import annotations

import dataclasses
import typing

import pytest

from flashgen.errors import InputError
from flashgen.registry import file_name, read_file
from flashgen.spec import parse_problem
from flashgen.target import named_target
from flashgen.tuning import SilentObserver, TuneReport, tune
from flashgen.tuning.covering import tune_portfolio
from flashgen.tuning.events import PortfolioResult, ProblemResult

# Computed by kernels alone that the interpreter can run, too.
SMALL = parse_problem("b=1 hq=2 hkv=2 s=256 d=64 dropout fp16")
LONGER = parse_problem("b=1 hq=2 hkv=2 s=512 d=64 dropout fp16")
LONGEST = parse_problem("b=1 hq=2 hkv=2 s=1024 d=64 dropout fp16")
BF16 = parse_problem("b=1 hq=2 hkv=2 s=256 d=64 dropout bf16")
# What is tried for each problem; 2 and 6 launch one kernel, in other groups of heads.
TRIED = 7


@pytest.fixture
def bench(bench):
    return dataclasses.replace(bench, problem=SMALL)


def plan(bench: typing.Any, confirm: dict[str, str] | None = None, **times: typing.Mapping[int, float | str]) -> None:
    """Write what each seed takes at each length, `s256={1: 100.0}`, some 300 us by default, and its last check."""
    words = {
        f"{length.removeprefix('s')} {seed}": seeds.get(number, 300.0 + number)
        for length, seeds in times.items()
        for number, seed in enumerate(bench.seeds[:TRIED])
    }
    bench.plan(evaluate=words, confirm=confirm or {})


def run(bench: typing.Any, kernels: int, *problems: typing.Any, **settings: typing.Any) -> TuneReport:
    return tune_portfolio(bench.prepared(trials=TRIED, **settings), problems or (SMALL, LONGER), kernels)


def only(report: TuneReport) -> PortfolioResult:
    (portfolio,) = report.portfolios
    return portfolio


def stored(bench: typing.Any) -> dict[int, typing.Any]:
    contents = read_file(bench.folder / "registry" / file_name("NVIDIA H200", "forward"))
    assert contents.issues == ()
    return {entry.range.seqlen_q.lo: entry for entry in contents.entries}


# Each is best at one length and bad at the other; the third is 4% off at both.
CROSSED = {
    "s256": {1: 100.0, 3: 104.0, 4: 105.0, 5: 150.0},
    "s512": {5: 100.0, 3: 104.0, 2: 105.0, 1: 150.0},
}


def test_one_kernel_for_all_is_the_one_with_the_least_worst_loss(bench):
    plan(bench, **CROSSED)
    report = run(bench, 1)
    portfolio = only(report)
    compromise = bench.seeds[3]
    assert portfolio.kernels == (compromise,)
    assert (portfolio.spec, portfolio.asked, portfolio.needed) == (SMALL.spec.structure(), 1, 2)
    assert [served.loss for served in portfolio.problems] == pytest.approx([0.04, 0.04])
    assert (portfolio.within(0.02), portfolio.within(0.05)) == (False, True)
    # Tuning itself found other winners, whose report is what it always was.
    assert [result.entry.config for result in report.results] == [bench.seeds[1], bench.seeds[5]]
    for served, winner in zip(portfolio.problems, (1, 5), strict=True):
        entry = served.entry
        assert (served.kernel, served.best_us, served.note) == (0, 100.0, "")
        assert (entry.config, entry.performance.median_us) == (compromise, 104.0)
        assert entry.runners_up[0].config == bench.seeds[winner]
        assert entry.runners_up[0].median_us == 100.0
        assert entry.provenance.trials == TRIED
    assert stored(bench) == {256: portfolio.problems[0].entry, 512: portfolio.problems[1].entry}


def test_two_kernels_lose_nothing_here(bench):
    plan(bench, **CROSSED)
    portfolio = only(run(bench, 2))
    assert set(portfolio.kernels) == {bench.seeds[1], bench.seeds[5]}
    assert [served.loss for served in portfolio.problems] == [0.0, 0.0]
    assert portfolio.within(0.02)
    assert [served.entry.config for served in portfolio.problems] == [bench.seeds[1], bench.seeds[5]]


def test_more_kernels_than_problems_are_the_best_of_each(bench):
    plan(bench, **CROSSED)
    portfolio = only(run(bench, 5))
    assert (len(portfolio.kernels), portfolio.asked, portfolio.needed) == (2, 5, 2)
    assert portfolio.within(0.0)


def test_what_a_launch_decides_makes_no_other_kernel(bench):
    plain, grouped = bench.seeds[2], bench.seeds[6]
    assert dataclasses.replace(grouped, head_group=1) == plain
    plan(bench, s256={2: 100.0, 6: 120.0, 1: 101.0}, s512={6: 100.0, 2: 120.0, 5: 101.0})
    portfolio = only(run(bench, 1))
    assert (portfolio.kernels, portfolio.needed) == ((plain,), 1)
    assert [served.entry.config for served in portfolio.problems] == [plain, grouped]
    assert portfolio.within(0.0)


def test_each_spec_has_kernels_of_its_own(bench):
    plan(bench, **CROSSED)
    report = run(bench, 1, SMALL, BF16, LONGER)
    assert [(portfolio.spec, len(portfolio.problems)) for portfolio in report.portfolios] == [
        (SMALL.spec.structure(), 2),
        (BF16.spec.structure(), 1),
    ]
    # Alone with its spec, a problem keeps its winner, and is not raced again.
    (alone,) = report.portfolios[1].problems
    assert (alone.loss, alone.entry) == (0.0, report.results[1].entry)
    assert len(report.files) == 1
    assert len(read_file(report.files[0]).entries) == 3


def test_a_problem_that_no_kernel_of_the_portfolio_can_serve_keeps_its_own(bench):
    seeds = bench.seeds[:TRIED]
    wrong = dict.fromkeys(range(TRIED), "wrong")
    plan(bench, s256=wrong | {1: 100.0, 3: 110.0}, s512=wrong | {3: 100.0, 1: 120.0}, s1024=wrong | {5: 100.0})
    report = run(bench, 1, SMALL, LONGER, LONGEST)
    portfolio = only(report)
    assert portfolio.kernels == (seeds[3],)
    last = portfolio.problems[2]
    assert (last.kernel, last.loss, last.entry) == (None, None, report.results[2].entry)
    assert (portfolio.within(1.0), portfolio.needed) == (False, 3)
    assert stored(bench)[1024] == report.results[2].entry
    assert stored(bench)[256].config == seeds[3]


def test_a_kernel_that_fails_the_last_check_is_not_chosen(bench):
    plan(bench, confirm={f"512 {bench.seeds[3]}": "wrong"}, **CROSSED)
    portfolio = only(run(bench, 1))
    # The other two are as bad as each other: the first of them.
    assert portfolio.kernels == (bench.seeds[1],)
    assert [served.loss for served in portfolio.problems] == pytest.approx([0.0, 0.5])
    assert f"{bench.seeds[3]}" in bench.calls("confirm")


class InterruptSecondRound(SilentObserver):
    """Presses Ctrl-C once each of two problems was tuned."""

    def __init__(self) -> None:
        self.finished: list[ProblemResult] = []

    def problem_finished(self, result: ProblemResult) -> None:
        self.finished.append(result)

    def trial(self, *args: object) -> None:
        if len(self.finished) == 2:
            raise KeyboardInterrupt


def test_ctrl_c_in_the_races_leaves_each_problem_its_own_winner(bench):
    plan(bench, **CROSSED)
    observer = InterruptSecondRound()
    report = run(bench, 1, observer=observer)
    assert report.interrupted
    assert report.portfolios == ()
    assert [result.entry.config for result in report.results] == [bench.seeds[1], bench.seeds[5]]
    assert list(stored(bench).values()) == [result.entry for result in report.results]
    # What was tried before is not tried again.
    report = run(bench, 1)
    assert only(report).kernels == (bench.seeds[3],)
    assert len(bench.calls("evaluate")) < 2 * TRIED + 2 * TRIED


def test_without_a_gpu_a_model_times_them(bench):
    portfolio = only(run(bench, 1, gpu=None))
    assert len(portfolio.kernels) == 1
    assert {served.entry.origin for served in portfolio.problems} == {"predicted"}
    assert all(served.entry.accuracy.allowed_error == 0.01 for served in portfolio.problems)
    # The model likes the same one at both lengths.
    assert (portfolio.kernels, portfolio.within(0.0)) == ((bench.seeds[4],), True)


def test_a_portfolio_of_nothing_is_refused(tmp_path):
    with pytest.raises(InputError, match="at least 1 kernel, got 0"):
        tune([SMALL], target=named_target("H200"), portfolio=0, registry=tmp_path, study=str(tmp_path / "study"))
    assert list(tmp_path.iterdir()) == []
