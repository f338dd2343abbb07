"""Show where a study's storage saturates as more machines join one run, without a GPU.

    python benchmarks/search/many_workers.py --storages journal,postgresql --workers 1,8,64,256,1000

One process is the run: its sampler, its offers and its polls are those of `flashgen tune`. Every worker claims trials
and hands them in by the code of `flashgen join`, and in between sleeps as long as a recorded table says that the config
took to compile and to measure, times --scale. What is simulated: the workers are threads of a few processes of this
one machine; those of a process share what they have read of a journal, and take turns to write to it, but have a
connection to PostgreSQL each. So their own work, which a thousand machines do on their own cores, is this machine's
here: `clients` and `all` are the shares of its cores that the workers and everything took. Where `all` is near 100%,
this machine was the limit, and the storage alone may do better.

`trials/s` counts what was handed in once every worker could have begun; `ideal` is workers over the mean time of the
trials that they claimed. `claim` is looking for a trial and claiming it, where there was one; `hand in` is telling its
result; `empty` the share of looks that found none. `run` is the share of its time that the run needed for offers and
polls. PostgreSQL is started for the occasion; --url takes another server.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import multiprocessing
import multiprocessing.connection
import multiprocessing.synchronize
import os
import pwd
import resource
import shutil
import statistics
import subprocess
import tempfile
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import optuna
from table import Row, Table, load_table

from flashgen.codegen import KernelResources
from flashgen.launch import software_versions
from flashgen.measure import Rejected, Timing
from flashgen.target import named_target
from flashgen.tuning.claims import Claims, Pace
from flashgen.tuning.events import TrialRecord
from flashgen.tuning.journal import join_storage, open_storage
from flashgen.tuning.offers import Offer
from flashgen.tuning.shared_run import Announcer, find_open
from flashgen.tuning.sharing import Sharing
from flashgen.tuning.study import ProblemStudy
from flashgen.tuning.tried import Tried

HERE = Path(__file__).parent
TABLE = HERE / "tables" / "b4_hq16_hkv16_sq4096_sk4096_forward_d128_full_bf16.json.xz"
TICK_S = 0.25


@dataclasses.dataclass(kw_only=True)
class Seen:
    """What the workers of one process saw: seconds, and when trials were handed in."""

    trials: list[float] = dataclasses.field(default_factory=list)
    claims: list[float] = dataclasses.field(default_factory=list)
    hand_ins: list[float] = dataclasses.field(default_factory=list)
    ended: list[float] = dataclasses.field(default_factory=list)
    empty: int = 0
    cpu_s: float = 0.0


def main() -> None:
    """Print a row for each storage and number of workers; see the module."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--storages", default="journal,postgresql", help="of journal, postgresql")
    parser.add_argument("--workers", default="1,8,64,256,1000", help="numbers of workers")
    parser.add_argument("--table", type=Path, default=TABLE, help="a recorded table")
    parser.add_argument("--scale", type=float, default=1.0, help="seconds here for one of a trial's")
    parser.add_argument("--seconds", type=float, default=20.0, help="how long each number of workers is at it")
    parser.add_argument("--ramp", type=float, default=9.0, help="of which are not counted: until all have begun")
    parser.add_argument("--processes", type=int, default=4, help="that the workers are threads of, at most")
    parser.add_argument("--url", help="of a PostgreSQL database to use in place of one of its own")
    arguments = parser.parse_args()
    unknown = set(names := arguments.storages.split(",")) - {"journal", "postgresql"}
    if unknown:
        parser.error(f"unknown storages {', '.join(sorted(unknown))}; there are journal and postgresql")
    optuna.logging.set_verbosity(optuna.logging.ERROR)
    counts = [int(count) for count in arguments.workers.split(",")]
    table = load_table(arguments.table)
    print(f"{os.cpu_count()} cores; {table.problem}, {len(table.rows)} configs")
    print(
        f"{'storage':<11}{'workers':>8}{'trials/s':>10}{'ideal':>8}{'share':>7}{'claim ms':>10}{'p95':>7}"
        f"{'hand in ms':>12}{'p95':>7}{'empty':>7}{'run':>6}{'clients':>9}{'all':>6}"
    )
    for name in names:
        for count in counts:
            with _place(name, arguments.url, max(counts)) as study:
                _print_row(name, count, _simulate(study, arguments.table, table, count, arguments))


