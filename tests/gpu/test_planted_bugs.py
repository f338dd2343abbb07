"""Bugs planted into kernels that are compiled and launched: each is refused, whatever it does to its GPU."""

from __future__ import annotations

import os
import re
import time
import typing
from collections.abc import Iterator, Mapping

import pytest
import torch
from mutant_jobs import MUTANTS

from flashgen.codegen import KernelConfig
from flashgen.launch import detect_target
from flashgen.measure import Rejected
from flashgen.spec import Problem, parse_problem
from flashgen.tuning.choices import find_choices
from flashgen.tuning.effort import EFFORTS
from flashgen.tuning.pool import Pool
from flashgen.tuning.workers import Worker, WorkerFailure, WorkerResult

pytestmark = pytest.mark.gpu

TIMEOUT_S = 20.0
COMPILE_S = 120.0
RIGHT = (
    "b=2 hq=4 hkv=2 s=1000 d=64 causal bf16",
    "b=2 hq=4 hkv=1 s=777 d=128 full fp16",
    "b=2 hq=2 hkv=2 s=1024 d=128 sliding_window(127,0) bf16",
    "b=3 hq=2 hkv=2 s=500 d=96 causal varlen fp16",
    "b=2 hq=2 hkv=1 s=512 d=64 causal softcap alibi bf16",
    "b=2 hq=2 hkv=1 s=512 d=64 full bias=input dropout fp16",
    "b=2 hq=2 hkv=2 s=512 d=128 causal fp8",
    "b=2 hq=2 hkv=2 s=512 d=64 causal sinks seqused=qk bf16",
    "b=2 hq=4 hkv=2 s=1000 d=64 causal bf16 backward",
    "b=2 hq=2 hkv=1 s=512 d=128 full bias=input fp16 backward",
    "b=3 hq=2 hkv=2 s=500 d=64 causal varlen bf16 backward",
    "b=2 hq=2 hkv=2 s=512 d=64 sliding_window(127,0) softcap deterministic bf16 backward",
    "b=3 hq=8 hkv=4 sq=2 sk=5000 d=64 causal bf16 decode",
    "b=2 hq=8 hkv=2 sk=777 d=128 full page=16 lse fp16 decode",
    "b=2 hq=8 hkv=2 sk=1000 d=128 full append rotary=halves leftpad bf16 decode",
    "b=2 hq=16 hkv=1 sk=1000 d=576 dv=512 full shared_kv bf16 decode",
    "b=2 hq=8 hkv=2 sq=2 sk=1000 d=128 causal fp8_kv descale bf16 decode",
    "b=2 hq=8 hkv=2 sq=100 sk=1000 d=128 causal bf16 decode",
)
CONFIGS_OF_EACH = 6


@pytest.fixture
def worker() -> Iterator[Worker]:
    worker = Worker("measuring process", setup="flashgen.tuning.gpu_jobs:start", setup_args=("cuda:0",))
    yield worker
    worker.kill()


def compile_all(requests: Mapping[str, tuple[object, ...]]) -> dict[str, str]:
    """Run compiling jobs on all cores, and return what failed, by name."""
    with Pool[str](os.cpu_count() or 1, name="compiling process") as pool:
        for name, request in requests.items():
            pool.submit(name, typing.cast("str", request[0]), *request[1:], timeout_s=COMPILE_S)
        failed = {}
        while pool.pending:
            for finished in pool.wait(1.0):
                if isinstance(finished.outcome, WorkerFailure):
                    failed[finished.task_id] = finished.outcome.detail
        return failed


def judged(worker: Worker, function: str, *args: object) -> tuple[str, str] | None:
    """Return stage and reason of a refusal, or None."""
    outcome = worker.call(function, *args, timeout_s=TIMEOUT_S)
    if isinstance(outcome, WorkerFailure):
        assert not outcome.at_start, outcome
        assert "AssertionError" not in outcome.detail, outcome
        return "run", f"{outcome.kind}: {outcome.detail}"
    assert isinstance(outcome, WorkerResult)
    refused = outcome.value
    assert refused is None or isinstance(refused, Rejected), refused
    return None if refused is None else (refused.stage, refused.reason)


def test_every_bug_is_refused(worker: Worker, capsys: pytest.CaptureFixture[str]) -> None:
    target = detect_target(torch.device("cuda:0"))
    names = [name for name, mutant in MUTANTS.items() if runs_here(mutant.config, target.has_wgmma)]
    assert len(names) >= 60
    assert compile_all({name: ("mutant_jobs:compile_mutant", name, target) for name in names}) == {}
    start, escaped, said_otherwise = time.monotonic(), [], []
    for name in names:
        refused = judged(worker, "mutant_jobs:judge_mutant", name)
        if refused is None:
            escaped.append(name)
        elif not re.search(MUTANTS[name].says, refused[1]):
            said_otherwise.append((name, refused))
    with capsys.disabled():
        caught, seconds = len(names) - len(escaped), time.monotonic() - start
        print(f"\n{caught} of {len(names)} planted bugs refused in {seconds:.0f} s; escaped: {escaped or 'none'}")
        for name, refused in said_otherwise:
            print(f"refused for another reason: {name}: {refused}")
    assert not escaped
    # A store past the end may show as another fault first; most say what they are.
    assert len(said_otherwise) <= len(names) // 10


def runs_here(config: KernelConfig, has_wgmma: bool) -> bool:
    return has_wgmma or not config.template.startswith("gluon/hopper")


def test_nothing_right_is_refused(worker: Worker, capsys: pytest.CaptureFixture[str]) -> None:
    target = detect_target(torch.device("cuda:0"))
    configs: dict[str, tuple[Problem, KernelConfig]] = {}
    for words in RIGHT:
        problem = parse_problem(words)
        for config in find_choices(problem, target, EFFORTS["full"]).seeds[:CONFIGS_OF_EACH]:
            configs[f"{words}: {config}"] = (problem, config)
    requests = {name: ("mutant_jobs:compile_right", *pair, target) for name, pair in configs.items()}
    failed = compile_all(requests)
    verdicts = {
        name: judged(worker, "mutant_jobs:judge_right", *pair) for name, pair in configs.items() if name not in failed
    }
    refused = {name: verdict for name, verdict in verdicts.items() if verdict is not None}
    with capsys.disabled():
        print(f"\n{len(verdicts)} right configs tried, {len(refused)} refused; {len(failed)} do not compile")
    assert len(verdicts) >= 4 * len(RIGHT)
    assert not refused
