"""Which few kernels serve many problems: a choice of columns in a table of times."""

from __future__ import annotations

import dataclasses
import itertools
import math
import typing

LOSS_LIMIT = 0.02
"""The loss that a portfolio is to stay within on each problem: what timings hardly tell apart."""

# A second or so.
_EXACT_SUBSETS = 10_000

Times = typing.Sequence[typing.Sequence[float | None]]
_Score = tuple[int, float, float]
_Losses = list[list[float]]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Cover:
    """A choice of columns.

    Attributes:
        columns: those chosen, in order; each is the best of them for some row.
        serving: for each row the chosen column that is best; None where none of them has a time.
        losses: of each row, how much longer that takes than the row's best, as a share; None likewise.
    """

    columns: tuple[int, ...]
    serving: tuple[int | None, ...]
    losses: tuple[float | None, ...]


def choose_columns(times: Times, count: int) -> Cover:
    """Return at most `count` columns that serve the rows best.

    What counts is, in this order: as few rows as can be without a time in any of them, the smallest worst loss, the
    smallest mean loss, the earlier columns. All sets are tried where there are few; else columns are added one by one
    and then exchanged one by one as long as that helps.

    Args:
        times: of each row in each column, all above 0; None where the column cannot serve the row.
        count: at least 1.
    """
    losses = _losses(times)
    columns = _undominated(losses)
    rows = [row for row in losses if min(row, default=math.inf) < math.inf]
    size = min(count, len(columns))
    if count >= len(rows):
        chosen = tuple(_best(row, columns) for row in rows)
    elif math.comb(len(columns), size) <= _EXACT_SUBSETS:
        chosen = min(itertools.combinations(columns, size), key=lambda subset: (_score(rows, subset), subset))
    else:
        chosen = _exchanged(rows, columns, _added(rows, columns, size))
    serving = tuple(_best(row, chosen) if chosen and _least(row, chosen) < math.inf else None for row in losses)
    return Cover(
        columns=tuple(sorted({column for column in serving if column is not None})),
        serving=serving,
        losses=tuple(None if best is None else row[best] for row, best in zip(losses, serving, strict=True)),
    )


def columns_needed(times: Times, limit: float = LOSS_LIMIT) -> int:
    """Return how many columns keep the loss of every row within `limit`; rows without any time do not count.

    At most so many, where `choose_columns` does not try all sets.
    """
    rows = [row for row in times if any(time is not None for time in row)]
    for count in range(1, len(rows)):
        if all(loss is not None and loss <= limit for loss in choose_columns(rows, count).losses):
            return count
    return len(rows)


def _losses(times: Times) -> _Losses:
    """Return what each time is above the least of its row, as a share; infinity for None."""
    found = []
    for row in times:
        least = min((time for time in row if time is not None), default=math.inf)
        found.append([math.inf if time is None else time / least - 1 for time in row])
    return found


def _undominated(losses: _Losses) -> list[int]:
    """Return the columns that serve some row, without those that another one, the first of equals, serves as well."""
    columns = list(zip(*losses, strict=True))
    kept = [index for index, column in enumerate(columns) if min(column) < math.inf]
    return [b for b in kept if not any(_dominates(columns[a], columns[b], a < b) for a in kept if a != b)]


def _dominates(a: tuple[float, ...], b: tuple[float, ...], is_first: bool) -> bool:
    return all(x <= y for x, y in zip(a, b, strict=True)) and (is_first or a != b)


def _score(rows: _Losses, columns: typing.Sequence[int]) -> _Score:
    """Return what is to be small: rows that are not served, and the worst and the mean loss of the others."""
    least = [_least(row, columns) for row in rows]
    served = [loss for loss in least if loss < math.inf]
    return len(least) - len(served), max(served, default=0.0), math.fsum(served) / max(1, len(served))


def _least(row: typing.Sequence[float], columns: typing.Sequence[int]) -> float:
    return min(row[column] for column in columns)


def _best(row: typing.Sequence[float], columns: typing.Sequence[int]) -> int:
    return min(columns, key=lambda column: (row[column], column))


def _added(rows: _Losses, columns: typing.Sequence[int], count: int) -> tuple[int, ...]:
    """Return `count` columns, each the best beside those before it."""
    chosen: tuple[int, ...] = ()
    while len(chosen) < count:
        others = [column for column in columns if column not in chosen]
        chosen = min(((*chosen, column) for column in others), key=lambda subset: (_score(rows, subset), subset))
    return chosen


def _exchanged(rows: _Losses, columns: typing.Sequence[int], chosen: tuple[int, ...]) -> tuple[int, ...]:
    """Return `chosen` after the best exchange of one column for another, again and again while that helps."""
    while True:
        others = [column for column in columns if column not in chosen]
        exchanges = [(*chosen[:place], other, *chosen[place + 1 :]) for place in range(len(chosen)) for other in others]
        best = min(exchanges, key=lambda subset: (_score(rows, subset), subset), default=chosen)
        if _score(rows, best) >= _score(rows, chosen):
            return chosen
        chosen = best
