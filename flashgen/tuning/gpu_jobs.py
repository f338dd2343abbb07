"""What the measuring process does on its GPU: check a candidate, time it, race the best.

These functions run in a worker that is killed when a kernel hangs. Inputs and references are made once a problem.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import os
import sys
import typing

import torch

from flashgen.codegen import KernelConfig, TritonForwardConfig, render
from flashgen.compile import CompiledKernel, compile_kernel
from flashgen.errors import FlashgenError
from flashgen.launch import bind_forward, detect_target
from flashgen.measure import (
    CudaClock,
    Measurement,
    Oracle,
    Outcome,
    Rejected,
    Timing,
    awkward_shapes,
    benchmark,
    poisoned_outputs,
    quick_time,
    random_extras,
    random_inputs,
    sampled_heads,
)
from flashgen.measure.peers import default_baselines
from flashgen.spec import AttentionSpec, Extras, Problem
from flashgen.target import GpuTarget

_CHECKED_HEADS = 3
_FIRST_LAUNCHES = 3
_RUNG_ROUNDS = 2
_RUNG_MS = 8.0
# A candidate this far behind the best is not timed any further.
_HOPELESS = 1.5
_FINAL_ROUNDS = 5


def start(device: str) -> GpuTarget:
    """Wake the GPU and return its target."""
    torch.cuda.set_device(device)
    torch.zeros(1, device=device)
    return detect_target(_device())


def evaluate(problem: Problem, config: KernelConfig, best_us: float | None) -> Outcome:
    """Return the timing of a config that computes the right thing, or why it was rejected.

    First the numerics, at awkward shapes and at the problem's own, on outputs full of NaN and twice for equal bits;
    then a few launches, and more of them unless `best_us` is far ahead.
    """
    try:
        with _ending_if_the_context_is_lost():
            return _checked_and_timed(problem, config, best_us)
    except torch.OutOfMemoryError as error:
        torch.cuda.empty_cache()
        return Rejected(stage="run", reason=f"out of device memory: {_first_line(error)}")
    except (FlashgenError, RuntimeError) as error:
        return Rejected(stage="run", reason=f"{type(error).__name__}: {_first_line(error)}")


def _checked_and_timed(problem: Problem, config: KernelConfig, best_us: float | None) -> Outcome:
    compiled = _compiled(problem.spec, config)
    wrong = check_awkward(problem, config)
    if wrong is not None:
        return wrong
    report = _check_own_shape(problem, config, compiled)
    if isinstance(report, Rejected):
        return report
    call = bind_forward(problem, config, compiled, _extras(problem), _tensors(problem))
    timing = quick_time(call, _clock(), _FIRST_LAUNCHES)
    if best_us is None or timing.median_us < _HOPELESS * best_us:
        timing = benchmark({"": call}, clock=_clock(), rounds=_RUNG_ROUNDS, target_ms=_RUNG_MS)[""]
    return Measurement(timing=timing, max_error=report[0], allowed_error=report[1])


def check_awkward(problem: Problem, config: KernelConfig) -> Rejected | None:
    """Return why a config computes something wrong at shapes that break careless kernels, or None."""
    if not isinstance(config, TritonForwardConfig):
        raise FlashgenError(f"no check for template {config.template!r}")
    compiled = _compiled(problem.spec, config)
    for shape in awkward_shapes(problem, config.block_m, config.block_n):
        if shape.seqlen_k == 0:
            # Nothing is launched without keys.
            continue
        small = dataclasses.replace(problem, shape=shape)
        inputs, extras, oracle = _small_case(small)
        outputs = _outputs(small)
        bind_forward(small, config, compiled, extras, {**inputs, **outputs})()
        report = oracle.judge(outputs["out"], outputs.get("lse"))
        if not report.ok:
            return Rejected(stage="accuracy", reason=f"at {shape}: {report.reason}")
    return None


def check_lse(problem: Problem, config: KernelConfig) -> Rejected | None:
    """Return why the variant of a config that also writes lse is wrong, or None."""
    with_lse = dataclasses.replace(problem, spec=dataclasses.replace(problem.spec, lse=True))
    with _ending_if_the_context_is_lost():
        return check_awkward(with_lse, config)


def race(
    problem: Problem, configs: typing.Sequence[KernelConfig], target_ms: float, seed: int, baselines: bool
) -> tuple[list[Timing], dict[str, Timing]]:
    """Return the timings of finalists, and of what was timed in the same interleaved rounds: the baselines if wanted.

    The first config runs twice, as itself and under the name `A/A`: the difference is the noise floor.
    """
    with _ending_if_the_context_is_lost():
        tensors, extras = _tensors(problem), _extras(problem)
        calls: dict[str, typing.Callable[[], object]] = {
            str(index): bind_forward(problem, config, _compiled(problem.spec, config), extras, tensors)
            for index, config in enumerate(configs)
        }
        calls["A/A"] = calls["0"]
        for peer in default_baselines(_device()) if baselines else ():
            run = peer.make(tensors["q"], tensors["k"], tensors["v"], problem, extras)
            if not isinstance(run, str):
                calls[peer.name] = run
        timings = benchmark(calls, clock=_clock(), rounds=_FINAL_ROUNDS, target_ms=target_ms, seed=seed)
    finalists = [timings.pop(str(index)) for index in range(len(configs))]
    return finalists, timings


def _check_own_shape(
    problem: Problem, config: KernelConfig, compiled: CompiledKernel
) -> tuple[float, float] | Rejected:
    tensors, extras = _tensors(problem), _extras(problem)
    out = tensors["out"]
    out.fill_(float("nan"))
    bind_forward(problem, config, compiled, extras, tensors)()
    report = _oracle(problem).judge(out, None)
    if not report.ok:
        return Rejected(stage="accuracy", reason=f"at {problem.shape}: {report.reason}")
    again = torch.full_like(out, float("nan"))
    bind_forward(problem, config, compiled, extras, {**tensors, "out": again})()
    if not torch.equal(out, again):
        return Rejected(stage="accuracy", reason=f"at {problem.shape}: two runs differ in their bits")
    return report.max_error, report.allowed_error


@functools.lru_cache(maxsize=1)
def _oracle(problem: Problem) -> Oracle:
    """Return the oracle for a sample of the heads of a problem at its own shape."""
    tensors = _tensors(problem)
    heads = sampled_heads(problem.shape.batch, problem.shape.nheads_q, _CHECKED_HEADS, seed=0)
    return Oracle(tensors["q"], tensors["k"], tensors["v"], spec=problem.spec, extras=_extras(problem), heads=heads)


@functools.lru_cache(maxsize=1)
def _tensors(problem: Problem) -> dict[str, torch.Tensor]:
    return {**_inputs(problem, 0), **_outputs(problem)}


@functools.lru_cache(maxsize=1)
def _extras(problem: Problem) -> Extras:
    return random_extras(problem, device=_device(), seed=0)


@functools.lru_cache(maxsize=256)
def _small_case(problem: Problem) -> tuple[dict[str, torch.Tensor], Extras, Oracle]:
    inputs, extras = _inputs(problem, 1), random_extras(problem, device=_device(), seed=1)
    return inputs, extras, Oracle(inputs["q"], inputs["k"], inputs["v"], spec=problem.spec, extras=extras)


def _inputs(problem: Problem, seed: int) -> dict[str, torch.Tensor]:
    return dict(zip("qkv", random_inputs(problem, device=_device(), seed=seed), strict=True))


def _outputs(problem: Problem) -> dict[str, torch.Tensor]:
    out, lse = poisoned_outputs(problem, device=_device())
    return {"out": out} | ({"lse": lse} if lse is not None else {})


@functools.lru_cache(maxsize=512)
def _compiled(spec: AttentionSpec, config: KernelConfig) -> CompiledKernel:
    # The compile workers have been here: this reads Triton's disk cache.
    return compile_kernel(render(spec, config), spec, config, detect_target(_device()))


@functools.lru_cache(maxsize=1)
def _clock() -> CudaClock:
    return CudaClock(_device())


def _device() -> torch.device:
    return torch.device("cuda", torch.cuda.current_device())


@contextlib.contextmanager
def _ending_if_the_context_is_lost() -> typing.Iterator[None]:
    """End this process if the block's error took the GPU context with it: nothing after it could be trusted."""
    try:
        yield
    except Exception as error:
        if _context_is_lost():
            sys.stderr.write(f"the GPU context is lost: {error}\n")
            sys.stderr.flush()
            os._exit(1)
        raise


def _context_is_lost() -> bool:
    try:
        torch.cuda.synchronize()
    except RuntimeError:
        return True
    return False


def _first_line(error: BaseException) -> str:
    return next(iter(str(error).splitlines()), repr(error))[:300]
