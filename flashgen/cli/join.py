"""`flashgen join`."""

from __future__ import annotations

import typing

import typer

from flashgen.cli import options
from flashgen.cli.exits import INTERRUPTED
from flashgen.cli.output import note, print_json
from flashgen.cli.tune import Workers

if typing.TYPE_CHECKING:
    from flashgen.tuning import JoinReport

EXAMPLE = "flashgen join --study postgresql+psycopg://tuner@head/studies --device cuda:1"

Study = typing.Annotated[
    str,
    typer.Option("--study", metavar="URL", help="The study that the run was given: a shared journal or PostgreSQL."),
]


def join(
    study: Study,
    device: options.Devices = None,
    workers: Workers = None,
    as_json: options.Json = False,
) -> None:
    """Help a running `flashgen tune --study URL` from another GPU or machine.

    It compiles, checks and times configs that the run offers, until the run ends; the run alone chooses, compares the
    finalists on its own GPU and writes the registry. It waits where there is no run yet. Ctrl-C gives back what it
    holds; a machine that is lost costs the run nothing but a little time.

    A journal must be in a folder that all machines share; a PostgreSQL server must allow a connection for each
    machine (max_connections). Only a GPU of the same model, with the same driver and Triton, measures; with --device
    cpu, or with another GPU, a machine compiles. What it compiled reaches the others by Triton's cache: set
    TRITON_CACHE_DIR to a shared folder on all of them, or they compile again what they measure. Do not join on a GPU
    that something else is using.
    """
    import flashgen.tuning

    report = flashgen.tuning.join(study, device=device, workers=workers, say=note)
    if as_json:
        print_json(_document(report))
    else:
        counts = ", ".join(f"{name.replace('_', ' ')} {count}" for name, count in _document(report)["configs"].items())
        print(f"configs: {counts}")
    if report.interrupted:
        note("interrupted; the run goes on without this machine")
        raise typer.Exit(INTERRUPTED)


class _Document(typing.TypedDict):
    interrupted: bool
    configs: dict[str, int]


def _document(report: JoinReport) -> _Document:
    return {
        "interrupted": report.interrupted,
        "configs": {
            "measured": report.measured,
            "compiled": report.compiled,
            "rejected": report.rejected,
            "ignored": report.ignored,
            "given_back": report.given_back,
        },
    }
