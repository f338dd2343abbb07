"""Registry files as YAML text: parsing that survives any bytes and knows the lines, and byte-stable writing."""

from __future__ import annotations

import typing
from pathlib import Path

import yaml

from flashgen.errors import RegistryError
from flashgen.registry.contents import FileContents, FileIssue
from flashgen.registry.entry import RegistryEntry
from flashgen.registry.merging import merge
from flashgen.registry.schema import FORMAT, MAX_CODE, MAX_ENTRIES, EntryError, read_entry, read_header

MAX_FILE_BYTES = 8 * 2**20
MAX_DEPTH = 8
# The largest file that flashgen would write has about 1.2 million events; more only makes the reader work.
MAX_EVENTS = 1_500_000

_HEADING = "# Tuned attention kernels of one GPU and phase, written by flashgen. An edited entry fails its digest.\n"
# No line is ever broken: that of an entry's spec may hold two functions, each character escaped.
_WIDTH = 2**20
_STR_TAG = "tag:yaml.org,2002:str"
_MAP_TAG = "tag:yaml.org,2002:map"
_VALUE_TAGS = frozenset(f"tag:yaml.org,2002:{kind}" for kind in ("int", "float", "bool", "null"))

# libyaml where PyYAML was built with it: ten times faster, the same text.
if typing.TYPE_CHECKING:
    from yaml import SafeDumper as _BaseDumper
    from yaml import SafeLoader as _Loader
else:
    _Loader = getattr(yaml, "CSafeLoader", yaml.SafeLoader)
    _BaseDumper = getattr(yaml, "CSafeDumper", yaml.SafeDumper)

_SCALARS = yaml.constructor.SafeConstructor()


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
        text = data.decode("utf-8")
        _guard(text)
        root = yaml.compose(text, Loader=_Loader)
    except UnicodeDecodeError as error:
        return _damaged(path, _line_at(data, error.start), "not UTF-8 text")
    except yaml.reader.ReaderError as error:
        return _damaged(path, _line_at(data, error.position), f"not a registry file: {error.reason}")
    except yaml.YAMLError as error:
        # The parser puts the end of a truncated file on a line of its own.
        line = min(_line_of(error) or 1, _line_at(data, len(data)))
        return _damaged(path, line, f"not a registry file: {_reason(error)}")
    if root is None:
        return _damaged(path, None, "empty: no registry file")
    return _read_root(path, root)


def _damaged(path: Path, line: int | None, reason: str) -> FileContents:
    return FileContents(issues=(FileIssue(path=path, line=line, reason=reason),))


def _guard(text: str) -> None:
    # Before any tree is built: aliases can expand without end, depth can exhaust the stack, and a number of a million
    # digits the clock. The event parser is iterative and lazy, so this stops at the first offence.
    depth = 0
    for count, event in enumerate(yaml.parse(text, Loader=_Loader)):
        reason = None
        if isinstance(event, yaml.CollectionStartEvent):
            depth += 1
        elif isinstance(event, yaml.CollectionEndEvent):
            depth -= 1
        if isinstance(event, yaml.NodeEvent) and event.anchor is not None:
            reason = f"anchors and aliases are not allowed, got {event.anchor[:60]!r}"
        elif isinstance(event, yaml.ScalarEvent) and len(event.value) > MAX_CODE:
            reason = f"a value is longer than {MAX_CODE} characters"
        elif depth > MAX_DEPTH:
            reason = f"nested deeper than {MAX_DEPTH} levels"
        elif count >= MAX_EVENTS:
            reason = f"more than {MAX_EVENTS} values"
        if reason is not None:
            raise yaml.MarkedYAMLError(problem=reason, problem_mark=typing.cast("yaml.Mark", event.start_mark))


def _read_root(path: Path, root: yaml.Node) -> FileContents:
    try:
        fields = _fields(root)
        items = fields.pop("entries", None)
        header = read_header({name: _plain(node) for name, node in fields.items()})
        if not isinstance(items, yaml.SequenceNode):
            raise EntryError("must be a list", ("entries",))
        if len(items.value) > MAX_ENTRIES:
            raise EntryError(f"more than {MAX_ENTRIES} entries", ("entries",))
    except (EntryError, yaml.YAMLError) as error:
        return FileContents(issues=(_issue(path, root, error),))
    entries: list[RegistryEntry] = []
    issues: list[FileIssue] = []
    for node in items.value:
        try:
            entries.append(read_entry(header, _plain(node)))
        except (EntryError, yaml.YAMLError) as error:
            issues.append(_issue(path, node, error))
    return FileContents(entries=merge(entries, ()), issues=tuple(issues))


def _issue(path: Path, node: yaml.Node, error: EntryError | yaml.YAMLError) -> FileIssue:
    if isinstance(error, EntryError):
        return FileIssue(path=path, line=_find(node, error.where).start_mark.line + 1, reason=str(error))
    return FileIssue(path=path, line=_line_of(error), reason=_reason(error))


def _fields(node: yaml.Node) -> dict[str, yaml.Node]:
    if not isinstance(node, yaml.MappingNode):
        raise yaml.MarkedYAMLError(problem="must be a mapping", problem_mark=node.start_mark)
    fields: dict[str, yaml.Node] = {}
    for key, value in node.value:
        if key.tag != _STR_TAG:
            raise yaml.MarkedYAMLError(problem="every name must be plain text", problem_mark=key.start_mark)
        if key.value in fields:
            raise yaml.MarkedYAMLError(problem=f"{key.value!r} is given twice", problem_mark=key.start_mark)
        fields[key.value] = value
    return fields


def _plain(node: yaml.Node) -> object:
    if isinstance(node, yaml.MappingNode):
        return {name: _plain(value) for name, value in _fields(node).items()}
    if isinstance(node, yaml.SequenceNode):
        return [_plain(value) for value in node.value]
    if node.tag == _STR_TAG:
        return node.value
    if node.tag not in _VALUE_TAGS:
        kind = node.tag.removeprefix("tag:yaml.org,2002:")
        problem = f"{node.value!r} reads as a {kind}, which no field takes; quote it if it is text"
        raise yaml.MarkedYAMLError(problem=problem, problem_mark=node.start_mark)
    try:
        return _SCALARS.yaml_constructors[node.tag](_SCALARS, node)
    except ValueError as error:
        problem = f"{node.value!r} is no number: {error}"
        raise yaml.MarkedYAMLError(problem=problem, problem_mark=node.start_mark) from error


def _find(node: yaml.Node, where: tuple[int | str, ...]) -> yaml.Node:
    # The deepest node on the way: a missing field is reported at the mapping that lacks it.
    for step in where:
        if isinstance(node, yaml.MappingNode):
            children = {key.value: value for key, value in node.value if isinstance(key, yaml.ScalarNode)}
        elif isinstance(node, yaml.SequenceNode):
            children = dict(enumerate(node.value))
        else:
            return node
        if step not in children:
            return node
        node = children[step]
    return node


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
