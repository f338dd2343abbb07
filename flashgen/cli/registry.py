"""`flashgen registry ...`: files of entries, compared, joined, checked and cleaned; and `flashgen schema`."""

from __future__ import annotations

import contextlib
import os
import typing
from collections.abc import Sequence
from pathlib import Path

import typer

from flashgen import resources
from flashgen.cli import options
from flashgen.cli.configs import short_config
from flashgen.cli.exits import FAILED
from flashgen.cli.output import note, print_json, print_table
from flashgen.cli.show import is_stale, issue_document
from flashgen.errors import InputError
from flashgen.registry import (
    Difference,
    FileContents,
    FileIssue,
    Location,
    RegistryEntry,
    compare,
    forgotten_indexes,
    json_schema,
    read_file,
    remove_entries,
    search_locations,
    write_entries,
)

Sources = typing.Annotated[list[Path], typer.Argument(metavar="PATH...", help="Registry files, or folders of them.")]


def diff(
    old: typing.Annotated[Path, typer.Argument(metavar="OLD", help="A registry file, or a folder of them.")],
    new: typing.Annotated[Path, typer.Argument(metavar="NEW", help="A registry file, or a folder of them.")],
    as_json: options.Json = False,
) -> None:
    """Show which entries were added, removed or changed from one registry to another.

    Entries are the same by device, what they compute, and the sizes they were measured on. Exit code 1 if a part of
    either could not be read; what could is compared all the same.
    """
    (before, issues), (after, more) = (_read_all([path]) for path in (old, new))
    found = compare(before, after)
    if as_json:
        print_json({"differences": list(map(_difference_document, found)), "skipped": _documents(issues + more)})
    elif found:
        print_table(
            ("", "device", "spec", "measured at", "old", "us", "new", "us "), map(_row, found), numeric=("us", "us ")
        )
    else:
        note(f"no difference: {len(after)} entries in each")
    _fail_for(issues + more)


def merge(
    sources: Sources,
    to: typing.Annotated[
        Path | None, typer.Option("--to", metavar="FOLDER", help="Where they go; default: your own registry.")
    ] = None,
    as_json: options.Json = False,
) -> None:
    """Merge the entries of registries into the files of a folder, one per device and phase.

    Of two for the same device, spec and sizes a measured one stays before a predicted one, then the later: the order
    of the sources does not matter. Exit code 1 if a part of a source could not be read; what could is merged.
    """
    entries, issues = _read_all(sources)
    files = write_entries(to or resources.user_registry_dir(), entries)
    if as_json:
        print_json({"entries": len(entries), "files": [str(path) for path in files], "skipped": _documents(issues)})
    else:
        for path in files:
            print(f"wrote {path}")
        if not files:
            note("no entry to merge")
    _fail_for(issues)


def verify(
    sources: typing.Annotated[
        list[Path] | None,
        typer.Argument(metavar="PATH...", help="Files or folders; default: all that a call would look in."),
    ] = None,
    as_json: options.Json = False,
) -> None:
    """Check registry files: schema, digests, configs; and say how many entries are stale.

    A stale entry was measured on a template that has changed since, and is not used. Exit code 1 if anything could not
    be read. `flashgen verify` checks what the kernels compute.
    """
    paths = _files(sources) if sources else _searched_files()
    found = {path: read_file(path) for path in paths}
    if as_json:
        print_json({"files": [_contents_document(path, contents) for path, contents in found.items()]})
    elif found:
        print_table(
            ("file", "entries", "stale", "unreadable parts"),
            [
                (str(path), str(len(contents.entries)), str(len(_stale(contents.entries))), str(len(contents.issues)))
                for path, contents in found.items()
            ],
            numeric=("entries", "stale", "unreadable parts"),
        )
    else:
        note("no registry file on the search path; `flashgen tune` makes one")
    _fail_for([issue for contents in found.values() for issue in contents.issues])