@dataclasses.dataclass(frozen=True, kw_only=True)
class Cell:
    """What became of one number of workers.

    Attributes:
        per_s: trials handed in each second.
        seen: by the workers.
        run: share of its time that the run needed.
        clients: share of this machine's cores that the workers took.
        everything: share of them that was taken at all.
    """

    per_s: float
    seen: Seen
    run: float
    clients: float
    everything: float


def _print_row(name: str, count: int, cell: Cell) -> None:
    seen = cell.seen
    ideal = count / statistics.fmean(seen.trials)
    looks = seen.empty + len(seen.claims)
    print(
        f"{name:<11}{count:>8}{cell.per_s:>10.2f}{ideal:>8.2f}{cell.per_s / ideal:>7.0%}"
        f"{_ms(seen.claims, 0.5):>10}{_ms(seen.claims, 0.95):>7}"
        f"{_ms(seen.hand_ins, 0.5):>12}{_ms(seen.hand_ins, 0.95):>7}"
        f"{seen.empty / max(looks, 1):>7.0%}{cell.run:>6.0%}{cell.clients:>9.0%}{cell.everything:>6.0%}",
        flush=True,
    )


def _ms(seconds: list[float], quantile: float) -> str:
    return f"{1000 * sorted(seconds)[int(quantile * (len(seconds) - 1))]:.1f}" if seconds else "-"


