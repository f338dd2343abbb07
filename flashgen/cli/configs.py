"""Kernel configs as a person types and reads them."""

from __future__ import annotations

from collections.abc import Iterable

from flashgen.codegen import KernelConfig, TritonBackwardConfig, TritonForwardConfig, config_from_dict
from flashgen.errors import ConfigError
from flashgen.spec import Phase, Problem

_TEMPLATES: dict[Phase, str] = {"forward": TritonForwardConfig.template, "backward": TritonBackwardConfig.template}


def parse_config(text: str | None, problems: Iterable[Problem]) -> KernelConfig | None:
    """Return the config that `key=value` words describe, the inverse of `str(config)`; None for None.

    A word without `=` is the template; left out, it is `triton/forward` or `triton/backward`, by the problems' phase.

    Raises:
        ConfigError: for a repeated, unknown, missing or wrongly typed value, or problems of another phase or of both.
    """
    if text is None:
        return None
    phases = sorted({problem.spec.phase for problem in problems})
    if len(phases) != 1:
        raise ConfigError(f"--config is of one phase, the problems are {' and '.join(phases)}; name one with --phase")
    template = _TEMPLATES[phases[0]]
    values: dict[str, object] = {}
    for word in text.replace(",", " ").split():
        key, equals, value = word.partition("=")
        if not equals:
            key, value = "template", word
        if key in values:
            raise ConfigError(f"{key} is given twice in {text!r}")
        values[key] = int(value) if value.isdecimal() else value
    config = config_from_dict({"template": template, **values})
    if config.template != template:
        raise ConfigError(f"a config of {config.template} cannot run {phases[0]} problems: they take {template}")
    return config


def short_config(config: KernelConfig) -> str:
    """Return a config in a few characters.

    `128x64 w8 s2 descriptor r168 g4 h2 single`, or of a backward one `64x128 w8 s2 dq 128x64 w8 s2 pointer`, where the
    tiles of dQ's own kernel follow those of dK and dV, and `dq atomic` or `dq ordered` stands for none.
    """
    if isinstance(config, TritonForwardConfig):
        tile = [f"{config.block_m}x{config.block_n}", f"w{config.num_warps}", f"s{config.num_stages}"]
        cut = [f"h{config.head_tiles}"] if config.head_tiles != 1 else []
    elif isinstance(config, TritonBackwardConfig):
        tile = [f"{config.block_m1}x{config.block_n1}", f"w{config.num_warps}", f"s{config.num_stages}", "dq"]
        own = [f"{config.block_m2}x{config.block_n2}", f"w{config.num_warps2}", f"s{config.num_stages2}"]
        tile += own if config.dq == "kernel" else [config.dq]
        cut = []
    else:
        return str(config)
    words = [*tile, config.loads]
    words += [f"r{config.maxnreg}"] if config.maxnreg else []
    words += [f"g{config.head_group}"] if config.head_group != 1 else []
    words += [*cut, *([config.loops] if config.loops != "split" else [])]
    return " ".join(words)
