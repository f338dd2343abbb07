"""A study as it is at this moment: read without a lock, and never written, also while a tuning run is at it."""

from __future__ import annotations

import contextlib
import json
import typing
import urllib.parse
import warnings
from pathlib import Path

import optuna
import sqlalchemy
from optuna.storages import BaseStorage
from optuna.storages.journal import BaseJournalBackend

from flashgen.errors import FlashgenError, InputError
from flashgen.tuning.journal import shown_place


def open_snapshot(study: str) -> BaseStorage:
    """Return the storage behind a path (a journal file) or a URL (a database), to be read only.

    Raises:
        InputError: if there is none, or it is damaged; the message says what to do.
    """
    with _refusing(study), warnings.catch_warnings():
        warnings.simplefilter("ignore", optuna.exceptions.ExperimentalWarning)
        if "://" in study:
            return optuna.storages.RDBStorage(_read_only(study), skip_table_creation=True)
        path = Path(study)
        if not path.is_file():
            raise InputError(_missing(path))
        return optuna.storages.JournalStorage(_JournalSnapshot(path.read_bytes()))


class _JournalSnapshot(BaseJournalBackend):
    """The whole lines of a journal; what a run is just writing, or a killed one wrote in part, is left out."""

    def __init__(self, data: bytes) -> None:
        lines = data[: data.rfind(b"\n") + 1].splitlines()
        if data and not data.startswith(b"{"):
            raise ValueError("it is not an Optuna journal; a database is named by its URL, as in sqlite:///PATH")
        self._logs: list[dict[str, typing.Any]] = [json.loads(line) for line in lines]

    def read_logs(self, log_number_from: int) -> list[dict[str, typing.Any]]:
        return self._logs[log_number_from:]

    def append_logs(self, logs: list[dict[str, typing.Any]]) -> None:
        raise FlashgenError("a report never writes to a study")


def _read_only(text: str) -> str:
    """Return the URL; that of an SQLite file says to read only, which would else be made if it is missing."""
    url = sqlalchemy.engine.make_url(text)
    if url.get_backend_name() != "sqlite" or not url.database or url.database.startswith("file:"):
        return text
    path = Path(url.database)
    if not path.is_file():
        raise InputError(_missing(path))
    quoted = urllib.parse.quote(str(path.absolute()))
    return url.set(database=f"file:{quoted}", query={**url.query, "mode": "ro", "uri": "true"}).render_as_string(
        hide_password=False
    )


def _missing(path: Path) -> str:
    beside = sorted(str(other) for other in path.parent.glob("*.journal")) if path.parent.is_dir() else []
    there = f"; beside it: {', '.join(beside)}" if beside else ""
    return f"there is no study {path}{there}; name one, or make it: flashgen tune --study {path}"


@contextlib.contextmanager
def _refusing(study: str) -> typing.Iterator[None]:
    try:
        yield
    except FlashgenError:
        raise
    # A damaged journal shows as almost any exception of its parser, a database as any of its driver's.
    except Exception as error:
        reason = str(error).partition("\n")[0]
        raise InputError(
            f"the study {shown_place(study)} cannot be read ({type(error).__name__}: {reason}); it was left as it is: "
            "name another, or tune again into a new one"
        ) from error
