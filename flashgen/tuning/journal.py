"""The file or database that holds the trials: opened by one run at a time, mended after a kill, refused if damaged."""

from __future__ import annotations

import contextlib
import json
import os
import typing
import warnings
from pathlib import Path

import filelock
import optuna
from optuna.storages import BaseStorage
from optuna.storages.journal import JournalFileBackend

from flashgen.errors import FlashgenError, InputError
from flashgen.resources import cache_dir
from flashgen.target import GpuTarget

_TAIL_BYTES = 1 << 20
_FIRST_BYTES = b'{"op_code"'


def default_study(target: GpuTarget) -> str:
    """Return the journal that trials are kept in where no study is named."""
    return str(cache_dir() / "studies" / f"{target.arch}.journal")


@contextlib.contextmanager
def open_storage(study: str) -> typing.Iterator[BaseStorage]:
    """Give the storage behind a path (a journal file, this run's alone) or a URL (a database that Optuna knows).

    Raises:
        InputError: if it cannot be opened; the message says why.
        FlashgenError: if another run is using the journal.
    """
    if "://" in study:
        with _refusing(study):
            storage: BaseStorage = optuna.storages.RDBStorage(study)
        yield storage
        return
    # A relative path would end the lock file's link in the wrong folder.
    path = Path(study).absolute()
    with _refusing(study):
        path.parent.mkdir(parents=True, exist_ok=True)
        lock = filelock.FileLock(f"{path}.run-lock")
        try:
            lock.acquire(timeout=0)
        except filelock.Timeout:
            raise FlashgenError(
                f"another flashgen tune is using the study {path}; wait for it, or name another with --study"
            ) from None
    try:
        with _refusing(study), warnings.catch_warnings():
            warnings.simplefilter("ignore", optuna.exceptions.ExperimentalWarning)
            _mend(path)
            storage = optuna.storages.JournalStorage(JournalFileBackend(str(path)))
        yield storage
    finally:
        lock.release()


def _mend(path: Path) -> None:
    """Remove what a killed run left: Optuna's own lock, which it would wait for, and a line written in part.

    Raises:
        ValueError: if the file is no journal, which is left as it is, or its last line is whole and yet no record:
            Optuna would find out after the next one.
    """
    with contextlib.suppress(FileNotFoundError):
        os.unlink(f"{path}.lock")
    if not path.exists():
        return
    with open(path, "r+b") as file:
        if not _FIRST_BYTES.startswith(file.read(len(_FIRST_BYTES))):
            raise ValueError("it is not an Optuna journal")
        size = file.seek(0, os.SEEK_END)
        start = max(0, size - _TAIL_BYTES)
        file.seek(start)
        tail = file.read()
        whole = tail.rfind(b"\n") + 1
        if whole < len(tail):
            if start and not whole:
                raise ValueError(f"its last line is longer than {_TAIL_BYTES} bytes")
            file.truncate(start + whole)
        last_line = tail[:whole].rstrip(b"\n").rpartition(b"\n")[2]
        if last_line:
            json.loads(last_line)


@contextlib.contextmanager
def _refusing(study: str) -> typing.Iterator[None]:
    """Turn whatever a damaged or unreachable study raises into one clear error."""
    try:
        yield
    except FlashgenError:
        raise
    # A damaged journal shows as almost any exception of its parser.
    except Exception as error:
        raise InputError(
            f"the study {study} cannot be opened ({type(error).__name__}: {error}); move it away or name another"
        ) from error
