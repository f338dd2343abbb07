"""The charts of a report; each is drawn when it is asked for."""

from __future__ import annotations

import collections
import dataclasses
import functools
import itertools
import typing

from matplotlib.artist import Artist
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import MaxNLocator

from flashgen.codegen.kernel_config import Scalar
from flashgen.report.data import Parameter, ProblemReport, Trial
from flashgen.report.drawing import (
    BESIDE,
    DOT,
    INK,
    MUTED,
    NARROW_IN,
    REJECTED,
    WIDE_IN,
    WINNER,
    legend_above,
    new_axes,
)
from flashgen.report.roofline import roofline

# Times beyond so many times the best would hide how the good ones differ.
_FAR = 2
_MAX_BARS = 12


@dataclasses.dataclass(frozen=True, kw_only=True)
class Chart:
    """A chart.

    Attributes:
        name: of a file, without its ending.
        description: for those who cannot see it.
        draw: draws it; to be called within `drawing.style`.
    """

    name: str
    description: str
    draw: typing.Callable[[], Figure]


def problem_charts(report: ProblemReport) -> dict[str, Chart]:
    """Return the charts of a problem by name; without those that there is nothing to draw for."""
    charts: list[Chart] = []
    if report.passed:
        charts.append(
            Chart(
                name="best-by-trial",
                description="Best time so far against the number of trials",
                draw=functools.partial(_progress, report, by_time=False),
            )
        )
    if report.passed and all(trial.elapsed_s is not None for trial in report.trials):
        charts.append(
            Chart(
                name="best-by-time",
                description="Best time so far against seconds of searching",
                draw=functools.partial(_progress, report, by_time=True),
            )
        )
    if report.finalists:
        charts.append(
            Chart(
                name="finalists",
                description="Times of the winner and the next best, with their spread",
                draw=functools.partial(_finalists, report),
            )
        )
    if report.roof is not None and report.finalists:
        charts.append(
            Chart(
                name="roofline",
                description="Achieved TFLOP/s against operations per byte, under the roofs of the GPU",
                draw=functools.partial(roofline, {1: report}),
            )
        )
    if report.importances.shares:
        charts.append(
            Chart(
                name="importances",
                description="Importance of each parameter",
                draw=functools.partial(_importances, report),
            )
        )
    charts += [
        Chart(
            name=f"parameter-{parameter.name}",
            description=f"Times of the trials by {parameter.name}",
            draw=functools.partial(_parameter, report, parameter),
        )
        for parameter in report.parameters
        if any(value.passed for value in parameter.values)
    ]
    return {chart.name: chart for chart in charts}


def overview_charts(reports: typing.Sequence[ProblemReport]) -> dict[str, Chart]:
    """Return the roofline of each GPU that several problems were tuned for, with all their winners, by device."""
    found: dict[str, dict[int, ProblemReport]] = {}
    for index, report in enumerate(reports, 1):
        if report.roof is not None and report.winner is not None:
            found.setdefault(report.device, {})[index] = report
    return {
        device: Chart(
            name=f"overview-roofline-{device}",
            description=f"Achieved TFLOP/s of all winners against operations per byte, on {device}",
            draw=functools.partial(roofline, of_device),
        )
        for device, of_device in found.items()
        if len(of_device) > 1
    }


def _progress(report: ProblemReport, *, by_time: bool) -> Figure:
    def place(trial: Trial) -> float:
        return (trial.elapsed_s or 0.0) if by_time else trial.place

    figure, axes = new_axes(WIDE_IN, 3.1)
    _draw_times(axes, report, [(place(trial), trial.us) for trial in report.passed if trial.us is not None], 3.5)
    steps = [(place(t), us) for t, us in zip(report.trials, report.best_so_far(), strict=True) if us is not None]
    axes.step(*zip(*steps, strict=True), where="post", color=WINNER, linewidth=1.8, label="best so far")
    rejected = [place(trial) for trial in report.trials if trial.us is None]
    if rejected:
        axes.plot(
            rejected,
            [0.03] * len(rejected),
            "x",
            color=REJECTED,
            markersize=4.5,
            transform=axes.get_xaxis_transform(),
            label="rejected",
        )
    if report.untuned is not None and report.untuned.us is not None and report.untuned.us < axes.get_ylim()[1]:
        axes.axhline(report.untuned.us, color=BESIDE, linewidth=1.2, linestyle=(0, (4, 3)), label="untuned default")
    axes.set_ylabel("median time (µs)")
    axes.set_xlabel("time of searching (s)" if by_time else "trials that ended")
    axes.xaxis.set_major_locator(MaxNLocator(7, integer=not by_time))
    axes.set_xlim(left=0)
    legend_above(figure)
    return figure