def _simulate(study: str, path: Path, table: Table, count: int, arguments: argparse.Namespace) -> Cell:
    context = multiprocessing.get_context("spawn")
    processes = min(arguments.processes, count)
    shares = [count // processes + (index < count % processes) for index in range(processes)]
    stop, ready = context.Event(), context.Barrier(processes + 1)
    pipes = [context.Pipe(duplex=False) for _ in shares]
    workers = [
        context.Process(target=_work, args=(study, path, share, arguments.scale, ready, stop, theirs))
        for share, (_, theirs) in zip(shares, pipes, strict=True)
    ]
    with open_storage(study) as storage:
        target = named_target(table.device)
        problem_study = ProblemStudy(
            storage,
            problem=table.problem,
            target=target,
            how=f"simulated {time.time()}",
            configs=list(table.rows),
            seeds=(),
            seed=0,
            n_quasi_random=20,
        )
        announcer = Announcer(storage, target=target, software=software_versions(), measured=True)
        sharing = Sharing(problem_study, announcer=announcer, problem=table.problem, lost_s=1e6, idle_s=1e6)
        for worker in workers:
            worker.start()
        sharing.start(())
        ready.wait()
        busy_s = 0.0
        start, cpu = time.monotonic(), None
        while (now := time.monotonic()) < start + arguments.seconds:
            if cpu is None and now > start + arguments.ramp:
                cpu = now, _cpu_s()
            sharing.collect(busy=True)
            for _ in range(sharing.wanted):
                sharing.offer()
            took_s = time.monotonic() - now
            busy_s += took_s
            time.sleep(max(0.0, TICK_S - took_s))
        end = time.monotonic()
        assert cpu is not None
        cores_s = (end - cpu[0]) * (os.cpu_count() or 1)
        everything = (_cpu_s() - cpu[1]) / cores_s
        stop.set()
        found: list[Seen] = [ours.recv() for ours, _ in pipes]
        for worker in workers:
            worker.join()
    ended = sum(start + arguments.ramp <= moment <= end for seen in found for moment in seen.ended)
    seen = Seen(
        trials=[s for each in found for s in each.trials],
        claims=[s for each in found for s in each.claims],
        hand_ins=[s for each in found for s in each.hand_ins],
        empty=sum(each.empty for each in found),
    )
    return Cell(
        per_s=ended / (end - start - arguments.ramp),
        seen=seen,
        run=busy_s / (end - start),
        clients=sum(each.cpu_s for each in found) / (arguments.seconds * (os.cpu_count() or 1)),
        everything=everything,
    )


def _cpu_s() -> float:
    """Return the seconds that all cores of this machine were busy since it started."""
    fields = [int(field) for field in Path("/proc/stat").read_text().split("\n", 1)[0].split()[1:]]
    return (sum(fields[:8]) - fields[3] - fields[4]) / os.sysconf("SC_CLK_TCK")


def _work(
    study: str,
    path: Path,
    count: int,
    scale: float,
    ready: multiprocessing.synchronize.Barrier,
    stop: multiprocessing.synchronize.Event,
    result: multiprocessing.connection.Connection,
) -> None:
    """Be so many workers, until told to stop."""
    optuna.logging.set_verbosity(optuna.logging.ERROR)
    table, target = load_table(path), None
    if "://" in study:
        storage = optuna.storages.RDBStorage(study, engine_kwargs={"pool_size": count, "max_overflow": 2})
    else:
        storage = join_storage(study)
        assert storage is not None
    seen, over = Seen(), threading.Event()
    while target is None:
        target = find_open(storage)
    workers = [
        threading.Thread(target=_claim_and_tell, args=(Claims(storage, *target), table, scale, seen, over))
        for _ in range(count)
    ]
    ready.wait()
    before = resource.getrusage(resource.RUSAGE_SELF)
    for worker in workers:
        worker.start()
    stop.wait()
    after = resource.getrusage(resource.RUSAGE_SELF)
    seen.cpu_s = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    over.set()
    for worker in workers:
        worker.join()
    result.send(seen)


def _claim_and_tell(claims: Claims, table: Table, scale: float, seen: Seen, over: threading.Event) -> None:
    pace = Pace()
    while not over.is_set():
        start = time.monotonic()
        offer = claims.claim(measures=True, spill_limit=1 << 20)
        took_s = time.monotonic() - start
        pause_s = pace.pause_s(found=offer is not None, took_s=took_s)
        if offer is None:
            seen.empty += 1
            over.wait(pause_s)
            continue
        seen.claims.append(took_s)
        row = table.rows[offer.config]
        seen.trials.append((row.compile_s + row.measure_s) * scale)
        if over.wait(seen.trials[-1]):
            return
        start = time.monotonic()
        claims.hand_in(offer, _replayed(offer, row))
        seen.ended.append(time.monotonic())
        seen.hand_ins.append(seen.ended[-1] - start)


def _replayed(offer: Offer, row: Row) -> Tried:
    resources = KernelResources(registers=100, spills=row.spills, smem_bytes=0)
    result = (
        Rejected(stage="compile", reason=row.failure)
        if row.us is None
        else Timing(median_us=row.us, spread=0.01, samples=9)
    )
    record = TrialRecord(number=offer.number, config=offer.config, resources=resources, result=result)
    return Tried(record=record, binary_hash=str(offer.number))


@contextlib.contextmanager
def _place(storage: str, url: str | None, most: int) -> Iterator[str]:
    """Give a fresh journal or database."""
    with tempfile.TemporaryDirectory(prefix="fg", ignore_cleanup_errors=True) as name:
        if storage == "journal":
            yield str(Path(name) / "study.journal")
        elif url:
            yield url
        else:
            with _server(Path(name), most) as own:
                yield own


@contextlib.contextmanager
def _server(folder: Path, most: int) -> Iterator[str]:
    if shutil.which("initdb") is None:
        raise SystemExit("PostgreSQL's initdb is not on PATH; give --url, or --storages journal")
    # It will not run as root.
    user = "postgres" if os.getuid() == 0 else None
    if user is not None:
        os.chown(folder, pwd.getpwnam(user).pw_uid, -1)

    def run(*command: str) -> None:
        subprocess.run(command, user=user, cwd=folder, check=True, stdout=subprocess.DEVNULL)

    run("initdb", "--pgdata=data", "--username=flashgen", "--auth=trust")
    options = f"-k {folder} -c listen_addresses='' -c max_connections={most + 100}"
    run("pg_ctl", "start", "--wait", "--pgdata=data", "--log=server.log", f"--options={options}")
    try:
        yield f"postgresql+psycopg://flashgen@/postgres?host={folder}"
    finally:
        run("pg_ctl", "stop", "--pgdata=data", "--mode=immediate")


if __name__ == "__main__":
    main()
