"""Rendered source as an importable file: Triton reads kernels through `inspect`, so they must lie on disk."""

from __future__ import annotations

import functools
import hashlib
import importlib.util
import os
import tempfile
import types
import typing
from pathlib import Path

from flashgen.codegen import RenderedKernel
from flashgen.resources import cache_dir


def source_path(rendered: RenderedKernel) -> Path:
    """Return the file that holds a rendered module, writing it if need be; equal sources share one file."""
    text_hash = hashlib.sha256(rendered.source.encode()).hexdigest()[:8]
    path = cache_dir() / "kernels" / f"{rendered.entry_point}_{rendered.digest}_{text_hash}.py"
    if not path.exists():
        path.parent.mkdir(parents=True, exist_ok=True)
        # Written aside and renamed: other processes may import the same file at this moment.
        handle, temporary = tempfile.mkstemp(dir=path.parent, suffix=".tmp")
        try:
            with os.fdopen(handle, "w", encoding="utf-8") as file:
                file.write(rendered.source)
            os.replace(temporary, path)
        except BaseException:
            Path(temporary).unlink(missing_ok=True)
            raise
    return path


def load_kernel(rendered: RenderedKernel, name: str | None = None) -> typing.Any:
    """Return a `@triton.jit` function of a rendered module, its entry point unless named; imported from the cache."""
    return getattr(_load_module(rendered), name or rendered.entry_point)


@functools.lru_cache(maxsize=256)
def _load_module(rendered: RenderedKernel) -> types.ModuleType:
    return _import_file(source_path(rendered))


@functools.lru_cache(maxsize=256)
def _import_file(path: Path) -> types.ModuleType:
    spec = importlib.util.spec_from_file_location(f"flashgen_rendered.{path.stem}", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module
