"""Some workers that share a queue of tasks."""

from __future__ import annotations

import collections
import dataclasses
import multiprocessing.connection
import time
import typing
from multiprocessing.connection import Connection

from flashgen.errors import WorkerError
from flashgen.tuning.workers import Function, Outcome, Worker, pack_request

TaskId = typing.TypeVar("TaskId")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Finished(typing.Generic[TaskId]):
    """A task of a `Pool` and how it ended."""

    task_id: TaskId
    outcome: Outcome


class Pool(typing.Generic[TaskId]):
    """Some workers and a queue; use it as a context manager, from one thread."""

    def __init__(
        self,
        size: int,
        *,
        name: str = "worker",
        setup: Function | None = None,
        setup_args: tuple[object, ...] = (),
        env: typing.Mapping[str, str] | None = None,
        start_timeout_s: float = 120.0,
    ) -> None:
        """Make a pool of `size` workers, all described as in `Worker`; each starts when it is first needed."""
        if size < 1:
            raise WorkerError(f"a pool needs at least 1 worker, got {size}")
        self._workers = [
            Worker(f"{name} {index}", setup=setup, setup_args=setup_args, env=env, start_timeout_s=start_timeout_s)
            for index in range(size)
        ]
        self._running: dict[Worker, TaskId] = {}
        # Busy with what was cancelled.
        self._forgotten: set[Worker] = set()
        self._queue: collections.deque[tuple[TaskId, bytes, float]] = collections.deque()

    @property
    def size(self) -> int:
        """How many workers there are."""
        return len(self._workers)

    @property
    def busy_s(self) -> float:
        """Seconds that the workers have spent on tasks so far, their mean."""
        return sum(worker.busy_s for worker in self._workers) / len(self._workers)

    @property
    def connections(self) -> list[Connection]:
        """Readable when `wait` has something to do; the deadlines of tasks are its own to watch."""
        return [worker.connection for worker in (*self._running, *self._forgotten) if worker.connection]

    @property
    def idle(self) -> int:
        """How many workers have nothing to do."""
        return len(self._workers) - len(self._running) - len(self._forgotten)

    @property
    def pending(self) -> int:
        """How many tasks are queued or running."""
        return len(self._queue) + len(self._running)

    def submit(self, task_id: TaskId, function: Function, *args: object, timeout_s: float) -> None:
        """Queue `function(*args)`; its deadline begins when a worker takes it up.

        Raises:
            WorkerError: if the request cannot be sent to another process.
        """
        self._queue.append((task_id, pack_request(function, *args), timeout_s))
        self._dispatch()

    def wait(self, timeout_s: float) -> list[Finished[TaskId]]:
        """Return the tasks that ended, as soon as there are any; none after `timeout_s` or if nothing is pending."""
        until = time.monotonic() + timeout_s
        while True:
            left = max(0.0, until - time.monotonic()) if self.pending else 0.0
            nearest = min((worker.seconds_left for worker in (*self._running, *self._forgotten)), default=0.0)
            multiprocessing.connection.wait(self.connections, min(left, nearest))
            finished = self._collect()
            self._dispatch()
            if finished or not left:
                return finished

    def cancel(self) -> None:
        """Forget all tasks; workers have some seconds to end the one they are at, or are killed.

        To start a worker again would cost the next task more than to wait for most.
        """
        self._queue.clear()
        for worker in self._running:
            worker.hurry()
        self._forgotten.update(self._running)
        self._running.clear()

    def close(self) -> None:
        """Kill every worker at once and forget all tasks."""
        self._queue.clear()
        self._running.clear()
        self._forgotten.clear()
        for worker in self._workers:
            worker.kill()

    def __enter__(self) -> Pool[TaskId]:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _collect(self) -> list[Finished[TaskId]]:
        self._forgotten = {worker for worker in self._forgotten if worker.advance() is None}
        outcomes = [(worker, worker.advance()) for worker in self._running]
        return [Finished(task_id=self._running.pop(w), outcome=outcome) for w, outcome in outcomes if outcome]

    def _dispatch(self) -> None:
        for worker in self._workers:
            if self._queue and worker not in self._running and worker not in self._forgotten:
                task_id, request, timeout_s = self._queue.popleft()
                self._running[worker] = task_id
                worker.begin(request, timeout_s=timeout_s)
