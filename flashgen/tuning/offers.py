"""How trials pass between the run that owns a study and machines that joined it: offered, claimed, handed in.

An offer is a trial that waits, with the config as an attribute. Who sets it to running has it: the storage says yes to
one alone. A machine that only compiled it sets it back to waiting, with what the compiler said as another attribute.
Everything is plain JSON, never pickled: the storage is shared ground.
"""

from __future__ import annotations

import dataclasses
import json
import typing

import optuna
from optuna.storages import BaseStorage
from optuna.trial import FrozenTrial, TrialState

from flashgen.codegen import KernelConfig, KernelResources, config_from_dict
from flashgen.compile import CompileReport
from flashgen.errors import FlashgenError, InputError
from flashgen.tuning.config_space import ConfigSpace

OFFER = "offer"
"""The attribute that makes a waiting or running trial another machine's business; empty where the run took it back."""

_COMPILED = "compiled"
MOST_CHARACTERS = 1000
"""Of a text that is kept with a trial, such as the reason of a rejection."""
# A name and a number of a file that others write, not of memory that is taken for it.
_MOST = 1 << 40


@dataclasses.dataclass(frozen=True, kw_only=True)
class Offer:
    """A trial that waits for who claims it.

    Attributes:
        number: in the study.
        config: to be tried.
        report: what another machine's compiler said of it; None where it is still to be compiled.
    """

    number: int
    config: KernelConfig
    report: CompileReport | None


def new_trial(storage: BaseStorage, study_id: int, space: ConfigSpace, config: KernelConfig, *, offered: bool) -> int:
    """Write a trial of one config, for others or as one's own, and return its number in the storage.

    In one step: asking Optuna for it writes each of a dozen parameters on its own.
    """
    template = optuna.trial.create_trial(
        state=TrialState.WAITING if offered else TrialState.RUNNING,
        params=dict(zip(space.choices, space.key(config), strict=True)),
        distributions=space.distributions(),
        user_attrs={OFFER: config.as_dict()} if offered else {},
    )
    return storage.create_new_trial(study_id, template_trial=template)


def is_offered(trial: FrozenTrial) -> bool:
    """Return whether a trial is, or was, for other machines."""
    return bool(trial.user_attrs.get(OFFER))


def open_offers(storage: BaseStorage, study_id: int) -> list[Offer]:
    """Return what waits in a study; offers that make no sense are left out."""
    waiting = storage.get_all_trials(study_id, deepcopy=False, states=(TrialState.WAITING,))
    offers = (offer_from(trial) for trial in waiting if is_offered(trial))
    return [offer for offer in offers if offer is not None]


def offer_from(trial: FrozenTrial) -> Offer | None:
    """Return a waiting trial as an offer, or None if its attributes make no sense."""
    try:
        config = offered_config(trial)
        report = _report_from(trial.user_attrs.get(_COMPILED))
    except InputError:
        return None
    return Offer(number=trial.number, config=config, report=report)


def offered_config(trial: FrozenTrial) -> KernelConfig:
    """Return the config of an offer.

    Raises:
        InputError: if it is none.
    """
    try:
        return config_from_dict(trial.user_attrs[OFFER])
    except (FlashgenError, LookupError, TypeError, ValueError, AttributeError) as error:
        raise InputError(f"trial {trial.number} offers no config ({type(error).__name__}: {error})") from error


def claim(storage: BaseStorage, trial_id: int) -> bool:
    """Return whether a waiting trial is this process's now: of all that try, one is told so.

    In a journal, who held it before and gave it back may be told so wrongly: claim no trial twice.
    """
    return _set(storage, trial_id, TrialState.RUNNING)


def put_back(storage: BaseStorage, trial_id: int, report: CompileReport | None) -> bool:
    """Set a claimed trial back to waiting, with what the compiler said; False if the run had given up on it."""
    try:
        if report is not None:
            storage.set_trial_user_attr(trial_id, _COMPILED, json.dumps(dataclasses.asdict(report)))
    except RuntimeError:
        return False
    return _set(storage, trial_id, TrialState.WAITING)


def take_back(storage: BaseStorage, trial_id: int) -> bool:
    """Return whether the run itself claimed an offer, which is then no other machine's business."""
    if not claim(storage, trial_id):
        return False
    storage.set_trial_user_attr(trial_id, OFFER, {})
    return True


def give_up(storage: BaseStorage, trial_id: int) -> bool:
    """Fail a trial, which counts as untried then; False if it ended meanwhile."""
    return _set(storage, trial_id, TrialState.FAIL)


def hand_in(storage: BaseStorage, trial_id: int, attribute: str, text: str, value: float) -> bool:
    """Finish a trial with what became of it; False if the run had given up on it."""
    try:
        storage.set_trial_user_attr(trial_id, attribute, text)
        storage.set_trial_state_values(trial_id, TrialState.COMPLETE, [value])
    except RuntimeError:
        return False
    return True


def _set(storage: BaseStorage, trial_id: int, state: TrialState) -> bool:
    try:
        return storage.set_trial_state_values(trial_id, state)
    # Of a trial that is finished; newer versions of Optuna derive an error of their own from it.
    except RuntimeError:
        return False


def _report_from(text: object) -> CompileReport | None:
    if text is None:
        return None
    try:
        told = json.loads(typing.cast("str", text))
        return CompileReport(
            resources=checked_resources(told["resources"]),
            binary_hash=checked_text(told["binary_hash"]),
            seconds=float(told["seconds"]),
        )
    except (LookupError, TypeError, ValueError, AttributeError) as error:
        raise InputError(f"no report of a compiler ({type(error).__name__}: {error})") from error


def checked_resources(told: typing.Mapping[str, object]) -> KernelResources:
    """Return resources that another machine told.

    Raises:
        ValueError: if one of them is no count.
    """
    resources = KernelResources(**told)  # type: ignore[arg-type]
    for name, count in dataclasses.asdict(resources).items():
        if type(count) is not int or not 0 <= count < _MOST:
            raise ValueError(f"{name} is {count!r}"[:200])
    return resources


def checked_text(told: object) -> str:
    """Return a short text that another machine told.

    Raises:
        ValueError: if it is none.
    """
    if not isinstance(told, str) or len(told) > MOST_CHARACTERS:
        raise ValueError(f"{told!r} is no short text"[:200])
    return told
