"""Compiled kernels that an earlier process left in Triton's disk cache, found without asking Triton for its key.

Triton's key hashes all of Triton, its compiler's library included, runs the assembler for its version and parses the
kernels: half a second, once a process. What says here that nothing of it changed are the sizes and times of the files.
Anything that steps between source and binary (an assembler of the user's own, overrides, hooks) leads past this.
"""

from __future__ import annotations

import dataclasses
import logging
import os
import re
import typing
from collections.abc import Mapping

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import CompiledKernel, make_backend
from triton.compiler.compiler import AsmDict
from triton.runtime.cache import get_cache_manager

from flashgen.codegen import RenderedKernel
from flashgen.resources import names_assembler
from flashgen.storage import is_still, keep, own_folders, read_kept, tree_stamp

logger = logging.getLogger("flashgen")

_FOLDER = "binaries"
_BINARY = ".cubin"
_TRITON = os.path.dirname(triton.__file__)
_ASSEMBLERS = ("ptxas", "ptxas_blackwell")
# Settings under which Triton does more than to read its cache.
_STEPS_BETWEEN = ("always_compile", "override", "dump_ir", "use_ir_loc", "listener")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Recipe:
    """All that a binary is made of, besides Triton and its settings.

    Attributes:
        rendered: the module.
        entry: name of the kernel in it.
        signature: type of every argument by name, in the order of the kernel.
        constants: values of the compile-time ones.
        alignment: of the others, in Triton's words.
        options: of the launch.
        target: in Triton's words.
    """

    rendered: RenderedKernel
    entry: str
    signature: Mapping[str, str]
    constants: Mapping[str, int]
    alignment: Mapping[tuple[int], list[list[object]]]
    options: Mapping[str, object]
    target: GPUTarget


@dataclasses.dataclass(frozen=True, kw_only=True)
class KernelFace:
    """What Triton's launcher asks of a kernel's function; reading the function itself takes 20 ms."""

    __name__: str
    arg_names: tuple[str, ...]
    launch_metadata: None = None


class _Texts(AsmDict):  # type: ignore[misc]
    """What Triton made on the way to a binary, read when it is asked for: to read it all takes half of the time."""

    def __init__(self, known: Mapping[str, object], files: Mapping[str, str]) -> None:
        super().__init__(known)
        self._files = {file.rpartition(".")[2]: path for file, path in files.items()}

    def __missing__(self, key: str) -> object:
        if key not in self._files:
            return super().__missing__(key)
        with open(self._files[key], encoding="utf-8") as file:
            self[key] = file.read()
        return self[key]


def binary_key(recipe: Recipe) -> str | None:
    """Return the key of a binary, which holds all that it depends on; None where that cannot be said."""
    try:
        stamp = tree_stamp(*_made_by())
        if stamp is None or recipe.target.backend != "cuda" or _is_stepped_into():
            return None
        options = make_backend(recipe.target).parse_options(dict(recipe.options))
        parts = (
            stamp,
            triton.__version__,
            recipe.rendered.digest,
            recipe.rendered.source,
            recipe.entry,
            [*recipe.signature.items()],
            sorted(recipe.constants.items()),
            sorted(recipe.alignment.items()),
            recipe.target,
            options.hash(),
            sorted(triton._C.libtriton.get_cache_invalidating_env_vars().items()),
        )
    except Exception as error:
        # Whatever another version does differently, the public way stands.
        logger.debug("no key for a compiled kernel: %s: %s", type(error).__name__, error)
        return None
    return repr(parts)


def _made_by() -> tuple[str, ...]:
    return (_TRITON, *own_folders())


def _is_stepped_into() -> bool:
    knobs = triton.knobs
    return (
        any(getattr(knobs.compilation, name, None) for name in _STEPS_BETWEEN)
        or knobs.runtime.add_stages_inspection_hook is not None
        or knobs.nvidia.mock_ptx_version is not None
        # Not the values of these settings: reading one runs the assembler.
        or any(name in vars(knobs.nvidia) for name in _ASSEMBLERS)
        or names_assembler()
    )


def stored_kernel(key: str, recipe: Recipe, make_source: typing.Any) -> typing.Any:
    """Return Triton's compiled kernel for a key that `keep_kernel` was given once, or None."""
    found = read_kept(_FOLDER, key)
    if found is None or not re.fullmatch("[0-9a-f]{64}", found):
        return None
    try:
        name = f"{recipe.entry[:150]}.json"
        files = get_cache_manager(found).get_group(name)
        if not files or name not in files:
            return None
        needed = {file: path for file, path in files.items() if file.endswith((".json", _BINARY))}
        face = KernelFace(__name__=recipe.entry, arg_names=tuple(recipe.signature))
        source = make_source(face, dict(recipe.signature), dict(recipe.constants), dict(recipe.alignment))
        handle = CompiledKernel(source, needed, found)
        handle.asm = _Texts(handle.asm, files)
        return handle
    except Exception as error:
        # A file that is gone or damaged: Triton compiles it again.
        logger.debug("a compiled kernel is not read: %s: %s", type(error).__name__, error)
        return None


def keep_kernel(key: str, recipe: Recipe, handle: typing.Any) -> None:
    """Let later processes find what Triton has compiled, or found, by the key that it had before and has still."""
    stamp = tree_stamp(*_made_by())
    if stamp is not None and is_still(stamp, *_made_by()) and key == binary_key(recipe):
        keep(_FOLDER, key, str(handle.hash))
