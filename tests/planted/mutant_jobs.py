"""Jobs of the measuring process and of the compiling ones with planted bugs, by name."""

from __future__ import annotations

from backward_mutants import BACKWARD_MUTANTS
from decode_mutants import DECODE_MUTANTS, WAITING_MUTANTS
from forward_mutants import FORWARD_MUTANTS
from hopper_decode_mutants import HOPPER_DECODE_MUTANTS
from hopper_mutants import HOPPER_MUTANTS
from mutants import Mutant, outcome_of, planted

from flashgen.codegen import KernelConfig
from flashgen.compile import compile_kernel
from flashgen.measure import Rejected
from flashgen.spec import Problem
from flashgen.target import GpuTarget
from flashgen.tuning import gpu_jobs
from flashgen.tuning.variants import confirmed_variant

MUTANTS: dict[str, Mutant] = {
    **{f"forward: {name}": mutant for name, mutant in FORWARD_MUTANTS.items()},
    **{f"backward: {name}": mutant for name, mutant in BACKWARD_MUTANTS.items()},
    **{f"decode: {name}": mutant for name, mutant in (DECODE_MUTANTS | WAITING_MUTANTS).items()},
    **{f"Hopper: {name}": mutant for name, mutant in HOPPER_MUTANTS.items()},
    **{f"Hopper, decode: {name}": mutant for name, mutant in HOPPER_DECODE_MUTANTS.items()},
}


def compile_mutant(name: str, target: GpuTarget) -> None:
    """Fill Triton's cache with what `judge_mutant` launches."""
    mutant = MUTANTS[name]
    with planted(mutant):
        compile_right(mutant.parsed(), mutant.config, target)


def compile_right(problem: Problem, config: KernelConfig, target: GpuTarget) -> None:
    """Fill Triton's cache with what the checks of a config launch."""
    for spec in (problem.spec, confirmed_variant(problem.spec)):
        if spec is not None:
            compile_kernel(gpu_jobs.render(spec, config), spec, config, target)


def judge_mutant(name: str) -> Rejected | None:
    """Return why the tuner's checks refuse a bug; None if they do not."""
    mutant = MUTANTS[name]
    with planted(mutant):
        return outcome_of(mutant.parsed(), mutant.config)


def judge_right(problem: Problem, config: KernelConfig) -> Rejected | None:
    """Return why the tuner's checks refuse a config as it is; None if they do not."""
    return outcome_of(problem, config)