def _draw_times(
    axes: Axes, report: ProblemReport, points: typing.Sequence[tuple[float, float]], markersize: float
) -> None:
    """Draw (place, us) points where the good ones are told apart; those that are far off, as triangles at the top."""
    best = min(trial.us for trial in report.passed if trial.us is not None)
    slowest = max(trial.us for trial in report.passed if trial.us is not None)
    far = _FAR * best
    near = [point for point in points if point[1] <= far]
    axes.plot(*_columns(near), "o", color=DOT, markersize=markersize, label="a trial")
    off = [(place, 0.975) for place, us in points if us > far]
    if off:
        axes.plot(
            *_columns(off),
            "^",
            color=DOT,
            markersize=markersize + 0.5,
            markerfacecolor="none",
            transform=axes.get_xaxis_transform(),
            label=f"over {_FAR}x the best",
        )
    top = far if slowest > far else slowest
    # Room below for the marks of those rejected, and above for the triangles.
    room = max(top - best, 0.02 * best)
    axes.set_ylim(best - 0.16 * room, top + 0.1 * room)
    axes.yaxis.set_major_locator(MaxNLocator(5))


def _columns(points: typing.Sequence[tuple[float, float]]) -> tuple[list[float], list[float]]:
    return [x for x, _ in points], [y for _, y in points]


def _finalists(report: ProblemReport) -> Figure:
    figure, axes = new_axes(WIDE_IN, 0.9 + 0.38 * len(report.finalists))
    for row, finalist in enumerate(report.finalists):
        colour = WINNER if row == 0 else MUTED
        timing = finalist.timing
        half = timing.median_us * timing.spread / 2
        axes.errorbar(
            timing.median_us, row, xerr=half, fmt="o", color=colour, markersize=4.5, capsize=3, elinewidth=1.6
        )
        if finalist.raced_us is not None and report.origin == "measured":
            axes.plot(finalist.raced_us, row, "D", color=colour, markersize=5, markerfacecolor="none")
        name = f"{row + 1}  {finalist.trial.name}"
        axes.text(0.0, row - 0.36, name, transform=axes.get_yaxis_transform(), va="center", fontsize=8.5, color=INK)
    handles: list[Artist] = [Line2D([], [], color=MUTED, marker="o", markersize=4.5, label=_search_label(report))]
    if any(finalist.raced_us for finalist in report.finalists) and report.origin == "measured":
        handles.append(
            Line2D([], [], color=MUTED, marker="D", markerfacecolor="none", linestyle="", label="final comparison")
        )
    if report.baseline is not None:
        name, us = report.baseline
        axes.axvline(us, color=BESIDE, linewidth=1.2, linestyle=(0, (4, 3)))
        handles.append(Line2D([], [], color=BESIDE, linestyle=(0, (4, 3)), label=name))
    axes.set_ylim(len(report.finalists) - 0.5, -0.75)
    axes.set_yticks([])
    axes.grid(visible=False, axis="y")
    axes.spines["left"].set_visible(False)
    axes.margins(x=0.08)
    axes.xaxis.set_major_locator(MaxNLocator(6))
    axes.set_xlabel("time (µs)")
    legend_above(figure, handles)
    return figure


def _search_label(report: ProblemReport) -> str:
    return "median and spread in the search" if report.origin == "measured" else "predicted"


def _importances(report: ProblemReport) -> Figure:
    shares = dict(itertools.islice(report.importances.shares.items(), _MAX_BARS))
    figure, axes = new_axes(WIDE_IN, 0.6 + 0.24 * len(shares))
    bars = axes.barh(list(shares), list(shares.values()), color=WINNER, height=0.62)
    axes.bar_label(bars, labels=[f"{share:.0%}" for share in shares.values()], padding=4, color=MUTED, fontsize=8.5)
    axes.invert_yaxis()
    axes.set_xlim(0, max(shares.values()) * 1.15)
    axes.set_xticks([])
    axes.grid(visible=False)
    axes.spines["bottom"].set_visible(False)
    axes.set_xlabel("share of what tells the fastest tenth from the rest")
    return figure


def _parameter(report: ProblemReport, parameter: Parameter) -> Figure:
    values = [value.value for value in parameter.values]
    figure, axes = new_axes(NARROW_IN, 1.9)
    points = [(values.index(value), trial.us) for trial, value in _valued(report.trials, parameter.name) if trial.us]
    # Trials of one value side by side, in the order in which they ended.
    counts = collections.Counter(place for place, _ in points)
    seen: collections.Counter[int] = collections.Counter()
    spread = []
    for place, _ in points:
        spread.append(place + (0.44 * seen[place] / max(1, counts[place] - 1) - 0.22 if counts[place] > 1 else 0.0))
        seen[place] += 1
    _draw_times(axes, report, list(zip(spread, (us for _, us in points), strict=True)), 3)
    for place, value in enumerate(parameter.values):
        if value.best_us is not None and value.median_us is not None:
            axes.hlines(value.median_us, place - 0.3, place + 0.3, color=INK, linewidth=1.4)
            axes.plot(place, value.best_us, "_", color=WINNER, markersize=18, markeredgewidth=2.2)
    axes.set_xlim(-0.6, len(values) - 0.4)
    axes.set_xticks(range(len(values)), [str(value).replace("/", "/\n") for value in values])
    axes.grid(visible=False, axis="x")
    axes.set_ylabel("time (µs)")
    return figure


def _valued(trials: typing.Iterable[Trial], name: str) -> typing.Iterator[tuple[Trial, Scalar]]:
    for trial in trials:
        numbers = trial.config.as_dict()
        if name in numbers:
            yield trial, numbers[name]
