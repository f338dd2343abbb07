"""What reading a registry file gives: the good entries and, beside them, what is wrong with the rest."""

from __future__ import annotations

import dataclasses
from pathlib import Path

from flashgen.registry.entry import RegistryEntry


@dataclasses.dataclass(frozen=True, kw_only=True)
class FileIssue:
    """Why a file, or one entry of it, was skipped.

    Attributes:
        path: the file.
        line: counted from 1; None where no line is to blame.
        reason: what was got and what is allowed.
    """

    path: Path
    line: int | None
    reason: str

    def __str__(self) -> str:
        place = str(self.path) if self.line is None else f"{self.path}:{self.line}"
        return f"{place}: {self.reason}"


@dataclasses.dataclass(frozen=True, kw_only=True)
class FileContents:
    """The sound entries of a file, merged and sorted, and its issues."""

    entries: tuple[RegistryEntry, ...] = ()
    issues: tuple[FileIssue, ...] = ()
