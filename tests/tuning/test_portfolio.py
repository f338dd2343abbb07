"""Choosing few columns of a table of times: against trying every set, and what holds where there are too many."""

from __future__ import annotations

import itertools
import math

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from flashgen.tuning import portfolio
from flashgen.tuning.portfolio import LOSS_LIMIT, Times, choose_columns, columns_needed

Score = tuple[int, float, float]

# Few different times, so that ties and equal columns are common.
TIMES = st.one_of(st.none(), st.sampled_from([1.0, 1.01, 1.05, 1.3, 2.0]), st.floats(0.5, 50.0))


@st.composite
def tables(draw: st.DrawFn) -> list[list[float | None]]:
    columns = draw(st.integers(1, 6))
    return draw(st.lists(st.lists(TIMES, min_size=columns, max_size=columns), min_size=1, max_size=5))


def score(times: Times, columns: tuple[int, ...]) -> Score:
    """What is to be small, from its definition: rows not served, the worst loss, the mean loss."""
    losses = []
    unserved = 0
    for row in times:
        known = [time for time in row if time is not None]
        own = [row[column] for column in columns if row[column] is not None]
        if own:
            losses.append(min(own) / min(known) - 1)
        else:
            unserved += bool(known)
    return unserved, max(losses, default=0.0), math.fsum(losses) / max(1, len(losses))


def best_by_trying_all(times: Times, count: int) -> Score:
    columns = range(len(times[0]))
    sizes = range(1, min(count, len(columns)) + 1)
    return min(score(times, subset) for size in sizes for subset in itertools.combinations(columns, size))


@given(tables(), st.integers(1, 7))
@settings(deadline=None)
def test_no_set_of_so_many_columns_is_better(times: list[list[float | None]], count: int) -> None:
    cover = choose_columns(times, count)
    assert len(cover.columns) <= count
    assert score(times, cover.columns) == pytest.approx(best_by_trying_all(times, count))
    for row, column, loss in zip(times, cover.serving, cover.losses, strict=True):
        usable = [other for other in cover.columns if row[other] is not None]
        assert (column is None) is (loss is None) is (not usable)
        if column is not None:
            assert row[column] == min(row[other] for other in usable)
            assert loss == row[column] / min(time for time in row if time is not None) - 1
    assert {column for column in cover.serving if column is not None} == set(cover.columns)


@given(tables())
@settings(deadline=None)
def test_so_many_are_needed_and_no_fewer(times: list[list[float | None]]) -> None:
    needed = columns_needed(times)

    def reaches(count: int) -> bool:
        unserved, worst, _ = best_by_trying_all(times, count)
        return (unserved, worst <= LOSS_LIMIT) == (0, True)

    known = sum(any(time is not None for time in row) for row in times)
    assert needed <= known
    assert not known or reaches(needed)
    assert not any(reaches(count) for count in range(1, needed))


@given(tables(), st.integers(1, 7))
@settings(deadline=None)
def test_adding_and_exchanging_ends_where_no_exchange_helps(times: list[list[float | None]], count: int) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(portfolio, "_EXACT_SUBSETS", 0)
        chosen = choose_columns(times, count).columns
    assert len(chosen) <= count
    reached = score(times, chosen)
    exact = best_by_trying_all(times, count)
    assert reached >= exact or reached == pytest.approx(exact)
    if count == 1 or count >= len(times):
        assert reached == pytest.approx(exact)
    for place, other in itertools.product(range(len(chosen)), range(len(times[0]))):
        exchanged = (*chosen[:place], other, *chosen[place + 1 :])
        assert score(times, exchanged) >= reached or score(times, exchanged) == pytest.approx(reached)


def test_the_worst_loss_counts_before_the_mean() -> None:
    # The first is best three times of four, and 30% off once.
    times = [[1.0, 1.04], [1.0, 1.04], [1.0, 1.04], [1.3, 1.0]]
    assert choose_columns(times, 1).columns == (1,)
    assert choose_columns(times, 2).losses == (0.0,) * 4
    assert columns_needed(times) == 2


def test_a_row_without_a_time_counts_more_than_any_loss() -> None:
    times = [[1.0, 9.0], [1.0, 9.0], [None, 9.0]]
    assert choose_columns(times, 1).columns == (1,)
    alone = [[1.0, None], [None, 1.0], [None, None]]
    cover = choose_columns(alone, 1)
    assert (cover.columns, cover.serving, cover.losses) == ((0,), (0, None, None), (0.0, None, None))


def test_many_columns_end_in_time_and_no_worse_than_the_best_of_each_size_below() -> None:
    times = [[1.0 + ((7 * row + 3 * column * column) % 41) / 40 for column in range(60)] for row in range(15)]
    losses = [max(loss or 0.0 for loss in choose_columns(times, count).losses) for count in (1, 2, 4, 8, 15)]
    assert losses == sorted(losses, reverse=True)
    assert losses[-1] == 0.0
