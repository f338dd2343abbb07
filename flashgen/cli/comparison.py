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
from flashgen.errors import InputError
from flashgen.launch import Operands, allocate_outputs, bind_forward, detect_target
from flashgen.measure import (
    AccuracyReport,
    Clock,
    Oracle,
    Timing,
    benchmark,
    count_visible,
    host_time_us,
    random_extras,
    random_inputs,
    sampled_heads,
)
from flashgen.measure.peers import Peer
from flashgen.ops import attention
from flashgen.ops.call import Options, Tensors, decode_config, encode_config
from flashgen.ops.cpu import INTERPRETED_AS
from flashgen.ops.runtime import choose, operands_of, prepare
from flashgen.ops.torch_op import forward
from flashgen.ops.warming import run_problem
from flashgen.spec import Extras, Problem

OURS = "flashgen"

_ROUNDS = 5
_CHECKED_HEADS = 4

Run = Callable[[], Tensor]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Comparison:
    """What one problem gave.

    Attributes:
        problem: what was computed.
        flops: useful multiply-adds, counted twice: of the pairs that the mask shows.
        selection: the kernel that flashgen ran.
        timings: device time by name, flashgen's under `OURS`; only of those that computed the right thing.
        accuracy: how far each output was off, by name.
        absent: why an implementation was not timed, by name.
        host_us: what a call costs the host by name, and beside it the parts of flashgen's own; empty if not asked for.
    """

    problem: Problem
    flops: int
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
    q, k, v = random_inputs(problem, device=device, seed=0)
    extras = random_extras(problem, device=device, seed=0)
    text, path = encode_config(config), "" if registry is None else str(registry)
    options = Options.of(problem, extras, config=text, registry=path)
    target = detect_target(device) if device.type == "cuda" else INTERPRETED_AS
    operands = operands_of(q, k, v, problem, options.layout) if device.type == "cuda" else None
    selection = choose(problem, target, options, operands)
    calls: dict[str, Run] = {OURS: lambda: run_problem(q, k, v, problem, extras, config=text, registry=path)[0]}
    absent: dict[str, str] = {}
    for peer in peers:
        run = peer.make(q, k, v, problem, extras)
        if isinstance(run, str):
            absent[peer.name] = run
        else:
            calls[peer.name] = run
    accuracy = _judge(problem, extras, calls, q, k, v)
    for name, report in accuracy.items():
        if not report.ok:
            absent[name] = f"wrong result: {report.reason}"
            del calls[name]
    return Comparison(
        problem=problem,
        flops=_useful_flops(problem, extras),
        selection=selection,
        timings=benchmark(calls, clock=clock, rounds=_ROUNDS, target_ms=target_ms) if calls else {},
        accuracy=accuracy,
        absent=absent,
        host_us=_host_costs(selection, calls, q, k, v, options) if host else {},
    )


def _useful_flops(problem: Problem, extras: Extras) -> int:
    """Return the flops over the pairs that the mask shows; where its data decide, those are counted."""
    spec = problem.spec
    if spec.mask.by_formula:
        return problem.flops()
    return problem.flops_of(count_visible(spec, problem.shape, extras))


def _judge(
    problem: Problem, extras: Extras, calls: dict[str, Run], q: Tensor, k: Tensor, v: Tensor
) -> dict[str, AccuracyReport]:
    heads = sampled_heads(problem.shape.batch, problem.shape.nheads_q, _CHECKED_HEADS, seed=0)
    oracle = Oracle(q, k, v, spec=problem.spec, extras=extras, heads=heads)
    return {name: oracle.judge(run(), None) for name, run in calls.items()}


def _host_costs(
    selection: Selection, calls: dict[str, Run], q: Tensor, k: Tensor, v: Tensor, options: Options
) -> dict[str, float]:
    """Return what one call costs the host, in microseconds, and what of flashgen's goes where.

    Raises:
        InputError: for a problem that takes more than Q, K, V and a mask.
    """
    spec = selection.problem.spec
    if spec.features or spec.score_mod or spec.mask.capture_count:
        raise InputError(f"host time is measured of Q, K, V and a mask alone, not of {spec}")
    problem = dataclasses.replace(selection.problem, spec=dataclasses.replace(spec, lse=False))
    spec, extras = problem.spec, Extras(softmax_scale=problem.spec.default_scale)
    options = options._replace(softmax_scale=None, return_lse=False)
    tensors = {"q": q, "k": k, "v": v, "out": allocate_outputs(q, spec)[0]}
    compiled = compile_kernel(render(spec, selection.config), spec, selection.config, selection.target)
    raw = bind_forward(problem, selection.config, compiled, extras, tensors)
    side = Tensors()
    runner = prepare(q, k, v, side, options)
    bound_us = host_time_us(lambda: runner(q, k, v, side))
    body_us = host_time_us(lambda: forward(q, k, v, side, options))
    operands = Operands.of(tensors)
    config, registry = decode_config(options.config), options.registry or None
    calls = {**calls, OURS: lambda: attention(q, k, v, mask=spec.mask, config=config, registry=registry)}
    return {
        **{name: host_time_us(call) for name, call in calls.items()},
        "raw launch of the same kernel": host_time_us(raw),
        "finding the choice again": max(0.0, body_us - bound_us),
        "choosing a kernel": host_time_us(lambda: choose(problem, selection.target, options, operands)),
    }
