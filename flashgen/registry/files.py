"""Reading and writing registry files: reading never raises for damage, writing never touches what it cannot read."""

from __future__ import annotations

import contextlib
import os
import re
import stat
import typing
from pathlib import Path

import filelock

from flashgen.errors import RegistryError
from flashgen.registry.contents import FileContents, FileIssue
from flashgen.registry.entry import RegistryEntry
from flashgen.registry.locations import entries_changed
from flashgen.registry.merging import merge
from flashgen.registry.yaml_text import MAX_FILE_BYTES, dump, parse, readable
from flashgen.spec import Phase
from flashgen.storage import replace_file

LOCK_TIMEOUT_S = 60.0


def file_name(device_name: str, phase: Phase) -> str:
    """Return the name of the file for a GPU and phase, for example `nvidia_h200.forward.yaml`.

    Raises:
        RegistryError: if the device's name has no letter and no digit.
    """
    stem = re.sub(r"[^a-z0-9]+", "_", device_name.lower()).strip("_")
    if not stem:
        raise RegistryError(f"no file can be named after the device {device_name!r}: it needs a letter or a digit")
    return f"{stem}.{phase}.yaml"


def read_file(path: Path) -> FileContents:
    """Return the sound entries of the file at `path`; all else becomes issues, and nothing is raised."""
    try:
        if not stat.S_ISREG(path.stat().st_mode):
            return _unreadable(path, "not a regular file")
        with path.open("rb") as file:
            data = file.read(MAX_FILE_BYTES + 1)
    except (OSError, ValueError) as error:
        return _unreadable(path, f"cannot be read: {getattr(error, 'strerror', None) or error}")
    return parse(path, data)


def _unreadable(path: Path, reason: str) -> FileContents:
    return FileContents(issues=(FileIssue(path=path, line=None, reason=reason),))


def write_entries(folder: Path, entries: typing.Iterable[RegistryEntry]) -> tuple[Path, ...]:
    """Merge `entries` into the registry files of `folder`, one per device and phase, and return the files.

    Safe beside other writers, threads or processes; a crash at any moment leaves each file old or new.

    Raises:
        RegistryError: if a file in the way is damaged or foreign (it is left alone), holds another device, stays
            locked, or cannot be written. Files already written stay written.
    """
    groups: dict[str, list[RegistryEntry]] = {}
    for entry in entries:
        groups.setdefault(file_name(entry.device_name, entry.spec.phase), []).append(entry)
    paths = []
    for name, group in sorted(groups.items()):
        _update(folder / name, group)
        paths.append(folder / name)
        entries_changed()
    return tuple(paths)


def remove_entries(path: Path, unwanted: typing.Callable[[RegistryEntry], bool]) -> tuple[RegistryEntry, ...]:
    """Take entries out of the registry file at `path`, and return them; a file that none is left in is removed.

    As safe as `write_entries`.

    Raises:
        RegistryError: if the file is damaged or foreign (it is left alone), stays locked, or cannot be written.
    """
    with _locked(path):
        entries = _trusted_entries(path)
        removed = tuple(entry for entry in entries if unwanted(entry))
        gone = {entry.key() for entry in removed}
        kept = tuple(entry for entry in entries if entry.key() not in gone)
        if removed and kept:
            _replace(path, kept)
        elif removed:
            path.unlink()
    if removed:
        entries_changed()
    return removed


def _update(path: Path, new: list[RegistryEntry]) -> None:
    with _locked(path):
        merged = merge(_trusted_entries(path), new)
        _check_one_device(path, merged)
        _replace(path, merged)


def _replace(path: Path, entries: tuple[RegistryEntry, ...]) -> None:
    data = dump(entries)
    readable(path, data, entries)
    # An unchanged file keeps its time stamp, and so its index.
    if not path.exists() or path.read_bytes() != data:
        replace_file(path, data)


@contextlib.contextmanager
def _locked(path: Path) -> typing.Iterator[None]:
    # Hidden, because it stays: a lock file that is removed can be held twice.
    lock = path.with_name(f".{path.name}.lock")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with filelock.FileLock(lock, timeout=LOCK_TIMEOUT_S):
            yield
    except filelock.Timeout as error:
        raise RegistryError(
            f"{path}: another process has held {lock.name} for {LOCK_TIMEOUT_S:g} s; wait for it or stop it"
        ) from error
    except (OSError, UnicodeError) as error:
        raise RegistryError(f"{path}: cannot be written: {error}; the file is as it was") from error


def _trusted_entries(path: Path) -> tuple[RegistryEntry, ...]:
    if not os.path.lexists(path):
        return ()
    contents = read_file(path)
    if contents.issues:
        more = len(contents.issues) - 1
        raise RegistryError(
            f"{contents.issues[0]}{f' (and {more} more)' if more else ''}; the file was left untouched: "
            "repair it or move it away, then run again"
        )
    return contents.entries


def _check_one_device(path: Path, entries: tuple[RegistryEntry, ...]) -> None:
    devices = sorted({f"{entry.device_name} ({entry.arch})" for entry in entries})
    if len(devices) > 1:
        raise RegistryError(
            f"{path}: a file holds one device, got {', '.join(devices)}; move the file away or choose another folder"
        )
