"""Public functions without registries of the user's, and without what earlier calls left in memory."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from flashgen.ops import backward_op, cpu, decode_op, functional, kvcache_calls, lengths, reading, runtime, torch_op
from flashgen.registry import clear_bundles


@pytest.fixture(autouse=True)
def _fresh_process(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setenv("FLASHGEN_CACHE", str(tmp_path / "cache"))
    monkeypatch.delenv("FLASHGEN_REGISTRY", raising=False)
    monkeypatch.setattr("flashgen.resources.user_registry_dir", lambda: tmp_path / "user")
    monkeypatch.setattr("flashgen.resources.shipped_registry_dir", lambda: tmp_path / "shipped")
    clear_bundles()
    runtime._load_registry.cache_clear()
    torch_op._memo.clear()
    torch_op._recent.clear()
    functional._recent.clear()
    backward_op._memo.clear()
    decode_op._memo.clear()
    kvcache_calls._recent.clear()
    cpu.say_eager.cache_clear()
    lengths._known.clear()
    reading._known.clear()
    yield
    clear_bundles()
    torch_op._memo.clear()
    torch_op._recent.clear()
    functional._recent.clear()
    backward_op._memo.clear()
    decode_op._memo.clear()
    kvcache_calls._recent.clear()
