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
from flashgen.tuning.journal_lock import TAIL_BYTES, JournalLock

# Of PostgreSQL's advisory locks: "flashgen" in ASCII.
_POSTGRESQL_LOCK = int.from_bytes(b"flashgen", "big")
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
                database = optuna.storages.get_storage(optuna.storages.RDBStorage(study))
            yield database
        return
    # A relative path would end the lock file's link in the wrong folder.
    path = Path(study).absolute()
    with contextlib.ExitStack() as stack:
        with _refusing(study):
            path.parent.mkdir(parents=True, exist_ok=True)
            stack.enter_context(_locked_file(path))
            _mend(path)
            storage = _journal(path)
        yield storage


def can_be_joined(study: str) -> bool:
    """Return whether machines can join a run by this study.

    Not by SQLite: two may find a trial waiting and both take it, for reading locks nothing there.
    """
    return "://" not in study or _backend(study) == "postgresql"


def join_storage(study: str) -> BaseStorage | None:
    """Return the storage of a run that another process may have open, or None where no run has made it yet.

    Raises:
        InputError: if it cannot be joined or opened; the message says why.
    """
    if not can_be_joined(study):
        raise InputError(
            f"a run cannot be joined by {shown_place(study)}; give both a journal file on a shared folder, or a "
            "PostgreSQL database"
        )
    with _refusing(study):
        if "://" not in study:
            path = Path(study).absolute()
            if not path.exists():
                return None
            _require_journal(path)
            return _journal(path)
        # Two that make the tables at once would disturb each other; this one is made last.
        engine = sqlalchemy.create_engine(study, poolclass=sqlalchemy.pool.NullPool)
        if not sqlalchemy.inspect(engine).has_table("alembic_version"):
            return None
        # Not cached: that would read every trial under way, where only those matter that wait.
        storage = optuna.storages.RDBStorage(study)
        # Opening it took two connections, of which a server has not many; working with it takes one.
        storage.remove_session()
        storage.engine.dispose()
        return storage


def _journal(path: Path) -> BaseStorage:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", optuna.exceptions.ExperimentalWarning)
        return optuna.storages.JournalStorage(JournalFileBackend(str(path), lock_obj=JournalLock(str(path))))


def _backend(study: str) -> str:
    try:
        return sqlalchemy.engine.make_url(study).get_backend_name()
    except sqlalchemy.exc.ArgumentError:
        return ""


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

    Machines that joined may be writing: the lock is left to them for as long as one may hold it.

    Raises:
        ValueError: if the file is no journal, which is left as it is, or its last line is whole and yet no record:
            Optuna would find out after the next one.
    """
    if not path.exists():
        return
    _require_journal(path)
    lock = JournalLock(str(path))
    lock.acquire()
    try:
        with open(path, "rb") as file:
            size = file.seek(0, os.SEEK_END)
            file.seek(max(0, size - TAIL_BYTES))
            last_line = file.read().rstrip(b"\n").rpartition(b"\n")[2]
        if last_line:
            json.loads(last_line)
    finally:
        lock.release()


def _require_journal(path: Path) -> None:
    with open(path, "rb") as file:
        if not _FIRST_BYTES.startswith(file.read(len(_FIRST_BYTES))):
            raise ValueError("it is not an Optuna journal")


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
