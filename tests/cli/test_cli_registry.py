"""`flashgen registry diff`, `merge`, `verify` and `gc`, and `flashgen schema`."""

from __future__ import annotations

import dataclasses
import json
import typing
from pathlib import Path

import jsonschema
import pytest
import yaml

from flashgen.registry import RegistryEntry, load_indexed, read_file, write_entries
from flashgen.registry.index import index_path
from flashgen.spec import parse_problem

SHIPPED = Path(__file__).parents[2] / "flashgen" / "tuned"


def other(entry: RegistryEntry) -> RegistryEntry:
    """Return an entry for another spec."""
    return dataclasses.replace(entry, spec=parse_problem("h=1 s=1 d=64 full fp16").spec)


def faster(entry: RegistryEntry) -> RegistryEntry:
    """Return a later entry for the same."""
    performance = dataclasses.replace(entry.performance, median_us=17.0)
    provenance = dataclasses.replace(entry.provenance, date="2026-12-01T00:00:00Z")
    return dataclasses.replace(entry, performance=performance, provenance=provenance)


def damaged(folder: Path) -> Path:
    (path,) = folder.glob("*.yaml")
    path.write_text(path.read_text().replace("median_us: 20.0", "median_us: 19.0"))
    return path


@pytest.mark.parametrize("action", ["diff", "merge", "verify", "gc"])
def test_help_teaches_by_example(run: typing.Any, action: str) -> None:
    assert f"Example: flashgen registry {action}" in run("registry", action, "--help").stdout


def test_diff_names_what_was_added_removed_and_changed(run: typing.Any, tuned: Path, entry: RegistryEntry) -> None:
    new = tuned.with_name("new")
    write_entries(new, [faster(entry), other(entry)])
    result = run("registry", "diff", tuned, new)
    assert result.exit_code == 0
    rows = [line.split() for line in result.stdout.splitlines() if line.split()[:1] in (["changed"], ["added"])]
    assert sorted(row[0] for row in rows) == ["added", "changed"]
    found = json.loads(run("registry", "diff", new, tuned, "--json").stdout)["differences"]
    assert sorted(difference["kind"] for difference in found) == ["changed", "removed"]
    (changed,) = (difference for difference in found if difference["kind"] == "changed")
    assert (changed["old"]["performance"]["median_us"], changed["new"]["performance"]["median_us"]) == (17.0, 20.0)
    (removed,) = (difference for difference in found if difference["kind"] == "removed")
    assert removed["new"] is None


def test_diff_of_equals_is_nothing(run: typing.Any, tuned: Path) -> None:
    result = run("registry", "diff", tuned, next(tuned.glob("*.yaml")))
    assert (result.exit_code, result.stdout) == (0, "")
    assert "no difference: 1 entries in each" in result.stderr


def test_merge_does_not_depend_on_the_order(run: typing.Any, tuned: Path, entry: RegistryEntry, tmp_path: Path) -> None:
    new = tmp_path / "new"
    write_entries(new, [faster(entry), other(entry)])
    for order, to in (((tuned, new), "a"), ((new, tuned), "b")):
        assert run("registry", "merge", *order, "--to", tmp_path / to).exit_code == 0
    (first,), (second,) = ((tmp_path / to).glob("*.yaml") for to in "ab")
    assert first.read_bytes() == second.read_bytes()
    assert set(read_file(first).entries) == {faster(entry), other(entry)}
    # What is merged again changes nothing.
    assert run("registry", "merge", new, "--to", tmp_path / "a").exit_code == 0
    assert first.read_bytes() == second.read_bytes()


def test_merge_goes_to_the_users_own_registry(run: typing.Any, tuned: Path, tmp_path: Path) -> None:
    result = run("registry", "merge", tuned)
    assert result.exit_code == 0
    assert f"wrote {tmp_path / 'user'}" in result.stdout


def test_what_cannot_be_read_is_said_and_the_rest_merged(
    run: typing.Any, tuned: Path, entry: RegistryEntry, tmp_path: Path
) -> None:
    write_entries(tmp_path / "sound", [other(entry)])
    path = damaged(tuned)
    result = run("registry", "merge", tuned, tmp_path / "sound", "--to", tmp_path / "to")
    assert result.exit_code == 1
    assert f"skipped: {path}:" in result.stderr
    assert "edited by hand or damaged" in result.stderr
    (written,) = (tmp_path / "to").glob("*.yaml")
    assert read_file(written).entries == (other(entry),)


