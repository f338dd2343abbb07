"""The rates that a time stands for."""

from __future__ import annotations

from flashgen.errors import InputError
from flashgen.spec.problem import Problem


def tflops(problem: Problem, us: float) -> float:
    """Return the useful TFLOP/s of a call that took `us` microseconds."""
    return problem.flops() / (_positive(us) * 1e6)


def tbps(problem: Problem, us: float) -> float:
    """Return the TB/s of a call that took `us` microseconds, each input and output counted once."""
    return problem.min_bytes() / (_positive(us) * 1e6)


def _positive(us: float) -> float:
    if not us > 0:
        raise InputError(f"a time must be positive, got {us} us")
    return us
