"""Exit codes, and errors as one clean message instead of a traceback."""

from __future__ import annotations

import functools
import typing
from collections.abc import Callable

import typer

from flashgen.cli.output import note
from flashgen.errors import ConfigError, FlashgenError, InputError, NoKernelError

FAILED = 1
BAD_USAGE = 2
NOTHING_TUNED = 3
INTERRUPTED = 130

Parameters = typing.ParamSpec("Parameters")


def exit_code(error: FlashgenError) -> int:
    """Return the exit code of a command that ended with `error`."""
    if isinstance(error, (InputError, ConfigError)):
        return BAD_USAGE
    return NOTHING_TUNED if isinstance(error, NoKernelError) else FAILED


def reported(command: Callable[Parameters, None]) -> Callable[Parameters, None]:
    """Return `command` with deliberate errors and Ctrl-C turned into a message on stderr and an exit code.

    Anything else keeps its traceback: it is a bug.
    """

    @functools.wraps(command)
    def run(*args: Parameters.args, **kwargs: Parameters.kwargs) -> None:
        try:
            command(*args, **kwargs)
        except FlashgenError as error:
            note(f"error: {error}")
            raise typer.Exit(exit_code(error)) from None
        except KeyboardInterrupt:
            note("interrupted")
            raise typer.Exit(INTERRUPTED) from None

    return run
