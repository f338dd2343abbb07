"""A problem on the GPU: what its kernels read and write, and the right answer, made once for all candidates."""

from __future__ import annotations

import collections.abc
import dataclasses
import functools

import torch
from torch import Tensor

from flashgen.codegen import render
from flashgen.codegen.constraints import check_config
from flashgen.compile import compile_kernel
from flashgen.errors import FlashgenError
from flashgen.heuristics import default_configs
from flashgen.launch import bind_forward, detect_target
from flashgen.measure import (
    POISON,
    AccuracyReport,
    GradientOracle,
    Gradients,
    Oracle,
    attention_reference,
    poisoned_gradients,
    poisoned_outputs,
    random_extras,
    random_inputs,
    random_lse_gradients,
    random_output_gradients,
    sampled_heads,
)
from flashgen.measure.gradients import bias_sizes
from flashgen.spec import Extras, Problem

# (batch entry, head) pairs that a large problem is judged by; of gradients key/value heads, with all of their groups.
_CHECKED_HEADS = 3
_CHECKED_GROUPS = 2


@dataclasses.dataclass(frozen=True, kw_only=True)
class Case:
    """One problem with its tensors.

    Attributes:
        problem: of either phase.
        extras: of its calls.
        tensors: by name, as `bind_forward` or `bind_backward` takes them.
        written: the names of those that kernels fill.
        judge: returns how far off what they hold is; the references are made at its first call.
    """

    problem: Problem
    extras: Extras
    tensors: dict[str, Tensor]
    written: tuple[str, ...]
    judge: collections.abc.Callable[[], AccuracyReport]

    def poison(self) -> None:
        """Fill with NaN what kernels are to fill."""
        for name in self.written:
            self.tensors[name].fill_(POISON)

    def results(self) -> list[Tensor]:
        """Return copies of what kernels have filled."""
        return [self.tensors[name].clone() for name in self.written]


def make_case(problem: Problem, *, device: torch.device, seed: int, whole: bool) -> Case:
    """Return a case of random inputs.

    Args:
        problem: of either phase.
        device: a GPU.
        seed: of the inputs.
        whole: judge every head, and give lse a gradient, too: for small problems. Else a sample of the heads is judged,
            and what gradients need of the forward pass comes from a kernel, which is checked.
    """
    inputs = dict(zip("qkv", random_inputs(problem, device=device, seed=seed), strict=True))
    extras = random_extras(problem, device=device, seed=seed)
    make = _backward_case if problem.spec.phase == "backward" else _forward_case
    return make(problem, inputs, extras, seed, whole)


def _forward_case(problem: Problem, inputs: dict[str, Tensor], extras: Extras, seed: int, whole: bool) -> Case:
    out, lse = poisoned_outputs(problem, device=inputs["q"].device)
    written = {"out": out} | ({"lse": lse} if lse is not None else {})
    oracle = functools.cache(lambda: _forward_oracle(problem, inputs, extras, None if whole else _CHECKED_HEADS))
    return Case(
        problem=problem,
        extras=extras,
        tensors={**inputs, **written},
        written=tuple(written),
        judge=lambda: oracle().judge(out, lse),
    )


def _forward_oracle(problem: Problem, inputs: dict[str, Tensor], extras: Extras, limit: int | None) -> Oracle:
    shape = problem.shape
    heads = None if limit is None else sampled_heads(shape.batch, shape.nheads_q, limit, seed=0)
    return Oracle(inputs["q"], inputs["k"], inputs["v"], spec=problem.spec, extras=extras, heads=heads)


def _backward_case(problem: Problem, inputs: dict[str, Tensor], extras: Extras, seed: int, whole: bool) -> Case:
    q, k, v = inputs.values()
    spec, shape, device = problem.spec, problem.shape, q.device
    dout = random_output_gradients(problem, device=device, seed=seed)
    dlse = random_lse_gradients(problem, device=device, seed=seed) if whole else None
    forward = Problem(spec=spec.forward(), shape=shape)
    out, lse = _exact_forward(forward, inputs, extras) if whole else _launched_forward(forward, inputs, extras)
    written = dict(zip(("dq", "dk", "dv"), poisoned_gradients(problem, device=device), strict=True))
    if spec.dbias and extras.bias is not None:
        written["dbias"] = torch.full(bias_sizes(extras.bias), POISON, device=device)
    heads = None if whole else sampled_heads(shape.batch, shape.nheads_kv, _CHECKED_GROUPS, seed=0)
    oracle = functools.cache(
        lambda: GradientOracle(q, k, v, dout, spec=spec, extras=extras, dlse=dlse, heads=heads),
    )
    return Case(
        problem=problem,
        extras=extras,
        tensors={**inputs, "out": out, "lse": lse, "do": dout, **({} if dlse is None else {"dlse": dlse}), **written},
        written=tuple(written),
        judge=lambda: oracle().judge(Gradients(**written)),
    )


def _exact_forward(problem: Problem, inputs: dict[str, Tensor], extras: Extras) -> tuple[Tensor, Tensor]:
    """Return out and lse of the reference: the errors of gradients are then those of their own kernels."""
    q, k, v = inputs.values()
    out, lse = attention_reference(q, k, v, spec=problem.spec, extras=extras, precision="float64")
    return out.to(q.dtype), lse.float().contiguous()


def _launched_forward(problem: Problem, inputs: dict[str, Tensor], extras: Extras) -> tuple[Tensor, Tensor]:
    """Return out and lse of the first default config that computes them right.

    Raises:
        FlashgenError: if none does.
    """
    spec, device = problem.spec, inputs["q"].device
    target = detect_target(device)
    oracle = _forward_oracle(problem, inputs, extras, _CHECKED_HEADS)
    out, lse = poisoned_outputs(problem, device=device)
    assert lse is not None
    reasons: list[str] = []
    for config in default_configs(problem, target):
        if check_config(config, spec, target):
            continue
        try:
            compiled = compile_kernel(render(spec, config), spec, config, target)
            bind_forward(problem, config, compiled, extras, {**inputs, "out": out, "lse": lse})()
        except FlashgenError as error:
            reasons.append(f"{config}: {error}")
            continue
        report = oracle.judge(out, lse)
        if report.ok:
            return out, lse
        reasons.append(f"{config}: {report.reason}")
    raise FlashgenError(f"gradients need the forward pass, which no default config computes: {'; '.join(reasons)}")
