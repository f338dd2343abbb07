"""Recorded tables, and how near their optimum samplers come."""

from __future__ import annotations

import dataclasses
import importlib
import math
import subprocess
import sys
import types
import typing
from pathlib import Path

import pytest

from flashgen.errors import InputError

FOLDER = Path(__file__).parents[2] / "benchmarks" / "search"
TABLES = sorted((FOLDER / "tables").glob("*.json.xz"))


@pytest.fixture
def replay(monkeypatch: pytest.MonkeyPatch) -> types.ModuleType:
    monkeypatch.syspath_prepend(str(FOLDER))
    return importlib.import_module("replay")


@pytest.fixture
def table(replay: types.ModuleType) -> typing.Any:
    return replay.load_table(min(TABLES, key=lambda path: path.stat().st_size))


def test_a_table_is_read_as_it_was_written(replay: types.ModuleType, table: typing.Any, tmp_path: Path) -> None:
    failed = dict.fromkeys(list(table.rows)[:3], dataclasses.replace(next(iter(table.rows.values())), us=None))
    written = dataclasses.replace(table, rows={**table.rows, **failed})
    written.save(tmp_path / "one.json.xz")
    assert replay.load_table(tmp_path / "one.json.xz") == written
    assert dataclasses.replace(table, rows=failed).best_us == math.inf


def test_tables_of_other_formats_are_refused(
    replay: types.ModuleType, table: typing.Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("table.FORMAT", 2)
    table.save(tmp_path / "newer.json.xz")
    monkeypatch.undo()
    monkeypatch.syspath_prepend(str(FOLDER))
    with pytest.raises(InputError, match="format 2, this version reads 1; record it again"):
        replay.load_table(tmp_path / "newer.json.xz")


def test_what_fails_or_is_no_config_costs_an_evaluation(
    replay: types.ModuleType, table: typing.Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    table.save(path := tmp_path / "one.json.xz")
    in_order = sorted(table.rows, key=lambda config: table.rows[config].us, reverse=True)
    proposed = [in_order[0], None, in_order[0], in_order[1], in_order[-1]]
    monkeypatch.setitem(replay.SAMPLERS, "planned", lambda table, count, seed: iter(proposed))
    shares = [replay.replay(path, "planned", str(count), 0, 1) for count in (1, 3, 4, 5)]
    slowest, second = (table.best_us / table.rows[config].us for config in in_order[:2])
    assert shares == [slowest, slowest, max(slowest, second), 1.0]
    assert replay.replay(path, "random", "100%", 0, 1) == 1.0


def test_time_passes_as_recorded_and_each_binary_is_compiled_once(
    replay: types.ModuleType, table: typing.Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = next(iter(table.rows))
    same = [config for config in table.rows if config.kernel() == first.kernel()][:2]
    other = next(config for config in table.rows if config.kernel() != first.kernel())
    row = dataclasses.replace(table.rows[first], failure="", compile_s=6.0, measure_s=1.0)
    rows = {
        config: dataclasses.replace(row, us=us) for config, us in zip((*same, other), (40.0, 20.0, 10.0), strict=True)
    }
    dataclasses.replace(table, rows=rows).save(path := tmp_path / "one.json.xz")
    monkeypatch.setitem(replay.SAMPLERS, "planned", lambda table, count, seed: iter(rows))

    def share(seconds: str, cores: int) -> float:
        return typing.cast("float", replay.replay(path, "planned", seconds, 0, cores))

    # Two binaries of 6 s, three measurements of 1 s.
    assert [share(seconds, 1) for seconds in ("5s", "6s", "11s", "12s")] == [0.0, 0.5, 0.5, 1.0]
    assert [share(seconds, 100) for seconds in ("0.9s", "1s", "2s", "3s")] == [0.0, 0.25, 0.5, 1.0]


def test_the_search_comes_near_the_optimum(replay: types.ModuleType) -> None:
    # Half as many as --effort quick has, and less than 5% of each table.
    assert all(len(replay.load_table(path).rows) * 0.05 > 48 for path in TABLES)
    shares = [replay.replay(path, "flashgen", "48", 0, 1) for path in TABLES]
    assert math.prod(shares) ** (1 / len(shares)) >= 0.985
    assert min(shares) >= 0.95


def test_the_command() -> None:
    words = ["--samplers", "random,tpe", "--evaluations", "1%", "--seeds", "1"]
    told = subprocess.run([sys.executable, FOLDER / "replay.py", *words], capture_output=True, text=True, check=True)
    lines = told.stdout.splitlines()
    assert [line.split()[:2] for line in lines[:3]] == [["sampler", "evaluations"], ["random", "1%"], ["tpe", "1%"]]
    assert len(lines[1].split()) == 4 + len(TABLES)
    wrong = subprocess.run(
        [sys.executable, FOLDER / "replay.py", "--samplers", "luck"], capture_output=True, text=True, check=False
    )
    assert wrong.returncode == 2
    assert "unknown samplers luck; there are flashgen" in wrong.stderr


def test_many_workers_replay_a_table_over_a_journal() -> None:
    words = ["--storages", "journal", "--workers", "3", "--processes", "2"]
    words += ["--scale", "0.05", "--seconds", "4", "--ramp", "2"]
    told = subprocess.run(
        [sys.executable, FOLDER / "many_workers.py", *words], capture_output=True, text=True, check=True
    )
    header, row = told.stdout.splitlines()[1:]
    assert header.split()[:3] == ["storage", "workers", "trials/s"]
    assert row.split()[:2] == ["journal", "3"]
    assert float(row.split()[2]) > 0
