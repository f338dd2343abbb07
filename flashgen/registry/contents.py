"""What reading a registry file gives: the good entries and, beside them, what is wrong with the rest."""

from __future__ import annotations

import dataclasses
from pathlib import Path

from flashgen.registry.entry import RegistryEntry

_MAX_REASON = 600
_MAX_SHOWN = 60


def one_line(text: str) -> str:
    """Return text of a foreign file for a terminal: words on one line, no control characters."""
    return " ".join("".join(c if c.isprintable() else " " for c in text).split())


def shown_path(path: Path) -> str:
    """Return a path for a terminal: whoever made the file chose its name."""
    return "".join(c if c.isprintable() else "\N{REPLACEMENT CHARACTER}" for c in str(path))


def shortened(value: object) -> str:
    """Return the start of a value from a file, as Python would write it in ASCII."""
    text = ascii(value[: 2 * _MAX_SHOWN] if isinstance(value, str) else value)
    return text if len(text) <= _MAX_SHOWN else f"{text[: _MAX_SHOWN - 3]}..."


@dataclasses.dataclass(frozen=True, kw_only=True)
class FileIssue:
    """Why a file, or one entry of it, was skipped.

    Attributes:
        path: the file.
        line: counted from 1; None where no line is to blame.
        reason: what was got and what is allowed; one printable line, whatever the file holds.
    """

    path: Path
    line: int | None
    reason: str

    def __post_init__(self) -> None:
        reason = one_line(self.reason)
        object.__setattr__(self, "reason", reason if len(reason) <= _MAX_REASON else f"{reason[: _MAX_REASON - 3]}...")

    def __str__(self) -> str:
        place = shown_path(self.path)
        return f"{place}: {self.reason}" if self.line is None else f"{place}:{self.line}: {self.reason}"


@dataclasses.dataclass(frozen=True, kw_only=True)
class FileContents:
    """The sound entries of a file, merged and sorted, and its issues."""

    entries: tuple[RegistryEntry, ...] = ()
    issues: tuple[FileIssue, ...] = ()
