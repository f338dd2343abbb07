"""What the measuring process does on its GPU: check a candidate, time it, race the best.

These functions run in a worker that is killed when a kernel hangs. Inputs and references are made once a problem.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import math
import os
import sys
import typing

import torch

from flashgen.codegen import KernelConfig, TritonBackwardConfig, render
from flashgen.compile import CompiledKernel, compile_kernel
from flashgen.errors import FlashgenError
from flashgen.launch import (
    bind_backward,
    bind_decode,
    bind_forward,
    counters_astray,
    detect_target,
    reset_tile_counters,
)
from flashgen.measure import (
    AccuracyReport,
    Clock,
    CudaClock,
    Measurement,
    Outcome,
    Race,
    Rejected,
    benchmark,
    quick_time,
    run_race,
)
from flashgen.measure.graph_clock import GraphClock, Rotation
from flashgen.measure.peers import Peer, default_baselines
from flashgen.spec import AttentionSpec, Problem
from flashgen.target import GpuTarget
from flashgen.tuning.awkward import awkward_for
from flashgen.tuning.full_disk import says_disk_is_full
from flashgen.tuning.gpu_cases import Case, make_case
from flashgen.tuning.variants import confirmed_variant

_FIRST_LAUNCHES = 3
_RUNG_ROUNDS = 2
_RUNG_MS = 8.0
# A candidate this far behind the best is not timed any further.
_HOPELESS = 1.5
_FINAL_ROUNDS = 10


def start(device: str) -> GpuTarget:
    """Wake the GPU and return its target."""
    torch.cuda.set_device(device)
    torch.zeros(1, device=device)
    return detect_target(_device())


def stand_by() -> None:
    """Do nothing, in a process that has imported all that the other jobs need: most of what a new one takes.

    The GPU is left alone: a process that waits must not hold its memory.
    """


def evaluate(problem: Problem, config: KernelConfig, best_us: float | None) -> Outcome:
    """Return the timing of a config that computes the right thing, or why it was rejected.

    First the numerics, at awkward shapes and at the problem's own, on outputs full of NaN and twice for equal bits;
    then a few launches, and more of them unless `best_us` is far ahead.
    """
    try:
        with _ending_if_the_context_is_lost():
            outcome: Outcome | None = None
            with contextlib.suppress(torch.OutOfMemoryError):
                outcome = _checked_and_timed(problem, config, best_us)
            if outcome is None:
                # What is kept of an earlier problem may be what fills the GPU.
                forget_cases()
                outcome = _checked_and_timed(problem, config, best_us)
            if isinstance(outcome, Rejected):
                # What was wrong may have left it so that the next one takes no tiles.
                reset_tile_counters()
            return outcome
    except torch.OutOfMemoryError as error:
        forget_cases()
        return Rejected(stage="run", reason=f"out of device memory: {_first_line(error)}")
    except (FlashgenError, RuntimeError) as error:
        if says_disk_is_full(str(error)):
            raise
        return Rejected(stage="run", reason=f"{type(error).__name__}: {_first_line(error)}")


def _checked_and_timed(problem: Problem, config: KernelConfig, best_us: float | None) -> Outcome:
    wrong = check_awkward(problem, config)
    if wrong is not None:
        return wrong
    report = _check_own_shape(problem, config)
    if isinstance(report, Rejected):
        return report
    call, clock = _timed(_own_case(problem), config), _clock_of(problem)
    timing = quick_time(call, clock, _FIRST_LAUNCHES)
    if best_us is None or timing.median_us < _HOPELESS * best_us:
        timing = benchmark({"": call}, clock=clock, rounds=_RUNG_ROUNDS, target_ms=_RUNG_MS)[""]
    # The last of many launches: some faults take more than one to show.
    last = _judged(_own_case(problem))
    if not last.ok:
        return Rejected(stage="accuracy", reason=f"at {problem.shape}, after the timing: {last.reason}")
    return Measurement(timing=timing, max_error=report[0], allowed_error=report[1])


def check_awkward(problem: Problem, config: KernelConfig) -> Rejected | None:
    """Return why a config computes something wrong at shapes that break careless kernels, or None."""
    for shape in awkward_for(problem, config):
        case = _small_case(dataclasses.replace(problem, shape=shape))
        case.poison()
        _bound(case, config)()
        report = _judged(case)
        if not report.ok:
            return Rejected(stage="accuracy", reason=f"at {shape}: {report.reason}")
    return None


def confirm(problem: Problem, config: KernelConfig) -> Rejected | None:
    """Return why the variant of a config that writes more is wrong, or None.

    It is other code, which the registry's key covers: a forward pass that also writes lse, gradients of a bias, pages
    and appended keys.
    """
    variant = confirmed_variant(problem.spec)
    if variant is None:
        return None
    with _ending_if_the_context_is_lost():
        rejected = check_awkward(dataclasses.replace(problem, spec=variant), config)
        if rejected is not None:
            reset_tile_counters()
        return rejected


def race(
    problem: Problem, configs: typing.Sequence[KernelConfig], target_ms: float, seed: int, baselines: bool
) -> Race:
    """Return the race of finalists, by their places in `configs`, beside the baselines if wanted, by their names."""
    with _ending_if_the_context_is_lost():
        case = _own_case(problem)
        finalists = {str(index): _timed(case, config) for index, config in enumerate(configs)}
        beside: dict[str, typing.Callable[[], object]] = {}
        for peer in default_baselines(_device()) if baselines else ():
            run = _peer_run(peer, case)
            if not isinstance(run, str):
                beside[peer.name] = run
        return run_race(
            finalists, beside, clock=_clock_of(problem), rounds=_FINAL_ROUNDS, target_ms=target_ms, seed=seed
        )


def _peer_run(peer: Peer, case: Case) -> typing.Callable[[], object] | str:
    if not case.calls:
        return peer.make(case.tensors["q"], case.tensors["k"], case.tensors["v"], case.problem, case.extras)
    runs = peer.make_decode(case.calls)
    return runs if isinstance(runs, str) else Rotation(calls=runs)


def _check_own_shape(problem: Problem, config: KernelConfig) -> tuple[float, float] | Rejected:
    """Return the largest error and what is allowed, or why a config is wrong: in each of two runs.

    A sample of the heads is judged; that all are written, and the same bits twice, is checked of all.
    """
    case = _own_case(problem)
    run = _bound(case, config)
    first: list[torch.Tensor] = []
    for _ in range(2):
        case.poison()
        run()
        report = _judged(case)
        wrong = report.reason or case.hole()
        if not wrong and first and not all(map(torch.equal, first, case.results())):
            wrong = "two runs differ in their bits"
        if wrong:
            return Rejected(stage="accuracy", reason=f"at {problem.shape}: {wrong}")
        first = case.results() if _has_one_order(config) else []
    return report.max_error, report.allowed_error


def _judged(case: Case) -> AccuracyReport:
    """Return what a launch did: nothing is right that wrote where nothing is its own, or misleads the next launch."""
    stray = case.stray()
    if not stray:
        report = case.judge()
        if case.problem.spec.append and not report.ok:
            # Rows that were written beside those appended to stay in the caches.
            forget_cases()
        count = counters_astray() if report.ok else 0
        reason = f"counters by which programs learn of each other are not at zero after the launch: {count}"
        return dataclasses.replace(report, ok=False, reason=reason) if count else report
    # What lies beside it may be damaged as well, and the next config is not to blame.
    forget_cases()
    return AccuracyReport(max_error=math.inf, allowed_error=0.0, ok=False, reason=stray)


def _has_one_order(config: KernelConfig) -> bool:
    """Return whether a config adds everything up in one order."""
    return not (isinstance(config, TritonBackwardConfig) and config.dq == "atomic")


def _bound(case: Case, config: KernelConfig) -> typing.Callable[[], None]:
    bind = {"forward": bind_forward, "backward": bind_backward, "decode": bind_decode}[case.problem.spec.phase]
    return bind(case.problem, config, _compiled(case.problem.spec, config), case.extras, case.tensors)


def _timed(case: Case, config: KernelConfig) -> typing.Callable[[], object]:
    """Return what is timed: of decoding, calls in turn whose caches are not found in the L2 cache."""
    turns = tuple(_bound(turn, config) for turn in case.in_turn())
    return turns[0] if len(turns) == 1 else Rotation(calls=turns)


@functools.lru_cache(maxsize=1)
def _own_case(problem: Problem) -> Case:
    return make_case(problem, device=_device(), seed=0, whole=False)


@functools.lru_cache(maxsize=256)
def _small_case(problem: Problem) -> Case:
    # The seed picks how a bias is broadcast: each way meets some of the shapes.
    seed = 1 + (problem.shape.seqlen_q + problem.shape.seqlen_k) % 3
    return make_case(problem, device=_device(), seed=seed, whole=True)


def forget_cases() -> None:
    """Give back the memory of all cases; they are made again where they are needed."""
    _own_case.cache_clear()
    _small_case.cache_clear()
    if torch.cuda.is_initialized():
        torch.cuda.empty_cache()


@functools.lru_cache(maxsize=512)
def _compiled(spec: AttentionSpec, config: KernelConfig) -> CompiledKernel:
    # The compile workers have been here: this reads Triton's disk cache.
    return compile_kernel(render(spec, config), spec, config, detect_target(_device()))


def _clock_of(problem: Problem) -> Clock:
    """Return the clock of a problem's calls: those of decoding are too short for anything but a graph of many.

    That one is made anew each time: it keeps what it has timed. The graphs of those before it are gone, and without
    their counters a search runs out of such as cost a replay nothing.
    """
    if problem.spec.phase != "decode":
        return _clock()
    reset_tile_counters()
    return GraphClock(_device())


@functools.lru_cache(maxsize=1)
def _clock() -> CudaClock:
    return CudaClock(_device())


def _device() -> torch.device:
    return torch.device("cuda", torch.cuda.current_device())


@contextlib.contextmanager
def _ending_if_the_context_is_lost() -> typing.Iterator[None]:
    """End this process if the block's error took the GPU context with it: nothing after it could be trusted."""
    try:
        yield
    except Exception as error:
        if _context_is_lost():
            sys.stderr.write(f"the GPU context is lost: {error}\n")
            sys.stderr.flush()
            os._exit(1)
        raise


def _context_is_lost() -> bool:
    try:
        torch.cuda.synchronize()
    except RuntimeError:
        return True
    return False


def _first_line(error: BaseException) -> str:
    return next(iter(str(error).splitlines()), repr(error))[:300]
