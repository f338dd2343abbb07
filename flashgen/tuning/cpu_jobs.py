"""What a process without a GPU can say of a config: whether it computes the right thing, in the interpreter."""

from __future__ import annotations

import dataclasses

import torch

from flashgen.codegen import KernelConfig
from flashgen.launch import interpret_backward, interpret_decode, interpret_forward
from flashgen.measure import (
    AccuracyReport,
    CacheOracle,
    Gradients,
    Oracle,
    Rejected,
    accuracy_error,
    attention_reference,
    gradient_error,
    poisoned_outputs,
    random_decode_call,
    random_extras,
    random_inputs,
    random_lse_gradients,
    random_output_gradients,
)
from flashgen.measure.gradients import bias_sizes
from flashgen.spec import Problem, Shape

# About 1 ms a tile step: enough rows and keys for two tiles of most configs, odd in both directions.
_LENGTHS = ((133, 261), (259, 130))
# Of decoding: several sequences of lengths of their own, with fewer rows than a tile has, or more.
_DECODE_LENGTHS = ((1, 261), (19, 130))
_SEQUENCES = 3


def check_interpreted(problem: Problem, config: KernelConfig) -> tuple[float, float] | Rejected:
    """Return the largest error and what is allowed, over small awkward shapes, or why the config is wrong."""
    phase, group = problem.spec.phase, min(problem.shape.group, 2)
    check = {"forward": _report, "backward": _gradient_report, "decode": _decode_report}[phase]
    worst = (0.0, 0.0)
    batch = _SEQUENCES if phase == "decode" else 1
    for seqlen_q, seqlen_k in _DECODE_LENGTHS if phase == "decode" else _LENGTHS:
        shape = Shape(batch=batch, seqlen_q=seqlen_q, seqlen_k=seqlen_k, nheads_q=group, nheads_kv=1)
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


def _decode_report(problem: Problem, config: KernelConfig) -> AccuracyReport:
    """Return how far out and lse are off, or what of the caches is wrong."""
    spec = dataclasses.replace(problem.spec, lse=True)
    small = Problem(spec=spec, shape=problem.shape)
    call = random_decode_call(small, device="cpu", seed=0, ragged=True)
    oracle = Oracle(call.q, call.k, call.v, spec=spec, extras=call.extras)
    caches = CacheOracle(call)
    out, lse = poisoned_outputs(small, device="cpu")
    assert lse is not None
    tensors = {"q": call.q, "k": call.k, "v": call.v, "out": out, "lse": lse}
    interpret_decode(tensors, problem=small, config=config, extras=call.extras)
    report, fault = oracle.judge(out, lse), caches.fault()
    return dataclasses.replace(report, ok=False, reason=fault) if report.ok and fault else report
