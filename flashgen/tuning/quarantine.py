"""Configs that hung or killed a process on this machine: no search of another problem meets their code again.

They are kept in one file of the cache, for each GPU, driver and Triton apart: under another one a config gets its
chance again, and who removes the file gives all of them another.
"""

from __future__ import annotations

import contextlib
import dataclasses
import datetime
import hashlib
import json
import os
import re
import typing
from pathlib import Path

import filelock

from flashgen.codegen import KernelConfig, constant_values, render
from flashgen.measure import Rejected
from flashgen.resources import cache_dir
from flashgen.spec import AttentionSpec, Problem
from flashgen.storage import replace_file
from flashgen.target import GpuTarget, Software
from flashgen.tuning.offers import MOST_CHARACTERS

_FORMAT = 1
# The oldest make room.
_MAX_OFFENCES = 1000
_MAX_BYTES = 4 << 20
_REASON_CHARACTERS = 300
_LOCK_TIMEOUT_S = 5.0
# As `failure_reason` begins, alone or behind what the evaluator was at.
_DEADLY = re.compile(r"(?:(?:in the final comparison|with lse|with dbias), )?(?:timeout|crashed): ")
# No kernel and no compiler sends it: somebody else did, or the machine was out of memory.
_FROM_OUTSIDE = "died of SIGKILL"


@dataclasses.dataclass(frozen=True, kw_only=True)
class Offence:
    """A config that took its process with it.

    Attributes:
        code: which code it was, `code_of`.
        device, driver, triton: where.
        config: its text, for people.
        problem: at which it happened.
        stage: of the trial.
        reason: how it ended.
        date: of the day.
    """

    code: str
    device: str
    driver: str
    triton: str
    config: str
    problem: str
    stage: typing.Literal["compile", "run", "accuracy"]
    reason: str
    date: str


class Quarantine:
    """The offences on one GPU under one driver and one Triton."""

    def __init__(self, path: Path, target: GpuTarget, software: Software) -> None:
        """Read the file at `path`, which need not exist.

        Attributes:
            issue: what is wrong with the file, or nothing.
        """
        self._path = path
        self._place = (target.device_name, software.driver, software.triton)
        offences, self.issue = read_offences(path)
        self._known = {offence.code: offence for offence in offences if _place(offence) == self._place}

    def refusal(self, spec: AttentionSpec, config: KernelConfig) -> Rejected | None:
        """Return why a config must not be run here, or None."""
        if not self._known:
            return None
        offence = self._known.get(code_of(spec, config))
        if offence is None:
            return None
        reason = f"quarantined on {offence.date}: the same code, at {offence.problem}, ended in {offence.reason}"
        # As long as a study keeps it: the file may hold anything.
        return Rejected(stage=offence.stage, reason=f"{reason} (remembered in {self._path})"[:MOST_CHARACTERS])

    def consider(self, problem: Problem, config: KernelConfig, rejected: Rejected) -> None:
        """Remember a config that hung or killed its process; what was merely wrong is left to the study.

        A file that cannot be written loses the memory of it, and nothing else: `issue` says so.
        """
        if not _DEADLY.match(rejected.reason) or _FROM_OUTSIDE in rejected.reason:
            return
        device, driver, triton = self._place
        offence = Offence(
            code=code_of(problem.spec, config),
            device=device,
            driver=driver,
            triton=triton,
            config=str(config),
            # A function's source may be part of it.
            problem=str(problem)[:_REASON_CHARACTERS],
            stage=rejected.stage if rejected.stage in ("compile", "accuracy") else "run",
            reason=rejected.reason.splitlines()[0][:_REASON_CHARACTERS],
            date=datetime.date.today().isoformat(),
        )
        self._known[offence.code] = offence
        try:
            _add(self._path, offence)
        except (OSError, filelock.Timeout) as error:
            self.issue = f"{self._path} cannot be written ({error}); what hung or crashed is forgotten after this run"


def default_quarantine() -> Path:
    """Return the file that offences are kept in; it may not exist yet."""
    return cache_dir() / "quarantine.json"


def code_of(spec: AttentionSpec, config: KernelConfig) -> str:
    """Return 16 hex digits of the code that runs: equal for problems that differ in nothing but what it is given."""
    constants = sorted(constant_values(spec, config).items())
    identity = [render(spec, config).digest, str(config), str(spec.dtype), spec.bias, constants]
    return hashlib.sha256(json.dumps(identity).encode()).hexdigest()[:16]


def read_offences(path: Path) -> tuple[tuple[Offence, ...], str]:
    """Return the offences in the file at `path`, and what is wrong with it, or nothing; a damaged file holds none."""
    try:
        with path.open("rb") as file:
            data = file.read(_MAX_BYTES + 1)
        if len(data) > _MAX_BYTES:
            raise ValueError(f"it is larger than {_MAX_BYTES} bytes")
        return _parsed(json.loads(data)), ""
    except FileNotFoundError:
        return (), ""
    # A deep nesting ends in a RecursionError.
    except (OSError, ValueError, TypeError, KeyError, RecursionError) as error:
        return (), f"{path} is not read ({type(error).__name__}: {error}): nothing is quarantined by it"


def _parsed(document: typing.Any) -> tuple[Offence, ...]:
    if document["format"] != _FORMAT:
        raise ValueError(f"format {_FORMAT} is known, got {document['format']!r}")
    offences = tuple(Offence(**fields) for fields in document["offences"])
    if not all(isinstance(value, str) for offence in offences for value in dataclasses.astuple(offence)):
        raise ValueError("every field of an offence is a text")
    return offences


def _add(path: Path, offence: Offence) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    # Hidden, because it stays: a lock file that is removed can be held twice.
    with filelock.FileLock(path.with_name(f".{path.name}.lock"), timeout=_LOCK_TIMEOUT_S):
        offences, issue = read_offences(path)
        if issue:
            with contextlib.suppress(OSError):
                os.replace(path, path.with_name(f"{path.name}.damaged"))
        merged = {(_place(other), other.code): other for other in (*offences, offence)}
        kept = [dataclasses.asdict(other) for other in list(merged.values())[-_MAX_OFFENCES:]]
        replace_file(path, json.dumps({"format": _FORMAT, "offences": kept}, indent=1).encode())


def _place(offence: Offence) -> tuple[str, str, str]:
    return offence.device, offence.driver, offence.triton
