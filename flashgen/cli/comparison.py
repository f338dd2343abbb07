"""flashgen beside other implementations on one problem: all checked, then timed in the same interleaved rounds."""

from __future__ import annotations

import dataclasses
import statistics
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from torch import Tensor

from flashgen.cli.gradients import GradientCase
from flashgen.codegen import KernelConfig, render
from flashgen.compile import compile_kernel
from flashgen.dispatch import Selection
from flashgen.launch import Operands, allocate_outputs, bind_forward, detect_target
from flashgen.measure import (
    AccuracyReport,
    Clock,
    Gradients,
    Oracle,
    Timing,
    benchmark,
    count_visible,
    floor_us,
    host_time_us,
    random_extras,
    random_inputs,
    sampled_heads,
    tbps,
)
from flashgen.measure.autograd_calls import Run
from flashgen.measure.peers import Peer
from flashgen.ops import attention
from flashgen.ops.call import NO_TENSORS, Options, decode_config, encode_config
from flashgen.ops.cpu import INTERPRETED_AS
from flashgen.ops.runtime import choose, operands_of, prepare
from flashgen.ops.torch_op import forward
from flashgen.ops.warming import run_problem
from flashgen.spec import Extras, Problem

OURS = "flashgen"
BEST = "the fastest of each"

_ROUNDS = 5
_CHECKED_HEADS = 4
_CHECKED_KV_HEADS = 2

