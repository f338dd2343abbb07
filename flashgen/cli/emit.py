"""`flashgen emit`."""

from __future__ import annotations

import sys
import typing
from pathlib import Path

import typer

from flashgen.cli import options
from flashgen.cli.configs import parse_config
from flashgen.cli.lookup import load_registry, select_all, selection_document
from flashgen.cli.output import note, print_json
from flashgen.cli.problems import resolve_problems
from flashgen.cli.targets import resolve_target
from flashgen.codegen import RenderedKernel, render
from flashgen.errors import FlashgenError, InputError

EXAMPLE = "flashgen emit --preset quick --target sm_90 -o kernel.py"

Output = typing.Annotated[
    Path | None, typer.Option("--output", "-o", metavar="FILE", help="Write the source there instead of to stdout.")
]


def emit(
    model: options.Model = None,
    preset: options.Preset = None,
    shape: options.Shapes = None,
    phase: options.Phase = None,
    seqlen: options.Seqlens = options.DEFAULT_SEQLENS,
    device: options.Device = None,
    target: options.Target = None,
    registry: options.Registry = None,
    config: options.Config = None,
    output: Output = None,
    as_json: options.Json = False,
) -> None:
    """Print the source of the kernel that would run."""
    problems = resolve_problems(model, preset, shape, phase=phase, seqlens=seqlen)
    selections = select_all(
        problems, resolve_target(device, target), load_registry(registry), config=parse_config(config, problems)
    )
    kernels: dict[RenderedKernel, None] = dict.fromkeys(render(s.problem.spec, s.config) for s in selections)
    if len(kernels) > 1:
        raise InputError(f"these {len(problems)} problems need {len(kernels)} different sources; name one with --shape")
    kernel = next(iter(kernels))
    if output is not None:
        _write(output, kernel.source)
    if as_json:
        document = {"entry_point": kernel.entry_point, "digest": kernel.digest, "source": kernel.source}
        print_json({**document, "selections": [selection_document(selection) for selection in selections]})
    elif output is None:
        sys.stdout.write(kernel.source)


def _write(path: Path, source: str) -> None:
    try:
        path.write_text(source, encoding="utf-8")
    except OSError as error:
        raise FlashgenError(f"{path}: cannot be written: {error.strerror or error}") from error
    note(f"wrote {path}")
