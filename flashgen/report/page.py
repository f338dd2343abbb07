"""The report as one HTML page that fetches nothing and needs no script."""

from __future__ import annotations

import dataclasses
import typing
from pathlib import Path

import jinja2
import markupsafe

from flashgen.report.charts import Chart, overview_charts, problem_charts
from flashgen.report.data import ProblemReport, StudyReport
from flashgen.report.drawing import number, style, to_svg

_TEMPLATE = "page.html.jinja"


@dataclasses.dataclass(frozen=True, kw_only=True)
class _Section:
    """One problem of the page: where links lead, what it says, its charts by name."""

    anchor: str
    report: ProblemReport
    charts: dict[str, markupsafe.Markup]


def render_page(report: StudyReport) -> str:
    """Return the page; every text of the study in it is escaped."""
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(Path(__file__).parent),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters |= {"number": _number, "ratio": _ratio, "duration": _duration}
    sections = [
        _Section(anchor=f"problem-{index}", report=problem, charts=_drawn(problem_charts(problem), f"p{index}"))
        for index, problem in enumerate(report.problems, 1)
    ]
    overviews = _drawn(overview_charts(report.problems), "overview")
    return environment.get_template(_TEMPLATE).render(report=report, sections=sections, overviews=overviews)


def _drawn(charts: typing.Mapping[str, Chart], salt: str) -> dict[str, markupsafe.Markup]:
    drawn = {}
    for name, chart in charts.items():
        with style(f"{salt}-{name}"):
            # matplotlib escapes the texts in it.
            drawn[name] = markupsafe.Markup(to_svg(chart.draw(), chart.description))
    return drawn


def _number(value: float | None) -> str:
    return "-" if value is None else number(value)


def _ratio(value: float) -> str:
    return f"{value:.2f}x"


def _duration(seconds: float | None) -> str:
    if seconds is None:
        return "-"
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes} min {rest} s" if minutes else f"{seconds:.3g} s"
