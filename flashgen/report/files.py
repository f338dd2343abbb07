"""Reports on disk."""

from __future__ import annotations

import contextlib
import re
import typing
from pathlib import Path

from flashgen.errors import InputError
from flashgen.report.charts import overview_charts, problem_charts
from flashgen.report.data import StudyReport
from flashgen.report.drawing import style, write_png
from flashgen.report.page import render_page
from flashgen.storage import replace_file

_MAX_NAME_CHARACTERS = 100


def write_page(report: StudyReport, path: Path) -> None:
    """Write the page to `path`, whole or not at all.

    Raises:
        InputError: if it cannot be written, or `path` is the study itself.
    """
    if path.exists() and Path(report.place).exists() and path.samefile(report.place):
        raise InputError(f"{path} is the study; name another file for the page with --out")
    with _refusing(path):
        replace_file(path, render_page(report).encode())


def write_charts(report: StudyReport, folder: Path) -> tuple[Path, ...]:
    """Write every chart as a PNG file for print, 300 dots per inch, and return the files.

    Raises:
        InputError: if they cannot be written.
    """
    named = {chart.name: chart for chart in overview_charts(report.problems).values()}
    for index, problem in enumerate(report.problems, 1):
        prefix = f"{index:02d}-{problem.text}"[:_MAX_NAME_CHARACTERS]
        named |= {f"{prefix}-{name}": chart for name, chart in problem_charts(problem).items()}
    written = []
    with _refusing(folder):
        folder.mkdir(parents=True, exist_ok=True)
        for name, chart in named.items():
            written.append(folder / f"{_plain(name)}.png")
            with style():
                write_png(chart.draw(), written[-1])
    return tuple(written)


def _plain(name: str) -> str:
    """Return a name as a file may have it anywhere: a problem's text holds blanks, and what not."""
    return re.sub(r"[^A-Za-z0-9_=.]+", "-", name).strip("-.")


@contextlib.contextmanager
def _refusing(path: Path) -> typing.Iterator[None]:
    try:
        yield
    except OSError as error:
        raise InputError(f"{path} cannot be written ({error}); name another place") from error
