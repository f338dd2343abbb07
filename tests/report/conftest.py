"""Studies as `tune` writes them, without a GPU: configs are asked for as it does, and told invented times."""

from __future__ import annotations

import contextlib
import functools
import os
import random
import typing
from collections.abc import Iterator
from pathlib import Path

import pytest

from flashgen.cli.configs import short_config
from flashgen.codegen import KernelConfig, KernelResources, render
from flashgen.measure import Rejected, Timing, tflops
from flashgen.registry import (
    Accuracy,
    MeasuredRange,
    Performance,
    Provenance,
    Registry,
    RegistryEntry,
    RunnerUp,
    load,
    write_entries,
)
from flashgen.registry.locations import Location
from flashgen.report import StudyReport, read_report
from flashgen.spec import Problem, parse_problem
from flashgen.target import named_target
from flashgen.tuning.choices import find_choices
from flashgen.tuning.effort import EFFORTS
from flashgen.tuning.events import TrialRecord
from flashgen.tuning.journal import open_storage
from flashgen.tuning.study import ProblemStudy
from flashgen.tuning.tried import Tried

PROBLEM = "b=4 hq=16 hkv=16 sq=4096 sk=4096 forward d=128 causal bf16"
SMALL = "b=1 hq=2 hkv=2 sq=512 sk=512 forward d=64 full bf16"
HOSTILE = "b=1 forward <script>alert(1)</script> $x_1"
REASON = '<img src=x onerror="alert(2)"> at [0, 3]: got 7.5 $\\frac{'
H200 = named_target("H200")


class Studies:
    """Makes studies in one journal, and a registry that goes with it."""

    def __init__(self, folder: Path) -> None:
        self.path = folder / "study.journal"
        self.registry_folder = folder / "registry"
        self.registry_folder.mkdir()

    def add(
        self,
        count: int,
        *,
        problem: Problem | None = None,
        text: str = "",
        timing: str = "cold-l2",
        rejects_all: bool = False,
        leave_open: int = 0,
    ) -> list[Tried]:
        """Tell `count` trials of a problem; `text` stands in its place in the study's name."""
        known = problem or parse_problem(PROBLEM)
        configs, seeds = _choices(known)
        told = []
        with open_storage(str(self.path)) as storage:
            study = ProblemStudy(
                storage,
                problem=typing.cast("Problem", _Named(known, text)) if text else known,
                target=H200,
                how=f"{timing}, triton 3.6.0, driver 580.1",
                configs=configs,
                seeds=seeds,
                seed=0,
                n_quasi_random=count,
            )
            for index in range(count):
                number, config = study.ask()
                told.append(_tried(number, config, index, rejects_all))
                study.tell(told[-1])
            for _ in range(leave_open):
                study.ask()
        return told

    def enter(self, told: typing.Sequence[Tried]) -> RegistryEntry:
        """Write the entry that a final comparison of the best of `told` might have ended with: the second wins."""
        ranked = sorted((tried for tried in told if tried.passed), key=lambda tried: tried.timing.median_us)
        entry = _entry(parse_problem(PROBLEM), ranked[1], [ranked[0], *ranked[2:5]])
        write_entries(self.registry_folder, [entry])
        return entry

    def registry(self) -> Registry:
        return load([Location(label="argument", path=self.registry_folder)])

    def report(self, *problems: str) -> StudyReport:
        return read_report(str(self.path), registry=self.registry(), short_name=short_config, problems=problems)


@functools.lru_cache
def _choices(problem: Problem) -> tuple[list[KernelConfig], list[KernelConfig]]:
    """Return some of the configs that tune would try, and the first of its seeds."""
    choices = find_choices(problem, H200, EFFORTS["full"])
    seeds = list(choices.seeds[:8])
    return list(dict.fromkeys((*seeds, *choices.configs[:: len(choices.configs) // 120]))), seeds


class _Named:
    """A problem under another name."""

    def __init__(self, problem: Problem, text: str) -> None:
        self.spec, self._text = problem.spec, text

    def __str__(self) -> str:
        return self._text


def _tried(number: int, config: KernelConfig, index: int, rejects_all: bool) -> Tried:
    noise = random.Random(index)
    registers = noise.choice((96, 128, 144, 160))
    resources = KernelResources(registers=registers, spills=noise.choice((0, 0, 0, 16)), smem_bytes=180_000)
    result: Timing | Rejected
    if index % 9 == 4:
        result = Rejected(stage="resources", reason=f"{230_000 + 512 * index} bytes of shared memory of 232448")
    elif index % 13 == 6:
        result = Rejected(stage="accuracy", reason=REASON)
    elif rejects_all:
        result = Rejected(stage="compile", reason="PassManager::run failed " + "and so on " * 40)
    else:
        us = 800.0 if config.template.startswith("triton") else 414.0
        values = config.as_dict()
        us *= {1: 1.8, 2: 1.0, 3: 1.05}.get(int(values.get("consumers", 2)), 1.0)
        us *= {32: 1.7, 64: 1.2, 128: 1.0}.get(int(values.get("block_n", 128)), 1.0) * (1 + 0.15 * noise.random())
        us *= 1 + 0.4 * 0.9**index
        result = Timing(median_us=us, spread=0.01 + 0.03 * noise.random(), samples=40)
    record = TrialRecord(number=number, config=config, resources=resources, result=result)
    return Tried(record=record, max_error=0.003, allowed_error=0.01, binary_hash=str(number))


def _entry(problem: Problem, winner: Tried, others: typing.Sequence[Tried]) -> RegistryEntry:
    us = winner.timing.median_us * 0.98
    assert winner.record.resources is not None
    return RegistryEntry(
        device_name=H200.device_name,
        arch=H200.arch,
        spec=problem.spec,
        range=MeasuredRange.of(problem.shape),
        config=winner.config,
        origin="measured",
        resources=winner.record.resources,
        performance=Performance(
            median_us=us,
            spread=0.01,
            tflops=tflops(problem, us),
            baseline="cudnn",
            baseline_us=us * 1.17,
            timing="cold-l2",
        ),
        accuracy=Accuracy(max_error=0.003, allowed_error=0.01),
        runners_up=tuple(RunnerUp(config=t.config, median_us=t.timing.median_us * 0.99) for t in others),
        provenance=Provenance(
            template_digest=render(problem.spec, winner.config).digest,
            flashgen="0.1.0",
            triton="3.6.0",
            torch="2.11.0",
            driver="580.1",
            date="2026-11-22T07:00:00Z",
            trials=60,
            seed=0,
        ),
    )


@pytest.fixture
def studies(tmp_path: Path) -> Iterator[Studies]:
    """A maker of studies in a folder of their own."""
    with _quick_disk():
        yield Studies(tmp_path)


@pytest.fixture(scope="module")
def full(tmp_path_factory: pytest.TempPathFactory) -> tuple[StudyReport, RegistryEntry]:
    """The report on a tuned problem, and on one of which every config was rejected; and the entry of the first."""
    with _quick_disk():
        studies = Studies(tmp_path_factory.mktemp("full"))
        entry = studies.enter(studies.add(52, leave_open=1))
        studies.add(4, problem=parse_problem(SMALL), rejects_all=True)
        return studies.report(), entry


@contextlib.contextmanager
def _quick_disk() -> Iterator[None]:
    """Do not wait for the disk, which Optuna does some twenty times a trial."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(os, "fsync", lambda _: None)
        yield
