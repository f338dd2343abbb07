"""Score samplers on recorded tables, without a GPU: how near the optimum after so many evaluations.

    python benchmarks/search/replay.py --samplers flashgen,random,tpe --evaluations 48,200,5%
    python benchmarks/search/replay.py --evaluations 10s,30s

Every config costs one evaluation, a failed, illegal or repeated one too. The share of the optimum is the least time of
the whole table over the least time found. `flashgen` is the sampler of `flashgen tune` with its seeds for that many
trials, `unseeded` the same without seeds, `random` takes legal configs without repeats, `tpe` is Optuna's TPESampler as
it comes, which knows no legal list; `gp` its GPSampler (needs SciPy).

With seconds in place of evaluations, time passes as recorded: each binary is compiled once, on one of --cores, beside
the measuring of others on one GPU, and the longer of the two counts. Starts of processes and the final comparison,
which are the same for all, do not, nor do proposals that are no legal config.
"""

from __future__ import annotations

import argparse
import collections
import concurrent.futures
import functools
import importlib.util
import itertools
import json
import math
import random
import statistics
import typing
from collections.abc import Callable, Iterator
from pathlib import Path

import optuna
from optuna.samplers import BaseSampler, GPSampler, TPESampler
from table import Table, load_table

from flashgen.codegen import KernelConfig, config_from_dict
from flashgen.errors import FlashgenError
from flashgen.target import named_target
from flashgen.tuning.choices import find_choices
from flashgen.tuning.config_space import suggest_config
from flashgen.tuning.effort import EFFORTS, Effort
from flashgen.tuning.sampler import UntriedNeighbourSampler
from flashgen.tuning.tried import FAILED_US

HERE = Path(__file__).parent
Times = dict[KernelConfig, float]
Search = Callable[[Table, int, int], Iterator[KernelConfig | None]]
"""Yields what a sampler proposes for a table, a number of evaluations and a seed; None for what is no legal config."""


def main() -> None:
    """Print a table of shares; see the module."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--tables", type=Path, default=HERE / "tables", help="folder of recorded tables")
    parser.add_argument("--samplers", default="flashgen,unseeded,random,tpe", help=f"of {', '.join(SAMPLERS)}")
    parser.add_argument(
        "--evaluations", default="48,200", help="numbers, shares of the table such as 5%%, or times such as 30s"
    )
    parser.add_argument("--cores", type=int, default=14, help="processes that compile, where times are given")
    parser.add_argument("--seeds", type=int, default=5, help="runs of each sampler on each table")
    parser.add_argument("--workers", type=int, default=2, help="processes")
    parser.add_argument("--json", action="store_true", help="print one JSON document")
    arguments = parser.parse_args()
    unknown = set(names := arguments.samplers.split(",")) - SAMPLERS.keys()
    if unknown:
        parser.error(f"unknown samplers {', '.join(sorted(unknown))}; there are {', '.join(SAMPLERS)}")
    if "gp" in names and importlib.util.find_spec("scipy") is None:
        parser.error("gp needs SciPy: pip install scipy")
    paths = sorted(arguments.tables.glob("*.json.xz"))
    if not paths:
        parser.error(f"no table in {arguments.tables}; record.py makes them")
    jobs = list(itertools.product(paths, names, arguments.evaluations.split(","), range(arguments.seeds)))
    cores = itertools.repeat(arguments.cores)
    with concurrent.futures.ProcessPoolExecutor(arguments.workers) as pool:
        shares = list(pool.map(replay, *zip(*jobs, strict=True), cores))
    found: dict[tuple[str, str], dict[str, list[float]]] = collections.defaultdict(dict)
    for (path, name, evaluations, _), share in zip(jobs, shares, strict=True):
        found[name, evaluations].setdefault(path.name.removesuffix(".json.xz"), []).append(share)
    if arguments.json:
        rows = [{"sampler": n, "evaluations": e, "shares": cells} for (n, e), cells in found.items()]
        print(json.dumps(rows, indent=1))
        return
    print(f"{'sampler':<10} {'evaluations':>11} {'geomean':>8} {'worst':>7}   each table, worst of {arguments.seeds}")
    for (name, evaluations), cells in found.items():
        every = [share for values in cells.values() for share in values]
        # Who found nothing that runs has a share of none.
        mean = math.exp(statistics.fmean(map(math.log, every))) if min(every) > 0 else 0.0
        each = " ".join(f"{min(values):.3f}" for values in cells.values())
        print(f"{name:<10} {evaluations:>11} {mean:8.4f} {min(every):7.4f}   {each}")
    print("tables: " + ", ".join(path.name.removesuffix(".json.xz") for path in paths))


def replay(path: Path, sampler: str, evaluations: str, seed: int, cores: int) -> float:
    """Return the share of a table's optimum that a sampler reaches."""
    table = _table(path)
    count, seconds = _limits(evaluations, table)
    best, compile_s, measure_s = math.inf, 0.0, 0.0
    compiled: set[KernelConfig] = set()
    for config in itertools.islice(SAMPLERS[sampler](table, count, seed), count):
        row = table.rows.get(config) if config is not None else None
        if config is None or row is None:
            continue
        if config.kernel() not in compiled:
            compiled.add(config.kernel())
            compile_s += row.compile_s
        measure_s += row.measure_s
        if max(compile_s / cores, measure_s) > seconds:
            break
        if row.us is not None:
            best = min(best, row.us)
    return table.best_us / best


