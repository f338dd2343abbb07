"""Processes that run what may hang or abort: killed with all their children at a deadline, restarted by themselves.

The compiler can abort the process, a kernel can hang the GPU; here both are results. A worker is a fresh interpreter
that runs this file (never the caller's `__main__`) and imports only what it is asked to call. Replies are plain
values; an exception comes back as text, because not every exception survives a pipe.
"""

from __future__ import annotations

import collections
import contextlib
import ctypes
import dataclasses
import multiprocessing.connection
import os
import pickle
import pkgutil
import resource
import signal
import subprocess
import sys
import tempfile
import threading
import time
import typing
import weakref
from multiprocessing.connection import Connection

from flashgen.errors import WorkerError

Function = typing.Callable[..., object] | str
TaskId = typing.TypeVar("TaskId")

_BOOT = "import sys; sys.path[:] = sys.argv[4:]; import runpy; runpy.run_path(sys.argv[1], run_name='__main__')"
_STDERR_LINES = 5
_STDERR_BYTES = 64 * 1024
_MESSAGE_CHARACTERS = 4000
_REAP_SECONDS = 5.0
_PARENT_POLL_SECONDS = 0.5
_PR_SET_PDEATHSIG = 1


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
    """

    kind: typing.Literal["timeout", "crashed", "error"]
    detail: str


Outcome = WorkerResult | WorkerFailure


@dataclasses.dataclass(frozen=True, kw_only=True)
class Finished(typing.Generic[TaskId]):
    """A task of a `Pool` and how it ended."""

    task_id: TaskId
    outcome: Outcome


class Worker:
    """One process that answers one request at a time; it starts with the first and restarts after it died.

    On Linux a worker dies with the *thread* that started it: call from a thread that lives as long as the tuning.
    """

    def __init__(
        self,
        name: str,
        *,
        setup: Function | None = None,
        env: typing.Mapping[str, str] | None = None,
        start_timeout_s: float = 120.0,
    ) -> None:
        """Describe a worker; nothing starts yet.

        Args:
            name: for messages.
            setup: called without arguments in each new process before its first request; a callable that pickles by
                name, or `module:function`, which spares the caller the import.
            env: environment variables that its interpreter starts with, added to the caller's.
            start_timeout_s: deadline of starting and `setup` together; a request's own deadline begins after it.
        """
        self.name = name
        self._setup = None if setup is None else _pack(setup, ())
        self._env = dict(env or {})
        self._start_timeout_s = start_timeout_s
        self._process: _Process | None = None
        self._request = b""
        self._timeout_s = 0.0
        self._deadline: float | None = None
        self._starting = False

    @property
    def busy(self) -> bool:
        """Whether a request is under way."""
        return self._deadline is not None

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
            while True:
                multiprocessing.connection.wait([self.connection] if self.connection else [], self.seconds_left)
                outcome = self.advance()
                if outcome is not None:
                    return outcome
        except BaseException:
            self.kill()
            raise

    def begin(self, request: bytes, *, timeout_s: float) -> None:
        """Send what `pack_request` made, starting the process if there is none; `advance` tells how it ended."""
        if self.busy:
            raise WorkerError(f"{self.name} is busy; wait for its outcome first")
        self._request, self._timeout_s = request, timeout_s
        self._starting = self._process is None
        self._deadline = time.monotonic() + (self._start_timeout_s if self._starting else timeout_s)
        if self._process is None:
            self._process = _Process(self._setup, self._env)
        else:
            self._send()

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
            self._starting = False
            self._deadline = time.monotonic() + self._timeout_s
            self._send()
            return None
        self._deadline = None
        if self._starting:
            self.kill()
            return WorkerFailure(kind="error", detail=f"{self.name} could not be set up: {reply}")
        return _unpacked(reply) if ok else WorkerFailure(kind="error", detail=reply)

    def kill(self) -> None:
        """End the process and its children at once; the next request starts a new one."""
        self._deadline = None
        if self._process is not None:
            process, self._process = self._process, None
            process.kill()

    def _send(self) -> None:
        assert self._process is not None
        # A process that is gone shows as end of file at the next `advance`.
        with contextlib.suppress(OSError):
            self._process.begin_request(self._request)

    def _fail(self, kind: typing.Literal["timeout", "crashed"]) -> WorkerFailure:
        assert self._process is not None
        process, limit = self._process, self._start_timeout_s if self._starting else self._timeout_s
        self.kill()
        when = " while it started" if self._starting else ""
        how = f"killed after {limit:g} s" if kind == "timeout" else process.ending()
        return WorkerFailure(kind=kind, detail=f"{self.name} {how}{when}{process.last_words()}")


class Pool(typing.Generic[TaskId]):
    """Some workers and a queue; use it as a context manager, from one thread."""

    def __init__(
        self,
        size: int,
        *,
        name: str = "worker",
        setup: Function | None = None,
        env: typing.Mapping[str, str] | None = None,
        start_timeout_s: float = 120.0,
    ) -> None:
        """Make a pool of `size` workers, all described as in `Worker`; each starts when it is first needed."""
        if size < 1:
            raise WorkerError(f"a pool needs at least 1 worker, got {size}")
        self._workers = [
            Worker(f"{name} {index}", setup=setup, env=env, start_timeout_s=start_timeout_s) for index in range(size)
        ]
        self._running: dict[Worker, TaskId] = {}
        self._queue: collections.deque[tuple[TaskId, bytes, float]] = collections.deque()

    @property
    def idle(self) -> int:
        """How many workers have nothing to do."""
        return len(self._workers) - len(self._running)

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
        while self._running:
            left = max(0.0, until - time.monotonic())
            connections = [worker.connection for worker in self._running if worker.connection]
            nearest = min(worker.seconds_left for worker in self._running)
            multiprocessing.connection.wait(connections, min(left, nearest))
            finished = self._collect()
            self._dispatch()
            if finished or not left:
                return finished
        return []

    def close(self) -> None:
        """Kill every worker at once and forget all tasks."""
        self._queue.clear()
        self._running.clear()
        for worker in self._workers:
            worker.kill()

    def __enter__(self) -> Pool[TaskId]:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _collect(self) -> list[Finished[TaskId]]:
        outcomes = [(worker, worker.advance()) for worker in self._running]
        return [Finished(task_id=self._running.pop(w), outcome=outcome) for w, outcome in outcomes if outcome]

    def _dispatch(self) -> None:
        for worker in self._workers:
            if self._queue and worker not in self._running:
                task_id, request, timeout_s = self._queue.popleft()
                self._running[worker] = task_id
                worker.begin(request, timeout_s=timeout_s)


class _Process:
    """The caller's side of one worker process: its pipe, its stderr and its end."""

    def __init__(self, setup: bytes | None, env: dict[str, str]) -> None:
        self.connection, theirs = multiprocessing.connection.Pipe()
        # Appending, so that emptying the file between requests leaves no hole.
        self._stderr = tempfile.TemporaryFile("a+b", prefix="flashgen-worker-")  # noqa: SIM115
        # The command `env` adds variables without reading ours, then becomes the interpreter under the same number.
        interpreter = ["env", *(f"{name}={value}" for name, value in env.items()), sys.executable]
        with theirs:
            self.popen = subprocess.Popen(
                [*interpreter, "-c", _BOOT, __file__, str(theirs.fileno()), str(os.getpid()), *map(str, sys.path)],
                stdin=subprocess.DEVNULL,
                stdout=self._stderr,
                stderr=self._stderr,
                pass_fds=[theirs.fileno()],
                start_new_session=True,
            )
        self._finalizer = weakref.finalize(self, _kill_group, self.popen)
        with contextlib.suppress(OSError):
            self.connection.send(setup)

    def begin_request(self, request: bytes) -> None:
        os.ftruncate(self._stderr.fileno(), 0)
        self.connection.send_bytes(request)

    def kill(self) -> None:
        self._finalizer()
        self.connection.close()

    def ending(self) -> str:
        """Return how the process ended, in words."""
        code = self.popen.returncode
        if code is None:
            return "does not die, stuck in the driver"
        if code >= 0:
            return f"exited with code {code}"
        with contextlib.suppress(ValueError):
            return f"died of {signal.Signals(-code).name}"
        return f"died of signal {-code}"

    def last_words(self) -> str:
        """Return the end of what it wrote to stderr, and close that file."""
        with self._stderr as file:
            size = os.fstat(file.fileno()).st_size
            text = os.pread(file.fileno(), _STDERR_BYTES, max(0, size - _STDERR_BYTES)).decode(errors="replace")
        lines = [line for line in text.splitlines() if line.strip()]
        # LLVM prints a stack after the line that matters.
        cause = [line for line in lines[:-_STDERR_LINES] if "Assertion" in line or "LLVM ERROR" in line]
        return "".join(f"\n{line[:500]}" for line in cause[-1:] + lines[-_STDERR_LINES:])


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
        return WorkerFailure(kind="error", detail=f"the result does not unpickle: {_described(error)}")


