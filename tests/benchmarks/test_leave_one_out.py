"""Entries held out of the registry one by one, with planted times in place of a GPU."""

from __future__ import annotations

import dataclasses
import importlib
import json
import subprocess
import sys
import types
import typing
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import pytest

from flashgen.codegen import KernelConfig
from flashgen.registry import Interval, Location, RegistryEntry, load
from flashgen.resources import shipped_registry_dir
from flashgen.spec import Problem
from flashgen.target import Software, named_target

FOLDER = Path(__file__).parents[2] / "benchmarks"
H200 = named_target("H200")
SOFTWARE = Software(flashgen="0.1.0", triton="3.6.0", torch="2.11.0", driver="580.1")


@pytest.fixture(scope="module")
def bench() -> Iterator[types.ModuleType]:
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(FOLDER))
        yield importlib.import_module("leave_one_out")


@pytest.fixture(scope="module")
def races(bench: types.ModuleType) -> types.ModuleType:
    return importlib.import_module("races")


@pytest.fixture(scope="module")
def entries() -> list[RegistryEntry]:
    shipped = load([Location(path=shipped_registry_dir(), label="shipped")])
    return [located.entry for located in shipped.entries()]


@pytest.fixture(scope="module")
def held_out(bench: types.ModuleType, entries: list[RegistryEntry]) -> list[typing.Any]:
    return list(bench.hold_out(entries, H200))


class PlantedClock:
    """Takes what a call returns for its microseconds."""

    def samples_us(self, call: Callable[[], object], repeats: int) -> list[float]:
        return [typing.cast("float", call())] * repeats


def test_an_entry_never_answers_for_itself(
    bench: types.ModuleType, entries: list[RegistryEntry], held_out: list[typing.Any]
) -> None:
    assert [one.entry for one in held_out] == entries
    for one in held_out:
        assert one.entry.range.covers(one.problem.shape)
        registry = bench.registry_without(entries, one.problem)
        left = [located.entry for located in registry.entries()]
        assert one.entry not in left
        # Nothing else was measured on the problem, and whatever was not is still there.
        assert len(left) == len(entries) - 1
        assert one.chosen.rung in ("nearest", "other features", "heuristic", "safe default")
        assert one.chosen.entry != one.entry
    assert any(one.chosen.rung == "nearest" for one in held_out)


def test_all_entries_that_cover_the_problem_are_held_out(bench: types.ModuleType, entries: list[RegistryEntry]) -> None:
    first = entries[0]
    wide = dataclasses.replace(first, range=dataclasses.replace(first.range, batch=Interval(lo=0, hi=99)))
    (one,) = bench.hold_out([first, wide, *entries[1:]], H200, match=str(next(bench.hold_out([first], H200)).problem))
    left = [located.entry for located in bench.registry_without([wide, *entries], one.problem).entries()]
    assert wide not in left
    assert first not in left


def test_filters(bench: types.ModuleType, entries: list[RegistryEntry]) -> None:
    backward = list(bench.hold_out(entries, H200, "backward"))
    assert {one.problem.spec.phase for one in backward} == {"backward"}
    others = [entry for entry in entries if entry.spec.phase != "backward"]
    assert sum(len(list(bench.hold_out(entries, H200, phase))) for phase in ("forward", "decode")) == len(others)
    assert all("d=256" in str(one.problem) for one in bench.hold_out(entries, H200, None, "d=256"))
    assert list(bench.hold_out(entries, named_target("H100"))) == []


def test_regret_is_what_the_choice_costs_over_the_entrys_own(
    bench: types.ModuleType, held_out: list[typing.Any]
) -> None:
    held = [one for one in held_out if one.entry.config not in (one.chosen.config, one.default)]
    slow, fast, unknown = [one for one in held if one.chosen.config != one.default][:3]
    us = {
        slow.problem: {slow.entry.config: 100.0, slow.chosen.config: 110.0, slow.default: 107.0},
        fast.problem: {fast.entry.config: 100.0, fast.chosen.config: 96.0, fast.default: 95.0},
        unknown.problem: {unknown.entry.config: 100.0},
    }

    def ratio(problem: Problem, config: KernelConfig, winner: KernelConfig) -> float | None:
        return us[problem][config] / us[problem][winner] if config in us[problem] else None

    rows = [bench.row_of(one, ratio) for one in (slow, fast, unknown)]
    assert [row.regret for row in rows] == [pytest.approx(0.10), pytest.approx(-0.04), None]
    # 110 for 107 is beyond the noise, 96 for 95 is not.
    assert [row.loses_to_default for row in rows] == [True, False, False]
    summary = bench.summary_of(rows)
    assert (summary["entries"], summary["timed"], summary["slower than the default"]) == (3, 2, 1)
    assert summary["mean regret"] == pytest.approx(0.05)
    assert summary["mean regret, signed"] == pytest.approx(0.03)
    assert summary["worst regret"] == pytest.approx(0.10)
    assert summary["mean regret of the default"] == pytest.approx(0.035)


def test_percentiles(bench: types.ModuleType) -> None:
    hundred = [float(i) for i in range(1, 101)]
    assert bench.percentile(hundred, 0.95) == 95
    assert bench.percentile(hundred[:20], 0.95) == 19
    assert bench.percentile([7.0], 0.95) == 7


