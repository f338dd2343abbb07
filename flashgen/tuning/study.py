"""The trials of one problem as an Optuna study: resumable, readable by Optuna's own tools."""

from __future__ import annotations

import contextlib
import functools
import hashlib
import itertools
import json
import operator
import typing

import optuna
from optuna.storages import BaseStorage
from optuna.trial import FrozenTrial, TrialState

from flashgen.codegen import KernelConfig, make_plan, render
from flashgen.codegen.kernel_config import Scalar
from flashgen.errors import FlashgenError
from flashgen.spec import AttentionSpec, Problem
from flashgen.target import GpuTarget
from flashgen.tuning import offers
from flashgen.tuning.interrupts import finishing_first
from flashgen.tuning.sampler import UntriedNeighbourSampler
from flashgen.tuning.tried import Tried, garbage, refusing_damage, told, tried_from


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
        # Of trials under way here, the number in the storage.
        self._open: dict[int, int] = {}
        # As last read, and what was written since: a database takes long to read what hundreds of machines work on.
        self._trials: list[FrozenTrial] = []
        self._since: list[KernelConfig] = []
        self._is_broken = False
        with self.writing(), refusing_damage():
            self._study = optuna.create_study(
                study_name=name, storage=storage, sampler=self._sampler, direction="minimize", load_if_exists=True
            )
            self.storage, self.study_id = storage, storage.get_study_id_from_name(name)
            self._clear()
            self._trials = self.storage.get_all_trials(self.study_id, deepcopy=False)

    def _clear(self) -> None:
        """Fail what a killed run left unfinished, which counts as untried then.

        What a machine that joined it had claimed is left to that machine: it may live.
        """
        for trial in self._study.get_trials(deepcopy=False, states=(TrialState.RUNNING, TrialState.WAITING)):
            trial_id = self._id_of(trial.number)
            if not offers.is_offered(trial) or offers.claim(self.storage, trial_id):
                offers.give_up(self.storage, trial_id)

    def finished(self) -> tuple[Tried, ...]:
        """Return the trials of earlier runs, in order.

        Raises:
            InputError: if one is not what `tell` wrote.
        """
        trials = self._study.get_trials(deepcopy=False, states=(TrialState.COMPLETE,))
        return tuple(self.judged(trial) for trial in trials)

    def judged(self, trial: FrozenTrial) -> Tried:
        """Return a finished trial; what a machine that joined told of another config, or garbage, is a rejection.

        Raises:
            InputError: if a trial of this run's own is not what `tell` wrote.
        """
        tried = tried_from(trial)
        if not offers.is_offered(trial):
            return tried
        if self._sampler.space.key(tried.config) != tuple(
            trial.params.get(name) for name in self._sampler.space.choices
        ):
            tried = garbage(trial.number, offers.offered_config(trial), f"it told of {tried.config}")
        if not tried.passed:
            self._sampler.distrust(trial.number)
        return tried

    def remaining(self) -> int:
        """Return how many legal configs are untried."""
        return self._sampler.left(self._trials, self._since)

    def ask(self) -> tuple[int, KernelConfig]:
        """Return the number of a new trial and its config, which nobody tried.

        Raises:
            FlashgenError: if the study cannot be written.
        """
        self.trials()
        number, config, trial_id = self._new(offered=False)
        self._open[number] = trial_id
        return number, config

    def offer(self) -> offers.Offer:
        """Write a new trial, of a config that nobody tried, for a machine that joined.

        What was told since `trials` was called last is not learned from.

        Raises:
            FlashgenError: if the study cannot be written.
        """
        number, config, _ = self._new(offered=True)
        return offers.Offer(number=number, config=config, report=None)

    def take_back(self, offer: offers.Offer) -> bool:
        """Return whether an offer is this run's own trial now, or another machine was faster.

        Raises:
            FlashgenError: if the study cannot be written.
        """
        with self.writing():
            trial_id = self._id_of(offer.number)
            taken = offers.take_back(self.storage, trial_id)
            if taken:
                self._open[offer.number] = trial_id
            return taken

    def withdraw(self, number: int) -> bool:
        """Fail an offer, claimed or not; False if it was handed in meanwhile.

        Whoever has claimed it learns so when it hands in, and its answer is ignored.

        Raises:
            FlashgenError: if the study cannot be written.
        """
        with self.writing():
            is_withdrawn = offers.give_up(self.storage, self._id_of(number))
        self.trials()
        return is_withdrawn

    def trials(self) -> list[FrozenTrial]:
        """Return all trials as they stand.

        Raises:
            FlashgenError: if the study cannot be read.
        """
        with self.writing():
            self._trials = self.storage.get_all_trials(self.study_id, deepcopy=False)
        self._since.clear()
        return self._trials

    def tell(self, tried: Tried) -> None:
        """Keep what became of a trial.

        Raises:
            FlashgenError: if the study cannot be written.
        """
        number = tried.record.number
        with self.writing():
            offers.hand_in(self.storage, self._open[number], *told(tried))
            del self._open[number]

    def abandon(self) -> None:
        """Give up the trials under way: they count as untried, now or when the study is opened again."""
        if not self._open or self._is_broken:
            return
        with self.writing():
            while self._open:
                _, trial_id = self._open.popitem()
                offers.give_up(self.storage, trial_id)
        self.trials()

    def _new(self, *, offered: bool) -> tuple[int, KernelConfig, int]:
        with self.writing():
            # Nobody else makes trials here.
            number = len(self._trials) + len(self._since)
            config = self._sampler.propose(self._trials, number, self._since)
            space = self._sampler.space
            trial_id = offers.new_trial(self.storage, self.study_id, space, config, offered=offered)
            self._since.append(config)
            return number, config, trial_id

    def _id_of(self, number: int) -> int:
        return self.storage.get_trial_id_from_study_id_trial_number(self.study_id, number)

    @contextlib.contextmanager
    def writing(self) -> typing.Iterator[None]:
        """Let nothing interrupt the block, and tell clearly if the storage fails in it.

        Raises:
            FlashgenError: if the study cannot be written.
        """
        try:
            with finishing_first():
                yield
        except (OSError, optuna.exceptions.StorageInternalError) as error:
            # A line may have been written in part: another one after it would damage the journal.
            self._is_broken = True
            raise FlashgenError(
                f"the study cannot be written ({error}); the trials so far are kept: make room, then run the same "
                "command again"
            ) from error


