"""Numerics of a chosen config: on a GPU at its own and at awkward sizes, on a CPU in the interpreter at small ones."""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Callable

import torch

from flashgen.cli.decoding import DecodeCase
from flashgen.cli.gradients import GradientCase
from flashgen.codegen import KernelConfig, render
from flashgen.compile import compile_kernel
from flashgen.dispatch import Selection
from flashgen.launch import bind_forward, interpret_forward
from flashgen.measure import (
    AccuracyReport,
    Oracle,
    accuracy_error,
    awkward_decode_shapes,
    poisoned_outputs,
    random_extras,
    random_inputs,
    sampled_heads,
)
from flashgen.spec import Problem, Shape
from flashgen.tuning.awkward import awkward_for

MAX_INTERPRETED_TOKENS = 256

_MAX_CHECKED_SCORES = 2**24
_CHECKED_HEADS = 4
_CHECKED_KV_HEADS = 2
# What calls ask for in turn: nothing, no split, a few, more than there are tiles of keys.
_NUM_SPLITS = (0, 1, 3, 32)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Check:
    """The numerics of one config at one shape."""

    shape: Shape
    report: AccuracyReport


def check_on_gpu(selection: Selection, device: torch.device) -> tuple[Check, ...]:
    """Return the checks at awkward shapes and at the problem's own, on a sample of its heads.

    At awkward shapes a forward also writes lse, and a backward pass also has a gradient of it; sequences that are
    decoded have lengths of their own there, and their keys are split in several ways.
    """
    problem, config = selection.problem, selection.config
    with torch.cuda.device(device):
        if problem.spec.phase == "decode":
            own = DecodeCase.of(problem, device)
            awkward = [_decoded(case, case.bind(selection)) for case in _decode_cases(problem, config, device)]
            return (*awkward, _decoded(own, own.bind(selection), _few(problem.shape, _CHECKED_HEADS)))
        if problem.spec.phase == "backward":
            cases = [(shape, True) for shape in awkward_for(problem, config)] + [(problem.shape, False)]
            return tuple(
                Check(shape=shape, report=_launched_gradients(_at(problem, shape), selection, device, dlse))
                for shape, dlse in cases
            )
        with_lse = dataclasses.replace(problem, spec=dataclasses.replace(problem.spec, lse=True))
        forwards = [_at(with_lse, shape) for shape in awkward_for(problem, config)] + [problem]
        return tuple(Check(shape=case.shape, report=_launched(case, selection, device)) for case in forwards)


def check_interpreted(selection: Selection) -> tuple[Check, ...]:
    """Return the checks at awkward shapes and at the problem's own cut down to what an interpreter can do.

    The config is one that it runs, see `interpreter_refusal`.
    """
    problem, config = selection.problem, selection.config
    if problem.spec.phase == "decode":
        # Awkward ones alone: caches of their own shapes take an interpreter minutes.
        calls = _decode_cases(problem, config, "cpu", most_keys=MAX_INTERPRETED_TOKENS)
        return tuple(_decoded(call, functools.partial(call.interpret, config)) for call in calls)
    shape = problem.shape
    nheads_kv = min(shape.nheads_kv, 2)
    small = Shape(
        batch=min(shape.batch, 1),
        seqlen_q=min(shape.seqlen_q, MAX_INTERPRETED_TOKENS),
        seqlen_k=min(shape.seqlen_k, MAX_INTERPRETED_TOKENS),
        nheads_q=nheads_kv * min(shape.group, 2),
        nheads_kv=nheads_kv,
    )
    backward = problem.spec.phase == "backward"
    spec = problem.spec if backward else dataclasses.replace(problem.spec, lse=True)
    reduced = Problem(spec=spec, shape=small)
    awkward = awkward_for(reduced, config)
    shapes = [shape for shape in awkward if max(shape.seqlen_q, shape.seqlen_k) <= MAX_INTERPRETED_TOKENS]
    interpreted = _interpreted_gradients if backward else _interpreted
    cases = [_at(reduced, shape) for shape in shapes] + [reduced]
    return tuple(Check(shape=case.shape, report=interpreted(case, config)) for case in cases)


