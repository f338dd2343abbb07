"""What became of a trial, as it is kept in the study: written as JSON, and read without trust in who wrote it."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import math
import typing

from optuna.trial import FrozenTrial

from flashgen.codegen import KernelConfig, config_from_dict
from flashgen.errors import InputError
from flashgen.measure import Rejected, Stage, Timing
from flashgen.tuning import offers
from flashgen.tuning.events import TrialRecord

# What a failed config is told as, in us: finite, because a model ignores failures and proposes them again.
FAILED_US = 1e9
_RESULT = "flashgen"


@dataclasses.dataclass(frozen=True, kw_only=True)
class Tried:
    """A finished trial: its record, the accuracy that was measured with it, and the binary it was measured on."""

    record: TrialRecord
    max_error: float = 0.0
    allowed_error: float = 0.0
    binary_hash: str = ""

    @property
    def config(self) -> KernelConfig:
        """The config that was tried."""
        return self.record.config

    @property
    def timing(self) -> Timing:
        """The time of a config that passed."""
        assert isinstance(self.record.result, Timing)
        return self.record.result

    @property
    def passed(self) -> bool:
        """Whether the config computed the right thing and was timed."""
        return isinstance(self.record.result, Timing)


@contextlib.contextmanager
def refusing_damage() -> typing.Iterator[None]:
    """Turn what nonsense in a study raises into one clear error."""
    try:
        yield
    # What Optuna raises on lines of JSON that are no records of its own.
    except (LookupError, TypeError, ValueError, AttributeError, AssertionError, RecursionError) as error:
        raise InputError(
            f"the study is damaged ({type(error).__name__}: {error}); move it away or name another"
        ) from error


def told(tried: Tried, **more: str) -> tuple[str, str, float]:
    """Return the attribute that keeps what became of a trial, its text, and the trial's value."""
    record = tried.record
    attributes: dict[str, object] = {
        "config": record.config.as_dict(),
        "resources": None if record.resources is None else dataclasses.asdict(record.resources),
        "max_error": tried.max_error,
        "allowed_error": tried.allowed_error,
        "binary_hash": tried.binary_hash,
        **more,
    }
    key = "rejected" if isinstance(record.result, Rejected) else "timing"
    attributes[key] = dataclasses.asdict(record.result)
    return _RESULT, json.dumps(attributes), tried.timing.median_us if tried.passed else FAILED_US


def tried_from(trial: FrozenTrial) -> Tried:
    """Return a finished trial as it was told; what a machine that joined told is a rejection if it makes no sense.

    Raises:
        InputError: if a trial of the run's own is not what `ProblemStudy.tell` wrote.
    """
    try:
        with refusing_damage():
            return _read(trial)
    except InputError as error:
        if not offers.is_offered(trial):
            raise
        return garbage(trial.number, offers.offered_config(trial), str(error.__cause__))


def _read(trial: FrozenTrial) -> Tried:
    attributes = json.loads(trial.user_attrs[_RESULT])
    resources, rejected = attributes["resources"], attributes.get("rejected")
    tried = Tried(
        record=TrialRecord(
            number=trial.number,
            config=config_from_dict(attributes["config"]),
            resources=None if resources is None else offers.checked_resources(resources),
            result=_rejection(rejected) if rejected else _timing(attributes["timing"]),
            resumed=True,
        ),
        max_error=_finite(attributes["max_error"]),
        allowed_error=_finite(attributes["allowed_error"]),
        binary_hash=offers.checked_text(attributes["binary_hash"]),
    )
    if tried.passed and tried.record.resources is None:
        raise ValueError("it was timed without resources")
    return tried


def _rejection(values: typing.Mapping[str, object]) -> Rejected:
    (stage,) = (stage for stage in typing.get_args(Stage) if stage == values["stage"])
    return Rejected(stage=stage, reason=offers.checked_text(values["reason"]))


def _timing(values: typing.Mapping[str, object]) -> Timing:
    median_us, samples = _finite(values["median_us"]), values["samples"]
    if not median_us > 0 or type(samples) is not int:
        raise ValueError(f"{samples!r} samples took {median_us!r} us"[:200])
    return Timing(median_us=median_us, spread=_finite(values["spread"]), samples=samples)


def _finite(value: object) -> float:
    if type(value) not in (int, float) or not math.isfinite(typing.cast("float", value)):
        raise ValueError(f"{value!r} is no finite number"[:200])
    return typing.cast("float", value)


def garbage(number: int, config: KernelConfig, why: str) -> Tried:
    """Return the rejection of a config that another machine told nonsense of."""
    reason = f"what a machine that joined told of it makes no sense: {why}"
    record = TrialRecord(
        number=number, config=config, resources=None, result=Rejected(stage="run", reason=reason[:1000]), resumed=True
    )
    return Tried(record=record)
