"""What ships speaks of the code that ships: a template change that makes an entry stale needs another tuning run."""

from __future__ import annotations

from flashgen.codegen.constraints import check_config
from flashgen.dispatch import is_stale
from flashgen.registry import Location, load
from flashgen.resources import shipped_registry_dir
from flashgen.target import named_target


def test_shipped_entries_are_fresh_and_legal() -> None:
    registry = load([Location(path=shipped_registry_dir(), label="shipped")])
    assert registry.issues == ()
    entries = [located.entry for located in registry.entries()]
    assert entries
    for entry in entries:
        assert entry.origin == "measured"
        assert is_stale(entry) is None, f"{entry.spec} [{entry.range}]"
        assert check_config(entry.config, entry.spec, named_target(entry.device_name)) == ()