def gc(
    path: typing.Annotated[
        Path | None, typer.Argument(metavar="PATH", help="A file or folder; default: your own registry.")
    ] = None,
    dry_run: typing.Annotated[bool, typer.Option("--dry-run", help="Say what would go, and remove nothing.")] = False,
    as_json: options.Json = False,
) -> None:
    """Remove stale entries, and indexes of registry files that are gone.

    A stale entry was measured on a template that has changed since; no call uses it. Files that cannot be read whole
    are left alone, with exit code 1.
    """
    folder = path or resources.user_registry_dir()
    found = _files([folder]) if path or os.path.exists(folder) else ()
    contents = {file: read_file(file) for file in found}
    issues = [issue for each in contents.values() for issue in each.issues]
    sound = [file for file, each in contents.items() if not each.issues]
    removed = {file: _stale(contents[file].entries) if dry_run else remove_entries(file, is_stale) for file in sound}
    indexes = forgotten_indexes()
    if not dry_run:
        for index in indexes:
            # Another process may clean up, too.
            with contextlib.suppress(FileNotFoundError):
                index.unlink()
    if as_json:
        print_json(
            {
                "removed": not dry_run,
                "entries": [{"file": str(f), **e.as_dict()} for f, entries in removed.items() for e in entries],
                "indexes": list(map(str, indexes)),
                "skipped": _documents(issues),
            }
        )
    else:
        verb = "would remove" if dry_run else "removed"
        for file, entries in removed.items():
            for entry in entries:
                print(f"{verb} {entry.spec}, {entry.range}: {short_config(entry.config)} from {file}")
        note(f"{verb} {sum(map(len, removed.values()))} stale entries and {len(indexes)} indexes")
    _fail_for(issues)


def schema() -> None:
    """Print the JSON schema of registry files: YAML read as JSON, draft 2020-12."""
    print_json(json_schema())


COMMANDS = (
    ("diff", diff, "flashgen registry diff tuned-before/ tuned/"),
    ("merge", merge, "flashgen registry merge node1/ node2/ --to tuned/"),
    ("verify", verify, "flashgen registry verify tuned/"),
    ("gc", gc, "flashgen registry gc --dry-run"),
)
SCHEMA_EXAMPLE = "flashgen schema > registry.schema.json"


def _read_all(paths: Sequence[Path]) -> tuple[list[RegistryEntry], list[FileIssue]]:
    contents = [read_file(path) for path in _files(paths)]
    entries = [entry for each in contents for entry in each.entries]
    return entries, [issue for each in contents for issue in each.issues]


def _files(paths: Sequence[Path]) -> tuple[Path, ...]:
    """Return the files that paths name, each once.

    Raises:
        InputError: if there is none at a path.
    """
    found: dict[Path, None] = {}
    for path in paths:
        location = Location(path=path, label="argument")
        files = location.files()
        if not location.exists() or not files:
            what = "no *.yaml in this folder" if location.exists() else "no such file or folder"
            raise InputError(f"{path}: {what}; name a registry file or a folder of them")
        found |= dict.fromkeys(files)
    return tuple(found)


def _searched_files() -> tuple[Path, ...]:
    existing = (location for location in search_locations() if location.exists())
    return tuple(dict.fromkeys(path for location in existing for path in location.files()))


def _stale(entries: Sequence[RegistryEntry]) -> tuple[RegistryEntry, ...]:
    return tuple(filter(is_stale, entries))


def _fail_for(issues: Sequence[FileIssue]) -> None:
    for issue in issues:
        note(f"skipped: {issue}")
    if issues:
        raise typer.Exit(FAILED)


def _row(difference: Difference) -> tuple[str, ...]:
    entry = difference.either
    each = (
        text
        for side in (difference.old, difference.new)
        for text in (("-", "-") if side is None else (short_config(side.config), f"{side.performance.median_us:g}"))
    )
    return (difference.kind, f"{entry.device_name} ({entry.arch})", str(entry.spec), str(entry.range), *each)


def _difference_document(difference: Difference) -> dict[str, object]:
    old, new = (None if side is None else side.as_dict() for side in (difference.old, difference.new))
    return {"kind": difference.kind, "old": old, "new": new}


def _contents_document(path: Path, contents: FileContents) -> dict[str, object]:
    stale = len(_stale(contents.entries))
    skipped = _documents(contents.issues)
    return {"file": str(path), "entries": len(contents.entries), "stale": stale, "skipped": skipped}


def _documents(issues: Sequence[FileIssue]) -> list[dict[str, object]]:
    return list(map(issue_document, issues))
