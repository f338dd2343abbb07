"""The trials of one search that ended: kept in its study, told to who listens, ranked."""

from __future__ import annotations

import time
import typing

from flashgen.codegen import KernelConfig, KernelResources
from flashgen.measure import Rejected, Timing
from flashgen.tuning.events import Observer, TrialRecord
from flashgen.tuning.study import ProblemStudy
from flashgen.tuning.task import Task
from flashgen.tuning.tried import Tried
from flashgen.tuning.winner import by_speed


class Trials:
    """Every trial that ended, those of earlier runs and of other machines included.

    Attributes:
        tried: in the order in which they ended.
        resumed: how many of them are of earlier runs.
        start: monotonic time from which the search counts.
    """

    def __init__(self, task: Task, study: ProblemStudy, observer: Observer) -> None:
        """Begin with the trials of earlier runs.

        Raises:
            InputError: if the study is damaged.
        """
        self._task, self._study, self._observer = task, study, observer
        self.tried = list(study.finished())
        self.resumed = len(self.tried)
        # By the final comparison, with the reason.
        self._refused: dict[KernelConfig, str] = {}
        self.start = time.monotonic()

    def __len__(self) -> int:
        return len(self.tried)

    def record(
        self,
        number: int,
        config: KernelConfig,
        resources: KernelResources | None,
        result: Timing | Rejected,
        accuracy: tuple[float, float] = (0.0, 0.0),
        binary_hash: str = "",
    ) -> Tried:
        """Keep what became of a trial of this process and return it.

        Args:
            number: of the trial.
            config: what was tried.
            resources: of the kernel; None if it did not compile.
            result: its time, or why it fell.
            accuracy: the largest error and the one allowed.
            binary_hash: of the binary that was measured.

        Raises:
            FlashgenError: if the study cannot be written.
        """
        record = TrialRecord(number=number, config=config, resources=resources, result=result)
        return self.keep(
            Tried(record=record, max_error=accuracy[0], allowed_error=accuracy[1], binary_hash=binary_hash)
        )

    def keep(self, tried: Tried) -> Tried:
        """Keep what became of a trial of this process and return it.

        Raises:
            FlashgenError: if the study cannot be written.
        """
        self._study.tell(tried)
        self.count(tried)
        return tried

    def count(self, tried: Tried) -> None:
        """Take in a trial that the study has."""
        self.tried.append(tried)
        elapsed = time.monotonic() - self.start
        left = max(0.0, self._task.deadline - time.monotonic())
        to_do = max(0, self._task.planned - len(self.tried))
        estimate = elapsed / (len(self.tried) - self.resumed) * to_do
        best = self.ranked()[:1]
        self._observer.trial(tried.record, best[0].record if best else None, len(self.tried), min(left, estimate))

    def ranked(self) -> list[Tried]:
        """Return those that passed and were not refused since, the fastest first."""
        return sorted((t for t in self.tried if t.passed and t.config not in self._refused), key=by_speed)

    def refuse(self, refused: typing.Mapping[KernelConfig, str]) -> None:
        """Take configs that passed out of the ranking, for the reasons given."""
        self._refused |= refused

    def why_nothing(self) -> str:
        """Return why no config is left."""
        in_order = sorted((tried.record for tried in self.tried), key=lambda record: record.number)
        reasons = {r.config: r.result.reason for r in in_order if isinstance(r.result, Rejected)} | self._refused
        if not reasons:
            return "no config was tried in time"
        config, reason = next(iter(reasons.items()))
        return f"no config passed; of {len(reasons)} refused, the first, {config}: {reason}"
