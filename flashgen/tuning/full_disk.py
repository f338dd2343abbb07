"""Telling a full disk from a config that fails."""

from __future__ import annotations

import errno
import os

_WORDS = tuple(os.strerror(code) for code in (errno.ENOSPC, errno.EDQUOT))


def says_disk_is_full(text: str) -> bool:
    """Return whether an error's text is the system's own for a full disk or a spent quota."""
    return any(words in text for words in _WORDS)