def _study_name(problem: Problem, target: GpuTarget, how: str, configs: typing.Sequence[KernelConfig]) -> str:
    return f"{problem} | {target.device_name} | {how} | {_search_digest(problem.spec, tuple(configs))}"


# A second's work; lengths of one spec follow each other.
@functools.lru_cache(maxsize=4)
def _search_digest(spec: AttentionSpec, configs: tuple[KernelConfig, ...]) -> str:
    # The code and the legal list: other code, or other choices, is another search.
    digests = sorted({render(spec, config).digest for config in _varied(spec, configs)})
    numbers = _getters(configs, lambda config: config.as_dict())
    identity = json.dumps([digests, [numbers[config.template](config) for config in configs]])
    return hashlib.sha256(identity.encode()).hexdigest()[:8]


def _varied(spec: AttentionSpec, configs: typing.Sequence[KernelConfig]) -> list[KernelConfig]:
    """Return configs of different structure that have every value, and every two of different numbers, among them.

    There are hundreds of structures, and each takes time to digest; code that changes does so in one of these.
    """
    numbers = _getters(configs, lambda config: config.as_dict().keys() - config.at_rest.keys())
    kernels: dict[object, KernelConfig] = {}
    for config in configs:
        kernels.setdefault(numbers[config.template](config), config)
    different = {make_plan(spec, config): config for config in map(KernelConfig.kernel, reversed(kernels.values()))}
    seen: set[tuple[tuple[str, Scalar], ...]] = set()
    kept: list[KernelConfig] = []
    for config in different.values():
        pairs = set(itertools.combinations(config.as_dict().items(), 2))
        if pairs - seen:
            seen |= pairs
            kept.append(config)
    return kept


def _getters(
    configs: typing.Iterable[KernelConfig], names_of: typing.Callable[[KernelConfig], typing.Iterable[str]]
) -> dict[str, typing.Callable[[KernelConfig], object]]:
    """Return for each template what reads these numbers of a config: a dictionary of each takes seconds."""
    one_of_each = {config.template: config for config in configs}
    return {template: operator.attrgetter(*names_of(config)) for template, config in one_of_each.items()}
