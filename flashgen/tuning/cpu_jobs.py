"""What a process without a GPU can say of a config: whether it computes the right thing, in the interpreter."""

from __future__ import annotations

import dataclasses

from flashgen.codegen import KernelConfig
from flashgen.launch import interpret_forward
from flashgen.measure import Rejected, accuracy_error, random_extras, random_inputs
from flashgen.spec import Problem, Shape

# About 1 ms a tile step: enough rows and keys for two tiles of most configs, odd in both directions.
_LENGTHS = ((133, 261), (259, 130))


def check_interpreted(problem: Problem, config: KernelConfig) -> tuple[float, float] | Rejected:
    """Return the largest error and what is allowed, over small awkward shapes, or why the config is wrong."""
    group = min(problem.shape.group, 2)
    spec = dataclasses.replace(problem.spec, lse=True)
    worst = (0.0, 0.0)
    for seqlen_q, seqlen_k in _LENGTHS:
        shape = Shape(batch=1, seqlen_q=seqlen_q, seqlen_k=seqlen_k, nheads_q=group, nheads_kv=1)
        small = Problem(spec=spec, shape=shape)
        q, k, v = random_inputs(small, device="cpu", seed=0)
        extras = random_extras(small, device="cpu", seed=0)
        out, lse = interpret_forward(q, k, v, problem=small, config=config, extras=extras)
        report = accuracy_error(out, lse, q, k, v, spec=spec, extras=extras)
        if not report.ok:
            return Rejected(stage="accuracy", reason=f"in the interpreter at {shape}: {report.reason}")
        worst = max(worst, (report.max_error, report.allowed_error))
    return worst
