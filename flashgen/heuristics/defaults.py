"""The default configs of each phase."""

from __future__ import annotations

from flashgen.codegen import KernelConfig
from flashgen.heuristics import backward, forward
from flashgen.spec import Phase, Problem
from flashgen.target import GpuTarget


def default_configs(problem: Problem, target: GpuTarget) -> tuple[KernelConfig, ...]:
    """Return configs to try in order, the most promising first; some may break a constraint of the target."""
    if problem.spec.phase == "backward":
        return backward.default_configs(problem, target)
    return forward.default_configs(problem, target)


def safe_configs(phase: Phase = "forward") -> tuple[KernelConfig, ...]:
    """Return small configs that fit every GPU and every stride, for a last resort."""
    return backward.safe_configs() if phase == "backward" else forward.safe_configs()
