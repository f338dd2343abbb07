"""What a process without a GPU can say of a config: whether it computes the right thing, in the interpreter."""

from __future__ import annotations

import dataclasses

import torch

from flashgen.codegen import KernelConfig
from flashgen.launch import interpret_backward, interpret_forward
from flashgen.measure import (
    AccuracyReport,
    Gradients,
    Rejected,
    accuracy_error,
    attention_reference,
    gradient_error,
    random_extras,
    random_inputs,
    random_lse_gradients,
    random_output_gradients,
)
from flashgen.measure.gradients import bias_sizes
from flashgen.spec import Problem, Shape

# About 1 ms a tile step: enough rows and keys for two tiles of most configs, odd in both directions.
_LENGTHS = ((133, 261), (259, 130))


def check_interpreted(problem: Problem, config: KernelConfig) -> tuple[float, float] | Rejected:
    """Return the largest error and what is allowed, over small awkward shapes, or why the config is wrong."""
    group = min(problem.shape.group, 2)
    backward = problem.spec.phase == "backward"
    check = _gradient_report if backward else _report
    worst = (0.0, 0.0)
    for seqlen_q, seqlen_k in _LENGTHS:
        shape = Shape(batch=1, seqlen_q=seqlen_q, seqlen_k=seqlen_k, nheads_q=group, nheads_kv=1)
        report = check(dataclasses.replace(problem, shape=shape), config)
        if not report.ok:
            return Rejected(stage="accuracy", reason=f"in the interpreter at {shape}: {report.reason}")
        worst = max(worst, (report.max_error, report.allowed_error))
    return worst


def _report(problem: Problem, config: KernelConfig) -> AccuracyReport:
    """Return how far out and lse are off."""
    spec = dataclasses.replace(problem.spec, lse=True)
    small = Problem(spec=spec, shape=problem.shape)
    q, k, v = random_inputs(small, device="cpu", seed=0)
    extras = random_extras(small, device="cpu", seed=0)
    out, lse = interpret_forward(q, k, v, problem=small, config=config, extras=extras)
    return accuracy_error(out, lse, q, k, v, spec=spec, extras=extras)


def _gradient_report(problem: Problem, config: KernelConfig) -> AccuracyReport:
    """Return how far the gradients are off, that of a bias of numbers among them."""
    spec = dataclasses.replace(problem.spec, dbias=problem.spec.bias not in ("none", "bool"))
    small = Problem(spec=spec, shape=problem.shape)
    q, k, v = random_inputs(small, device="cpu", seed=0)
    extras = random_extras(small, device="cpu", seed=0)
    out, lse = attention_reference(q, k, v, spec=spec.forward(), extras=extras, precision="float64")
    dout = random_output_gradients(small, device="cpu", seed=0)
    dlse = random_lse_gradients(small, device="cpu", seed=0)
    tensors = {"q": q, "k": k, "v": v, "out": out.to(q.dtype), "lse": lse.float(), "do": dout, "dlse": dlse}
    if spec.dbias and extras.bias is not None:
        tensors["dbias"] = torch.empty(bias_sizes(extras.bias))
    gradients = Gradients(**interpret_backward(tensors, problem=small, config=config, extras=extras))
    return gradient_error(gradients, q, k, v, dout, spec=spec, extras=extras, dlse=dlse)
