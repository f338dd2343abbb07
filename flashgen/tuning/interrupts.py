"""A Ctrl-C that comes at the wrong moment."""

from __future__ import annotations

import contextlib
import signal
import threading
import types
import typing


@contextlib.contextmanager
def finishing_first() -> typing.Iterator[None]:
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
