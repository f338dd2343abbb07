"""Processes that run what may hang or abort: killed with all their children at a deadline, restarted by themselves.

The compiler can abort the process, a kernel can hang the GPU; here both are results. A worker is a fresh interpreter
that runs `worker_main` (never the caller's `__main__`) and imports only what it is asked to call. Replies are plain
values; an exception comes back as text, because not every exception survives a pipe.
"""

from __future__ import annotations

import contextlib
import dataclasses
import multiprocessing.connection
import pickle
import time
import typing
from multiprocessing.connection import Connection

from flashgen.errors import WorkerError
from flashgen.tuning.worker_main import described
from flashgen.tuning.worker_process import WorkerProcess

# For what was cancelled.
_GRACE_S = 10.0

Function = typing.Callable[..., object] | str


@dataclasses.dataclass(frozen=True, kw_only=True)
class WorkerResult:
    """What the function returned."""

    value: object


@dataclasses.dataclass(frozen=True, kw_only=True)
class WorkerFailure:
    """Why there is no result.

    Attributes:
        kind: `timeout` (killed at its deadline), `crashed` (the process died), `error` (the function raised, and the
            worker lives on).
        detail: the exception, or how the process ended and the last lines it wrote to stderr.
        at_start: whether the process failed before it took up the request, which is then not to blame.
    """

    kind: typing.Literal["timeout", "crashed", "error"]
    detail: str
    at_start: bool = False


Outcome = WorkerResult | WorkerFailure


