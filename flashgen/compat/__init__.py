"""Other packages' functions, by their own names and signatures, run by flashgen's kernels."""

from __future__ import annotations

import importlib
import typing

if typing.TYPE_CHECKING:
    from flashgen.compat import flash_attn as flash_attn

__all__ = ["flash_attn"]


def __getattr__(name: str) -> typing.Any:
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}; it has {', '.join(__all__)}")
    return importlib.import_module(f"{__name__}.{name}")
