"""`flashgen tune`."""

from __future__ import annotations

import re
import typing
from pathlib import Path

import typer

from flashgen.cli import options
from flashgen.cli.exits import FAILED, INTERRUPTED
from flashgen.cli.output import note, print_json
from flashgen.cli.problems import resolve_problems
from flashgen.cli.targets import resolve_target
from flashgen.errors import InputError

if typing.TYPE_CHECKING:
    from flashgen.tuning import RetuneReport, TuneReport

EXAMPLE = "flashgen tune --model Llama-3-8B/config.json --effort full --budget 30m"

Effort = typing.Annotated[
    str, typer.Option("--effort", metavar="LEVEL", help="How hard to search: check, quick or full.")
]
Budget = typing.Annotated[
    str | None,
    typer.Option("--budget", metavar="TIME", help="Wall-clock limit of the whole run: 90s, 5m, 1h30m; default: none."),
]
Study = typing.Annotated[
    str | None,
    typer.Option(
        "--study",
        metavar="URL",
        help="Optuna storage that holds the trials, by which other machines join; default: a journal in the cache.",
    ),
]
Workers = typing.Annotated[
    int | None, typer.Option("--workers", metavar="N", min=1, help="Compiling processes; default: by the CPU's cores.")
]
Portfolio = typing.Annotated[
    int | None,
    typer.Option(
        "--portfolio",
        metavar="K",
        min=1,
        help="Serve all problems of one spec with at most K kernels, K for each spec; default: each has its own.",
    ),
]
Seed = typing.Annotated[int, typer.Option("--seed", metavar="N", help="Seed of the search.")]

Folder = typing.Annotated[
    Path | None, typer.Option("--registry", metavar="DIR", help="Folder to write to; default: the user's registry.")
]


def tune(
    model: options.Model = None,
    preset: options.Preset = None,
    shape: options.Shapes = None,
    phase: options.Phase = None,
    seqlen: options.Seqlens = options.DEFAULT_SEQLENS,
    device: options.Devices = None,
    target: options.Target = None,
    registry: Folder = None,
    effort: Effort = "quick",
    budget: Budget = None,
    study: Study = None,
    workers: Workers = None,
    portfolio: Portfolio = None,
    seed: Seed = 0,
    as_json: options.Json = False,
) -> None:
    """Search the best configs and write the registry.

    Every candidate is compiled, checked against float64 and timed; Ctrl-C keeps the best so far, and the same command
    goes on. Without a GPU a model ranks the candidates, and the entries are marked as predicted. A training step
    (--phase forward,backward) is fastest where each phase is: they share no kernel, so each is searched on its own.

    With --portfolio K, the best of every problem are raced on all problems of its spec, and the K kernels with the
    smallest worst loss are chosen to serve them; the report says whether each stays within 2% of its own best, and how
    many kernels that takes.
    """
    problems = resolve_problems(model, preset, shape, phase=phase, seqlens=seqlen)
    budget_s = None if budget is None else parse_seconds(budget)
    gpu_target = None if target is None else resolve_target(device, target)
    import flashgen.tuning
    from flashgen.cli.tune_report import print_report, report_document
    from flashgen.cli.tune_view import watching

    with watching() as observer:
        report = flashgen.tuning.tune(
            problems,
            target=gpu_target,
            device=device,
            effort=effort,
            budget_s=budget_s,
            seed=seed,
            registry=registry,
            study=study,
            workers=workers,
            portfolio=portfolio,
            observer=observer,
        )
    if as_json:
        print_json(report_document(report))
    else:
        print_report(report)
    end(report, failed=any(result.entry is None for result in report.results))


def end(report: TuneReport | RetuneReport, *, failed: bool) -> None:
    """Return if all went well.

    Raises:
        typer.Exit: after saying what is saved, if there was a Ctrl-C; or if something failed.
    """
    if report.interrupted:
        saved = ", ".join(map(str, report.files)) or "no entry yet"
        note(f"interrupted; saved: {saved}; the same command goes on from {report.study}")
        raise typer.Exit(INTERRUPTED)
    if failed:
        raise typer.Exit(FAILED)


def run_document(report: TuneReport | RetuneReport) -> dict[str, object]:
    """Return what every run has, as plain values for JSON."""
    return {
        "device": report.target.device_name,
        "arch": report.target.arch,
        "interrupted": report.interrupted,
        "study": report.study,
        "files": [str(path) for path in report.files],
        "wall_s": round(report.wall_s, 1),
    }


_UNITS_S = {"h": 3600, "m": 60, "s": 1}


def parse_seconds(text: str) -> float:
    """Return the seconds that `90s`, `5m`, `1h30m` or a bare number of seconds mean.

    Raises:
        InputError: for anything else, or nothing at all.
    """
    bare = f"{text}s" if text.isdecimal() else text
    parts = re.findall(r"(\d+(?:\.\d+)?)([hms])", bare)
    seconds = sum(float(number) * _UNITS_S[unit] for number, unit in parts)
    if "".join(number + unit for number, unit in parts) != bare or seconds <= 0:
        raise InputError(f"--budget takes a time such as 90s, 5m or 1h30m, got {text!r}")
    return seconds
