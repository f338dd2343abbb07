"""`flashgen verify`."""

from __future__ import annotations

import typing

import typer

from flashgen.cli import options
from flashgen.cli.configs import parse_config, short_config
from flashgen.cli.exits import FAILED
from flashgen.cli.lookup import load_registry, select_all, selection_document
from flashgen.cli.output import note, print_json, print_table
from flashgen.cli.problems import resolve_problems
from flashgen.cli.targets import gpu_device, resolve_target
from flashgen.codegen.constraints import interpreter_refusal

if typing.TYPE_CHECKING:
    import torch

    from flashgen.cli.checking import Check
    from flashgen.dispatch import Selection

EXAMPLE = "flashgen verify --preset llama3-8b --registry tuned/"


def verify(
    model: options.Model = None,
    preset: options.Preset = None,
    shape: options.Shapes = None,
    phase: options.Phase = None,
    seqlen: options.Seqlens = options.DEFAULT_SEQLENS,
    device: options.Device = None,
    target: options.Target = None,
    registry: options.Registry = None,
    config: options.Config = None,
    as_json: options.Json = False,
) -> None:
    """Check the numerics of what would run.

    Against float64, at the problem's own sizes and at awkward ones: on the GPU, or without one, or for a --target, in
    Triton's interpreter at small sizes. Gluon kernels, which it does not run, are left unchecked there, and named.
    """
    problems = resolve_problems(model, preset, shape, phase=phase, seqlens=seqlen)
    resolved = resolve_target(device, target)
    selections = select_all(problems, resolved, load_registry(registry), config=parse_config(config, problems))
    # A named target is not here, so its kernels run in the interpreter.
    gpu = gpu_device(device) if target is None else None
    from flashgen.cli.checking import check_interpreted, check_on_gpu

    results: list[tuple[Selection, tuple[Check, ...]]] = []
    for selection in selections:
        unchecked = _unchecked(selection, gpu)
        if unchecked:
            note(f"not checked: {selection.problem}: {unchecked}")
            results.append((selection, ()))
            continue
        checks = check_interpreted(selection) if gpu is None else check_on_gpu(selection, gpu)
        results.append((selection, checks))
        for check in _failures(checks):
            note(f"failed: {selection.problem} at {check.shape}: {check.report.reason}")
    where = "interpreter" if gpu is None else str(gpu)
    if as_json:
        print_json({"where": where, "problems": [_document(*result, _unchecked(result[0], gpu)) for result in results]})
    else:
        numeric = ("shapes", "largest error", "allowed")
        columns = ("problem", "config", "rung", "where", *numeric, "result")
        print_table(columns, [_row(*result, where) for result in results], numeric=numeric)
    if any(_failures(checks) for _, checks in results):
        raise typer.Exit(FAILED)


def _unchecked(selection: Selection, gpu: torch.device | None) -> str:
    """Return why nothing here can check a kernel; empty if something can."""
    refusal = interpreter_refusal(selection.config) if gpu is None else None
    return f"{refusal}: run this where there is one, with --device cuda" if refusal else ""


def _failures(checks: typing.Iterable[Check]) -> list[Check]:
    return [check for check in checks if not check.report.ok]


def _row(selection: Selection, checks: tuple[Check, ...], where: str) -> tuple[str, ...]:
    place = (str(selection.problem), short_config(selection.config), selection.rung)
    if not checks:
        return (*place, "-", "0", "-", "-", "not checked")
    failures = _failures(checks)
    # The check that came closest to its own limit, or passed it by most.
    worst = max(failures or checks, key=lambda check: check.report.max_error / check.report.allowed_error).report
    return (
        *place,
        where,
        str(len(checks)),
        f"{worst.max_error:.2g}",
        f"{worst.allowed_error:.2g}",
        f"{len(failures)} FAILED" if failures else "ok",
    )


def _document(selection: Selection, checks: tuple[Check, ...], unchecked: str) -> dict[str, object]:
    return {
        "selection": selection_document(selection),
        # Why there are no checks; null where there are.
        "unchecked": unchecked or None,
        "checks": [
            {
                "shape": str(check.shape),
                "ok": check.report.ok,
                # JSON has no infinity, which is what an output that is NaN is off by.
                "max_error": check.report.max_error if check.report.max_error != float("inf") else None,
                "allowed_error": check.report.allowed_error,
                "reason": check.report.reason,
            }
            for check in checks
        ],
    }
