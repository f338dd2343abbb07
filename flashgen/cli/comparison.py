"""flashgen beside other implementations on one problem: all checked, then timed in the same interleaved rounds."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from torch import Tensor

from flashgen.codegen import KernelConfig, render
from flashgen.compile import compile_kernel
from flashgen.dispatch import Selection
from flashgen.launch import Operands, bind_forward
from flashgen.measure import (
    AccuracyReport,
    Clock,
    Oracle,
    Timing,
    benchmark,
    host_time_us,
    random_inputs,
    sampled_heads,
    take_heads,
)
from flashgen.measure.peers import Peer
from flashgen.ops import attention, explain
from flashgen.ops.runtime import Options, choose, prepare
from flashgen.ops.torch_op import encode_config, forward
from flashgen.spec import Problem

OURS = "flashgen"

_ROUNDS = 5
_CHECKED_HEADS = 4

Run = Callable[[], Tensor]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Comparison:
    """What one problem gave.

    Attributes:
        problem: what was computed.
        selection: the kernel that flashgen ran.
        timings: device time by name, flashgen's under `OURS`; only of those that computed the right thing.
        accuracy: how far each output was off, by name.
        absent: why an implementation was not timed, by name.
        host_us: what a call costs the host by name, and beside it the parts of flashgen's own; empty if not asked for.
    """

    problem: Problem
    selection: Selection
    timings: dict[str, Timing]
    accuracy: dict[str, AccuracyReport]
    absent: dict[str, str]
    host_us: dict[str, float]


def compare(
    problem: Problem,
    peers: Sequence[Peer],
    *,
    device: torch.device,
    clock: Clock,
    target_ms: float,
    host: bool = False,
    config: KernelConfig | None = None,
    registry: Path | None = None,
) -> Comparison:
    """Return how flashgen and `peers` do on random inputs.

    Args:
        target_ms: time to spend on each.
        host: also measure what calls cost the host.
        config: what flashgen runs; by default what it selects.
        registry: where it looks first.

    Raises:
        FlashgenError: if flashgen cannot run the problem; a peer that cannot is in `absent`.
    """
    mask = problem.spec.mask
    q, k, v = random_inputs(problem, device=device, seed=0)
    selection = explain(q, k, v, mask=mask, config=config, registry=registry)
    calls: dict[str, Run] = {OURS: lambda: attention(q, k, v, mask=mask, config=config, registry=registry)}
    absent: dict[str, str] = {}
    for peer in peers:
        run = peer.make(q, k, v, problem)
        if isinstance(run, str):
            absent[peer.name] = run
        else:
            calls[peer.name] = run
    accuracy = _judge(problem, calls, q, k, v)
    for name, report in accuracy.items():
        if not report.ok:
            absent[name] = f"wrong result: {report.reason}"
            del calls[name]
    return Comparison(
        problem=problem,
        selection=selection,
        timings=benchmark(calls, clock=clock, rounds=_ROUNDS, target_ms=target_ms) if calls else {},
        accuracy=accuracy,
        absent=absent,
        host_us=_host_costs(selection, calls, q, k, v, config, registry) if host else {},
    )


def _judge(problem: Problem, calls: dict[str, Run], q: Tensor, k: Tensor, v: Tensor) -> dict[str, AccuracyReport]:
    pairs = sampled_heads(problem.shape.batch, problem.shape.nheads_q, _CHECKED_HEADS, seed=0)
    oracle: Oracle | None = None
    reports = {}
    for name, run in calls.items():
        sample = take_heads(pairs, q, k, v, run(), None)
        oracle = oracle or Oracle(
            sample.q, sample.k, sample.v, mask=problem.spec.mask, softmax_scale=problem.spec.default_scale
        )
        reports[name] = oracle.judge(sample.out, None)
    return reports


def _host_costs(
    selection: Selection,
    calls: dict[str, Run],
    q: Tensor,
    k: Tensor,
    v: Tensor,
    config: KernelConfig | None,
    registry: Path | None,
) -> dict[str, float]:
    """Return what one call costs the host, in microseconds, and what of flashgen's goes where."""
    problem = dataclasses.replace(selection.problem, spec=dataclasses.replace(selection.problem.spec, lse=False))
    spec, scale = problem.spec, problem.spec.default_scale
    path = "" if registry is None else str(registry)
    options = Options(
        mask=spec.mask,
        softmax_scale=scale,
        layout="bhsd",
        return_lse=False,
        config=config,
        registry=path or None,
    )
    tensors = {"q": q, "k": k, "v": v, "out": q.new_empty((*q.shape[:3], spec.head_dim_v))}
    compiled = compile_kernel(render(spec, selection.config), spec, selection.config, selection.target)
    raw = bind_forward(problem, selection.config, compiled, scale, tensors)
    runner = prepare(q, k, v, options)
    text = encode_config(config)
    bound_us = host_time_us(lambda: runner(q, k, v))
    body_us = host_time_us(lambda: forward(q, k, v, str(spec.mask), scale, "bhsd", False, text, path))
    operands = Operands.of(tensors, problem)
    return {
        **{name: host_time_us(call) for name, call in calls.items()},
        "raw launch of the same kernel": host_time_us(raw),
        "finding the choice again": max(0.0, body_us - bound_us),
        "choosing a kernel": host_time_us(lambda: choose(problem, selection.target, options, operands)),
    }
