"""A JSON index beside each YAML file: parsing 2,000 entries takes a second, looking them up here milliseconds.

Rows stay undecoded text, grouped by spec, until a spec or one of its family is asked for.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import stat
import typing
import zlib
from pathlib import Path

from flashgen import resources
from flashgen.registry.codec import entry_from_dict
from flashgen.registry.contents import FileContents, FileIssue
from flashgen.registry.entry import RegistryEntry
from flashgen.spec import AttentionSpec
from flashgen.storage import replace_file

INDEX_VERSION = 3
INDEX_FOLDER = "registry-index"
MAX_INDEX_BYTES = 64 * 2**20

# What odd bytes make of decoding: JSON may be nested deeper than the stack, and any value may be of any type.
_DAMAGE = (ValueError, KeyError, TypeError, AttributeError, OverflowError, RecursionError)

Groups = dict[str, tuple[RegistryEntry, ...]]
Block = tuple[memoryview, int]
"""The rows of one spec, one JSON object a line, and their checksum."""


class IndexedFile:
    """The entries of one registry file, decoded a spec at a time.

    Attributes:
        path: the YAML file.
        issues: what was wrong with it.
    """

    def __init__(self, path: Path, contents: FileContents | None, blocks: dict[str, Block]) -> None:
        self.path = path
        self.issues: tuple[FileIssue, ...] = contents.issues if contents is not None else ()
        self._groups: Groups = _grouped(contents.entries) if contents is not None else {}
        self._blocks = blocks

    def candidates(self, spec: AttentionSpec) -> tuple[RegistryEntry, ...]:
        """Return the entries for `spec.tuning_key()`, sorted by range."""
        wanted = spec.tuning_key()
        return tuple(entry for entry in self._group(_key(wanted)) if entry.spec == wanted)

    def related(self, spec: AttentionSpec) -> tuple[RegistryEntry, ...]:
        """Return the entries of `spec`'s family for any other spec; see `Registry.related`."""
        wanted = spec.tuning_key()
        # Decoding may replace the blocks: the keys are listed first.
        keys = [key for key in (self._blocks or self._groups) if key.startswith(_family(wanted))]
        return tuple(entry for key in keys for entry in self._group(key) if entry.spec != wanted)

    def entries(self) -> tuple[RegistryEntry, ...]:
        """Return every entry, sorted."""
        for key in tuple(self._blocks):
            self._group(key)
        # Groups are decoded in any order, and a failed decoding empties the blocks: hence both, and only now.
        return tuple(entry for key in self._blocks or self._groups for entry in self._groups[key])

    def is_empty(self) -> bool:
        """Return whether there is no entry."""
        return not (self._blocks or self._groups)

    def digest(self) -> str:
        """Return 16 hex digits that equal entries share, whichever file they stand in; decodes none of an index."""
        if not all(zlib.crc32(rows) == checksum for rows, checksum in self._blocks.values()):
            self._read_yaml()
        rows = [block for block, _ in self._blocks.values()] or map(_encode, self._groups.values())
        content = hashlib.sha256()
        for group in rows:
            content.update(group)
        return content.hexdigest()[:16]

    def _group(self, key: str) -> tuple[RegistryEntry, ...]:
        if key not in self._groups and key in self._blocks:
            try:
                self._groups[key] = _decode(*self._blocks[key])
            except _DAMAGE:
                # A damaged index, or one by a flashgen whose entries looked different: the YAML file decides.
                self._read_yaml()
        return self._groups.get(key, ())

    def _read_yaml(self) -> None:
        contents = _parse_yaml(self.path)
        self.issues, self._groups, self._blocks = contents.issues, _grouped(contents.entries), {}


def load_indexed(path: Path) -> IndexedFile:
    """Return the entries of the YAML file at `path`, from its index if that is fresh, writing one if it is not."""
    stamp = _stamp(path)
    blocks = _read_blocks(path, stamp)
    if blocks is not None:
        return IndexedFile(path, None, blocks)
    contents = _parse_yaml(path)
    # No index for a damaged file: what this version refuses another may accept, and issues must never go stale.
    if stamp is not None and not contents.issues:
        _write_blocks(path, stamp, contents.entries)
    return IndexedFile(path, contents, {})


def _parse_yaml(path: Path) -> FileContents:
    # yaml, pydantic and filelock take longer to import than an index takes to load: only a miss pays for them.
    from flashgen.registry.files import read_file

    return read_file(path)


