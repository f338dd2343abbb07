"""Files that processes leave to later ones: replaced whole, checked when read, and dated by what they were made of."""

from __future__ import annotations

import contextlib
import functools
import hashlib
import os
import tempfile
import zlib
from collections.abc import Iterator
from pathlib import Path

import flashgen
from flashgen import resources

_MODE = 0o644
_MAX_BYTES = 2**24
_PACKAGE = Path(__file__).parent
_IGNORED = "__pycache__"


def replace_file(path: Path, data: bytes, *, flush: bool = True) -> None:
    """Write `data` to a temporary file beside `path`, and rename it over `path`; flushed to the disk before.

    Without `flush` it takes no time of the disk's, and a crash of the machine may leave anything in the file.

    Raises:
        OSError: if the disk is full, the folder read-only, ...; `path` is then as it was and the temporary file gone.
    """
    handle, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.", suffix=".tmp")
    try:
        with os.fdopen(handle, "wb") as file:
            file.write(data)
            if flush:
                file.flush()
                os.fsync(file.fileno())
        os.chmod(name, _MODE)
        os.replace(name, path)
    except BaseException:
        with contextlib.suppress(OSError):
            os.unlink(name)
        raise


def read_kept(folder: str, key: str) -> str | None:
    """Return the text that `keep` left under a key in a folder of the cache; None where there is none, or damage."""
    try:
        path = _kept_path(folder, key)
        if path.stat().st_size > _MAX_BYTES:
            return None
        data = path.read_bytes()
        return data[8:].decode() if int(data[:8], 16) == zlib.crc32(data[8:]) else None
    except (OSError, ValueError):
        return None


def keep(folder: str, key: str, text: str) -> None:
    """Leave a text for later processes; a cache that cannot be written costs them time, nothing else.

    Args:
        folder: of the cache.
        key: all that the text depends on.
        text: found again under the key.
    """
    path, data = _kept_path(folder, key), text.encode()
    with contextlib.suppress(OSError):
        path.parent.mkdir(parents=True, exist_ok=True)
        # The checksum tells what a crash left half written.
        replace_file(path, b"%08x" % zlib.crc32(data) + data, flush=False)


def _kept_path(folder: str, key: str) -> Path:
    return resources.cache_dir() / folder / hashlib.sha256(key.encode()).hexdigest()[:32]


def own_folders() -> tuple[str, str]:
    """Return where flashgen's code and its templates lie."""
    return str(_PACKAGE), str(resources.resource_dir("templates"))


@functools.lru_cache(maxsize=16)
def tree_stamp(*roots: str) -> str | None:
    """Return 32 hex digits that change when a file below the folders does, by names, sizes, times and inodes.

    None where a file changed after this process had loaded flashgen: what it runs may then be older than the files,
    and what it makes is not to be kept under their stamp. Taken once a process.
    """
    return _stamp(roots)


def is_still(stamp: str, *roots: str) -> bool:
    """Return whether the files below the folders are those that the stamp was taken of."""
    return _stamp(roots) == stamp


def _stamp(roots: tuple[str, ...]) -> str | None:
    lines: list[str] = []
    newest = 0
    try:
        for root in roots:
            for entry in sorted(_files(root), key=lambda entry: entry.path):
                status = entry.stat()
                newest = max(newest, status.st_mtime_ns, status.st_ctime_ns)
                lines.append(f"{entry.path} {status.st_size} {status.st_mtime_ns} {status.st_ctime_ns} {status.st_ino}")
    except OSError:
        return None
    if not lines or newest >= flashgen.loaded_ns:
        return None
    return hashlib.sha256("\n".join(lines).encode(errors="surrogateescape")).hexdigest()[:32]


def _files(folder: str) -> Iterator[os.DirEntry[str]]:
    with os.scandir(folder) as entries:
        for entry in entries:
            if not entry.is_dir():
                yield entry
            elif entry.name != _IGNORED:
                yield from _files(entry.path)
