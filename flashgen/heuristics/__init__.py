"""What to run where nothing was tuned."""

from flashgen.heuristics.defaults import default_configs, safe_configs

__all__ = ["default_configs", "safe_configs"]
