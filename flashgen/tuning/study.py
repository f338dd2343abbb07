"""The trials of one problem as an Optuna study: resumable, readable by Optuna's own tools."""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import itertools
import json
import signal
import threading
import types
import typing

import optuna
from optuna.storages import BaseStorage
from optuna.trial import TrialState

from flashgen.codegen import KernelConfig, KernelResources, config_from_dict, make_plan, render
from flashgen.codegen.config import Scalar
from flashgen.errors import FlashgenError, InputError
from flashgen.measure import Rejected, Timing
from flashgen.spec import Problem
from flashgen.target import GpuTarget
from flashgen.tuning.config_space import suggest_config
from flashgen.tuning.events import TrialRecord
from flashgen.tuning.sampler import UntriedNeighbourSampler

# What a failed config is told as, in us: finite, because a model ignores failures and proposes them again.
FAILED_US = 1e9


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


class ProblemStudy:
    """The study of one problem on one target: asks for configs, keeps what became of them."""

    def __init__(
        self,
        storage: BaseStorage,
        *,
        problem: Problem,
        target: GpuTarget,
        how: str,
        configs: typing.Sequence[KernelConfig],
        seeds: typing.Sequence[KernelConfig],
        seed: int,
        n_quasi_random: int,
    ) -> None:
        """Open or resume it.

        Args:
            storage: where trials are kept.
            problem: what is tuned.
            target: for which GPU.
            how: what the objective is and under which software: trials of another kind are never mixed in.
            configs: the legal configs.
            seeds: tried first.
            seed: of the sampler.
            n_quasi_random: points spread over the space before the model proposes.
        """
        self._sampler = UntriedNeighbourSampler(configs, seeds=seeds, seed=seed, n_quasi_random=n_quasi_random)
        name = _study_name(problem, target, how, configs)
        self._open: dict[int, optuna.Trial] = {}
        self._is_broken = False
        with self._writing(), _refusing_damage():
            self._study = optuna.create_study(
                study_name=name, storage=storage, sampler=self._sampler, direction="minimize", load_if_exists=True
            )
            # What a killed run left unfinished counts as untried.
            for trial in self._study.get_trials(deepcopy=False, states=(TrialState.RUNNING, TrialState.WAITING)):
                self._study.tell(trial.number, state=TrialState.FAIL)

    def finished(self) -> tuple[Tried, ...]:
        """Return the trials of earlier runs, in order.

        Raises:
            InputError: if one is not what `tell` wrote.
        """
        trials = self._study.get_trials(deepcopy=False, states=(TrialState.COMPLETE,))
        return tuple(tried_from(trial.number, trial.user_attrs) for trial in trials)

    def remaining(self) -> int:
        """Return how many legal configs are untried."""
        return self._sampler.remaining(self._study)

    def ask(self) -> tuple[int, KernelConfig]:
        """Return the number of a new trial and its config, which nobody tried.

        Raises:
            FlashgenError: if the study cannot be written.
        """
        with self._writing():
            trial = self._study.ask()
            self._open[trial.number] = trial
            return trial.number, suggest_config(trial, self._sampler.space)

    def tell(self, tried: Tried) -> None:
        """Keep what became of a trial.

        Raises:
            FlashgenError: if the study cannot be written.
        """
        record = tried.record
        with self._writing():
            trial = self._open[record.number]
            trial.set_user_attr("flashgen", json.dumps(_attributes(tried)))
            self._study.tell(trial, tried.timing.median_us if tried.passed else FAILED_US)
            del self._open[record.number]

    def abandon(self) -> None:
        """Give up the trials under way: they count as untried, now or when the study is opened again."""
        with self._writing():
            while self._open and not self._is_broken:
                _, trial = self._open.popitem()
                self._study.tell(trial, state=TrialState.FAIL, skip_if_finished=True)

    @contextlib.contextmanager
    def _writing(self) -> typing.Iterator[None]:
        try:
            with _finishing_first():
                yield
        except (OSError, optuna.exceptions.StorageInternalError) as error:
            # A line may have been written in part: another one after it would damage the journal.
            self._is_broken = True
            raise FlashgenError(
                f"the study cannot be written ({error}); the trials so far are kept: make room, then run the same "
                "command again"
            ) from error


@contextlib.contextmanager
def _finishing_first() -> typing.Iterator[None]:
    """Let a Ctrl-C wait for the end of the block: in the middle of a write it would leave a lock half released."""
    usual = signal.getsignal(signal.SIGINT)
    if threading.current_thread() is not threading.main_thread() or not callable(usual):
        yield
        return
    pressed: list[tuple[int, types.FrameType | None]] = []
    signal.signal(signal.SIGINT, lambda number, frame: pressed.append((number, frame)))
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, usual)
    if pressed:
        usual(*pressed[0])


@contextlib.contextmanager
def _refusing_damage() -> typing.Iterator[None]:
    try:
        yield
    # What Optuna raises on lines of JSON that are no records of its own.
    except (LookupError, TypeError, ValueError, AttributeError, AssertionError) as error:
        raise InputError(
            f"the study is damaged ({type(error).__name__}: {error}); move it away or name another"
        ) from error


def _study_name(problem: Problem, target: GpuTarget, how: str, configs: typing.Sequence[KernelConfig]) -> str:
    # The code and the legal list are part of the name: other code, or other choices, is another search.
    digests = sorted({render(problem.spec, config).digest for config in _varied(problem, configs)})
    identity = json.dumps([digests, [list(config.as_dict().values()) for config in configs]])
    return f"{problem} | {target.device_name} | {how} | {hashlib.sha256(identity.encode()).hexdigest()[:8]}"


def _varied(problem: Problem, configs: typing.Sequence[KernelConfig]) -> list[KernelConfig]:
    """Return configs of different structure that have every value, and every two of different numbers, among them.

    There are hundreds of structures, and each takes time to digest; code that changes does so in one of these.
    """
    kernels = dict.fromkeys(config.kernel() for config in configs)
    different = {make_plan(problem.spec, config): config for config in reversed(kernels)}
    seen: set[tuple[tuple[str, Scalar], ...]] = set()
    kept: list[KernelConfig] = []
    for config in different.values():
        pairs = set(itertools.combinations(config.as_dict().items(), 2))
        if pairs - seen:
            seen |= pairs
            kept.append(config)
    return kept


def _attributes(tried: Tried) -> dict[str, object]:
    record = tried.record
    attributes: dict[str, object] = {
        "config": record.config.as_dict(),
        "resources": None if record.resources is None else dataclasses.asdict(record.resources),
        "max_error": tried.max_error,
        "allowed_error": tried.allowed_error,
        "binary_hash": tried.binary_hash,
    }
    key = "rejected" if isinstance(record.result, Rejected) else "timing"
    attributes[key] = dataclasses.asdict(record.result)
    return attributes


def tried_from(number: int, user_attrs: typing.Mapping[str, typing.Any]) -> Tried:
    """Return a trial as it was told, from its attributes.

    Raises:
        InputError: if they are not what `ProblemStudy.tell` wrote.
    """
    with _refusing_damage():
        attributes = json.loads(user_attrs["flashgen"])
        resources = attributes["resources"]
        rejected = attributes.get("rejected")
        return Tried(
            record=TrialRecord(
                number=number,
                config=config_from_dict(attributes["config"]),
                resources=None if resources is None else KernelResources(**resources),
                result=Rejected(**rejected) if rejected else Timing(**attributes["timing"]),
                resumed=True,
            ),
            max_error=attributes["max_error"],
            allowed_error=attributes["allowed_error"],
            binary_hash=attributes["binary_hash"],
        )
