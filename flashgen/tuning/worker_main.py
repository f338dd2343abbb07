"""The worker's own side: a fresh interpreter runs this file by path and answers what `workers` asks.

It imports the standard library alone, so that a worker holds nothing but what it is asked to call.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import pickle
import pkgutil
import resource
import signal
import sys
import threading
import time
from multiprocessing.connection import Connection

_MESSAGE_CHARACTERS = 4000
_PARENT_POLL_SECONDS = 0.5
_PR_SET_PDEATHSIG = 1


def described(error: BaseException) -> str:
    """Return the type and the message of an exception, whatever its `__str__` does."""
    try:
        text = str(error)
    except Exception:
        text = "(its message cannot be read)"
    return f"{type(error).__name__}: {text}"[:_MESSAGE_CHARACTERS]


def serve(connection: Connection, parent: int) -> None:
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
        return pickle.dumps((False, described(error)))
    try:
        return pickle.dumps((True, pickle.dumps(value, protocol=pickle.HIGHEST_PROTOCOL)))
    except BaseException as error:
        return pickle.dumps((False, f"the result does not pickle: {described(error)}"))


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
        serve(Connection(int(sys.argv[2])), int(sys.argv[3]))
    os.killpg(0, signal.SIGKILL)
