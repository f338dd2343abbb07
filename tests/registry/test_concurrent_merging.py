"""Several processes that merge into one folder at once, and a reader beside them: nothing is lost, nothing is torn."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

from flashgen.registry import RegistryEntry, load_indexed, merge, read_file, write_entries

NAME = "nvidia_h200.forward.yaml"
WRITERS = 4
MERGE = "from flashgen.cli import main; main()"


def test_merging_commands_at_once_lose_nothing(tmp_path: Path, make_entry: Callable[..., RegistryEntry]) -> None:
    # Each has entries of its own, and its version of one that all have; the last of these is the best.
    parts = []
    for writer in range(WRITERS):
        own = [make_entry(16 * (1 + writer + WRITERS * i)) for i in range(5)]
        parts.append([*own, make_entry(8192, median_us=10.0 + writer, date=f"2026-11-22T07:00:0{writer}Z")])
        write_entries(tmp_path / f"from{writer}", parts[-1])
    everything = merge([entry for part in parts for entry in part], ())
    to = tmp_path / "to"
    writers = [
        subprocess.Popen(
            [sys.executable, "-c", MERGE, "registry", "merge", tmp_path / f"from{writer}", "--to", to],
            stdout=subprocess.DEVNULL,
        )
        for writer in range(WRITERS)
    ]
    seen: set[RegistryEntry] = set()
    try:
        while any(writer.poll() is None for writer in writers):
            if not (to / NAME).exists():
                continue
            contents, indexed = read_file(to / NAME), load_indexed(to / NAME)
            assert contents.issues == indexed.issues == ()
            keys = {entry.key() for entry in contents.entries}
            assert {entry.key() for entry in seen} <= keys <= {entry.key() for entry in everything}
            seen = set(contents.entries)
    finally:
        for writer in writers:
            writer.wait(60)
    assert [writer.returncode for writer in writers] == [0] * WRITERS
    assert read_file(to / NAME).entries == load_indexed(to / NAME).entries() == everything
    assert everything[-1].performance.median_us == 10.0 + WRITERS - 1


def test_the_files_do_not_depend_on_who_came_first(tmp_path: Path, make_entry: Callable[..., RegistryEntry]) -> None:
    parts = [[make_entry(128), make_entry(256, date="2026-11-22T08:00:00Z")], [make_entry(256), make_entry(512)]]
    for folder, order in (("a", parts), ("b", parts[::-1]), ("c", [parts[0] + parts[1]]), ("d", parts + parts)):
        for part in order:
            write_entries(tmp_path / folder, part)
    assert len({(tmp_path / folder / NAME).read_bytes() for folder in "abcd"}) == 1
