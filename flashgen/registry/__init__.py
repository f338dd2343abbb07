"""Tuned winners on disk: YAML for people, a JSON index for machines.

Importing this package imports neither yaml nor pydantic: what needs them is loaded when first asked for.
"""

from __future__ import annotations

import importlib
import typing

from flashgen.registry.comparing import Difference, compare
from flashgen.registry.contents import FileContents, FileIssue, shown_path
from flashgen.registry.entry import (
    Accuracy,
    Interval,
    MeasuredRange,
    Origin,
    Performance,
    Provenance,
    RegistryEntry,
    RunnerUp,
)
from flashgen.registry.index import IndexedFile, forgotten_indexes, load_indexed
from flashgen.registry.locations import (
    BUNDLE_FOLDER,
    Location,
    clear_bundles,
    generation,
    search_locations,
    use_bundle,
)
from flashgen.registry.merging import merge
from flashgen.registry.registry import FileDigest, Located, Registry, load

if typing.TYPE_CHECKING:
    from flashgen.registry.bundle import export_bundle
    from flashgen.registry.files import file_name, read_file, remove_entries, write_entries
    from flashgen.registry.schema import json_schema

__all__ = [
    "BUNDLE_FOLDER",
    "Accuracy",
    "Difference",
    "FileContents",
    "FileDigest",
    "FileIssue",
    "IndexedFile",
    "Interval",
    "Located",
    "Location",
    "MeasuredRange",
    "Origin",
    "Performance",
    "Provenance",
    "Registry",
    "RegistryEntry",
    "RunnerUp",
    "clear_bundles",
    "compare",
    "export_bundle",
    "file_name",
    "forgotten_indexes",
    "generation",
    "json_schema",
    "load",
    "load_indexed",
    "merge",
    "read_file",
    "remove_entries",
    "search_locations",
    "shown_path",
    "use_bundle",
    "write_entries",
]

_NEEDS_YAML = {
    "export_bundle": "flashgen.registry.bundle",
    "file_name": "flashgen.registry.files",
    "json_schema": "flashgen.registry.schema",
    "read_file": "flashgen.registry.files",
    "remove_entries": "flashgen.registry.files",
    "write_entries": "flashgen.registry.files",
}


def __getattr__(name: str) -> object:
    if name not in _NEEDS_YAML:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(_NEEDS_YAML[name]), name)
