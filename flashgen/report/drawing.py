"""How every chart looks, and how one becomes part of a page or a file of its own."""

from __future__ import annotations

import contextlib
import html
import io
import re
import typing
from pathlib import Path

import matplotlib
from matplotlib.artist import Artist
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, LogLocator, NullLocator

# On white, as in the files for papers; a page names them `var(--...)`, and sets both their light and their dark values.
INK = "#1d2433"
MUTED = "#5a6577"
RULE = "#d8dde5"
DOT = "#8492a8"
WINNER = "#0a66c2"
BESIDE = "#0f7d6c"
REJECTED = "#c2451a"
_THEME = {
    INK: "ink",
    MUTED: "muted",
    RULE: "rule",
    DOT: "dot",
    WINNER: "winner",
    BESIDE: "beside",
    REJECTED: "rejected",
}

WIDE_IN = 5.6
NARROW_IN = 3.5
_PNG_DPI = 300

_STYLE: dict[str, object] = {
    "font.size": 9,
    "axes.titlesize": 9,
    "axes.labelsize": 9,
    "xtick.labelsize": 8.5,
    "ytick.labelsize": 8.5,
    "legend.fontsize": 8.5,
    "text.color": INK,
    "axes.labelcolor": MUTED,
    "axes.edgecolor": MUTED,
    "axes.linewidth": 0.8,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.color": RULE,
    "grid.linewidth": 0.7,
    "xtick.color": MUTED,
    "ytick.color": MUTED,
    "legend.frameon": False,
    # Texts of a study are shown as they are: a dollar sign starts no formula.
    "text.parse_math": False,
    "axes.formatter.useoffset": False,
    "svg.fonttype": "none",
}


def style(salt: str = "") -> contextlib.AbstractContextManager[None]:
    """Return the style to draw and to save in; `salt` keeps the ids of one chart apart from those of others."""
    # The names that matplotlib knows differ between its versions.
    settings: typing.Any = {**_STYLE, "svg.hashsalt": salt}
    return matplotlib.rc_context(settings)


def new_axes(width_in: float, height_in: float) -> tuple[Figure, Axes]:
    """Return a figure of this size, and its axes."""
    figure = Figure(figsize=(width_in, height_in), layout="constrained")
    return figure, figure.add_subplot()


def number(value: float) -> str:
    """Return a number in at most four digits, without an exponent where it can be read."""
    return f"{value:.4g}" if 1e-3 <= abs(value) < 1e5 or value == 0 else f"{value:.2e}"


def log_scales(axes: Axes) -> None:
    """Make both axes logarithmic, with plain numbers at round places."""
    axes.loglog()
    for axis in (axes.xaxis, axes.yaxis):
        axis.set_major_locator(LogLocator(subs=(1.0, 2.0, 5.0), numticks=8))
        axis.set_major_formatter(FuncFormatter(lambda value, _: number(value)))
        axis.set_minor_locator(NullLocator())


def legend_above(figure: Figure, handles: typing.Sequence[Artist] | None = None) -> None:
    """Put the legend above the axes, of these or of all that has a label."""
    drawn = figure.axes[0].get_legend_handles_labels()[0] if handles is None else handles
    figure.legend(
        handles=drawn, loc="outside upper left", ncols=5, handlelength=1.4, handletextpad=0.5, columnspacing=1.1
    )


def to_svg(figure: Figure, description: str) -> str:
    """Return a figure as an SVG element to stand in a page: in the page's colours and font, fetching nothing."""
    buffer = io.StringIO()
    figure.savefig(buffer, format="svg", transparent=True, metadata={"Date": None})
    # What comes before, and the metadata, name documents elsewhere.
    text = buffer.getvalue()
    text = re.sub(r"<metadata>.*?</metadata>|<style[^>]*>.*?</style>", "", text[text.index("<svg") :], flags=re.DOTALL)
    for colour, name in _THEME.items():
        text = text.replace(colour, f"var(--{name})")
    label = html.escape(description, quote=True)
    size = re.compile(r'\bwidth="([\d.]+)pt" height="[\d.]+pt"')
    return size.sub(lambda m: f'role="img" aria-label="{label}" style="max-width: {m[1]}pt"', text, count=1)


def write_png(figure: Figure, path: Path) -> None:
    """Write a figure for print."""
    figure.savefig(path, format="png", dpi=_PNG_DPI, facecolor="white", metadata={"Software": None})
