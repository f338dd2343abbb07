"""The process that measures on one GPU, whatever a candidate does to it."""

from __future__ import annotations

from multiprocessing.connection import Connection

from flashgen.codegen import KernelConfig
from flashgen.spec import Problem
from flashgen.tuning.jobs import Jobs
from flashgen.tuning.workers import Outcome, Worker, WorkerFailure, pack_request

# A GPU may need a moment after a fault before a new process can use it.
_START_ATTEMPTS = 3
# What a huge problem adds to the timeouts: this many launches, at a rate that slow kernels reach.
_LAUNCHES, _SLOW_FLOPS = 50, 1e13
_MAX_EXTRA_S = 120.0


class MeasuringProcess:
    """One GPU's process, with one request at a time; one that fails to start is started again a few times."""

    def __init__(self, device: str, jobs: Jobs) -> None:
        """Describe the process for `device`; it starts with the first request."""
        self.device = device
        self._jobs = jobs
        self._worker = Worker(
            f"measuring process on {device}", setup=jobs.start, setup_args=(device,), stand_by=jobs.stand_by
        )
        self._request = b""
        self._timeout_s = 0.0
        self._failed_starts = 0
        # Whose inputs and references it has made.
        self._warm_for: Problem | None = None

    @property
    def busy_s(self) -> float:
        """Seconds that requests took so far."""
        return self._worker.busy_s

    @property
    def connection(self) -> Connection | None:
        """Readable when `advance` has something to do."""
        return self._worker.connection if self._worker.busy else None

    def begin_start(self) -> None:
        """Wake the GPU."""
        self._begin(pack_request(self._jobs.start, self.device), self._jobs.race_timeout_s)

    def begin_evaluation(self, problem: Problem, config: KernelConfig, best_us: float | None) -> None:
        """Check and time a config; see `gpu_jobs.evaluate`."""
        jobs = self._jobs
        limit = jobs.evaluate_timeout_s if problem == self._warm_for else jobs.first_evaluate_timeout_s
        self._begin(pack_request(jobs.evaluate, problem, config, best_us), limit + _extra_s(problem))

    def warmed_for(self, problem: Problem) -> None:
        """Take down that the process has come through an evaluation of `problem`."""
        self._warm_for = problem

    def advance(self) -> Outcome | None:
        """Return how the request ended, or None while it is under way; never waits for it."""
        outcome = self._worker.advance()
        if outcome is None:
            return None
        if isinstance(outcome, WorkerFailure) and outcome.at_start:
            self._failed_starts += 1
            if self._failed_starts < _START_ATTEMPTS:
                self._worker.begin(self._request, timeout_s=self._timeout_s)
                return None
        else:
            self._failed_starts = 0
        return outcome

    def call(self, function: str, problem: Problem, *args: object, longer: float) -> Outcome:
        """Run one of the long jobs, with `longer` times its usual time, and return how it ended."""
        timeout_s = longer * (self._jobs.race_timeout_s + _extra_s(problem))
        self._begin(pack_request(function, problem, *args), timeout_s)
        try:
            while (outcome := self.advance()) is None:
                self._worker.wait()
        except BaseException:
            self.kill()
            raise
        if isinstance(outcome, WorkerFailure):
            self.kill()
        return outcome

    def hurry(self) -> None:
        """Leave the request under way a few seconds, for nobody waits for it any more."""
        self._worker.hurry()

    def kill(self) -> None:
        """End the process at once; the next request starts another one."""
        self._worker.kill()
        self._warm_for = None

    def close(self) -> None:
        """End the process, and the one that stands by for it."""
        self._worker.close()

    def _begin(self, request: bytes, timeout_s: float) -> None:
        self._request, self._timeout_s = request, timeout_s
        self._worker.begin(request, timeout_s=timeout_s)


def _extra_s(problem: Problem) -> float:
    return min(_MAX_EXTRA_S, _LAUNCHES * problem.flops() / _SLOW_FLOPS)
