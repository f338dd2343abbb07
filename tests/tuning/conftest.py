"""A planted run of the tuner: real search, study and worker processes around jobs that follow a plan."""

from __future__ import annotations

import dataclasses
import functools
import importlib.util
import json
import os
import pwd
import shutil
import subprocess
import sys
import tempfile
import typing
from collections.abc import Iterator
from pathlib import Path

import pytest

from flashgen.codegen import KernelConfig
from flashgen.search_space import LegalSpace, SearchSpace, load_space
from flashgen.spec import AttentionSpec, Problem, parse_problem
from flashgen.target import GpuTarget, named_target
from flashgen.tuning.choices import find_choices
from flashgen.tuning.effort import EFFORTS, Effort
from flashgen.tuning.events import Observer, SilentObserver, TuneReport
from flashgen.tuning.jobs import Jobs
from flashgen.tuning.run import Run

H200 = named_target("H200")
PROBLEM = parse_problem("b=1 hq=2 hkv=2 s=256 d=64 fp16")

PLANTED = Jobs(
    compile="planted_jobs:compile",
    start="planted_jobs:start",
    stand_by="planted_jobs:stand_by",
    evaluate="planted_jobs:evaluate",
    race="planted_jobs:race",
    confirm="planted_jobs:confirm",
    interpret="planted_jobs:interpret",
    compile_timeout_s=2.0,
    first_evaluate_timeout_s=2.0,
    evaluate_timeout_s=2.0,
    race_timeout_s=2.0,
    interpret_timeout_s=2.0,
    idle_s=10.0,
)


@dataclasses.dataclass
class Bench:
    """A folder with a plan, a log of calls, a study and a registry."""

    folder: Path
    problem: Problem = PROBLEM
    jobs: Jobs = PLANTED

    @property
    def seeds(self) -> list[KernelConfig]:
        """What a run tries first, in order."""
        return list(_seeds(self.problem))

    def plan(self, **jobs: dict[KernelConfig | str, object]) -> None:
        """Write what happens to which config in which job."""
        words = {job: {str(config): word for config, word in plan.items()} for job, plan in jobs.items()}
        (self.folder / "plan.json").write_text(json.dumps(words))

    def calls(self, job: str) -> list[str]:
        """Return the configs that a job was called with."""
        lines = (self.folder / "log").read_text().splitlines()
        return [line.removeprefix(f"{job} ") for line in lines if line.startswith(f"{job} ")]

    def run(self, *, problems: typing.Sequence[Problem] | None = None, **settings: typing.Any) -> TuneReport:
        """Tune, and return the report; `prepared` has the settings."""
        return self.prepared(**settings).tune(problems or [self.problem])

    def prepared(
        self,
        *,
        gpu: str | tuple[str, ...] | None = "planted:0",
        trials: int = 4,
        jobs: Jobs | None = None,
        observer: Observer | None = None,
        budget_s: float | None = None,
        workers: int = 2,
        folder: Path | None = None,
        study: str | None = None,
        seeds_only: bool = True,
        shared: bool = False,
    ) -> Run:
        """Return a run."""
        return Run(
            target=H200,
            gpus=(gpu,) if isinstance(gpu, str) else gpu or (),
            effort=Effort(trials=trials, finalists=3, final_ms=1.0, seconds=60.0, seeds_only=seeds_only),
            budget_s=budget_s,
            seed=0,
            folder=folder or self.folder / "registry",
            study=study or str(self.folder / "study.journal"),
            workers=workers,
            observer=observer or SilentObserver(),
            jobs=jobs or self.jobs,
            shared=shared,
        )

    def child(self, *, gpu: str | None, trials: int, before: str = "") -> subprocess.Popen[str]:
        """Start the same run in another process, which prints the config of each trial it was told.

        Args:
            gpu: as for `prepared`; likewise the next.
            trials: how many.
            before: lines that it runs first.
        """
        script = f"""
import sys
sys.path[:0] = {[str(Path(__file__).parent), *filter(None, sys.path)]!r}
from pathlib import Path
import flashgen.resources
from conftest import Bench
from flashgen.tuning import SilentObserver

class Printer(SilentObserver):
    def trial(self, record, best, done, seconds_left):
        print(record.config, flush=True)

flashgen.resources.shipped_registry_dir = lambda: Path({str(self.folder / "shipped")!r})
{before}
report = Bench(folder=Path({str(self.folder)!r})).run(gpu={gpu!r}, trials={trials}, workers=1, observer=Printer())
print("interrupted" if report.interrupted else "done", len(report.files), flush=True)
"""
        return subprocess.Popen(
            [sys.executable, "-c", script], stdout=subprocess.PIPE, text=True, env=os.environ.copy()
        )


