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
import sqlalchemy
import sqlalchemy.exc
from optuna.storages import BaseStorage
from optuna.storages.journal import JournalFileBackend

from flashgen.errors import FlashgenError, InputError
from flashgen.resources import cache_dir
from flashgen.target import GpuTarget

# Of PostgreSQL's advisory locks: "flashgen" in ASCII.
_POSTGRESQL_LOCK = int.from_bytes(b"flashgen", "big")
_TAIL_BYTES = 1 << 20
_FIRST_BYTES = b'{"op_code"'


def default_study(target: GpuTarget) -> str:
    """Return the journal that trials are kept in where no study is named."""
    return str(cache_dir() / "studies" / f"{target.arch}.journal")


def shown_place(study: str) -> str:
    """Return the path or URL of a study as others may see it: without a password."""
    if "://" not in study:
        return study
    try:
        return sqlalchemy.engine.make_url(study).render_as_string(hide_password=True)
    except sqlalchemy.exc.ArgumentError:
        return study


@contextlib.contextmanager
def open_storage(study: str) -> typing.Iterator[BaseStorage]:
    """Give the storage behind a path (a journal file) or a URL (a database that Optuna knows), this run's alone.

    What a run finds unfinished it takes for what a killed run left, so two must not use a study at once. Databases
    other than SQLite and PostgreSQL have no lock that this knows: there it is the callers who must see to it.

    Raises:
        InputError: if it cannot be opened; the message says why.
        FlashgenError: if another run is using it.
    """
    if "://" in study:
        with contextlib.ExitStack() as stack:
            with _refusing(study):
                stack.enter_context(_locked_database(study))
                database = optuna.storages.RDBStorage(study)
            yield database
        return
    # A relative path would end the lock file's link in the wrong folder.
    path = Path(study).absolute()
    with contextlib.ExitStack() as stack:
        with _refusing(study), warnings.catch_warnings():
            warnings.simplefilter("ignore", optuna.exceptions.ExperimentalWarning)
            path.parent.mkdir(parents=True, exist_ok=True)
            stack.enter_context(_locked_file(path))
            _mend(path)
            storage = optuna.storages.JournalStorage(JournalFileBackend(str(path)))
        yield storage


@contextlib.contextmanager
def _locked_file(path: Path) -> typing.Iterator[None]:
    lock = filelock.FileLock(f"{path}.run-lock")
    try:
        lock.acquire(timeout=0)
    except filelock.Timeout:
        raise _in_use(str(path)) from None
    try:
        yield
    finally:
        lock.release()


@contextlib.contextmanager
def _locked_database(study: str) -> typing.Iterator[None]:
    url = sqlalchemy.engine.make_url(study)
    backend, file = url.get_backend_name(), url.database
    if backend == "sqlite" and file and file != ":memory:" and not file.startswith("file:"):
        with _locked_file(Path(file).absolute()):
            yield
    elif backend == "postgresql":
        # The server lets go of it when this connection ends, however that comes about.
        engine = sqlalchemy.create_engine(url, isolation_level="AUTOCOMMIT", poolclass=sqlalchemy.pool.NullPool)
        with engine.connect() as connection:
            lock = sqlalchemy.text("SELECT pg_try_advisory_lock(:key)")
            if not connection.execute(lock, {"key": _POSTGRESQL_LOCK}).scalar():
                raise _in_use(study)
            yield
    else:
        yield


def _in_use(study: str) -> FlashgenError:
    return FlashgenError(
        f"another flashgen tune is using the study {shown_place(study)}; wait for it, or name another with --study"
    )


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
            f"the study {shown_place(study)} cannot be opened ({type(error).__name__}: {error}); move it away or name "
            "another"
        ) from error