def test_merge_into_a_damaged_file_leaves_it_alone(
    run: typing.Any, tuned: Path, entry: RegistryEntry, tmp_path: Path
) -> None:
    write_entries(tmp_path / "sound", [other(entry)])
    path = damaged(tuned)
    before = path.read_bytes()
    result = run("registry", "merge", tmp_path / "sound", "--to", tuned)
    assert result.exit_code == 1
    assert "the file was left untouched" in result.stderr
    assert path.read_bytes() == before


@pytest.mark.parametrize("action", [("diff", "no/such", "no/such"), ("merge", "no/such"), ("verify", "no/such")])
def test_a_path_that_is_not_there_is_bad_usage(run: typing.Any, action: tuple[str, ...], tmp_path: Path) -> None:
    result = run("registry", *action)
    assert result.exit_code == 2
    assert "no such file or folder; name a registry file or a folder of them" in result.stderr
    empty = run("registry", "verify", tmp_path)
    assert empty.exit_code == 2
    assert "no *.yaml in this folder" in empty.stderr


def test_verify_counts_and_names_lines(run: typing.Any, tuned: Path, stale_entry: RegistryEntry) -> None:
    assert run("registry", "verify", tuned).exit_code == 0
    write_entries(tuned, [dataclasses.replace(other(stale_entry))])
    (document,) = json.loads(run("registry", "verify", tuned, "--json").stdout)["files"]
    assert (document["entries"], document["stale"], document["skipped"]) == (2, 1, [])
    damaged(tuned)
    result = run("registry", "verify", tuned)
    assert result.exit_code == 1
    assert "skipped: " in result.stderr


def test_verify_looks_where_calls_look(run: typing.Any, entry: RegistryEntry, tmp_path: Path) -> None:
    nothing = run("registry", "verify")
    assert nothing.exit_code == 0
    assert "no registry file on the search path" in nothing.stderr
    (path,) = write_entries(tmp_path / "user", [entry])
    assert str(path) in run("registry", "verify").stdout


def test_gc_removes_what_no_call_uses(
    run: typing.Any, entry: RegistryEntry, stale_entry: RegistryEntry, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("FLASHGEN_CACHE", str(tmp_path / "cache"))
    folder, gone = tmp_path / "user", tmp_path / "gone"
    (path,) = write_entries(folder, [entry, other(stale_entry)])
    (lost,) = write_entries(gone, [entry])
    for each in (path, lost):
        load_indexed(each)
    lost.unlink()
    before = path.read_bytes()
    dry = run("registry", "gc", "--dry-run")
    assert (dry.exit_code, path.read_bytes()) == (0, before)
    assert "would remove 1 stale entries and 1 indexes" in dry.stderr
    assert index_path(lost).exists()
    result = run("registry", "gc")
    assert result.exit_code == 0
    assert read_file(path).entries == (entry,)
    assert index_path(path).exists()
    assert not index_path(lost).exists()
    # Twice is once.
    assert "removed 0 stale entries and 0 indexes" in run("registry", "gc").stderr


def test_gc_removes_a_file_that_nothing_is_left_in(run: typing.Any, stale_entry: RegistryEntry, tmp_path: Path) -> None:
    (path,) = write_entries(tmp_path / "mine", [stale_entry])
    document = json.loads(run("registry", "gc", tmp_path / "mine", "--json").stdout)
    assert [e["file"] for e in document["entries"]] == [str(path)]
    assert not path.exists()


def test_gc_leaves_damaged_files_alone(run: typing.Any, tuned: Path, stale_entry: RegistryEntry) -> None:
    write_entries(tuned, [other(stale_entry)])
    path = damaged(tuned)
    before = path.read_bytes()
    result = run("registry", "gc", tuned)
    assert (result.exit_code, path.read_bytes()) == (1, before)


def test_gc_without_a_registry_has_nothing_to_do(run: typing.Any) -> None:
    assert run("registry", "gc").exit_code == 0


def test_the_schema_accepts_what_ships_and_refuses_the_rest(run: typing.Any) -> None:
    schema = json.loads(run("schema").stdout)
    jsonschema.Draft202012Validator.check_schema(schema)
    validator = jsonschema.Draft202012Validator(schema)
    files = [yaml.safe_load(path.read_text()) for path in SHIPPED.glob("*.yaml")]
    assert len(files) >= 2
    for content in files:
        validator.validate(content)
    content = files[0]
    for broken in (
        {**content, "format": 2},
        {**content, "entries": [{**content["entries"][0], "winner": "yes"}]},
        {**content, "entries": [{k: v for k, v in content["entries"][0].items() if k != "digest"}]},
        {**content, "phase": "sideways"},
    ):
        assert not validator.is_valid(broken)
