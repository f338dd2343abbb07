"""Record the time of every legal config of problems on this machine's GPU, for `replay.py`.

    python benchmarks/search/record.py --shape "b=4 h=8 s=4096 d=256 causal bf16" --out benchmarks/search/tables

Problems of one call share their spec, and so their kernels: each binary is compiled once, checked and timed at every
shape. What has been measured is kept in a journal beside the tables: the same command goes on after an interruption,
and counts as failed what was being launched when a process died or hung.
"""

from __future__ import annotations

import argparse
import collections
import dataclasses
import faulthandler
import itertools
import json
import os
import time
import typing
from collections.abc import Iterator, Sequence
from pathlib import Path

import torch
from table import Row, Table

from flashgen.codegen import KernelConfig, TritonBackwardConfig, config_from_dict, render, templates_of
from flashgen.codegen.constraints import shape_refusal
from flashgen.compile import CompiledKernel, CompileReport, compile_job, compile_kernel
from flashgen.errors import FlashgenError
from flashgen.launch import bind_backward, bind_forward, detect_target, software_versions
from flashgen.measure import CudaClock, benchmark, quick_time
from flashgen.search_space import load_space
from flashgen.spec import Problem, parse_problem
from flashgen.tuning.evaluators import failure_reason
from flashgen.tuning.gpu_cases import Case, make_case
from flashgen.tuning.pool import Finished, Pool
from flashgen.tuning.workers import WorkerFailure

_HUNG_S = 40
_COMPILE_S = 120.0
_LAUNCHES = 3
# So many of the fastest are timed again, interleaved: the optimum is that of careful timings.
_REFINED = 128
_REFINED_ROUNDS, _REFINED_MS = 5, 5.0