@functools.cache
def _seeds(problem: Problem) -> tuple[KernelConfig, ...]:
    return find_choices(problem, H200, EFFORTS["full"]).seeds


_legal = SearchSpace.legal


@functools.cache
def _legal_once(template: str, spec: AttentionSpec, target: GpuTarget) -> LegalSpace:
    return _legal(load_space(template), spec, target)


@pytest.fixture(scope="module", autouse=True)
def _each_legal_space_once() -> Iterator[None]:
    # A second or more of work: most runs here tune one problem, and nearly all one of a few. Not for longer than a
    # module: others, which run in the same process, edit spaces.
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(SearchSpace, "legal", lambda space, spec, target: _legal_once(space.template, spec, target))
        yield


@pytest.fixture
def bench(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Bench:
    monkeypatch.syspath_prepend(str(Path(__file__).parent))
    monkeypatch.setenv("PLANTED_PLAN", str(tmp_path / "plan.json"))
    monkeypatch.setenv("PLANTED_LOG", str(tmp_path / "log"))
    # What hung or crashed in one test is quarantined in its own cache.
    monkeypatch.setenv("FLASHGEN_CACHE", str(tmp_path / "cache"))
    # What ships is a neighbour of every problem here, and would be tried first.
    monkeypatch.setattr("flashgen.resources.shipped_registry_dir", lambda: tmp_path / "shipped")
    bench = Bench(folder=tmp_path)
    bench.plan()
    (tmp_path / "log").touch()
    return bench


@dataclasses.dataclass(frozen=True)
class Server:
    """A PostgreSQL server that listens on a socket in its own folder."""

    folder: Path
    user: str | None

    @property
    def url(self) -> str:
        return f"postgresql+psycopg://flashgen@/postgres?host={self.folder}"

    def run(self, *command: str) -> None:
        told = self.folder / "log"
        with told.open("a") as log:
            done = subprocess.run(command, user=self.user, stdout=log, stderr=log, cwd=self.folder, check=False)
        assert done.returncode == 0, told.read_text()

    def start(self) -> None:
        options = f"-k {self.folder} -c listen_addresses=''"
        self.run("pg_ctl", "start", "--wait", "--pgdata=data", "--log=server.log", f"--options={options}")

    def stop(self) -> None:
        self.run("pg_ctl", "stop", "--wait", "--pgdata=data", "--mode=immediate")


@pytest.fixture
def server() -> Iterator[Server]:
    """A PostgreSQL server of the test's own."""
    if shutil.which("initdb") is None:
        pytest.skip("PostgreSQL's initdb is not on PATH")
    if importlib.util.find_spec("psycopg") is None:
        pytest.skip("psycopg is not installed")
    # Its path must be short, and its own user's: it will not run as root.
    with tempfile.TemporaryDirectory(prefix="pg", ignore_cleanup_errors=True) as name:
        user = "postgres" if os.getuid() == 0 else None
        if user is not None:
            os.chown(name, pwd.getpwnam(user).pw_uid, -1)
        server = Server(Path(name), user)
        server.run("initdb", "--pgdata=data", "--username=flashgen", "--auth=trust", "--no-sync")
        server.start()
        try:
            yield server
        finally:
            server.run("pg_ctl", "stop", "--pgdata=data", "--mode=immediate")
