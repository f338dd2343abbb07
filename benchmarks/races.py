"""Interleaved races of configs of many problems on this machine's GPU, kept as JSON lines."""

from __future__ import annotations

import collections
import contextlib
import dataclasses
import faulthandler
import json
import lzma
import typing
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path

import torch

from flashgen.cli.output import note
from flashgen.codegen import KernelConfig, config_from_dict, render
from flashgen.codegen.constraints import check_config
from flashgen.compile import CompileReport, compile_job, compile_kernel
from flashgen.errors import FlashgenError
from flashgen.heuristics import default_configs
from flashgen.launch import bind_backward, bind_forward
from flashgen.measure import Clock, benchmark
from flashgen.spec import AttentionSpec, Problem
from flashgen.target import GpuTarget, Software
from flashgen.tuning.gpu_cases import Case, make_case
from flashgen.tuning.pool import Pool
from flashgen.tuning.workers import WorkerFailure

_COMPILE_S = 120.0
_HUNG_S = 90
_ROUNDS = 5

Binary = tuple[AttentionSpec, KernelConfig]
Failures = dict[KernelConfig, str]
CallsOf = Callable[[Problem, Sequence[KernelConfig]], tuple[dict[KernelConfig, Callable[[], object]], Failures]]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Race:
    """Configs of one problem, timed beside each other.

    Attributes:
        problem: as text.
        device: the GPU's name.
        software: the versions of Triton and the driver.
        us: the median time of each, in microseconds.
        failures: why the others have none.
    """

    problem: str
    device: str
    software: str
    us: Mapping[KernelConfig, float]
    failures: Mapping[KernelConfig, str]

    def as_line(self) -> str:
        """Return the race as one line of JSON."""
        document = {
            "problem": self.problem,
            "device": self.device,
            "software": self.software,
            "us": [[config.as_dict(), us] for config, us in self.us.items()],
            "failures": [[config.as_dict(), reason] for config, reason in self.failures.items()],
        }
        return json.dumps(document)


def _text(path: Path) -> str:
    return lzma.decompress(path.read_bytes()).decode() if path.suffix == ".xz" else path.read_text()


