"""Numerics of a chosen config: on a GPU at its own and at awkward sizes, on a CPU in the interpreter at small ones."""

from __future__ import annotations

import dataclasses

import torch

from flashgen.codegen import KernelConfig, TritonForwardConfig, render
from flashgen.compile import compile_kernel
from flashgen.dispatch import Selection
from flashgen.errors import ConfigError
from flashgen.launch import bind_forward, interpret_forward
from flashgen.measure import (
    AccuracyReport,
    Oracle,
    accuracy_error,
    awkward_shapes,
    poisoned_outputs,
    random_extras,
    random_inputs,
    sampled_heads,
)
from flashgen.spec import Problem, Shape

MAX_INTERPRETED_TOKENS = 256

_MAX_CHECKED_SCORES = 2**24
_CHECKED_HEADS = 4


@dataclasses.dataclass(frozen=True, kw_only=True)
class Check:
    """The numerics of one config at one shape."""

    shape: Shape
    report: AccuracyReport


def check_on_gpu(selection: Selection, device: torch.device) -> tuple[Check, ...]:
    """Return the checks at awkward shapes, with lse, and at the problem's own, on a sample of its heads."""
    problem, config = selection.problem, selection.config
    with_lse = dataclasses.replace(problem, spec=dataclasses.replace(problem.spec, lse=True))
    cases = [dataclasses.replace(with_lse, shape=shape) for shape in _awkward(problem, config)] + [problem]
    with torch.cuda.device(device):
        return tuple(Check(shape=case.shape, report=_launched(case, selection, device)) for case in cases)


def check_interpreted(selection: Selection) -> tuple[Check, ...]:
    """Return the checks at awkward shapes and at the problem's own cut down to what an interpreter can do."""
    problem, config = selection.problem, selection.config
    shape = problem.shape
    nheads_kv = min(shape.nheads_kv, 2)
    small = Shape(
        batch=min(shape.batch, 1),
        seqlen_q=min(shape.seqlen_q, MAX_INTERPRETED_TOKENS),
        seqlen_k=min(shape.seqlen_k, MAX_INTERPRETED_TOKENS),
        nheads_q=nheads_kv * min(shape.group, 2),
        nheads_kv=nheads_kv,
    )
    reduced = Problem(spec=dataclasses.replace(problem.spec, lse=True), shape=small)
    shapes = [
        shape for shape in _awkward(reduced, config) if max(shape.seqlen_q, shape.seqlen_k) <= MAX_INTERPRETED_TOKENS
    ]
    cases = [dataclasses.replace(reduced, shape=shape) for shape in shapes] + [reduced]
    return tuple(Check(shape=case.shape, report=_interpreted(case, config)) for case in cases)


def _awkward(problem: Problem, config: KernelConfig) -> tuple[Shape, ...]:
    if not isinstance(config, TritonForwardConfig):
        raise ConfigError(f"no check for template {config.template!r}; known: {TritonForwardConfig.template}")
    shapes = awkward_shapes(problem, config.block_m, config.block_n)
    # Without keys nothing is launched.
    return tuple(shape for shape in shapes if shape.seqlen_k)


def _launched(problem: Problem, selection: Selection, device: torch.device) -> AccuracyReport:
    spec, shape = problem.spec, problem.shape
    q, k, v = random_inputs(problem, device=device, seed=0)
    extras = random_extras(problem, device=device, seed=0)
    out, lse = poisoned_outputs(problem, device=device)
    tensors = {"q": q, "k": k, "v": v, "out": out} | ({"lse": lse} if lse is not None else {})
    config, target = selection.config, selection.target
    compiled = compile_kernel(render(spec, config), spec, config, target)
    bind_forward(problem, config, compiled, extras, tensors)()
    few = shape.batch * shape.nheads_q * shape.seqlen_q * shape.seqlen_k > _MAX_CHECKED_SCORES
    heads = sampled_heads(shape.batch, shape.nheads_q, _CHECKED_HEADS, seed=0) if few else None
    return Oracle(q, k, v, spec=spec, extras=extras, heads=heads).judge(out, lse)


def _interpreted(problem: Problem, config: KernelConfig) -> AccuracyReport:
    q, k, v = random_inputs(problem, device="cpu", seed=0)
    extras = random_extras(problem, device="cpu", seed=0)
    out, lse = interpret_forward(q, k, v, problem=problem, config=config, extras=extras)
    return accuracy_error(out, lse, q, k, v, spec=problem.spec, extras=extras)
