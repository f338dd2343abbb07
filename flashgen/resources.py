"""Where flashgen finds its data files and keeps its caches; the only module that reads the environment.

Variables: `FLASHGEN_REGISTRY` (extra registry files or folders, separated as in PATH), `FLASHGEN_CACHE` (folder for
rendered sources, studies and indexes), `FLASHGEN_INTERPRET` (1: run CPU tensors through Triton's interpreter).
Of Triton's own it looks whether an assembler is named. Nothing here runs at import.
"""

from __future__ import annotations

import os
from pathlib import Path

import platformdirs

_PACKAGE = Path(__file__).parent


def resource_dir(name: str) -> Path:
    """Return the folder `templates` or `search_spaces`: inside the package in a wheel, beside it in a checkout."""
    inside = _PACKAGE / name
    return inside if inside.is_dir() else _PACKAGE.parent / name


def module_source(name: str) -> str:
    """Return the source of the flashgen module with this dotted name, without importing it."""
    return _PACKAGE.parent.joinpath(*name.split(".")).with_suffix(".py").read_text(encoding="utf-8")


def shipped_registry_dir() -> Path:
    """Return the folder of tuned entries that ship with the package."""
    return _PACKAGE / "tuned"


def cache_dir() -> Path:
    """Return the cache folder (FLASHGEN_CACHE, else the platform's user cache); it may not exist yet."""
    override = os.environ.get("FLASHGEN_CACHE")
    return Path(override) if override else Path(platformdirs.user_cache_dir("flashgen", appauthor=False))


def user_registry_dir() -> Path:
    """Return the folder where `flashgen tune` keeps the user's own entries; it may not exist yet."""
    return Path(platformdirs.user_data_dir("flashgen", appauthor=False)) / "registry"


def registry_override() -> tuple[Path, ...]:
    """Return the files and folders named by FLASHGEN_REGISTRY, in order; empty when it is not set."""
    value = os.environ.get("FLASHGEN_REGISTRY", "")
    return tuple(Path(part) for part in value.split(os.pathsep) if part)


def names_assembler() -> bool:
    """Return whether Triton is told to use another assembler than its own."""
    return any(os.environ.get(name) is not None for name in ("TRITON_PTXAS_PATH", "TRITON_PTXAS_BLACKWELL_PATH"))


def interpret_requested() -> bool:
    """Return whether FLASHGEN_INTERPRET asks for Triton's interpreter on CPU tensors."""
    return os.environ.get("FLASHGEN_INTERPRET", "") not in ("", "0")