class Record:
    """The races in a file; the last of two that hold a config counts."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._races: dict[str, list[Race]] = {}
        text = _text(path) if path.exists() else ""
        # A run that was killed may have left half a line.
        self._torn = not text.endswith("\n") and bool(text)
        for line in text.splitlines():
            with contextlib.suppress(json.JSONDecodeError):
                self._remember(_race_of(json.loads(line)))

    def add(self, race: Race) -> None:
        """Remember a race, on disk too."""
        self._remember(race)
        with self._path.open("a") as file:
            file.write("\n" * self._torn + race.as_line() + "\n")
        self._torn = False

    def ratio(self, problem: Problem, config: KernelConfig, winner: KernelConfig) -> float | None:
        """Return the time of a config over that of another, from a race that had both, or None."""
        if config == winner:
            return 1.0
        for race in reversed(self._races.get(str(problem), [])):
            if config in race.us and winner in race.us:
                return race.us[config] / race.us[winner]
        return None

    def tried(self, problem: Problem) -> frozenset[KernelConfig]:
        """Return the configs of a problem that were raced, or failed to."""
        races = self._races.get(str(problem), [])
        return frozenset(config for race in races for config in (*race.us, *race.failures))

    def _remember(self, race: Race) -> None:
        self._races.setdefault(race.problem, []).append(race)


def _race_of(told: dict[str, typing.Any]) -> Race:
    us = {config_from_dict(config): us for config, us in told.pop("us")}
    failures = {config_from_dict(config): reason for config, reason in told.pop("failures")}
    return Race(us=us, failures=failures, **told)


def run_races(
    ready: Iterable[tuple[Problem, Sequence[KernelConfig], Failures]],
    record: Record,
    target: GpuTarget,
    software: Software,
    *,
    clock: Clock,
    calls_of: CallsOf,
    target_ms: float,
) -> None:
    """Race the configs of each problem as it comes, and remember the times.

    Args:
        ready: problems, those of their configs that compiled, and why the others did not.
        record: where times go, one problem after the other.
        target: the GPU.
        software: at hand.
        clock: how one call is timed.
        calls_of: makes the calls.
        target_ms: time to spend on each config, over all rounds.
    """
    for problem, configs, broken in ready:
        faulthandler.dump_traceback_later(_HUNG_S, exit=True)
        calls, failures = calls_of(problem, configs)
        named = {str(index): call for index, call in enumerate(calls.values())}
        timings = benchmark(named, clock=clock, rounds=_ROUNDS, target_ms=target_ms) if named else {}
        faulthandler.cancel_dump_traceback_later()
        record.add(
            Race(
                problem=str(problem),
                device=target.device_name,
                software=f"triton {software.triton}, driver {software.driver}",
                us={config: round(timings[str(index)].median_us, 3) for index, config in enumerate(calls)},
                failures={**broken, **failures},
            )
        )


def compiled_first(
    wanted: Mapping[Problem, Sequence[KernelConfig]], target: GpuTarget, workers: int
) -> Iterator[tuple[Problem, tuple[KernelConfig, ...], Failures]]:
    """Yield each problem as soon as it is compiled, with the configs that have a binary, and why others have none.

    The binaries compile in `workers` processes, ahead of and beside whatever the caller does with a problem.
    """
    needs = {problem: _binaries(problem, configs, target) for problem, configs in wanted.items()}
    binaries = list(dict.fromkeys(binary for needed in needs.values() for binary in needed))
    broken: dict[Binary, str] = {}
    left = {problem: set(needed) for problem, needed in needs.items()}
    ready: collections.deque[Problem] = collections.deque(problem for problem in left if not left[problem])
    note(f"{len(wanted)} problems, {sum(map(len, wanted.values()))} configs, {len(binaries)} binaries to compile")
    with Pool[int](workers, name="compiler") as pool:
        for number, (spec, config) in enumerate(binaries):
            pool.submit(number, compile_job, spec, config, target, timeout_s=_COMPILE_S)
        while ready or pool.pending:
            for finished in pool.wait(0.0 if ready else 1.0):
                binary = binaries[finished.task_id]
                reason = _why_unusable(finished.outcome, target)
                if reason:
                    broken[binary] = reason
                for problem, missing in left.items():
                    if binary in missing:
                        missing.remove(binary)
                        if not missing:
                            ready.append(problem)
            if ready:
                problem = ready.popleft()
                failures = {
                    config: broken[problem.spec, config.kernel()]
                    for config in wanted[problem]
                    if (problem.spec, config.kernel()) in broken
                }
                yield problem, tuple(config for config in wanted[problem] if config not in failures), failures


def _binaries(problem: Problem, configs: Iterable[KernelConfig], target: GpuTarget) -> list[Binary]:
    found: list[Binary] = [(problem.spec, config.kernel()) for config in configs]
    if problem.spec.phase == "backward":
        # What makes the inputs of gradients; a failure of it does not concern the configs.
        forward = Problem(spec=problem.spec.forward(), shape=problem.shape)
        legal = (c for c in default_configs(forward, target) if not check_config(c, forward.spec, target))
        found += [(forward.spec, config) for config in (next(legal),)]
    return list(dict.fromkeys(found))


def _why_unusable(outcome: object, target: GpuTarget) -> str:
    if isinstance(outcome, WorkerFailure):
        return outcome.detail[:200]
    report = typing.cast("CompileReport", getattr(outcome, "value", None))
    smem_bytes = report.resources.smem_bytes
    return f"{smem_bytes} bytes of shared memory of {target.smem_bytes}" if smem_bytes > target.smem_bytes else ""


class GpuCalls:
    """Binds configs to tensors on a GPU, and leaves out what computes something wrong."""

    def __init__(self, device: torch.device, target: GpuTarget) -> None:
        self._device = device
        self._target = target

    def __call__(
        self, problem: Problem, configs: Sequence[KernelConfig]
    ) -> tuple[dict[KernelConfig, Callable[[], object]], Failures]:
        """Return what runs each config, and why others cannot be run."""
        case = make_case(problem, device=self._device, seed=0, whole=False)
        calls: dict[KernelConfig, Callable[[], object]] = {}
        failures: Failures = {}
        for config in configs:
            try:
                call = self._bound(case, config)
                case.poison()
                call()
                report = case.judge()
            except (FlashgenError, RuntimeError) as error:
                failures[config] = f"{type(error).__name__}: {error}".splitlines()[0][:200]
                continue
            if report.ok:
                calls[config] = call
            else:
                failures[config] = f"accuracy: {report.reason}"[:200]
        return calls, failures

    def _bound(self, case: Case, config: KernelConfig) -> Callable[[], object]:
        spec = case.problem.spec
        bind = bind_backward if spec.phase == "backward" else bind_forward
        binary = config.kernel()
        compiled = compile_kernel(render(spec, binary), spec, binary, self._target)
        return bind(case.problem, config, compiled, case.extras, case.tensors)
