"""Where attention problems come from, and where flashgen plugs in: model files, presets, PyTorch's own functions."""

from __future__ import annotations

import importlib
import typing

from flashgen.integrations.model_config import ModelProblems, problems_from_config, read_model_config
from flashgen.integrations.presets import load_presets, preset

if typing.TYPE_CHECKING:
    from flashgen.integrations.torch_flash import register as register_torch_flash

__all__ = [
    "ModelProblems",
    "load_presets",
    "preset",
    "problems_from_config",
    "read_model_config",
    "register_torch_flash",
]


def __getattr__(name: str) -> typing.Any:
    if name != "register_torch_flash":
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}; it has {', '.join(__all__)}")
    # It loads torch, which model files and presets do without.
    return importlib.import_module("flashgen.integrations.torch_flash").register
