"""Where attention problems come from outside: model configurations and named presets."""

from flashgen.integrations.model_config import ModelProblems, problems_from_config, read_model_config
from flashgen.integrations.presets import load_presets, preset

__all__ = ["ModelProblems", "load_presets", "preset", "problems_from_config", "read_model_config"]
