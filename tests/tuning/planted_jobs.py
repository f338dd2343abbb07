"""Jobs that do what a plan says of a config: right, slow or faulty. Workers import this file by its name.

The plan is a JSON file named by PLANTED_PLAN: for each job, what happens to a config (by its text, or by the dtype for
the compiler, the length for the clock, and its text). Every call is
noted in the file PLANTED_LOG. Results are made where they arrive: their types need torch, which would cost every
restarted worker two seconds.
"""

from __future__ import annotations

import errno
import hashlib
import json
import os
import pkgutil
import signal
import sys
import time
import typing
from pathlib import Path

from flashgen.codegen import KernelConfig, KernelResources
from flashgen.spec import AttentionSpec, DType, Problem
from flashgen.target import GpuTarget

Plan = dict[str, dict[str, typing.Any]]


class Made:
    """Unpickles as an instance of the class called `name`."""

    def __init__(self, name: str, **fields: object) -> None:
        self.recipe = (name, fields)

    def __reduce__(self) -> tuple[object, ...]:
        return _make, self.recipe


def _make(name: str, fields: dict[str, object]) -> object:
    return pkgutil.resolve_name(name)(**fields)


def _timing(us: float) -> Made:
    return Made("flashgen.measure:Timing", median_us=us, spread=0.01, samples=9)


def _measurement(us: float) -> Made:
    return Made("flashgen.measure:Measurement", timing=_timing(us), max_error=0.001, allowed_error=0.01)


def _wrong(reason: str) -> Made:
    return Made("flashgen.measure:Rejected", stage="accuracy", reason=reason)


def _planned(job: str, config: object, kind: str = "") -> typing.Any:
    """Return the plan's word on a config, or on a config of a kind, after committing the fault if it is one."""
    with open(os.environ["PLANTED_LOG"], "a") as log:
        log.write(f"{job} {config}\n")
    plan: Plan = json.loads(Path(os.environ["PLANTED_PLAN"]).read_text())
    words = plan.get(job, {})
    word = words.get(str(config), words.get(f"{kind} {config}"))
    if word == "hang":
        time.sleep(600)
    elif word == "busy":
        while True:
            pass
    elif word == "abort":
        os.abort()
    elif word == "exit":
        os._exit(7)
    elif word == "killed":
        os.kill(os.getpid(), signal.SIGKILL)
    elif word == "full disk":
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
    elif word == "memory":
        raise MemoryError("planted")
    elif word == "error":
        raise RuntimeError("planted")
    elif word == "sys.exit":
        sys.exit(3)
    return word


def _length(problem: Problem) -> str:
    return str(problem.shape.seqlen_q)


def usual_us(config: KernelConfig) -> float:
    """Return a time that depends on the config alone, from 100 to 200 us."""
    return 100.0 + int(hashlib.sha256(str(config).encode()).hexdigest()[:6], 16) % 100_000 / 1000


def compile(spec: AttentionSpec, config: KernelConfig, target: GpuTarget) -> object:
    # What the winner is confirmed with is compiled ahead, and is no trial.
    ahead = spec.dbias or (spec.phase == "forward" and spec.lse)
    word = _planned("ahead: compile" if ahead else "compile", config, str(spec.dtype))
    if word == "garbage":
        return {"registers": "many"}
    registers = 101 if spec.dtype is DType.BF16 else 100
    facts = {"registers": registers, "spills": 0, "smem_bytes": 1024, "binary": str(config), **(word or {})}
    time.sleep(facts.get("sleep_s", 0.0))
    resources = KernelResources(registers=facts["registers"], spills=facts["spills"], smem_bytes=facts["smem_bytes"])
    return Made("flashgen.compile:CompileReport", resources=resources, binary_hash=facts["binary"], seconds=0.0)


def start(device: str) -> None:
    _planned("start", device)


def stand_by() -> None:
    """What this file imports is all that its jobs need."""


def start_at_third_attempt(device: str) -> None:
    _planned("start", device)
    if Path(os.environ["PLANTED_LOG"]).read_text().count("start ") < 3:
        os._exit(1)


def evaluate(problem: Problem, config: KernelConfig, best_us: float | None) -> object:
    word = _planned("evaluate", config, _length(problem))
    if word == "garbage":
        return "fast"
    if word == "nan":
        return _measurement(float("nan"))
    if word == "wrong":
        return _wrong("at its own shape: max error 0.7, 0.01 is allowed")
    return _measurement(word if isinstance(word, float) else usual_us(config))


def race(
    problem: Problem, configs: typing.Sequence[KernelConfig], target_ms: float, seed: int, baselines: bool
) -> object:
    faults = [_planned("race", config) for config in configs]
    if baselines:
        _planned("race", "baselines")
    if "garbage" in faults:
        return None
    plan: Plan = json.loads(Path(os.environ["PLANTED_PLAN"]).read_text())
    words = plan.get("evaluate", {})
    length = _length(problem)
    times = [words.get(str(config)) or words.get(f"{length} {config}") or usual_us(config) for config in configs]
    timings = {str(place): _timing(us) for place, us in enumerate(times)} | (
        {"cudnn": _timing(90.0)} if baselines else {}
    )
    at_least = {str(place): us / min(times) for place, us in enumerate(times)}
    return Made("flashgen.measure:Race", timings=timings, at_least=at_least, noise=0.02)


def confirm(problem: Problem, config: KernelConfig) -> object:
    word = _planned("confirm", config, _length(problem))
    return _wrong("lse is off by 1") if word == "wrong" else word


def interpret(problem: Problem, config: KernelConfig) -> object:
    word = _planned("interpret", config)
    if word == "garbage":
        return (float("nan"), 1.0)
    return _wrong("planted") if word == "wrong" else (0.001, 0.01)


def interpret_corrupted(problem: Problem, config: KernelConfig) -> object:
    """Check for real kernels that, for a planted config, write one wrong row of out or of dV."""
    import flashgen.tuning.cpu_jobs as cpu_jobs
    from flashgen.launch import interpret_backward, interpret_forward

    def corrupted_forward(*args: typing.Any, **kwargs: typing.Any) -> typing.Any:
        out, lse = interpret_forward(*args, **kwargs)
        out[0, 0, -1] += 0.1
        return out, lse

    def corrupted_backward(*args: typing.Any, **kwargs: typing.Any) -> typing.Any:
        gradients = interpret_backward(*args, **kwargs)
        gradients["dv"][0, 0, -1] += 0.1
        return gradients

    wrong = _planned("interpret", config) == "wrong"
    cpu_jobs.interpret_forward = corrupted_forward if wrong else interpret_forward
    cpu_jobs.interpret_backward = corrupted_backward if wrong else interpret_backward
    return cpu_jobs.check_interpreted(problem, config)
