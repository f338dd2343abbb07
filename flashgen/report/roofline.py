"""What problems reach, under what the GPU allows (Williams, Waterman, Patterson: CACM 52(4), 2009)."""

from __future__ import annotations

import math
import typing

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from flashgen.report.data import ProblemReport
from flashgen.report.drawing import BESIDE, DOT, INK, MUTED, WIDE_IN, WINNER, legend_above, log_scales, new_axes, number


def roofline(numbered: typing.Mapping[int, ProblemReport]) -> Figure:
    """Draw the winners of problems on one GPU under its roofs; of a single problem, also what came close to it."""
    reports = list(numbered.values())
    figure, axes = new_axes(WIDE_IN, 3.4)
    roofs = [report.roof for report in reports if report.roof is not None]
    ridges = [roof.peak_tflops / roof.bandwidth_tbs for roof in roofs]
    places = [*(roof.intensity for roof in roofs), *ridges]
    low, high = min(places) / 4, max(places) * 4
    for peak, bandwidth in sorted({(roof.peak_tflops, roof.bandwidth_tbs) for roof in roofs}):
        corners = [low, peak / bandwidth, high]
        axes.plot(corners, [min(peak, x * bandwidth) for x in corners], color=INK, linewidth=1.4)
        axes.annotate(
            f"{number(peak)} TFLOP/s", (high, peak), (0, 4), textcoords="offset points", ha="right", color=MUTED
        )
    achieved = _draw_single(axes, reports[0]) if len(reports) == 1 else _draw_winners(axes, numbered)
    log_scales(axes)
    bandwidth, peak = roofs[0].bandwidth_tbs, max(roof.peak_tflops for roof in roofs)
    bottom = min([*achieved, peak / 2]) / 3
    start = max(low, bottom / bandwidth)
    axes.set_xlim(low, high)
    axes.set_ylim(bottom, peak * 1.8)
    axes.text(
        start * 1.25,
        start * 1.25 * bandwidth * 1.15,
        f"{number(bandwidth)} TB/s",
        # Along the roof, at whatever angle it stands in the picture.
        rotation=math.degrees(math.atan(bandwidth)),
        rotation_mode="anchor",
        transform_rotates_text=True,
        color=MUTED,
    )
    axes.set_xlabel("arithmetic intensity (FLOP per byte of device memory)")
    axes.set_ylabel("TFLOP/s, at most" if any(report.is_upper_bound for report in reports) else "TFLOP/s")
    if achieved and len(reports) == 1:
        legend_above(figure)
    return figure


def _draw_winners(axes: Axes, numbered: typing.Mapping[int, ProblemReport]) -> list[float]:
    """Draw the winner of each problem with the problem's number, and return their TFLOP/s."""
    drawn: list[float] = []
    for index, report in numbered.items():
        rate = None if report.winner is None else report.tflops(report.winner.us)
        if report.roof is not None and rate is not None:
            place = (report.roof.intensity, rate)
            axes.plot(*place, "o", color=WINNER, markersize=5)
            axes.annotate(str(index), place, (5, -3), textcoords="offset points", fontsize=8, color=MUTED)
            drawn.append(rate)
    return drawn


def _draw_single(axes: Axes, report: ProblemReport) -> list[float]:
    """Draw winner, runners-up and baseline of a problem, and return their TFLOP/s."""
    roof, winner = report.roof, report.winner
    if roof is None or winner is None:
        return []
    axes.axvline(roof.intensity, color=MUTED, linewidth=0.8, linestyle=(0, (1, 2)))

    def draw(times: typing.Iterable[float], label: str, looks: str, colour: str, size: float) -> list[float]:
        rates = [rate for us in times if (rate := report.tflops(us)) is not None]
        filled = "none" if looks == "D" else colour
        axes.plot([roof.intensity] * len(rates), rates, looks, label=label, color=colour, markersize=size, mfc=filled)
        return rates

    drawn = draw((finalist.us for finalist in report.finalists[1:]), "runners-up", "o", DOT, 4)
    if report.baseline is not None:
        drawn += draw([report.baseline[1]], report.baseline[0], "D", BESIDE, 5)
    (rate,) = draw([winner.us], "winner", "o", WINNER, 6.5)
    to_left = roof.bound == "compute"
    axes.annotate(
        f"{number(rate)} TFLOP/s, {rate / roof.tflops:.0%} of the roof",
        (roof.intensity, rate),
        (-9 if to_left else 9, 0),
        textcoords="offset points",
        ha="right" if to_left else "left",
        va="center",
        color=WINNER,
    )
    return [*drawn, rate]
