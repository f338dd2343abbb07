"""Kernel configs as a person types and reads them."""

from __future__ import annotations

from flashgen.codegen import KernelConfig, TritonForwardConfig, config_from_dict
from flashgen.errors import ConfigError


def parse_config(text: str | None) -> KernelConfig | None:
    """Return the config that `key=value` words describe, the inverse of `str(config)`; None for None.

    A word without `=` is the template; left out, it is `triton/forward`.

    Raises:
        ConfigError: for a repeated, unknown, missing or wrongly typed value.
    """
    if text is None:
        return None
    values: dict[str, object] = {}
    for word in text.replace(",", " ").split():
        key, equals, value = word.partition("=")
        if not equals:
            key, value = "template", word
        if key in values:
            raise ConfigError(f"{key} is given twice in {text!r}")
        values[key] = int(value) if value.isdecimal() else value
    return config_from_dict({"template": TritonForwardConfig.template, **values})


def short_config(config: KernelConfig) -> str:
    """Return a config in a few characters: `128x64 w8 s2 descriptor r168 g4 h2 single`."""
    if not isinstance(config, TritonForwardConfig):
        return str(config)
    words = [f"{config.block_m}x{config.block_n}", f"w{config.num_warps}", f"s{config.num_stages}", config.loads]
    words += [f"r{config.maxnreg}"] if config.maxnreg else []
    words += [f"g{config.head_group}"] if config.head_group != 1 else []
    words += [f"h{config.head_tiles}"] if config.head_tiles != 1 else []
    words += [config.loops] if config.loops != "split" else []
    return " ".join(words)
