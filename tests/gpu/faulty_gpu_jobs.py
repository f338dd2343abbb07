"""The measuring jobs with kernels that misbehave: for planted configs, every launch is followed by another one.

The plan is a JSON file named by FAULTY_PLAN: for `evaluate`, `race` and `confirm`, faults by the text of a config.
"""

from __future__ import annotations

import json
import os
import typing
from pathlib import Path

import torch
import triton
import triton.language as tl

from flashgen.codegen import KernelConfig
from flashgen.compile import CompiledKernel
from flashgen.launch import bind_backward, bind_forward
from flashgen.measure import Outcome, Race, Rejected
from flashgen.spec import Extras, Problem
from flashgen.tuning import gpu_jobs

_flags: list[torch.Tensor] = []


@triton.jit
def _spin(flag_ptr):
    flag = tl.load(flag_ptr, volatile=True)
    while flag == 0:
        flag = tl.load(flag_ptr, volatile=True)


@triton.jit
def _stray(out_ptr, distance):
    tl.store(out_ptr + distance, 1.0)


@triton.jit
def _overwrite(out_ptr, COLUMNS: tl.constexpr):
    tl.store(out_ptr + tl.arange(0, COLUMNS), 3.0)


def _misbehave(fault: str, tensors: typing.Mapping[str, torch.Tensor]) -> None:
    out = tensors["dq" if "dq" in tensors else "out"]
    if fault in tensors:
        # One of the tensors that the kernels have written.
        _overwrite[(1,)](tensors[fault], 16)
    elif fault == "hang":
        # Kept: another tensor in its place would end the loop.
        _flags.append(torch.zeros(1, dtype=torch.int32, device=out.device))
        _spin[(1,)](_flags[-1])
    elif fault == "illegal access":
        _stray[(1,)](out, 1 << 44)
    elif fault == "wrong result":
        _overwrite[(1,)](out, 16)
    elif fault == "too much memory":
        torch.empty(1 << 50, dtype=torch.uint8, device=out.device)
    elif fault == "abort":
        os.abort()


def _plant(job: str) -> None:
    """Make the jobs bind kernels that follow the plan of `job`."""
    plan: dict[str, str] = json.loads(Path(os.environ["FAULTY_PLAN"]).read_text()).get(job, {})

    def bind(
        problem: Problem,
        config: KernelConfig,
        compiled: CompiledKernel,
        extras: Extras,
        tensors: typing.Mapping[str, torch.Tensor],
    ) -> typing.Callable[[], None]:
        right = bind_backward if problem.spec.phase == "backward" else bind_forward
        call = right(problem, config, compiled, extras, tensors)
        fault = plan.get(str(config))
        if fault is None:
            return call

        def faulty() -> None:
            call()
            _misbehave(fault, tensors)

        return faulty

    gpu_jobs.bind_forward = gpu_jobs.bind_backward = bind


def evaluate(problem: Problem, config: KernelConfig, best_us: float | None) -> Outcome:
    _plant("evaluate")
    return gpu_jobs.evaluate(problem, config, best_us)


def race(
    problem: Problem, configs: typing.Sequence[KernelConfig], target_ms: float, seed: int, baselines: bool
) -> Race:
    _plant("race")
    return gpu_jobs.race(problem, configs, target_ms, seed, baselines)


def confirm(problem: Problem, config: KernelConfig) -> Rejected | None:
    _plant("confirm")
    return gpu_jobs.confirm(problem, config)