def race(
    races: types.ModuleType, record: typing.Any, wanted: dict[Problem, list[KernelConfig]], times: Callable[..., float]
) -> list[Problem]:
    """Race what is wanted with planted times; return the problems in order."""
    raced = []

    def calls_of(
        problem: Problem, configs: Sequence[KernelConfig]
    ) -> tuple[dict[KernelConfig, Callable[[], object]], dict[KernelConfig, str]]:
        raced.append(problem)
        return {config: lambda c=config: times(problem, c) for config in configs}, {}

    ready = ((problem, configs, {}) for problem, configs in wanted.items())
    races.run_races(ready, record, H200, SOFTWARE, clock=PlantedClock(), calls_of=calls_of, target_ms=1.0)
    return raced


def test_a_run_goes_on_where_it_stopped(
    bench: types.ModuleType, races: types.ModuleType, held_out: list[typing.Any], tmp_path: Path
) -> None:
    path = tmp_path / "races.jsonl"
    record = races.Record(path)
    wanted = bench.missing_races(held_out, record.tried, everything=False)
    assert all(configs[0] == one.entry.config for one in held_out for configs in [wanted.get(one.problem)] if configs)
    # Nothing is raced against itself.
    assert all(len(set(configs)) == len(configs) > 1 for configs in wanted.values())

    def times(problem: Problem, config: KernelConfig) -> float:
        if len(path.read_text().splitlines() if path.exists() else []) == 5:
            raise KeyboardInterrupt
        return 50.0 if config == wanted[problem][0] else 51.0

    with pytest.raises(KeyboardInterrupt):
        race(races, record, wanted, times)
    # The machine went down within a line.
    with path.open("a") as file:
        file.write('{"problem": "b=1 hq')
    done = list(wanted)[:5]
    assert len(path.read_text().splitlines()) == 6
    again = races.Record(path)
    left = bench.missing_races(held_out, again.tried, everything=False)
    assert list(left) == list(wanted)[5:]
    assert race(races, again, left, lambda p, c: 50.0 if c == wanted[p][0] else 51.0) == list(left)
    read = races.Record(path)
    assert bench.missing_races(held_out, read.tried, everything=False) == {}
    rows = [bench.row_of(one, read.ratio) for one in held_out]
    assert all(row.regret in (0.0, pytest.approx(0.02)) for row in rows)
    assert {row.held.problem for row in rows if row.regret} <= set(wanted)
    assert len(done) == 5
    # A config that is asked for later is raced beside the winner again, and nothing else is.
    more = bench.missing_races(held_out, read.tried, everything=True)
    assert more
    assert all(not read.tried(problem) & set(configs[1:]) for problem, configs in more.items())


def test_what_failed_is_not_tried_again(
    bench: types.ModuleType, races: types.ModuleType, held_out: list[typing.Any], tmp_path: Path
) -> None:
    record = races.Record(tmp_path / "races.jsonl")
    wanted = bench.missing_races(held_out, record.tried, everything=False)
    problem, (own, *others) = next(iter(wanted.items()))
    ready = [(problem, [own], dict.fromkeys(others, "ptxas died"))]
    calls = {own: lambda: 1.0}
    races.run_races(
        ready, record, H200, SOFTWARE, clock=PlantedClock(), calls_of=lambda p, c: (calls, {}), target_ms=1.0
    )
    read = races.Record(tmp_path / "races.jsonl")
    assert problem not in bench.missing_races(held_out, read.tried, everything=False)
    assert read.ratio(problem, others[0], own) is None


def test_the_ladder_meets_its_figures_where_the_entries_know_the_times(
    bench: types.ModuleType, held_out: list[typing.Any]
) -> None:
    summary = bench.summary_of([bench.row_of(one, bench.known_ratio(held_out)) for one in held_out])
    assert summary["timed"] > 0.75 * summary["entries"]
    assert summary["mean regret"] <= 0.03
    assert summary["p95 regret"] <= 0.10
    assert summary["slower than the default"] == 0


def test_the_ladder_meets_its_figures_in_the_recorded_races(
    bench: types.ModuleType, races: types.ModuleType, held_out: list[typing.Any]
) -> None:
    ratio = races.Record(FOLDER / "leave_one_out.jsonl.xz").ratio
    summary = bench.summary_of([bench.row_of(one, ratio) for one in held_out])
    assert summary["timed"] >= 80
    assert summary["mean regret"] <= 0.03
    assert summary["p95 regret"] <= 0.1


def test_the_command(tmp_path: Path) -> None:
    def run(*words: str) -> str:
        command = [sys.executable, str(FOLDER / "leave_one_out.py"), "--match", "d=256 full", *words]
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout

    text = run()
    assert "mean regret: " in text
    assert "entries: " in text
    # No time is recorded in a file that is empty.
    (tmp_path / "none.jsonl").touch()
    document = json.loads(run("--results", str(tmp_path / "none.jsonl"), "--json"))
    same = [row for row in document["entries"] if row["chosen"] == row["winner"]]
    assert document["summary"]["timed"] == len(same) < document["summary"]["entries"]
    assert all(row["regret"] == 0 for row in same)


@pytest.mark.gpu
def test_recording(tmp_path: Path) -> None:
    path = tmp_path / "races.jsonl"
    command = [sys.executable, str(FOLDER / "leave_one_out.py"), "--record", str(path), "--target-ms", "5", "--json"]
    match = ["--match", "b=1 hq=16 hkv=16 sq=512 sk=512 forward d=64 full"]
    told = subprocess.run([*command, *match], capture_output=True, text=True, check=True)
    document = json.loads(told.stdout)
    assert document["summary"]["timed"] == document["summary"]["entries"]
    raced = [json.loads(line) for line in path.read_text().splitlines()]
    assert all(not race["failures"] and min(us for _, us in race["us"]) > 0 for race in raced)
    size = path.stat().st_size
    subprocess.run([*command, *match], capture_output=True, text=True, check=True)
    assert path.stat().st_size == size