@functools.lru_cache(maxsize=2)
def _table(path: Path) -> Table:
    return load_table(path)


def _limits(text: str, table: Table) -> tuple[int, float]:
    """Return how many evaluations there are, and how many seconds."""
    if text.endswith("s"):
        return EFFORTS["full"].trials, float(text[:-1])
    count = math.ceil(float(text[:-1]) / 100 * len(table.rows)) if text.endswith("%") else int(text)
    return count, math.inf


def _told(table: Table, config: KernelConfig | None) -> float:
    row = table.rows.get(config) if config is not None else None
    return FAILED_US if row is None or row.us is None else row.us


def _study(sampler: BaseSampler) -> optuna.Study:
    optuna.logging.set_verbosity(optuna.logging.ERROR)
    return optuna.create_study(sampler=sampler)


def _flashgen(table: Table, count: int, seed: int, *, seeded: bool = True) -> Iterator[KernelConfig]:
    effort = Effort(trials=count, finalists=1, final_ms=1.0, seconds=1.0)
    seeds: tuple[KernelConfig, ...] = ()
    if seeded:
        seeds = find_choices(table.problem, named_target(table.device), effort).seeds
        # A table may be of one template alone.
        seeds = tuple(config for config in seeds if config in table.rows)
    spread = effort.spread(len(seeds))
    sampler = UntriedNeighbourSampler(list(table.rows), seeds=seeds, seed=seed, n_quasi_random=spread)
    study = _study(sampler)
    while sampler.remaining(study):
        trial = study.ask()
        config = suggest_config(trial, sampler.space)
        yield config
        study.tell(trial, _told(table, config))


def _random(table: Table, count: int, seed: int) -> Iterator[KernelConfig]:
    configs = list(table.rows)
    random.Random(seed).shuffle(configs)
    yield from configs


def _stock(make: Callable[[int], BaseSampler], table: Table, count: int, seed: int) -> Iterator[KernelConfig | None]:
    # As one writes it in Optuna: the template, then its numbers; which go together, a sampler has to find out.
    values: dict[str, dict[str, list[int | str]]] = {}
    for config in table.rows:
        own = values.setdefault(config.template, {})
        for name, value in config.as_dict().items():
            own.setdefault(name, [])
            if value not in own[name]:
                own[name].append(value)
    study = _study(make(seed))
    while True:
        trial = study.ask()
        template = trial.suggest_categorical("template", list(values))
        numbers = {name: trial.suggest_categorical(f"{template} {name}", v) for name, v in values[template].items()}
        proposed: KernelConfig | None
        try:
            proposed = config_from_dict(typing.cast("dict[str, int | str]", numbers))
        except FlashgenError:
            proposed = None
        yield proposed
        study.tell(trial, _told(table, proposed))


SAMPLERS: dict[str, Search] = {
    "flashgen": _flashgen,
    "unseeded": functools.partial(_flashgen, seeded=False),
    "random": _random,
    "tpe": functools.partial(_stock, lambda seed: TPESampler(seed=seed)),
    "gp": functools.partial(_stock, lambda seed: GPSampler(seed=seed)),
}

if __name__ == "__main__":
    main()