def _described(error: BaseException) -> str:
    try:
        text = str(error)
    except Exception:
        text = "(its message cannot be read)"
    return f"{type(error).__name__}: {text}"[:_MESSAGE_CHARACTERS]


def _kill_group(popen: subprocess.Popen[bytes]) -> None:
    # Before it is reaped: until then its number cannot become another's.
    with contextlib.suppress(ProcessLookupError, PermissionError):
        os.killpg(popen.pid, signal.SIGKILL)
    with contextlib.suppress(subprocess.TimeoutExpired):
        popen.wait(_REAP_SECONDS)


def _serve(connection: Connection, parent: int) -> None:
    """Answer requests until the caller closes the pipe: the worker's own main."""
    os.set_inheritable(connection.fileno(), False)
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the caller decides what an interrupt means
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    _die_with(parent)
    setup = connection.recv()
    connection.send_bytes(pickle.dumps((True, b"")) if setup is None else _answer(setup))
    while True:
        connection.send_bytes(_answer(connection.recv_bytes()))


def _answer(request: bytes) -> bytes:
    try:
        function, args = pickle.loads(request)
        if isinstance(function, str):
            function = pkgutil.resolve_name(function)
        value = function(*args)
    except BaseException as error:
        return pickle.dumps((False, _described(error)))
    try:
        return pickle.dumps((True, pickle.dumps(value, protocol=pickle.HIGHEST_PROTOCOL)))
    except BaseException as error:
        return pickle.dumps((False, f"the result does not pickle: {_described(error)}"))


def _die_with(parent: int) -> None:
    """End this process group when the parent is gone, whatever the main thread is doing."""
    if sys.platform == "linux":
        # The kernel's own way, for C code that never lets another Python thread run.
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)

    def watch() -> None:
        while os.getppid() == parent:
            time.sleep(_PARENT_POLL_SECONDS)
        os.killpg(0, signal.SIGKILL)

    threading.Thread(target=watch, name="parent-watch", daemon=True).start()


if __name__ == "__main__":
    with contextlib.suppress(EOFError, OSError):
        _serve(Connection(int(sys.argv[2])), int(sys.argv[3]))
    os.killpg(0, signal.SIGKILL)
