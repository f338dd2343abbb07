"""`flashgen bench`."""

from __future__ import annotations

import dataclasses
import typing

import typer

from flashgen.cli import options
from flashgen.cli.configs import parse_config, short_config
from flashgen.cli.exits import FAILED
from flashgen.cli.lookup import selection_document
from flashgen.cli.output import note, print_json, print_table, ratio
from flashgen.cli.problems import resolve_problems, training_steps, words
from flashgen.cli.targets import require_gpu
from flashgen.errors import InputError

if typing.TYPE_CHECKING:
    from flashgen.cli.comparison import Comparison
    from flashgen.measure.peers import Peer

EXAMPLE = "flashgen bench --preset llama3-8b --peers cudnn,flash,flex --host"

Peers = typing.Annotated[
    str | None,
    typer.Option(
        "--peers", metavar="LIST", help="Measured beside: cudnn, flash, efficient, flex, fa3, fa4; default: all."
    ),
]
Milliseconds = typing.Annotated[
    float, typer.Option("--ms", min=1, help="Device time spent on each implementation, in milliseconds.")
]
Host = typing.Annotated[bool, typer.Option("--host", help="Also measure what a call costs the host.")]


def bench(
    model: options.Model = None,
    preset: options.Preset = None,
    shape: options.Shapes = None,
    phase: options.Phase = None,
    seqlen: options.Seqlens = options.DEFAULT_SEQLENS,
    device: options.Device = None,
    registry: options.Registry = None,
    config: options.Config = None,
    peers: Peers = None,
    ms: Milliseconds = 100,
    host: Host = False,
    as_json: options.Json = False,
) -> None:
    """Time flashgen beside other implementations.

    Each is checked first, then all are timed in the same interleaved rounds on a cold L2 cache. Needs a GPU. Of a
    training step (--phase forward,backward), the sum of both phases is shown, too. Decoding is timed as CUDA graphs
    replay it, over caches that no L2 cache holds, and shown in TB/s.
    """
    problems = resolve_problems(model, preset, shape, phase=phase, seqlens=seqlen)
    chosen = parse_config(config, problems)
    gpu = require_gpu(device, "bench")
    import torch

    from flashgen.cli.comparison import OURS, compare, geometric_means
    from flashgen.cli.decode_comparison import compare_decoding
    from flashgen.measure import Clock, CudaClock, GraphClock

    contenders = _peers(peers)
    comparisons = []
    with torch.cuda.device(gpu):
        clocks: dict[bool, Clock] = {}
        for problem in problems:
            decoding = problem.spec.phase == "decode"
            if decoding not in clocks:
                clocks[decoding] = GraphClock(gpu) if decoding else CudaClock(gpu)
            result = (compare_decoding if decoding else compare)(
                problem,
                contenders,
                device=gpu,
                clock=clocks[decoding],
                target_ms=ms,
                host=host,
                config=chosen,
                registry=registry,
            )
            comparisons.append(result)
            note(f"{len(comparisons)}/{len(problems)} {problem}")
            for name, reason in result.absent.items():
                note(f"  {name} not timed: {reason}")
    if as_json:
        problem_documents = [_document(comparison) for comparison in comparisons]
        steps = {problem: dict(sums) for problem, sums in step_sums(comparisons)}
        means = {
            name: {"speed": mean, "problems": count} for name, (mean, count) in geometric_means(comparisons).items()
        }
        print_json(
            {
                "device": str(gpu),
                "problems": problem_documents,
                "geometric_means": means,
                "training_steps_us": steps,
            }
        )
    else:
        show_comparisons(comparisons)
    if any(OURS not in comparison.timings for comparison in comparisons):
        raise typer.Exit(FAILED)


def _peers(text: str | None) -> list[Peer]:
    from flashgen.measure.peers import PEERS

    if text is None:
        return list(PEERS.values())
    unknown = [name for name in words(text) if name not in PEERS]
    if unknown:
        raise InputError(f"unknown peers {', '.join(unknown)}; known: {', '.join(PEERS)}")
    return [PEERS[name] for name in words(text)]


