"""What processes leave to later ones: found by its key, refused when damaged or when its sources changed."""

from __future__ import annotations

import os
import time
from pathlib import Path

import pytest

import flashgen
from flashgen.storage import is_still, keep, read_kept, tree_stamp


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("FLASHGEN_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.fixture
def code(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder of files that were there when this process loaded flashgen."""
    folder = tmp_path / "code"
    (folder / "inner").mkdir(parents=True)
    (folder / "a.py").write_text("a")
    (folder / "inner" / "b.py").write_text("b")
    monkeypatch.setattr(flashgen, "loaded_ns", time.time_ns() + 10**9)
    tree_stamp.cache_clear()
    return folder


def test_what_was_kept_is_found_by_its_key(cache: Path) -> None:
    assert read_kept("texts", "one") is None
    keep("texts", "one", "first\nünï")
    keep("texts", "two", "")
    assert (read_kept("texts", "one"), read_kept("texts", "two"), read_kept("others", "one")) == (
        "first\nünï",
        "",
        None,
    )
    keep("texts", "one", "second")
    assert read_kept("texts", "one") == "second"
    assert len([*(cache / "texts").iterdir()]) == 2


@pytest.mark.parametrize("damage", [lambda d: d[:-1], lambda d: d[:5], lambda d: b"", lambda d: d[:-1] + b"\xff"])
def test_damage_is_nothing(cache: Path, damage: object) -> None:
    keep("texts", "one", "the text")
    (path,) = (cache / "texts").iterdir()
    path.write_bytes(damage(path.read_bytes()))  # type: ignore[operator]
    assert read_kept("texts", "one") is None
    path.unlink()
    path.mkdir()
    assert read_kept("texts", "one") is None


def test_a_cache_that_cannot_be_written_is_none(cache: Path) -> None:
    cache.write_text("a file where the folder should be")
    keep("texts", "one", "the text")
    assert read_kept("texts", "one") is None


def changed(folder: Path, name: str) -> None:
    match name:
        case "size":
            (folder / "a.py").write_text("aa")
        case "time":
            os.utime(folder / "a.py", ns=(0, 5))
        case "replaced":
            old = (folder / "inner" / "b.py").stat()
            (folder / "new").write_text("c")
            os.utime(folder / "new", ns=(old.st_atime_ns, old.st_mtime_ns))
            (folder / "new").replace(folder / "inner" / "b.py")
        case "more":
            (folder / "inner" / "c.py").write_text("")
        case "fewer":
            (folder / "a.py").unlink()


@pytest.mark.parametrize("name", ["size", "time", "replaced", "more", "fewer"])
def test_a_change_of_a_file_changes_the_stamp(code: Path, name: str) -> None:
    before = tree_stamp(str(code))
    assert before is not None
    assert is_still(before, str(code))
    changed(code, name)
    assert not is_still(before, str(code))
    tree_stamp.cache_clear()
    assert tree_stamp(str(code)) not in (before, None)


def test_bytecode_is_no_source(code: Path) -> None:
    before = tree_stamp(str(code))
    (code / "__pycache__").mkdir()
    (code / "__pycache__" / "a.pyc").write_text("")
    assert before is not None
    assert is_still(before, str(code))


def test_files_that_changed_since_flashgen_was_loaded_have_no_stamp(
    code: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    newest = max(path.stat().st_ctime_ns for path in code.rglob("*.py"))
    monkeypatch.setattr(flashgen, "loaded_ns", newest)
    assert tree_stamp(str(code)) is None
    # An old time does not hide it: the system's own says when the file was written.
    for path in code.rglob("*.py"):
        os.utime(path, ns=(0, 0))
    tree_stamp.cache_clear()
    assert tree_stamp(str(code)) is None


def test_a_folder_that_is_not_there_has_no_stamp(code: Path) -> None:
    assert tree_stamp(str(code), str(code / "missing")) is None
