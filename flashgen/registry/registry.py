"""All registry files of a search path as one: which entries exist for a spec, and from where."""

from __future__ import annotations

import dataclasses
import hashlib
import os
import typing
from pathlib import Path

from flashgen.registry.contents import FileIssue
from flashgen.registry.entry import RegistryEntry
from flashgen.registry.index import IndexedFile, load_indexed
from flashgen.registry.locations import Label, Location
from flashgen.spec import AttentionSpec

# Places that somebody named: their absence is worth a word. The user's and the shipped folder may well not exist.
_NAMED: tuple[Label, ...] = ("argument", "environment", "bundle")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Located:
    """An entry, the search location it came from, and the file."""

    entry: RegistryEntry
    location: Location
    path: Path


@dataclasses.dataclass(frozen=True, kw_only=True)
class FileDigest:
    """What tells the contents of one file of a registry from those of another.

    Attributes:
        digest: equal for equal entries, wherever the file lies.
    """

    path: Path
    label: Label
    digest: str


class Registry:
    """The entries of several files, in search order; made by `load`."""

    def __init__(
        self, files: typing.Iterable[tuple[Location, IndexedFile]], issues: typing.Iterable[FileIssue] = ()
    ) -> None:
        self._files = tuple(files)
        self._issues = tuple(issues)

    @property
    def issues(self) -> tuple[FileIssue, ...]:
        """What was skipped, and why."""
        return self._issues + tuple(issue for _, file in self._files for issue in file.issues)

    def file_digests(self) -> tuple[FileDigest, ...]:
        """Return the digest of each file that holds entries, in search order, without what repeats an earlier one."""
        found: dict[str, FileDigest] = {}
        for location, file in self._files:
            digest = file.digest()
            if not file.is_empty():
                found.setdefault(digest, FileDigest(path=file.path, label=location.label, digest=digest))
        return tuple(found.values())

    def fingerprint(self) -> str:
        """Return 16 hex digits that registries share which give every question the same answer; decodes no index."""
        text = " ".join(file.digest for file in self.file_digests())
        return hashlib.sha256(text.encode()).hexdigest()[:16]

    def entries(self) -> tuple[Located, ...]:
        """Return every entry, in search order; decodes them all."""
        return tuple(
            Located(entry=entry, location=location, path=file.path)
            for location, file in self._files
            for entry in file.entries()
        )

    def candidates(self, spec: AttentionSpec) -> tuple[Located, ...]:
        """Return the entries for `spec.tuning_key()`, of any device and range, in search order."""
        return tuple(
            Located(entry=entry, location=location, path=file.path)
            for location, file in self._files
            for entry in file.candidates(spec)
        )

    def related(self, spec: AttentionSpec) -> tuple[Located, ...]:
        """Return the entries for other masks or features than `spec.tuning_key()`, in search order.

        They share its phase, dtype and head dimensions, and packed sequences keep to themselves.
        """
        return tuple(
            Located(entry=entry, location=location, path=file.path)
            for location, file in self._files
            for entry in file.related(spec)
        )


def load(locations: typing.Iterable[Location]) -> Registry:
    """Return the registry of all files in `locations`; damage becomes `issues`, and nothing is raised.

    A file that two locations name is read once, for the first.
    """
    files: list[tuple[Location, IndexedFile]] = []
    issues: list[FileIssue] = []
    seen: set[str] = set()
    for location in locations:
        if not location.exists():
            if location.label in _NAMED:
                reason = f"no such file or folder (searched as {location.label})"
                issues.append(FileIssue(path=location.path, line=None, reason=reason))
            continue
        for path in location.files():
            # Of links that lead in a circle too, unlike `Path.resolve`.
            real = os.path.realpath(path)
            if real not in seen:
                seen.add(real)
                files.append((location, load_indexed(path)))
    return Registry(files, issues)