def step_sums(comparisons: typing.Sequence[Comparison]) -> list[tuple[str, list[tuple[str, float]]]]:
    """Return each training step of which both phases were timed: the backward problem's text and us by implementation.

    The forward is the one that writes lse; an implementation counts where it ran both.
    """
    found = {c.problem: c.timings for c in comparisons if c.problem.spec.phase == "backward" or c.problem.spec.lse}
    steps = []
    for forward, backward in training_steps(found):
        first, second = found[forward], found[backward]
        sums = [(name, first[name].median_us + second[name].median_us) for name in first if name in second]
        if sums:
            steps.append((str(backward), sums))
    return steps


def show_comparisons(comparisons: typing.Sequence[Comparison]) -> None:
    """Print a line for each implementation of each problem, then speeds to peers, training steps and host times."""
    _show_implementations(comparisons)
    _show_standings(comparisons)
    _show_steps(comparisons)
    host_rows = [(str(c.problem), name, f"{us:.2f}") for c in comparisons for name, us in c.host_us.items()]
    if host_rows:
        print_table(("problem", "on the host", "us a call"), host_rows, numeric=("us a call",))


def _show_implementations(comparisons: typing.Sequence[Comparison]) -> None:
    from flashgen.cli.comparison import OURS

    rows = []
    in_bytes = any(comparison.problem.spec.phase == "decode" for comparison in comparisons)
    for comparison in comparisons:
        ours = comparison.timings.get(OURS)
        problem = str(comparison.problem)
        for name, timing in comparison.timings.items():
            report = comparison.accuracy[name]
            selection = comparison.selection
            rows.append(
                (
                    problem,
                    name,
                    f"{short_config(selection.config)} ({selection.rung})" if name == OURS else "",
                    f"{timing.median_us:.1f}",
                    f"{comparison.tflops(name):.1f}",
                    *((f"{comparison.tbps(name):.2f}",) if in_bytes else ()),
                    ratio(timing.median_us, ours.median_us if ours else None),
                    f"{100 * timing.spread:.1f}%",
                    f"{report.max_error:.2g} of {report.allowed_error:.2g}",
                )
            )
    numeric = ("us", "TFLOP/s", *(("TB/s",) if in_bytes else ()), "of flashgen's time", "spread")
    print_table(("problem", "implementation", "kernel", *numeric, "error of allowed"), rows, numeric=numeric)


def _show_standings(comparisons: typing.Sequence[Comparison]) -> None:
    from flashgen.cli.comparison import OURS, geometric_means

    rows = [
        (
            str(comparison.problem),
            comparison.rate(OURS),
            best,
            comparison.rate(best),
            f"{comparison.speed_to(best):.2f}x",
        )
        for comparison in comparisons
        if (best := comparison.best_peer) is not None and OURS in comparison.timings
    ]
    if not rows:
        return
    numeric = ("flashgen", "its rate", "speed to it")
    columns = ("problem", "flashgen", "fastest peer", "its rate", "speed to it")
    print_table(columns, rows, numeric=numeric)
    means = [(name, f"{mean:.3f}x", str(count)) for name, (mean, count) in geometric_means(comparisons).items()]
    print_table(("peer", "geometric mean of the speed to it", "problems"), means, numeric=("problems",))


def _show_steps(comparisons: typing.Sequence[Comparison]) -> None:
    from flashgen.cli.comparison import OURS

    step_rows = [
        (problem, name, f"{us:.1f}", ratio(us, dict(sums).get(OURS)))
        for problem, sums in step_sums(comparisons)
        for name, us in sums
    ]
    if step_rows:
        columns = ("training step", "implementation", "us", "of flashgen's time")
        print_table(columns, step_rows, numeric=("us", "of flashgen's time"))


def _document(comparison: Comparison) -> dict[str, object]:
    best = comparison.best_peer
    return {
        "problem": str(comparison.problem),
        "selection": selection_document(comparison.selection),
        "timings": {
            name: {
                **dataclasses.asdict(timing),
                "tflops": comparison.tflops(name),
                "tbps": comparison.tbps(name),
            }
            for name, timing in comparison.timings.items()
        },
        "accuracy": {
            name: {"ok": report.ok, "max_error": str(report.max_error), "allowed_error": report.allowed_error}
            for name, report in comparison.accuracy.items()
        },
        "fastest_peer": best,
        "speed_to_fastest_peer": None if best is None else comparison.speed_to(best),
        "absent": comparison.absent,
        "host_us": comparison.host_us,
    }
