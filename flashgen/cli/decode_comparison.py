"""flashgen beside other implementations on one decode problem, as a CUDA graph replays them."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import torch

from flashgen.cli.comparison import OURS, Comparison
from flashgen.cli.decoding import DecodeCase
from flashgen.cli.lookup import load_registry, select_all
from flashgen.codegen import KernelConfig
from flashgen.launch import detect_target
from flashgen.measure import (
    AccuracyReport,
    Clock,
    Rotation,
    benchmark,
    host_time_us,
    quick_time,
    rotation_size,
    sampled_heads,
)
from flashgen.measure.peer import first_line
from flashgen.measure.peers import Peer
from flashgen.ops.call import encode_config
from flashgen.ops.cpu import INTERPRETED_AS
from flashgen.ops.warming import run_decode_call
from flashgen.spec import Problem

_ROUNDS = 5
_CHECKED_HEADS = 4


def compare_decoding(
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
    """Return how flashgen and `peers` decode random sequences of one length; as `compare`.

    Everything runs on several copies of the caches in turn, so that no L2 cache holds them; see `GraphClock`.

    Raises:
        FlashgenError: if flashgen cannot run the problem; a peer that cannot is in `absent`.
    """
    target = detect_target(device) if device.type == "cuda" else INTERPRETED_AS
    (selection,) = select_all([problem], target, load_registry(registry), config=config)
    heads = sampled_heads(problem.shape.batch, problem.shape.nheads_q, _CHECKED_HEADS, seed=0)
    first = DecodeCase.of(problem, device)
    cases = first.copies(rotation_size(problem.min_bytes(), device))
    # What is appended is appended by all of them, to the same rows: the answer is the one before it.
    oracle = first.oracle(heads)
    runs = {OURS: tuple(case.bind(selection) for case in cases)}
    absent: dict[str, str] = {}
    for peer in peers:
        made = peer.make_decode([case.call for case in cases])
        if isinstance(made, str):
            absent[peer.name] = made
        else:
            runs[peer.name] = made
    accuracy: dict[str, AccuracyReport] = {}
    calls: dict[str, Rotation] = {}
    for name, of_copies in runs.items():
        accuracy[name] = oracle.judge(of_copies[0]()[0], None)
        reason = "" if accuracy[name].ok else f"wrong result: {accuracy[name].reason}"
        call = Rotation(calls=of_copies)
        if reason or (reason := _refused_capture(name, call, clock)):
            absent[name] = reason
        else:
            calls[name] = call
    return Comparison(
        problem=problem,
        flops=problem.flops(),
        selection=selection,
        timings=benchmark(calls, clock=clock, rounds=_ROUNDS, target_ms=target_ms) if calls else {},
        accuracy=accuracy,
        absent=absent,
        host_us=_host_us(first, calls, config, registry) if host else {},
    )


def _refused_capture(name: str, call: Rotation, clock: Clock) -> str:
    """Return why an implementation cannot be timed; empty if it can."""
    try:
        quick_time(call, clock)
    # A peer is foreign code; what fails of flashgen's own is to be seen.
    except Exception as error:
        if name == OURS:
            raise
        return f"{name} cannot be captured in a CUDA graph: {first_line(error)}"
    return ""


def _host_us(
    case: DecodeCase, calls: Mapping[str, Rotation], config: KernelConfig | None, registry: Path | None
) -> dict[str, float]:
    """Return what one call costs the host, in microseconds; flashgen's is that of its public function."""
    text, path = encode_config(config), "" if registry is None else str(registry)
    called: dict[str, Callable[[], object]] = dict(calls)
    if OURS in calls:
        called[OURS] = lambda: run_decode_call(case.call, config=text, registry=path)
        called["raw launch of the same kernel"] = calls[OURS]
    return {name: host_time_us(call) for name, call in called.items()}
