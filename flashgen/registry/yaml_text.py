"""Registry files as YAML text: parsing that survives any bytes and knows the lines, and byte-stable writing."""

from __future__ import annotations

import typing
from pathlib import Path

import yaml

from flashgen.errors import RegistryError
from flashgen.registry.contents import FileContents, FileIssue
from flashgen.registry.entry import RegistryEntry
from flashgen.registry.merging import merge
from flashgen.registry.schema import FORMAT, EntryError, read_entry, read_header
from flashgen.registry.yaml_tree import Node, Sequence, TreeError, fields_of, find, plain, read_tree

MAX_FILE_BYTES = 8 * 2**20
MAX_ISSUES = 100
"""Damaged entries of a file that are listed one by one."""

_HEADING = "# Tuned attention kernels of one GPU and phase, written by flashgen. An edited entry fails its digest.\n"
# No line is ever broken: that of an entry's spec may hold two functions, each character escaped.
_WIDTH = 2**20
_MAP_TAG = "tag:yaml.org,2002:map"

# libyaml where PyYAML was built with it: ten times faster, the same text.
if typing.TYPE_CHECKING:
    from yaml import SafeDumper as _BaseDumper
else:
    _BaseDumper = getattr(yaml, "CSafeDumper", yaml.SafeDumper)


class _Line(dict[str, object]):
    """A mapping that is written on one line."""


class _Dumper(_BaseDumper):
    def ignore_aliases(self, data: object) -> bool:
        return True


_Dumper.add_representer(_Line, lambda dumper, data: dumper.represent_mapping(_MAP_TAG, data, flow_style=True))


def dump(entries: typing.Sequence[RegistryEntry]) -> bytes:
    """Return the file that holds `entries`, all of one device and phase; equal entries give equal bytes."""
    bodies = []
    head: dict[str, object] = {"format": FORMAT}
    for entry in entries:
        content = entry.as_dict()
        head |= {name: content.pop(name) for name in ("device", "arch", "phase")}
        body = {name: _Line(value) if isinstance(value, dict) else value for name, value in content.items()}
        body["runners_up"] = [_Line(r) for r in typing.cast("list[dict[str, object]]", body["runners_up"])]
        bodies.append(body | {"digest": entry.digest()})
    text = yaml.dump(head | {"entries": bodies}, Dumper=_Dumper, sort_keys=False, width=_WIDTH, allow_unicode=False)
    return (_HEADING + text).encode()


def parse(path: Path, data: bytes) -> FileContents:
    """Return what is sound in `data`, and an issue with its line for all that is not; raises for no content."""
    if len(data) > MAX_FILE_BYTES:
        return _damaged(path, None, f"larger than {MAX_FILE_BYTES // 2**20} MiB: no registry file")
    try:
        root = read_tree(data.decode("utf-8"))
    except UnicodeDecodeError as error:
        return _damaged(path, _line_at(data, error.start), "not UTF-8 text")
    except yaml.reader.ReaderError as error:
        return _damaged(path, _line_at(data, error.position), f"not a registry file: {error.reason}")
    except yaml.YAMLError as error:
        # The parser puts the end of a truncated file on a line of its own.
        line = min(_line_of(error) or 1, _line_at(data, len(data)))
        return _damaged(path, line, f"not a registry file: {_reason(error)}")
    except TreeError as error:
        return _damaged(path, error.line, f"not a registry file: {error.reason}")
    if root is None:
        return _damaged(path, None, "empty: no registry file")
    return _read_root(path, root)


def _damaged(path: Path, line: int | None, reason: str) -> FileContents:
    return FileContents(issues=(FileIssue(path=path, line=line, reason=reason),))


def _read_root(path: Path, root: Node) -> FileContents:
    try:
        fields = fields_of(root)
        items = fields.pop("entries", None)
        header = read_header({name: plain(node) for name, node in fields.items()})
        if not isinstance(items, Sequence):
            raise EntryError("must be a list", ("entries",))
    except (EntryError, TreeError) as error:
        return FileContents(issues=(_issue(path, root, error),))
    entries: list[RegistryEntry] = []
    issues: list[FileIssue] = []
    for node in items.items:
        try:
            entries.append(read_entry(header, plain(node)))
        except (EntryError, TreeError) as error:
            issues.append(_issue(path, node, error))
    return FileContents(entries=merge(entries, ()), issues=_listed(issues))


def _issue(path: Path, node: Node, error: EntryError | TreeError) -> FileIssue:
    if isinstance(error, EntryError):
        return FileIssue(path=path, line=find(node, error.where).line, reason=str(error))
    return FileIssue(path=path, line=error.line, reason=error.reason)


def _listed(issues: list[FileIssue]) -> tuple[FileIssue, ...]:
    if len(issues) <= MAX_ISSUES:
        return tuple(issues)
    first, rest = issues[:MAX_ISSUES], issues[MAX_ISSUES:]
    more = FileIssue(path=rest[0].path, line=rest[0].line, reason=f"here and below, {len(rest)} more damaged entries")
    return (*first, more)


def _line_at(data: bytes, position: int) -> int:
    return data.count(b"\n", 0, position) + 1


def _line_of(error: yaml.YAMLError) -> int | None:
    mark = error.problem_mark or error.context_mark if isinstance(error, yaml.MarkedYAMLError) else None
    return None if mark is None else mark.line + 1


def _reason(error: yaml.YAMLError) -> str:
    parts = (error.context, error.problem) if isinstance(error, yaml.MarkedYAMLError) else (str(error),)
    return ", ".join(part for part in parts if part)


def readable(path: Path, data: bytes, entries: typing.Sequence[RegistryEntry]) -> None:
    """Check that `data` reads back as `entries`, so that nothing is ever written that would be refused later.

    Raises:
        RegistryError: if it does not; the message says why.
    """
    contents = parse(path, data)
    if contents.issues or contents.entries != tuple(entries):
        reason = "; ".join(str(issue) for issue in contents.issues[:3]) or "it reads back as something else"
        raise RegistryError(f"{path}: not written, the file would not be readable: {reason}")
