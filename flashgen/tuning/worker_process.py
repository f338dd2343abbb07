"""One worker process as its caller sees it: the pipe, what it wrote to stderr, and its end."""

from __future__ import annotations

import contextlib
import multiprocessing.connection
import os
import signal
import subprocess
import sys
import tempfile
import weakref

from flashgen.tuning import worker_main

_BOOT = "import sys; sys.path[:] = sys.argv[4:]; import runpy; runpy.run_path(sys.argv[1], run_name='__main__')"
_STDERR_LINES = 5
_STDERR_BYTES = 64 * 1024
_REAP_SECONDS = 5.0


class WorkerProcess:
    """A process that runs `worker_main`; it starts at once and is killed with its children, at the latest at exit."""

    def __init__(self, setup: bytes | None, env: dict[str, str]) -> None:
        self.connection, theirs = multiprocessing.connection.Pipe()
        # Appending, so that emptying the file between requests leaves no hole.
        self._stderr = tempfile.TemporaryFile("a+b", prefix="flashgen-worker-")  # noqa: SIM115
        # The command `env` adds variables without reading ours, then becomes the interpreter under the same number.
        interpreter = ["env", *(f"{name}={value}" for name, value in env.items()), sys.executable]
        with theirs:
            self.popen = subprocess.Popen(
                [
                    *interpreter,
                    "-c",
                    _BOOT,
                    worker_main.__file__,
                    str(theirs.fileno()),
                    str(os.getpid()),
                    *map(str, sys.path),
                ],
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
        """Send a request; what an earlier one left on stderr is forgotten."""
        os.ftruncate(self._stderr.fileno(), 0)
        self.connection.send_bytes(request)

    def kill(self) -> None:
        """End the process group at once."""
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


def _kill_group(popen: subprocess.Popen[bytes]) -> None:
    # Before it is reaped: until then its number cannot become another's.
    with contextlib.suppress(ProcessLookupError, PermissionError):
        os.killpg(popen.pid, signal.SIGKILL)
    with contextlib.suppress(subprocess.TimeoutExpired):
        popen.wait(_REAP_SECONDS)
