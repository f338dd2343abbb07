"""`flashgen report`."""

from __future__ import annotations

import typing
from pathlib import Path

import typer

from flashgen.cli import options
from flashgen.cli.configs import short_config
from flashgen.cli.lookup import load_registry
from flashgen.cli.output import print_json
from flashgen.cli.targets import resolve_target

EXAMPLE = "flashgen report --out report.html --png figures/"

_DEFAULT_PAGE = Path("report.html")

Study = typing.Annotated[
    str | None,
    typer.Argument(metavar="STUDY", help="A journal file or database URL, as for tune --study; default: tune's own."),
]
Problems = typing.Annotated[
    list[str] | None,
    typer.Option("--shape", "--problem", metavar="TEXT", help="This problem of the study; repeatable; default: all."),
]
Out = typing.Annotated[
    Path | None,
    typer.Option("--out", metavar="FILE", help="The page; default: report.html, and none with --json."),
]
Png = typing.Annotated[
    Path | None, typer.Option("--png", metavar="FOLDER", help="Write the charts as PNG files for print, too.")
]


def report(
    study: Study = None,
    problem: Problems = None,
    out: Out = None,
    png: Png = None,
    device: options.Device = None,
    target: options.Target = None,
    registry: options.Registry = None,
    as_json: options.Json = False,
) -> None:
    """Show what a tuning study tried and why its winner won, as one HTML page.

    The page fetches nothing and needs no script. The study is only read, also while a run is writing it. Baselines and
    the times of the final comparison come from the registry, where it holds the winner of the study. --device and
    --target say whose study is meant where none is named.
    """
    from flashgen.report import read_report, report_document, write_charts, write_page
    from flashgen.tuning.journal import default_study

    place = study or default_study(resolve_target(device, target))
    found = read_report(place, registry=load_registry(registry), short_name=short_config, problems=problem or ())
    written = []
    if out is not None or not as_json:
        page = out or _DEFAULT_PAGE
        write_page(found, page)
        written.append(page)
    if png is not None:
        written += write_charts(found, png)
    if as_json:
        print_json(report_document(found))
    else:
        for path in written:
            print(f"wrote {path}")
