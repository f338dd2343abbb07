"""The command line: each command parses, calls and shows; what it calls is imported when it runs."""

from __future__ import annotations

import typing
from collections.abc import Callable

import typer

import flashgen
from flashgen.cli import bench, doctor, emit, explain, export, join, registry, report, retune, show, tune, verify
from flashgen.cli import compile as compile_command
from flashgen.cli.exits import reported

app = typer.Typer(
    name="flashgen",
    help="Attention kernels generated, tuned and dispatched for your GPU.",
    epilog="Exit codes: 0 done, 1 failed, 2 bad usage, 3 nothing tuned for it, 130 interrupted.",
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
)


def _print_version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"flashgen {flashgen.__version__}")
        raise typer.Exit


@app.callback()
def _root(
    version: typing.Annotated[
        bool, typer.Option("--version", callback=_print_version, is_eager=True, help="Print the version and exit.")
    ] = False,
) -> None:
    """Attention kernels generated, tuned and dispatched for your GPU."""


_COMMANDS: tuple[tuple[str, Callable[..., None], str], ...] = (
    ("tune", tune.tune, tune.EXAMPLE),
    ("join", join.join, join.EXAMPLE),
    ("retune", retune.retune, retune.EXAMPLE),
    ("report", report.report, report.EXAMPLE),
    ("show", show.show, show.EXAMPLE),
    ("explain", explain.explain, explain.EXAMPLE),
    ("emit", emit.emit, emit.EXAMPLE),
    ("compile", compile_command.compile_kernels, compile_command.EXAMPLE),
    ("bench", bench.bench, bench.EXAMPLE),
    ("verify", verify.verify, verify.EXAMPLE),
    ("export", export.export, export.EXAMPLE),
    ("schema", registry.schema, registry.SCHEMA_EXAMPLE),
    ("doctor", doctor.doctor, doctor.EXAMPLE),
)
for _name, _command, _example in _COMMANDS:
    app.command(_name, epilog=f"Example: {_example}")(reported(_command))

_registry_app = typer.Typer(no_args_is_help=True, rich_markup_mode=None)
for _name, _command, _example in registry.COMMANDS:
    _registry_app.command(_name, epilog=f"Example: {_example}")(reported(_command))
app.add_typer(_registry_app, name="registry", help="Compare, merge, check and clean registry files.")


def main() -> None:
    """Run the command line on the process's arguments, and exit."""
    app()
