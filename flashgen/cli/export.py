"""`flashgen export`."""

from __future__ import annotations

import dataclasses
import typing
from pathlib import Path

import typer

from flashgen.cli import options
from flashgen.cli.exits import NOTHING_TUNED
from flashgen.cli.lookup import load_registry, select_all
from flashgen.cli.output import note, print_json, print_table
from flashgen.cli.problems import resolve_problems
from flashgen.cli.targets import resolve_target
from flashgen.registry import Registry, export_bundle
from flashgen.target import GpuTarget, Software, named_target

EXAMPLE = "flashgen export --model Llama-3-8B/config.json --to Llama-3-8B/"

# An entry is judged by its versions where it is used, not where it is exported.
_ANY = Software(flashgen="any", triton="any", torch="any", driver="any")

To = typing.Annotated[
    Path,
    typer.Option("--to", metavar="MODEL_DIR", help="The folder of the model's weights; entries go to flashgen/ in it."),
]


def export(
    to: To,
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
    """Put a model's tuned entries beside its weights.

    `flashgen.use(MODEL_DIR)` finds them there. Without --device and --target: for every device that the registries
    hold entries of. Exit code 3 if there is no entry at all.
    """
    problems = resolve_problems(model, preset, shape, phase=phase, seqlens=seqlen)
    loaded = load_registry(registry)
    named = device is not None or target is not None
    targets = (resolve_target(device, target),) if named else _tuned_targets(loaded)
    selections = [selection for each in targets for selection in select_all(problems, each, loaded, software=_ANY)]
    found = [(selection, selection.entry) for selection in selections if selection.entry is not None]
    for selection in selections:
        if selection.entry is None:
            note(f"nothing tuned: {selection.problem} on {selection.target}")
    if not found:
        note("no entry to export; `flashgen tune` with the same problems makes them")
        raise typer.Exit(NOTHING_TUNED)
    # The same entry may be the nearest of many problems; of equals the first of the search path was selected.
    entries = {entry.key(): entry for _, entry in reversed(found)}
    files = export_bundle(entries.values(), to)
    if as_json:
        print_json(
            {
                "files": [str(path) for path in files],
                "entries": len(entries),
                "problems": [
                    {"problem": str(s.problem), "device": s.target.device_name, "rung": s.rung if s.entry else None}
                    for s in selections
                ],
            }
        )
        return
    print_table(
        ("problem", "device", "rung", "entry measured at"),
        [(str(s.problem), s.target.device_name, s.rung, str(entry.range)) for s, entry in found],
    )
    for path in files:
        print(f"wrote {path}")


def _tuned_targets(registry: Registry) -> tuple[GpuTarget, ...]:
    """Return every device that has entries, as far as this version knows its architecture."""
    devices = dict.fromkeys((located.entry.device_name, located.entry.arch) for located in registry.entries())
    return tuple(dataclasses.replace(named_target(arch), device_name=name) for name, arch in devices)
