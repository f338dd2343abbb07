"""The measuring process's own checks on the CPU: Triton's interpreter in the place of the GPU."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator

import pytest
import torch

from flashgen.codegen import KernelConfig, TritonDecodeConfig
from flashgen.compile import load_kernel
from flashgen.launch import grid_size, layouts_of
from flashgen.launch.backward import BackwardCall
from flashgen.launch.decode import decode_arguments
from flashgen.launch.forward import kernel_arguments
from flashgen.launch.interpreted import run_interpreted
from flashgen.tuning import awkward, gpu_cases, gpu_jobs
from flashgen.tuning.gpu_cases import Case

# Of the GPU that the interpreter stands for: few, so that programs have several units each.
_SMS = 3


class OneLaunchClock:
    """Launches once, and says 1 us."""

    def samples_us(self, call: Callable[[], object], repeats: int) -> list[float]:
        call()
        return [1.0] * repeats


def bound(case: Case, config: KernelConfig) -> Callable[[], None]:
    """As `gpu_jobs._bound`: what it renders is what runs, on the case's own memory."""
    of_phase = {"forward": _bound_forward, "backward": _bound_backward, "decode": _bound_decode}
    return of_phase[case.problem.spec.phase](case, config)


def _bound_forward(case: Case, config: KernelConfig) -> Callable[[], None]:
    rendered = gpu_jobs.render(case.problem.spec, config)
    arguments = kernel_arguments(rendered.plan, case.problem, config, case.extras, case.tensors)
    grid = (grid_size(case.problem.shape, config),)
    return lambda: run_interpreted(load_kernel(rendered), grid, arguments)


def _bound_backward(case: Case, config: KernelConfig) -> Callable[[], None]:
    rendered = gpu_jobs.render(case.problem.spec, config)
    call = BackwardCall(case.problem, config, case.extras, layouts_of(case.tensors))

    def run() -> None:
        given = call.with_scratch(case.tensors, case.extras)
        for entry in call.plan.entries:
            grid = call.grid(entry)
            if grid:
                run_interpreted(load_kernel(rendered, entry.name), (grid,), call.arguments(entry, given))
            call.after(entry.name, given)

    return run


def _bound_decode(case: Case, config: KernelConfig) -> Callable[[], None]:
    rendered = gpu_jobs.render(case.problem.spec, config)
    assert isinstance(config, TritonDecodeConfig)
    # Counters of its own, which all of its launches share.
    programs, arguments = decode_arguments(rendered.plan, case.problem, config, case.extras, case.tensors, _SMS)
    return lambda: run_interpreted(load_kernel(rendered), (programs,), arguments)


@contextlib.contextmanager
def without_a_gpu() -> Iterator[None]:
    """Have the checks run here, on cases of their own."""
    with pytest.MonkeyPatch.context() as patch:
        gpu_jobs.forget_cases()
        patch.setattr(gpu_jobs, "_bound", bound)
        patch.setattr(gpu_jobs, "_device", lambda: torch.device("cpu"))
        patch.setattr(gpu_jobs, "_clock_of", lambda problem: OneLaunchClock())
        patch.setattr(gpu_jobs, "_context_is_lost", lambda: False)
        # As many sequences as on a GPU, of fewer key tiles.
        patch.setattr(awkward, "_MANY_TILES", 10)
        # A kernel's own out and lse are made on a GPU alone.
        patch.setattr(gpu_cases, "_launched_forward", gpu_cases._exact_forward)
        yield
        gpu_jobs.forget_cases()
