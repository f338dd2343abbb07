"""Where attention problems come from, and where flashgen plugs in: model files, presets, PyTorch and its ranks."""

from __future__ import annotations

import importlib
import typing

from flashgen.integrations.model_config import ModelProblems, problems_from_config, read_model_config
from flashgen.integrations.model_decoding import decoding_from_config
from flashgen.integrations.presets import load_presets, preset

if typing.TYPE_CHECKING:
    from flashgen.integrations.distributed import RankMismatchError, check_ranks
    from flashgen.integrations.torch_flash import register as register_torch_flash

__all__ = [
    "ModelProblems",
    "RankMismatchError",
    "check_ranks",
    "decoding_from_config",
    "load_presets",
    "preset",
    "problems_from_config",
    "read_model_config",
    "register_torch_flash",
]

# They load torch, which model files and presets do without.
_NEEDS_TORCH = {
    "RankMismatchError": ("distributed", "RankMismatchError"),
    "check_ranks": ("distributed", "check_ranks"),
    "register_torch_flash": ("torch_flash", "register"),
}


def __getattr__(name: str) -> typing.Any:
    if name not in _NEEDS_TORCH:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}; it has {', '.join(__all__)}")
    module, attribute = _NEEDS_TORCH[name]
    return getattr(importlib.import_module(f"flashgen.integrations.{module}"), attribute)
