"""Where registry files are looked for, and in which order."""

from __future__ import annotations

import dataclasses
import os
import threading
import typing
from pathlib import Path

from flashgen import resources
from flashgen.errors import RegistryError
from flashgen.registry.index import load_indexed

Label = typing.Literal["argument", "environment", "bundle", "user", "shipped"]

BUNDLE_FOLDER = "flashgen"


@dataclasses.dataclass(frozen=True, kw_only=True)
class Location:
    """A registry file, or a folder of `*.yaml`, and why it is searched."""

    path: Path
    label: Label

    def exists(self) -> bool:
        """Return whether there is anything at the path; what may not be looked into does not exist."""
        return os.path.exists(self.path)

    def files(self) -> tuple[Path, ...]:
        """Return the files to read: those of the folder by name, or the path itself if it is no folder."""
        return _yaml_files(self.path) if os.path.isdir(self.path) else (self.path,)


@dataclasses.dataclass
class _SearchPath:
    bundles: tuple[Path, ...] = ()
    generation: int = 0


_search_path = _SearchPath()
_search_path_lock = threading.Lock()


def search_locations(explicit: Path | None = None) -> tuple[Location, ...]:
    """Return the places to search, first one first.

    The order: `explicit`, FLASHGEN_REGISTRY, bundles of `use_bundle` (latest first), the user's folder, the entries
    that ship with flashgen.
    """
    found: list[tuple[Path, Label]] = [] if explicit is None else [(explicit, "argument")]
    found += [(path, "environment") for path in resources.registry_override()]
    found += [(path, "bundle") for path in _search_path.bundles]
    found += [(resources.user_registry_dir(), "user"), (resources.shipped_registry_dir(), "shipped")]
    return tuple(Location(path=path, label=label) for path, label in found)


def use_bundle(model_dir: Path | str) -> Path:
    """Search the entries that ship beside a model, `MODEL_DIR/flashgen/*.yaml`, before the user's own.

    Calling it again moves the bundle to the front.

    Returns:
        The bundle's folder.

    Raises:
        RegistryError: if the folder holds no registry file, or no sound entry.
    """
    folder = Path(model_dir).absolute() / BUNDLE_FOLDER
    files = _yaml_files(folder)
    if not files:
        raise RegistryError(f"{folder}: no registry file (*.yaml) there; `flashgen export` writes them beside a model")
    loaded = [load_indexed(path) for path in files]
    if not any(file.entries() for file in loaded):
        reasons = "; ".join(str(issue) for file in loaded for issue in file.issues) or "no entries"
        raise RegistryError(f"{folder}: no usable entry in this bundle: {reasons}; export it again")
    with _search_path_lock:
        _search_path.bundles = (folder, *(known for known in _search_path.bundles if known != folder))
        _search_path.generation += 1
    return folder


def clear_bundles() -> None:
    """Forget every bundle of `use_bundle`."""
    with _search_path_lock:
        _search_path.bundles = ()
        _search_path.generation += 1


def entries_changed() -> None:
    """Say that this process wrote entries: what was looked up before is stale."""
    with _search_path_lock:
        _search_path.generation += 1


def generation() -> int:
    """Return a number that changes when this process changes bundles or entries: what was looked up before is stale."""
    return _search_path.generation


def _yaml_files(folder: Path) -> tuple[Path, ...]:
    return tuple(sorted(folder.glob("*.yaml")))
