"""The default configs of each phase."""

from __future__ import annotations

from flashgen.codegen import KernelConfig
from flashgen.heuristics import backward, decode, forward
from flashgen.spec import Phase, Problem
from flashgen.target import GpuTarget


def default_configs(problem: Problem, target: GpuTarget) -> tuple[KernelConfig, ...]:
    """Return configs to try in order, the most promising first; some may break a constraint of the target."""
    match problem.spec.phase:
        case "forward":
            return forward.default_configs(problem, target)
        case "backward":
            return backward.default_configs(problem, target)
        case "decode":
            return decode.default_configs(problem, target)


def safe_configs(phase: Phase = "forward") -> tuple[KernelConfig, ...]:
    """Return small configs that fit every GPU and every stride, for a last resort."""
    match phase:
        case "forward":
            return forward.safe_configs()
        case "backward":
            return backward.safe_configs()
        case "decode":
            return decode.safe_configs()
