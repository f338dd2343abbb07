"""`flashgen doctor`."""

from __future__ import annotations

import dataclasses

import typer

from flashgen.cli import options
from flashgen.cli.exits import FAILED
from flashgen.cli.output import print_json, print_table

EXAMPLE = "flashgen doctor --json"


def doctor(registry: options.Registry = None, as_json: options.Json = False) -> None:
    """Say what is here and what is missing.

    Looks at the machine, the versions, the folders, the registries, the compiler and the interpreter.
    """
    from flashgen.cli.machine import examine

    findings = tuple(examine(registry))
    missing = [finding for finding in findings if finding.state == "missing"]
    if as_json:
        print_json({"ok": not missing, "findings": [dataclasses.asdict(finding) for finding in findings]})
    else:
        print_table(("", "found", ""), [(f.name, f.value, "" if f.state == "ok" else f.state) for f in findings])
    if missing:
        raise typer.Exit(FAILED)
