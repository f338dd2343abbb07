"""What commands print: tables and JSON on stdout, notes on stderr."""

from __future__ import annotations

import json
import sys
from collections.abc import Collection, Iterable, Mapping, Sequence

import rich.box
from rich.console import Console
from rich.table import Table
from rich.text import Text

# Wide enough that nothing wraps where no person's window sets the width: in files and pipes a row is a line.
_PIPE_WIDTH = 1000


def console(*, stderr: bool = False) -> Console:
    """Return a console on stdout or stderr that prints text as it is, one line a row where it is not a terminal."""
    terminal = Console(stderr=stderr, markup=False, highlight=False, emoji=False)
    if terminal.is_terminal:
        return terminal
    return Console(stderr=stderr, markup=False, highlight=False, emoji=False, width=_PIPE_WIDTH)


def printable(text: str) -> str:
    """Return `text` with every control character but the line break replaced: files of others end up in terminals."""
    return "".join(c if c.isprintable() or c == "\n" else "\N{REPLACEMENT CHARACTER}" for c in text)


def note(text: str) -> None:
    """Print a line for people on stderr."""
    print(printable(text), file=sys.stderr)


def make_table(columns: Sequence[str], rows: Iterable[Sequence[str]], *, numeric: Collection[str] = ()) -> Table:
    """Return a table; the columns named in `numeric` are aligned to the right."""
    table = Table(box=rich.box.SIMPLE_HEAD, pad_edge=False)
    for column in columns:
        table.add_column(column, justify="right" if column in numeric else "left", overflow="fold")
    for row in rows:
        table.add_row(*(Text(printable(cell)) for cell in row))
    return table


def print_table(columns: Sequence[str], rows: Iterable[Sequence[str]], *, numeric: Collection[str] = ()) -> None:
    """Print a table on stdout."""
    console().print(make_table(columns, rows, numeric=numeric))


def print_json(document: Mapping[str, object]) -> None:
    """Print one JSON document on stdout."""
    print(json.dumps(document, indent=2, allow_nan=False))


def ratio(numerator: float | None, denominator: float | None) -> str:
    """Return `1.25x`, or `-` where a number is missing or zero."""
    return f"{numerator / denominator:.2f}x" if numerator and denominator else "-"
