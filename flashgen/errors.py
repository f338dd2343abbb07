"""Every error that flashgen raises on purpose: all derive from `FlashgenError`.

Each also derives from the built-in that a user would expect (`ValueError` for a bad value and so on), so existing
`except` clauses keep working. A message says what was got, what is allowed and what to do next.
"""

from __future__ import annotations


class FlashgenError(Exception):
    """Base class of every deliberate flashgen error."""


class InputError(FlashgenError, ValueError):
    """A call or a command line holds a value that attention cannot take (rank, dtype, head counts, ...)."""


class UnsupportedError(FlashgenError, NotImplementedError):
    """The request is meaningful attention, but this version has no kernel for it."""


class ConfigError(FlashgenError, ValueError):
    """A kernel configuration is outside its constraints; the message lists every reason."""


class RegistryError(FlashgenError):
    """A registry file cannot be read or written; the message holds path and, where known, the line."""


class CompileError(FlashgenError, RuntimeError):
    """Triton refused a rendered kernel."""


class NoKernelError(FlashgenError, LookupError):
    """No candidate is usable for a problem; the message lists why each was refused."""


class MissingDependencyError(FlashgenError, ImportError):
    """An optional dependency is needed; the message holds the `pip install` line."""


class WorkerError(FlashgenError, RuntimeError):
    """A worker process crashed, hung or sent back an error."""
