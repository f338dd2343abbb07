"""`flashgen compile`."""

from __future__ import annotations

import dataclasses
import time
import typing
from pathlib import Path

import typer

from flashgen.cli import options
from flashgen.cli.configs import parse_config, short_config
from flashgen.cli.lookup import load_registry, select_all
from flashgen.cli.output import note, print_json, print_table
from flashgen.cli.problems import resolve_problems, words
from flashgen.cli.targets import resolve_target
from flashgen.codegen import RenderedKernel, render
from flashgen.errors import FlashgenError, InputError
from flashgen.target import GpuTarget, named_target

if typing.TYPE_CHECKING:
    from flashgen.compile import CompiledKernel
    from flashgen.dispatch import Selection

EXAMPLE = "flashgen compile --preset quick --target sm_80,sm_90,gfx942 --out build/"

Targets = typing.Annotated[
    list[str] | None,
    typer.Option(
        "--target", metavar="LIST", help="GPUs by name, repeated or separated by commas; they need not be here."
    ),
]
Out = typing.Annotated[
    Path | None, typer.Option("--out", metavar="DIR", help="Write binaries, assembly and sources into this folder.")
]


def compile_kernels(
    model: options.Model = None,
    preset: options.Preset = None,
    shape: options.Shapes = None,
    phase: options.Phase = None,
    seqlen: options.Seqlens = options.DEFAULT_SEQLENS,
    device: options.Device = None,
    target: Targets = None,
    registry: options.Registry = None,
    config: options.Config = None,
    out: Out = None,
    as_json: options.Json = False,
) -> None:
    """Compile for any GPU, without having one.

    Shows the registers, spills and shared memory of the kernels that would run there, a line for each that is launched:
    the gradients take two or three.
    """
    problems = resolve_problems(model, preset, shape, phase=phase, seqlens=seqlen)
    targets = _targets(device, target)
    loaded, chosen = load_registry(registry), parse_config(config, problems)
    results = [
        _compile(selection, out) for each in targets for selection in select_all(problems, each, loaded, config=chosen)
    ]
    if as_json:
        print_json({"kernels": [result.document() for result in results]})
    else:
        numeric = ("registers", "spill bytes", "smem bytes", "binary bytes", "s")
        columns = ("problem", "target", "config", "kernel", *numeric)
        print_table(columns, [row for result in results for row in result.rows()], numeric=numeric)


def _targets(device: str | None, names: list[str] | None) -> tuple[GpuTarget, ...]:
    listed = [word for text in names or () for word in words(text)]
    if not listed:
        return (resolve_target(device, None),)
    if device is not None:
        raise InputError(f"give either --device {device} or --target {', '.join(listed)}")
    return tuple(dict.fromkeys(map(named_target, listed)))


@dataclasses.dataclass(frozen=True, kw_only=True)
class _Result:
    selection: Selection
    compiled: CompiledKernel
    seconds: float
    files: tuple[Path, ...]

    def rows(self) -> list[tuple[str, ...]]:
        """Return a row for each entry point; the seconds are those of all together."""
        place = (str(self.selection.problem), str(self.selection.target), short_config(self.selection.config))
        rows: list[tuple[str, ...]] = []
        for entry in self.compiled.entries:
            used = entry.resources
            numbers = (used.registers, used.spills, used.smem_bytes, len(entry.handle.kernel))
            rows.append((*place, entry.name, *map(str, numbers), "" if rows else f"{self.seconds:.2f}"))
        return rows

    def document(self) -> dict[str, object]:
        entries = [
            {
                "entry_point": entry.name,
                **dataclasses.asdict(entry.resources),
                "binary_bytes": len(entry.handle.kernel),
            }
            for entry in self.compiled.entries
        ]
        return {
            "problem": str(self.selection.problem),
            "device": self.selection.target.device_name,
            "arch": self.selection.target.arch,
            "config": self.selection.config.as_dict(),
            # The most that any of the entry points takes.
            **dataclasses.asdict(self.compiled.resources),
            "binary_bytes": sum(len(entry.handle.kernel) for entry in self.compiled.entries),
            "entries": entries,
            "binary_hash": self.compiled.binary_hash,
            "seconds": round(self.seconds, 3),
            "files": [str(path) for path in self.files],
        }


def _compile(selection: Selection, out: Path | None) -> _Result:
    from flashgen.compile import compile_kernel

    spec = selection.problem.spec
    rendered = render(spec, selection.config)
    start = time.perf_counter()
    compiled = compile_kernel(rendered, spec, selection.config, selection.target)
    seconds = time.perf_counter() - start
    files = () if out is None else _write(out, rendered, compiled, selection.target)
    return _Result(selection=selection, compiled=compiled, seconds=seconds, files=files)


_ASSEMBLY = {"cuda": "ptx", "hip": "amdgcn"}
_BINARY = {"cuda": "cubin", "hip": "hsaco"}


def _write(folder: Path, rendered: RenderedKernel, compiled: CompiledKernel, target: GpuTarget) -> tuple[Path, ...]:
    """Write the binary and the assembly of each entry point and the source of all, and return the files."""
    assembly, binary = _ASSEMBLY[target.backend], _BINARY[target.backend]
    stems = [f"{entry.name}_{rendered.digest}_{target.arch}_{compiled.binary_hash}" for entry in compiled.entries]
    contents: dict[str, bytes] = {}
    for stem, entry in zip(stems, compiled.entries, strict=True):
        contents[f"{stem}.{binary}"] = entry.handle.kernel
        contents[f"{stem}.{assembly}"] = entry.handle.asm[assembly].encode()
    contents[f"{rendered.entry_point}_{rendered.digest}.py"] = rendered.source.encode()
    try:
        folder.mkdir(parents=True, exist_ok=True)
        for name, content in contents.items():
            (folder / name).write_bytes(content)
    except OSError as error:
        raise FlashgenError(f"{folder}: cannot be written: {error.strerror or error}") from error
    for stem in stems:
        note(f"wrote {folder / stem}.{binary}, .{assembly} and the source")
    return tuple(folder / name for name in contents)
