"""Optuna's lock on a journal file, for many machines at once: waits in short steps, and outlives a killed holder."""

from __future__ import annotations

import contextlib
import os
import random
import time
import uuid

from optuna.storages.journal import JournalFileSymlinkLock

STALE_S = 5.0
"""A lock that one holder kept for so long is a killed one's: a write takes milliseconds."""

TAIL_BYTES = 1 << 20
_FIRST_WAIT_S, _LONGEST_WAIT_S = 0.001, 0.25


class JournalLock(JournalFileSymlinkLock):
    """The same symbolic link, so that Optuna's own tools keep out too.

    Optuna's waits grow to a second, in which hundreds of writes find room, and it takes a lock for a dead one's when
    the journal has not changed for 30 s. Here waits stay short, each of another length, and what counts is whether the
    link is still the same one, on this machine's monotonic clock. Whoever holds the lock first removes the line that
    the last holder left in part: after it another line would damage the journal.
    """

    def __init__(self, path: str) -> None:
        super().__init__(path)
        self._path = path
        self._mine: tuple[int, int] | None = None

    def acquire(self) -> bool:
        """Return True once the lock is held and the journal ends with a whole line.

        Raises:
            ValueError: if its last line is too long to be a record.
            OSError: if the folder or the file cannot be written.
        """
        seen: tuple[int, int] | None = None
        since = time.monotonic()
        wait_s = _FIRST_WAIT_S
        while not self._took_it():
            holder = self._holder()
            if holder != seen:
                seen, since = holder, time.monotonic()
            elif holder is not None and time.monotonic() - since > STALE_S:
                self._remove()
                continue
            time.sleep(wait_s * random.uniform(0.5, 1.0))
            wait_s = min(2 * wait_s, _LONGEST_WAIT_S)
        self._mine = self._holder()
        try:
            _remove_part_of_a_line(self._path)
        except BaseException:
            self.release()
            raise
        return True

    def release(self) -> None:
        """Let go of the lock, unless it was taken for a dead one's meanwhile and is another's."""
        if self._mine is not None and self._holder() == self._mine:
            self._remove()
        self._mine = None

    def _took_it(self) -> bool:
        try:
            os.symlink(self._lock_target_file, self._lock_file)
        except FileExistsError:
            return False
        return True

    def _holder(self) -> tuple[int, int] | None:
        """Return what tells this link from the next one."""
        try:
            link = os.lstat(self._lock_file)
        except FileNotFoundError:
            return None
        return link.st_ino, link.st_ctime_ns

    def _remove(self) -> None:
        # Of two that remove it at once, one does.
        name = f"{self._lock_file}{uuid.uuid4()}.rename"
        with contextlib.suppress(FileNotFoundError):
            os.rename(self._lock_file, name)
            os.unlink(name)


def _remove_part_of_a_line(path: str) -> None:
    try:
        file = open(path, "r+b")  # noqa: SIM115
    except FileNotFoundError:
        return
    with file:
        size = file.seek(0, os.SEEK_END)
        if not size:
            return
        file.seek(size - 1)
        if file.read(1) == b"\n":
            return
        start = max(0, size - TAIL_BYTES)
        file.seek(start)
        whole = file.read().rfind(b"\n") + 1
        if start and not whole:
            raise ValueError(f"its last line is longer than {TAIL_BYTES} bytes")
        file.truncate(start + whole)