def _decode_cases(
    problem: Problem, config: KernelConfig, device: torch.device | str, most_keys: float = math.inf
) -> list[DecodeCase]:
    """Return cases of awkward shapes of at most so many keys, that write lse; each sequence has a length of its own."""
    with_lse = dataclasses.replace(problem, spec=dataclasses.replace(problem.spec, lse=True))
    shapes = (shape for blocks in config.blocks for shape in awkward_decode_shapes(problem, *blocks))
    return [
        DecodeCase.of(_at(with_lse, shape), device, seed=i, ragged=True, num_splits=_NUM_SPLITS[i % len(_NUM_SPLITS)])
        for i, shape in enumerate(shapes)
        if shape.seqlen_k <= most_keys
    ]


def _decoded(case: DecodeCase, run: Callable[[], object], heads: tuple[tuple[int, int], ...] | None = None) -> Check:
    return Check(shape=case.call.problem.shape, report=case.check(run, heads))


def _at(problem: Problem, shape: Shape) -> Problem:
    return dataclasses.replace(problem, shape=shape)


def _launched(problem: Problem, selection: Selection, device: torch.device) -> AccuracyReport:
    spec, shape = problem.spec, problem.shape
    q, k, v = random_inputs(problem, device=device, seed=0)
    extras = random_extras(problem, device=device, seed=0)
    out, lse = poisoned_outputs(problem, device=device)
    tensors = {"q": q, "k": k, "v": v, "out": out} | ({"lse": lse} if lse is not None else {})
    config, target = selection.config, selection.target
    compiled = compile_kernel(render(spec, config), spec, config, target)
    bind_forward(problem, config, compiled, extras, tensors)()
    return Oracle(q, k, v, spec=spec, extras=extras, heads=_few(shape, _CHECKED_HEADS)).judge(out, lse)


def _few(shape: Shape, limit: int, *, kv: bool = False) -> tuple[tuple[int, int], ...] | None:
    """Return the (batch entry, head) pairs to check by, query or key/value heads; None, which is all, if cheap."""
    if shape.batch * shape.nheads_q * shape.seqlen_q * shape.seqlen_k <= _MAX_CHECKED_SCORES:
        return None
    return sampled_heads(shape.batch, shape.nheads_kv if kv else shape.nheads_q, limit, seed=0)


def _launched_gradients(
    problem: Problem, selection: Selection, device: torch.device, lse_gradient: bool
) -> AccuracyReport:
    heads = _few(problem.shape, _CHECKED_KV_HEADS, kv=True)
    case = _gradient_case(problem, device, lse_gradient)
    run, gradients = case.bind(selection)
    run()
    report = case.oracle(heads).judge(gradients)
    if not report.ok or not problem.spec.deterministic:
        return report
    run_again, again = case.bind(selection)
    run_again()
    pairs = ((gradients.dq, again.dq), (gradients.dk, again.dk), (gradients.dv, again.dv))
    if all(torch.equal(first, second) for first, second in pairs):
        return report
    return dataclasses.replace(report, ok=False, reason="two runs of a deterministic pass differ in their bits")


def _gradient_case(problem: Problem, device: torch.device, lse_gradient: bool) -> GradientCase:
    q, k, v = random_inputs(problem, device=device, seed=0)
    extras = random_extras(problem, device=device, seed=0)
    return GradientCase.of(problem, q, k, v, extras, lse_gradient=lse_gradient)


def _interpreted(problem: Problem, config: KernelConfig) -> AccuracyReport:
    q, k, v = random_inputs(problem, device="cpu", seed=0)
    extras = random_extras(problem, device="cpu", seed=0)
    out, lse = interpret_forward(q, k, v, problem=problem, config=config, extras=extras)
    return accuracy_error(out, lse, q, k, v, spec=problem.spec, extras=extras)


def _interpreted_gradients(problem: Problem, config: KernelConfig) -> AccuracyReport:
    case = _gradient_case(problem, torch.device("cpu"), lse_gradient=True)
    return case.oracle().judge(case.interpret(config))
