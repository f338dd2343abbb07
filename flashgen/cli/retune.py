"""`flashgen retune`."""

from __future__ import annotations

import typing
from pathlib import Path

import typer

from flashgen.cli import options
from flashgen.cli.configs import short_config
from flashgen.cli.output import note, print_json, print_table, ratio
from flashgen.cli.problems import resolve_problems
from flashgen.cli.targets import resolve_target
from flashgen.cli.tune import Budget, Study, Workers, end, parse_seconds, run_document

if typing.TYPE_CHECKING:
    from flashgen.tuning import Reraced, RetuneReport

Folder = typing.Annotated[
    Path | None,
    typer.Option(
        "--registry", metavar="DIR", help="Folder whose entries are raced again; default: the user's registry."
    ),
]

EXAMPLE = "flashgen retune --registry tuned/ --budget 10m"


def retune(
    model: options.Model = None,
    preset: options.Preset = None,
    shape: options.Shapes = None,
    phase: options.Phase = None,
    seqlen: options.Seqlens = options.DEFAULT_SEQLENS,
    device: options.Devices = None,
    target: options.Target = None,
    registry: Folder = None,
    budget: Budget = None,
    study: Study = None,
    workers: Workers = None,
    as_json: options.Json = False,
) -> None:
    """Race the winners and runners-up of a registry again.

    For a new Triton or driver, or changed templates: each entry of this GPU (those that cover the problems named, else
    all), stale or not, has its configs and the untuned default checked and timed as `tune` does, without a search. The
    report says what moved. Ctrl-C leaves the entries not raced yet as they were, and the same command goes on.
    """
    named = any(option is not None for option in (model, preset, shape, phase))
    problems = resolve_problems(model, preset, shape, phase=phase, seqlens=seqlen) if named else None
    budget_s = None if budget is None else parse_seconds(budget)
    gpu_target = None if target is None else resolve_target(device, target)
    import flashgen.tuning
    from flashgen.cli.tune_view import watching

    with watching("re-racing") as observer:
        report = flashgen.tuning.retune(
            problems,
            target=gpu_target,
            device=device,
            budget_s=budget_s,
            registry=registry,
            study=study,
            workers=workers,
            observer=observer,
        )
    if as_json:
        print_json(_document(report))
    else:
        _print(report)
    end(report, failed=any(result.new is None for result in report.results))


_NUMERIC = ("us", "today us", "new us", "gain")
_COLUMNS = ("problem", "old winner", "us", "under", "today us", "new winner", "new us", "gain", "winner")


def _print(report: RetuneReport) -> None:
    if report.results:
        print_table(_COLUMNS, map(_row, report.results), numeric=_NUMERIC)
        again = [result for result in report.results if result.new is not None]
        changed = sum(result.changed for result in again)
        kept = len(report.results) - len(again)
        print(f"{len(again)} entries raced again: {changed} changed their winner; {kept} kept as they were")
    for result in report.results:
        if result.note:
            kept_as_it_was = "kept as it was: " if result.new is None else ""
            note(f"{_place(result)}: {kept_as_it_was}{result.note}")
    for problem in report.missing:
        note(f"no entry covers {problem}: `flashgen tune` makes one")
    for path in report.files:
        print(f"wrote {path}")


def _row(result: Reraced) -> tuple[str, ...]:
    old, new = result.old, result.new
    software = old.provenance
    under = f"triton {software.triton}, driver {software.driver}" + (", stale" if result.stale else "")
    before = (_place(result), short_config(old.config), f"{old.performance.median_us:g}", under)
    today = "-" if result.old_config_us is None else f"{result.old_config_us:.4g}"
    if new is None:
        return (*before, today, "-", "-", "-", "kept")
    us = new.performance.median_us
    gain = ratio(old.performance.median_us, us)
    return (*before, today, short_config(new.config), f"{us:g}", gain, "changed" if result.changed else "same")


def _place(result: Reraced) -> str:
    return f"{result.old.range} {result.old.spec}"


def _document(report: RetuneReport) -> dict[str, object]:
    return {
        **run_document(report),
        "missing": [str(problem) for problem in report.missing],
        "results": [
            {
                "old": result.old.as_dict(),
                "stale": result.stale,
                "new": result.new.as_dict() if result.new else None,
                "old_config_us": result.old_config_us,
                "gain": result.gain,
                "changed": result.changed,
                "baselines_us": result.baselines,
                "note": result.note,
            }
            for result in report.results
        ],
    }
