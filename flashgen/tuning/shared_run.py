"""What a run tells the machines that may join it, as an attribute of the study that it works on."""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import typing
import uuid
from pathlib import Path

from optuna.storages import BaseStorage

import flashgen
from flashgen.errors import FlashgenError
from flashgen.resources import resource_dir
from flashgen.spec import Problem, parse_problem
from flashgen.target import GpuTarget, Software

_ATTRIBUTE = "flashgen run"
_OPEN, _CLOSED, _ENDED = "open", "closed", "ended"


@dataclasses.dataclass(frozen=True, kw_only=True)
class SharedRun:
    """A run, and the problem of it that a study is about.

    Attributes:
        run: tells this run from others; of letters and digits.
        problem: what is tuned, as text: who runs other code may not be able to read it.
        target: for which GPU.
        measured: whether configs are measured on a GPU, or ranked by a model.
        triton: its version, on which binaries depend.
        driver: its version, on which times depend.
        code: digest of everything that is run.
    """

    run: str
    problem: str
    target: GpuTarget
    measured: bool
    triton: str
    driver: str
    code: str


@functools.cache
def code_digest() -> str:
    """Return a digest of the package and its templates: who differs in it would compile or measure something else."""
    package = Path(flashgen.__file__).parent
    files = {path.relative_to(package).as_posix(): path for path in package.rglob("*.py")}
    templates = resource_dir("templates")
    files |= {f"templates/{path.relative_to(templates).as_posix()}": path for path in templates.rglob("*.jinja")}
    digest = hashlib.sha256()
    for name, path in sorted(files.items()):
        digest.update(f"{name}\0".encode() + hashlib.sha256(path.read_bytes()).digest())
    return digest.hexdigest()[:16]


def can_be_told(problem: Problem) -> bool:
    """Return whether others can read a problem from its text."""
    try:
        return parse_problem(str(problem)) == problem
    except FlashgenError:
        return False


class Announcer:
    """The run's side: says which study is being worked on, and that the run has ended."""

    def __init__(self, storage: BaseStorage, *, target: GpuTarget, software: Software, measured: bool) -> None:
        """Take back what a killed run left announced."""
        self._storage = storage
        self._target, self._software, self._measured = target, software, measured
        self._run = uuid.uuid4().hex
        self._last: tuple[int, Problem] | None = None
        for study in storage.get_all_studies():
            told = study.user_attrs.get(_ATTRIBUTE)
            if isinstance(told, dict) and told.get("state") == _OPEN:
                study_id = storage.get_study_id_from_name(study.study_name)
                storage.set_study_user_attr(study_id, _ATTRIBUTE, {**told, "state": _CLOSED})

    def open(self, study_id: int, problem: Problem) -> None:
        """Say that configs of a problem are on offer in a study."""
        self._last = study_id, problem
        self._tell(_OPEN)

    def close(self) -> None:
        """Say that they are no more."""
        self._tell(_CLOSED)

    def end(self) -> None:
        """Say that the run has ended."""
        self._tell(_ENDED)

    def _tell(self, state: str) -> None:
        if self._last is None:
            return
        study_id, problem = self._last
        told = {
            "state": state,
            "run": self._run,
            "problem": str(problem),
            "target": dataclasses.asdict(self._target),
            "measured": self._measured,
            "triton": self._software.triton,
            "driver": self._software.driver,
            "code": code_digest(),
        }
        self._storage.set_study_user_attr(study_id, _ATTRIBUTE, told)


def find_open(storage: BaseStorage) -> tuple[int, SharedRun] | None:
    """Return the study that a run works on, and that run, or None where there is none."""
    for study in storage.get_all_studies():
        told = study.user_attrs.get(_ATTRIBUTE)
        run = _read(told) if isinstance(told, dict) and told.get("state") == _OPEN else None
        if run is not None:
            return storage.get_study_id_from_name(study.study_name), run
    return None


def is_open(storage: BaseStorage, study_id: int, run: SharedRun) -> bool:
    """Return whether a run still works on a study."""
    told = storage.get_study_user_attrs(study_id).get(_ATTRIBUTE)
    return isinstance(told, dict) and (told.get("state"), told.get("run")) == (_OPEN, run.run)


def has_ended(storage: BaseStorage, run: str) -> bool:
    """Return whether a run said that it has ended."""
    told = (study.user_attrs.get(_ATTRIBUTE) for study in storage.get_all_studies())
    return any((each.get("state"), each.get("run")) == (_ENDED, run) for each in told if isinstance(each, dict))


def _read(told: dict[str, typing.Any]) -> SharedRun | None:
    """Return what a run told, or None if it makes no sense: others write there, too."""
    try:
        return SharedRun(
            run=str(told["run"]),
            problem=str(told["problem"]),
            target=_target(told["target"]),
            measured=bool(told["measured"]),
            triton=str(told["triton"]),
            driver=str(told["driver"]),
            code=str(told["code"]),
        )
    except (LookupError, TypeError, ValueError):
        return None


def _target(told: dict[str, typing.Any]) -> GpuTarget:
    for field in dataclasses.fields(GpuTarget):
        types = {"str": (str,), "int": (int,), "float": (int, float)}[str(field.type)]
        if type(told[field.name]) not in types:
            raise ValueError(f"{field.name} is {told[field.name]!r}")
    return GpuTarget(**told)