class Worker:
    """One process that answers one request at a time; it starts with the first and restarts after it died.

    On Linux a worker dies with the *thread* that started it: call from a thread that lives as long as the tuning.
    """

    def __init__(
        self,
        name: str,
        *,
        setup: Function | None = None,
        setup_args: tuple[object, ...] = (),
        env: typing.Mapping[str, str] | None = None,
        start_timeout_s: float = 120.0,
        stand_by: Function | None = None,
    ) -> None:
        """Describe a worker; nothing starts yet.

        Args:
            name: for messages.
            setup: called in each new process before its first request; a callable that pickles by name, or
                `module:function`, which spares the caller the import.
            setup_args: its arguments.
            env: environment variables that its interpreter starts with, added to the caller's.
            start_timeout_s: deadline of starting and `setup` together; a request's own deadline begins after it.
            stand_by: called in a second process, which then waits, once this one answers: where this one dies, that
                one is set up in its place. For what takes long and is nobody's, such as imports.
        """
        self.name = name
        self._setup = None if setup is None else _pack(setup, setup_args)
        self._env = dict(env or {})
        self._start_timeout_s = start_timeout_s
        self._stand_by = None if stand_by is None else _pack(stand_by, ())
        self._process: WorkerProcess | None = None
        self._spare: WorkerProcess | None = None
        # Of a process that stood by, which has yet to be set up.
        self._setup_due = False
        self._request = b""
        self._timeout_s = 0.0
        self._deadline: float | None = None
        self._began = 0.0
        self._ended_s = 0.0
        self._starting = False

    @property
    def busy(self) -> bool:
        """Whether a request is under way."""
        return self._deadline is not None

    @property
    def busy_s(self) -> float:
        """Seconds that requests have taken so far, starts of the process and the one under way included."""
        return self._ended_s + (time.monotonic() - self._began if self.busy else 0.0)

    @property
    def pid(self) -> int | None:
        """Process id, or None while there is no process."""
        return self._process.popen.pid if self._process else None

    @property
    def connection(self) -> Connection | None:
        """Readable when `advance` has something to do; None while there is no process."""
        return self._process.connection if self._process else None

    @property
    def seconds_left(self) -> float:
        """Time until `advance` gives up on the request under way."""
        return 0.0 if self._deadline is None else max(0.0, self._deadline - time.monotonic())

    def call(self, function: Function, *args: object, timeout_s: float) -> Outcome:
        """Run `function(*args)` in the worker and return how it ended, after `timeout_s` seconds at the latest.

        Raises:
            WorkerError: if the request cannot be sent to another process, or one is under way.
        """
        self.begin(pack_request(function, *args), timeout_s=timeout_s)
        try:
            while (outcome := self.advance()) is None:
                self.wait()
            return outcome
        except BaseException:
            self.kill()
            raise

    def wait(self) -> None:
        """Return when `advance` has something to do."""
        multiprocessing.connection.wait([self.connection] if self.connection else [], self.seconds_left)

    def begin(self, request: bytes, *, timeout_s: float) -> None:
        """Send what `pack_request` made, starting the process if there is none; `advance` tells how it ended."""
        if self.busy:
            raise WorkerError(f"{self.name} is busy; wait for its outcome first")
        self._request, self._timeout_s = request, timeout_s
        self._starting = self._process is None
        self._began = time.monotonic()
        self._deadline = time.monotonic() + (self._start_timeout_s if self._starting else timeout_s)
        if self._process is not None:
            self._send(self._request)
        elif self._spare is not None:
            self._process, self._spare = self._spare, None
            self._setup_due = self._setup is not None
        else:
            self._process, self._setup_due = WorkerProcess(self._setup, self._env), False

    def advance(self) -> Outcome | None:
        """Return how the request ended, or None while it is under way; never waits for it."""
        if self._process is None or self._deadline is None:
            return None
        try:
            if not self._process.connection.poll():
                return None if self.seconds_left else self._fail("timeout")
            ok, reply = pickle.loads(self._process.connection.recv_bytes())
        except (EOFError, OSError):
            return self._fail("crashed")
        if self._starting and ok:
            if self._setup_due:
                self._setup_due = False
                self._send(self._setup or b"")
                return None
            self._starting = False
            self._deadline = time.monotonic() + self._timeout_s
            self._send(self._request)
            return None
        self._stop_clock()
        if self._starting:
            self.kill()
            return WorkerFailure(kind="error", detail=f"{self.name} could not be set up: {reply}", at_start=True)
        if self._stand_by is not None and self._spare is None:
            self._spare = WorkerProcess(self._stand_by, self._env)
        return _unpacked(reply) if ok else WorkerFailure(kind="error", detail=reply)

    def hurry(self) -> None:
        """Leave the request under way a few seconds: `advance` gives up on it then."""
        if self._deadline is not None:
            self._timeout_s = min(self._timeout_s, _GRACE_S)
            self._deadline = min(self._deadline, time.monotonic() + _GRACE_S)

    def close(self) -> None:
        """End every process at once, that which stands by, too."""
        self.kill()
        if self._spare is not None:
            self._spare.kill()
            self._spare = None

    def kill(self) -> None:
        """End the process and its children at once; the next request goes to another one."""
        self._stop_clock()
        if self._process is not None:
            process, self._process = self._process, None
            process.kill()

    def _stop_clock(self) -> None:
        self._ended_s, self._deadline = self.busy_s, None

    def _send(self, request: bytes) -> None:
        assert self._process is not None
        # A process that is gone shows as end of file at the next `advance`.
        with contextlib.suppress(OSError):
            self._process.begin_request(request)

    def _fail(self, kind: typing.Literal["timeout", "crashed"]) -> WorkerFailure:
        assert self._process is not None
        process, limit = self._process, self._start_timeout_s if self._starting else self._timeout_s
        self.kill()
        when = " while it started" if self._starting else ""
        how = f"killed after {limit:.3g} s" if kind == "timeout" else process.ending()
        detail = f"{self.name} {how}{when}{process.last_words()}"
        return WorkerFailure(kind=kind, detail=detail, at_start=self._starting)


def pack_request(function: Function, *args: object) -> bytes:
    """Return a call in the form that crosses to a worker.

    Raises:
        WorkerError: if the function cannot be found by name there, or an argument does not pickle.
    """
    return _pack(function, args)


def _pack(function: Function, args: tuple[object, ...]) -> bytes:
    if getattr(function, "__module__", None) == "__main__":
        raise WorkerError(f"{function!r} lives in __main__, which workers do not run; move it to a module")
    try:
        return pickle.dumps((function, args), protocol=pickle.HIGHEST_PROTOCOL)
    except Exception as error:
        raise WorkerError(
            f"{function!r} with its arguments cannot be sent to a worker ({type(error).__name__}: {error}); use a "
            "function at the top level of a module, and plain values"
        ) from error


def _unpacked(reply: bytes) -> Outcome:
    try:
        return WorkerResult(value=pickle.loads(reply))
    except Exception as error:
        return WorkerFailure(kind="error", detail=f"the result does not unpickle: {described(error)}")
