"""`flashgen explain`."""

from __future__ import annotations

import typer

from flashgen.cli import options
from flashgen.cli.exits import NOTHING_TUNED
from flashgen.cli.lookup import is_tuned, load_registry, select_all, selection_document
from flashgen.cli.output import print_json, printable
from flashgen.cli.problems import resolve_problems
from flashgen.cli.targets import resolve_target

EXAMPLE = 'flashgen explain --shape "b=4 hq=32 hkv=8 s=4096 d=128 causal bf16" --target H200'


def explain(
    model: options.Model = None,
    preset: options.Preset = None,
    shape: options.Shapes = None,
    phase: options.Phase = None,
    seqlen: options.Seqlens = options.DEFAULT_SEQLENS,
    device: options.Device = None,
    target: options.Target = None,
    registry: options.Registry = None,
    as_json: options.Json = False,
) -> None:
    """Say which kernel a problem would get, and why.

    From which entry it comes, how far that is from what was measured, how fast it was there, which config came second,
    and why not the others. Exit code 3 if nothing is tuned for one of the problems.
    """
    problems = resolve_problems(model, preset, shape, phase=phase, seqlens=seqlen)
    selections = select_all(problems, resolve_target(device, target), load_registry(registry))
    if as_json:
        print_json({"selections": [selection_document(selection) for selection in selections]})
    else:
        print(printable("\n\n".join(map(str, selections))))
    if not all(map(is_tuned, selections)):
        raise typer.Exit(NOTHING_TUNED)