def main() -> None:
    """Record tables; see the module."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--shape", action="append", required=True, help="a problem; may be repeated, for one spec")
    parser.add_argument("--template", action="append", help="of these templates only; all of the phase by default")
    parser.add_argument("--out", type=Path, required=True, help="folder of the tables")
    parser.add_argument("--workers", type=int, default=max(1, (os.cpu_count() or 2) - 1), help="compiling processes")
    arguments = parser.parse_args()
    problems = [parse_problem(text) for text in arguments.shape]
    if len({problem.spec for problem in problems}) != 1:
        parser.error("problems of one call differ in nothing but their sizes")
    arguments.out.mkdir(parents=True, exist_ok=True)
    Recording(problems, arguments.template or templates_of(problems[0].spec.phase), arguments.out).run(
        arguments.workers
    )


class Recording:
    """The tables of problems of one spec."""

    def __init__(self, problems: Sequence[Problem], templates: Sequence[str], folder: Path) -> None:
        self._problems = problems
        self._folder = folder
        self._device = torch.device("cuda", torch.cuda.current_device())
        self._target = detect_target(self._device)
        self._spec = problems[0].spec
        self._templates = templates
        spaces = [load_space(template).legal(self._spec, self._target).configs for template in templates]
        self._configs = tuple(itertools.chain.from_iterable(spaces))
        self._cases: dict[Problem, Case] = {}
        self._clock = CudaClock(self._device)
        self._journal = folder / f"{self._stem(problems[0])}.jsonl"
        # By problem and config.
        self._rows: dict[tuple[str, KernelConfig], Row] = {}
        self._kept: dict[KernelConfig, CompiledKernel] = {}

    def run(self, workers: int) -> None:
        """Compile, measure, time the fastest again, and write the tables."""
        groups: dict[KernelConfig, list[KernelConfig]] = {}
        for config in self._configs:
            groups.setdefault(config.kernel(), []).append(config)
        dead = self._resume()
        print(f"{len(self._configs)} configs of {len(groups)} binaries, {len(self._rows)} rows known", flush=True)
        with self._journal.open("a") as journal:
            for binary, report in self._compiled(list(groups), workers):
                if isinstance(report, str):
                    self._fail(groups[binary], f"compile: {report}", 0.0, 0)
                    continue
                smem_bytes, limit = report.resources.smem_bytes, self._target.smem_bytes
                if smem_bytes > limit:
                    reason = f"resources: {smem_bytes} bytes of shared memory of {limit}"
                    self._fail(groups[binary], reason, report.seconds, report.resources.spills)
                    continue
                for problem in self._problems:
                    if (str(problem), binary) in dead:
                        self._fail(groups[binary], "hung, or its process died", report.seconds, 0, problem)
                        continue
                    self._measure(problem, binary, groups[binary], report, journal)
        for problem in self._problems:
            self._refine(problem)
            self._save(problem)
        self._journal.unlink()

    def _compiled(
        self, binaries: Sequence[KernelConfig], workers: int
    ) -> Iterator[tuple[KernelConfig, CompileReport | str]]:
        """Yield binaries as their compilation ends; those that share all their kernels with others come last."""
        first = dict(enumerate(_with_new_kernels(binaries)))
        ready: collections.deque[Finished[int]] = collections.deque()
        with Pool[int](workers, name="compiler") as pool:
            for number, binary in first.items():
                pool.submit(number, compile_job, self._spec, binary, self._target, timeout_s=_COMPILE_S)
            while ready or pool.pending:
                # Looked at before each measurement: who has compiled one gets the next.
                ready.extend(pool.wait(0.0 if ready else 1.0))
                if ready:
                    finished = ready.popleft()
                    outcome = finished.outcome
                    binary = first[finished.task_id]
                    if isinstance(outcome, WorkerFailure):
                        yield binary, failure_reason(outcome)[:200]
                    else:
                        yield binary, typing.cast("CompileReport", outcome.value)
        done = set(first.values())
        for binary in binaries:
            if binary not in done:
                try:
                    kernels = self._kernels(binary)
                except FlashgenError as error:
                    yield binary, f"{error}".splitlines()[0][:200]
                    continue
                # What its kernels took is told where each was new.
                yield binary, CompileReport(resources=kernels.resources, binary_hash=kernels.binary_hash, seconds=0.0)

    def _measure(
        self,
        problem: Problem,
        binary: KernelConfig,
        configs: Sequence[KernelConfig],
        report: CompileReport,
        journal: typing.TextIO,
    ) -> None:
        fitting = [config for config in configs if not shape_refusal(config, problem.shape)]
        todo = [config for config in fitting if (str(problem), config) not in self._rows]
        if not todo:
            return
        print(json.dumps({"problem": str(problem), "launched": binary.as_dict()}), file=journal, flush=True)
        faulthandler.dump_traceback_later(_HUNG_S, exit=True)
        wrong = ""
        for config in todo:
            start = time.perf_counter()
            us = None
            try:
                call = self._call(problem, config)
                if config is todo[0]:
                    wrong = self._wrong(problem, call)
                if not wrong:
                    us = quick_time(call, self._clock, _LAUNCHES).median_us
            except (FlashgenError, RuntimeError) as error:
                wrong = f"{type(error).__name__}: {error}".splitlines()[0][:200]
            row = Row(
                us=us,
                failure=wrong,
                compile_s=round(report.seconds, 2),
                measure_s=round(time.perf_counter() - start, 4),
                spills=report.resources.spills,
            )
            self._rows[str(problem), config] = row
            told = {"problem": str(problem), "config": config.as_dict(), "row": dataclasses.asdict(row)}
            print(json.dumps(told), file=journal)
        faulthandler.cancel_dump_traceback_later()
        journal.flush()

    def _wrong(self, problem: Problem, call: typing.Callable[[], object]) -> str:
        case = self._case(problem)
        case.poison()
        call()
        report = case.judge()
        return "" if report.ok else f"accuracy: {report.reason}"[:200]

    def _refine(self, problem: Problem) -> None:
        passed = {config: row for (name, config), row in self._rows.items() if name == str(problem) and row.us}
        best = sorted(passed, key=lambda config: typing.cast("float", passed[config].us))[:_REFINED]
        if not best:
            return
        calls = {str(index): self._call(problem, config) for index, config in enumerate(best)}
        timings = benchmark(calls, clock=self._clock, rounds=_REFINED_ROUNDS, target_ms=_REFINED_MS)
        careful = [timing.median_us for timing in timings.values()]
        # The rest was slower than every one of these when all were timed alike.
        slowest = max(careful)
        for (name, config), row in list(self._rows.items()):
            if name == str(problem) and row.us is not None and config not in best:
                self._rows[name, config] = dataclasses.replace(row, us=round(max(row.us, slowest), 2))
        for config, us in zip(best, careful, strict=True):
            self._rows[str(problem), config] = dataclasses.replace(self._rows[str(problem), config], us=round(us, 2))
        fastest = best[careful.index(min(careful))]
        print(f"{problem}: {len(passed)} passed, best {min(careful):.2f} us, {fastest}", flush=True)

    def _save(self, problem: Problem) -> None:
        rows = {
            config: self._rows[str(problem), config]
            for config in self._configs
            if not shape_refusal(config, problem.shape)
        }
        versions = dataclasses.asdict(software_versions())
        software = {name: str(value) for name, value in versions.items()} | {"date": time.strftime("%Y-%m-%d")}
        table = Table(problem=problem, device=self._target.device_name, software=software, rows=rows)
        table.save(self._folder / f"{self._stem(problem)}.json.xz")

    def _stem(self, problem: Problem) -> str:
        kinds = "" if len(self._templates) > 1 else f"{self._templates[0].split('/')[0]} "
        return f"{kinds}{problem}".replace("=", "").replace(" ", "_").replace("/", "-")

    def _call(self, problem: Problem, config: KernelConfig) -> typing.Callable[[], object]:
        case = self._case(problem)
        bind = bind_backward if problem.spec.phase == "backward" else bind_forward
        return bind(problem, config, self._kernels(config.kernel()), case.extras, case.tensors)

    def _kernels(self, binary: KernelConfig) -> CompiledKernel:
        found = self._kept.get(binary)
        if found is None:
            found = self._kept[binary] = compile_kernel(render(self._spec, binary), self._spec, binary, self._target)
        return found

    def _case(self, problem: Problem) -> Case:
        if problem not in self._cases:
            self._cases[problem] = make_case(problem, device=self._device, seed=0, whole=False)
        return self._cases[problem]

    def _fail(
        self, configs: Sequence[KernelConfig], reason: str, seconds: float, spills: int, only: Problem | None = None
    ) -> None:
        for problem in self._problems if only is None else [only]:
            for config in configs:
                row = Row(us=None, failure=reason, compile_s=round(seconds, 2), measure_s=0.0, spills=spills)
                self._rows.setdefault((str(problem), config), row)

    def _resume(self) -> set[tuple[str, KernelConfig]]:
        """Read the journal; return what was launched and never came back."""
        launched: set[tuple[str, KernelConfig]] = set()
        if self._journal.exists():
            for line in self._journal.read_text().splitlines():
                told = json.loads(line)
                if "launched" in told:
                    launched.add((told["problem"], config_from_dict(told["launched"])))
                else:
                    config = config_from_dict(told["config"])
                    self._rows[told["problem"], config] = Row(**told["row"])
                    launched.discard((told["problem"], config.kernel()))
        return launched


def _with_new_kernels(binaries: Sequence[KernelConfig]) -> Iterator[KernelConfig]:
    """Yield the binaries that have a kernel which none before them has: those of a backward pass share theirs."""
    seen: set[object] = set()
    for binary in binaries:
        kernels: list[object] = [binary]
        if isinstance(binary, TritonBackwardConfig) and binary.dq == "kernel":
            shared = (binary.loads, binary.loops, binary.maxnreg)
            kernels = [
                ("dkdv", *shared, binary.block_m1, binary.block_n1, binary.num_warps, binary.num_stages),
                ("dq", *shared, binary.block_m2, binary.block_n2, binary.num_warps2, binary.num_stages2),
            ]
        if not seen.issuperset(kernels):
            seen.update(kernels)
            yield binary


if __name__ == "__main__":
    main()