Judge = Callable[[tuple[Tensor, ...]], AccuracyReport]


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
        host_us: what a call costs the host by name; of Q, K, V and a mask, flashgen's is `flashgen.attention`, with its
            parts beside it, of decoding `flashgen.attention_with_kvcache`. Empty if not asked for.
    """

    problem: Problem
    flops: int
    selection: Selection
    timings: dict[str, Timing]
    accuracy: dict[str, AccuracyReport]
    absent: dict[str, str]
    host_us: dict[str, float]

    def tflops(self, name: str) -> float:
        """Return the rate of an implementation that was timed, in useful TFLOP/s."""
        return self.flops / self.timings[name].median_us / 1e6

    def tbps(self, name: str) -> float:
        """Return the TB/s of an implementation that was timed, each input and output counted once."""
        return tbps(self.problem, self.timings[name].median_us)

    def rate(self, name: str) -> str:
        """Return the rate of an implementation that was timed, in TFLOP/s or, of decoding that bytes bound, in TB/s."""
        in_bytes = (
            self.problem.spec.phase == "decode" and floor_us(self.problem, self.selection.target).bound == "memory"
        )
        return f"{self.tbps(name):.2f} TB/s" if in_bytes else f"{self.tflops(name):.1f} TFLOP/s"

    def speed_to(self, name: str) -> float | None:
        """Return a peer's time over flashgen's, above 1 where flashgen is faster; None if one was not timed."""
        if OURS not in self.timings or name not in self.timings:
            return None
        return self.timings[name].median_us / self.timings[OURS].median_us

    @property
    def best_peer(self) -> str | None:
        """The fastest other implementation; None if none was timed."""
        peers = [name for name in self.timings if name != OURS]
        return min(peers, key=lambda name: self.timings[name].median_us, default=None)


def geometric_means(comparisons: Sequence[Comparison]) -> dict[str, tuple[float, int]]:
    """Return flashgen's speed to each peer, and how many problems it is the geometric mean of.

    The mean under `BEST` is to the fastest peer of each problem.
    """
    speeds: dict[str, list[float]] = {}
    for comparison in comparisons:
        found = {name: comparison.speed_to(name) for name in comparison.timings if name != OURS}
        if comparison.best_peer is not None:
            found[BEST] = comparison.speed_to(comparison.best_peer)
        for name, speed in found.items():
            if speed is not None:
                speeds.setdefault(name, []).append(speed)
    names = sorted(speeds, key=lambda name: name == BEST)
    return {name: (statistics.geometric_mean(speeds[name]), len(speeds[name])) for name in names}


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
    backward = problem.spec.phase == "backward"
    ours, judge = _gradients(selection, q, k, v, extras) if backward else _forward(problem, q, k, v, extras, options)
    calls = {OURS: ours}
    absent: dict[str, str] = {}
    for peer in peers:
        run = peer.make(q, k, v, problem, extras)
        if isinstance(run, str):
            absent[peer.name] = run
        else:
            calls[peer.name] = run
    accuracy = {name: judge(run()) for name, run in calls.items()}
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
        host_us=_host_us(selection, calls, q, k, v, options) if host else {},
    )


def _useful_flops(problem: Problem, extras: Extras) -> int:
    """Return the flops over the pairs that the mask shows; where its data decide, those are counted."""
    spec = problem.spec
    if spec.mask.by_formula:
        return problem.flops()
    return problem.flops_of(count_visible(spec, problem.shape, extras))


def _forward(problem: Problem, q: Tensor, k: Tensor, v: Tensor, extras: Extras, options: Options) -> tuple[Run, Judge]:
    """Return flashgen's call, and what judges any call's output."""
    heads = sampled_heads(problem.shape.batch, problem.shape.nheads_q, _CHECKED_HEADS, seed=0)
    oracle = Oracle(q, k, v, spec=problem.spec, extras=extras, heads=heads)

    def run() -> tuple[Tensor, ...]:
        return run_problem(q, k, v, problem, extras, config=options.config, registry=options.registry)[:1]

    return run, lambda outputs: oracle.judge(outputs[0], None)


def _gradients(selection: Selection, q: Tensor, k: Tensor, v: Tensor, extras: Extras) -> tuple[Run, Judge]:
    """Return flashgen's backward pass alone, and what judges any call's gradients."""
    problem = selection.problem
    case = GradientCase.of(problem, q, k, v, extras, lse_gradient=False)
    launch, filled = case.bind(selection)
    oracle = case.oracle(sampled_heads(problem.shape.batch, problem.shape.nheads_kv, _CHECKED_KV_HEADS, seed=0))

    def run() -> tuple[Tensor, ...]:
        launch()
        return filled.dq, filled.dk, filled.dv

    def judge(gradients: tuple[Tensor, ...]) -> AccuracyReport:
        dq, dk, dv = gradients
        # No peer computes dbias: where there is one, it is flashgen's.
        return oracle.judge(Gradients(dq=dq, dk=dk, dv=dv, dbias=filled.dbias))

    return run, judge


def _host_us(
    selection: Selection, calls: dict[str, Run], q: Tensor, k: Tensor, v: Tensor, options: Options
) -> dict[str, float]:
    spec = selection.problem.spec
    if spec.phase == "backward" or spec.features or spec.score_mod or spec.mask.capture_count:
        return {name: host_time_us(call) for name, call in calls.items()}
    return _host_costs(selection, calls, q, k, v, options)


def _host_costs(
    selection: Selection, calls: dict[str, Run], q: Tensor, k: Tensor, v: Tensor, options: Options
) -> dict[str, float]:
    """Return what one call of Q, K, V and a mask costs the host, in microseconds, and what of flashgen's goes where."""
    problem = dataclasses.replace(selection.problem, spec=dataclasses.replace(selection.problem.spec, lse=False))
    spec, extras = problem.spec, Extras(softmax_scale=problem.spec.default_scale)
    options = options._replace(softmax_scale=None, return_lse=False)
    tensors = {"q": q, "k": k, "v": v, "out": allocate_outputs(q, spec)[0]}
    compiled = compile_kernel(render(spec, selection.config), spec, selection.config, selection.target)
    raw = bind_forward(problem, selection.config, compiled, extras, tensors)
    runner = prepare(q, k, v, NO_TENSORS, options)
    bound_us = host_time_us(lambda: runner(q, k, v, NO_TENSORS))
    body_us = host_time_us(lambda: forward(q, k, v, NO_TENSORS, options))
    operands = Operands.of(tensors)
    config, registry = decode_config(options.config), options.registry or None
    called: dict[str, Callable[[], object]] = dict(calls)
    called[OURS] = lambda: attention(q, k, v, mask=spec.mask, config=config, registry=registry)
    return {
        **{name: host_time_us(call) for name, call in called.items()},
        "raw launch of the same kernel": host_time_us(raw),
        "finding the choice again": max(0.0, body_us - bound_us),
        "choosing a kernel": host_time_us(lambda: choose(problem, selection.target, options, operands)),
    }