def _grouped(entries: typing.Iterable[RegistryEntry]) -> Groups:
    groups: dict[str, list[RegistryEntry]] = {}
    for entry in entries:
        groups.setdefault(_key(entry.spec), []).append(entry)
    return {key: tuple(group) for key, group in groups.items()}


def _family(spec: AttentionSpec) -> str:
    """Return what specs must share for the winners of one to say something about another."""
    return f"{spec.phase} {spec.dtype} {spec.head_dim_qk} {spec.head_dim_v} {'varlen' if spec.varlen else 'dense'}: "


def _key(spec: AttentionSpec) -> str:
    return f"{_family(spec)}{spec}"


def _stamp(path: Path) -> list[int] | None:
    # The inode tells two replacements within one tick of the clock apart.
    try:
        status = path.stat()
    except (OSError, ValueError):
        return None
    return [status.st_size, status.st_mtime_ns, status.st_ino]


def index_path(path: Path) -> Path:
    """Return where the index of the YAML file at `path` is kept."""
    name = hashlib.sha256(os.path.abspath(path).encode(errors="surrogateescape")).hexdigest()[:32]
    return resources.cache_dir() / INDEX_FOLDER / f"{name}.jsonl"


def forgotten_indexes() -> tuple[Path, ...]:
    """Return the indexes whose registry file is gone, and what lies among them and is no index."""
    folder = resources.cache_dir() / INDEX_FOLDER
    return tuple(path for path in sorted(folder.glob("*.jsonl")) if not _has_file(path))


def _has_file(index: Path) -> bool:
    try:
        return os.path.exists(_header(_content(index))[0]["path"])
    except (OSError, *_DAMAGE):
        return False


def _content(index: Path) -> bytes:
    status = index.stat()
    if not stat.S_ISREG(status.st_mode) or status.st_size > MAX_INDEX_BYTES:
        raise ValueError("no index")
    return index.read_bytes()


def _header(data: bytes) -> tuple[typing.Any, int]:
    """Return the first line, and where the rows begin; of a line that is not as it was written, nothing is believed."""
    start = data.index(b"\n") + 1
    if int(data[:8], 16) != zlib.crc32(data[8:start]):
        raise ValueError("checksum")
    return json.loads(data[8:start]), start


def _read_blocks(path: Path, stamp: list[int] | None) -> dict[str, Block] | None:
    # A first line with its checksum, version, stamp, and length and checksum of the rows of each spec; then the rows.
    # Anything odd means that there is no index. Checksums are against damage: the cache is the user's own.
    if stamp is None:
        return None
    try:
        data = _content(index_path(path))
        header, start = _header(data)
        if [header[name] for name in ("version", "path", "stamp")] != [INDEX_VERSION, os.path.abspath(path), stamp]:
            return None
        blocks = {}
        for key, (length, checksum) in header["blocks"].items():
            blocks[key] = (memoryview(data)[start : start + length], checksum)
            start += length
        return blocks if start == len(data) else None
    except (OSError, *_DAMAGE):
        return None


def _decode(rows: memoryview, checksum: int) -> tuple[RegistryEntry, ...]:
    if zlib.crc32(rows) != checksum:
        raise ValueError("checksum")
    return tuple(entry_from_dict(json.loads(row)) for row in bytes(rows).splitlines())


def _encode(group: typing.Iterable[RegistryEntry]) -> bytes:
    return "".join(json.dumps(entry.as_dict(), separators=(",", ":")) + "\n" for entry in group).encode()


def _write_blocks(path: Path, stamp: list[int], entries: typing.Iterable[RegistryEntry]) -> None:
    blocks = {key: _encode(group) for key, group in _grouped(entries).items()}
    header = {
        "version": INDEX_VERSION,
        "path": os.path.abspath(path),
        "stamp": stamp,
        "blocks": {key: [len(rows), zlib.crc32(rows)] for key, rows in blocks.items()},
    }
    # A cache that cannot be written costs time, nothing else.
    with contextlib.suppress(OSError):
        target = index_path(path)
        target.parent.mkdir(parents=True, exist_ok=True)
        first = json.dumps(header).encode() + b"\n"
        replace_file(target, b"".join([b"%08x" % zlib.crc32(first), first, *blocks.values()]))
