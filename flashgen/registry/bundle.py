"""Tuned entries that travel with a model's weights."""

from __future__ import annotations

import typing
from pathlib import Path

from flashgen.errors import RegistryError
from flashgen.registry.entry import RegistryEntry
from flashgen.registry.files import write_entries
from flashgen.registry.locations import BUNDLE_FOLDER


def export_bundle(entries: typing.Iterable[RegistryEntry], model_dir: Path | str) -> tuple[Path, ...]:
    """Merge `entries` into `MODEL_DIR/flashgen`, where `use_bundle` finds them, and return the files.

    Raises:
        RegistryError: if `model_dir` is no folder, or for what `write_entries` refuses.
    """
    if not Path(model_dir).is_dir():
        raise RegistryError(f"{model_dir}: no such folder; give the one that holds the model's weights")
    return write_entries(Path(model_dir) / BUNDLE_FOLDER, entries)
