"""Kernel configs as a person types and reads them."""

from __future__ import annotations

from collections.abc import Iterable

from flashgen.codegen import (
    HopperDecodeConfig,
    HopperForwardConfig,
    KernelConfig,
    TritonBackwardConfig,
    TritonDecodeConfig,
    TritonForwardConfig,
    config_from_dict,
    templates_of,
)
from flashgen.codegen.hopper_config import ROWS_OF_CONSUMER, HopperConfig
from flashgen.errors import ConfigError
from flashgen.spec import Problem


def parse_config(text: str | None, problems: Iterable[Problem]) -> KernelConfig | None:
    """Return the config that `key=value` words describe, the inverse of `str(config)`; None for None.

    A word without `=` is the template, one of those of the problems' phase; left out, it is `triton/forward`,
    `triton/backward` or `triton/decode`.

    Raises:
        ConfigError: for a repeated, unknown, missing or wrongly typed value, or problems of other phases or several.
    """
    if text is None:
        return None
    phases = sorted({problem.spec.phase for problem in problems})
    if len(phases) != 1:
        raise ConfigError(f"--config is of one phase, the problems are {' and '.join(phases)}; name one with --phase")
    templates = templates_of(phases[0])
    values: dict[str, object] = {}
    for word in text.replace(",", " ").split():
        key, equals, value = word.partition("=")
        if not equals:
            key, value = "template", word
        if key in values:
            raise ConfigError(f"{key} is given twice in {text!r}")
        values[key] = int(value) if value.isdecimal() else value
    config = config_from_dict({"template": templates[0], **values})
    if config.template not in templates:
        known = " or ".join(templates)
        raise ConfigError(f"a config of {config.template} cannot run {phases[0]} problems: they take {known}")
    return config


def short_config(config: KernelConfig) -> str:
    """Return a config in a few characters.

    `128x64 w8 s2 descriptor r168 g4 h2 single`, or of a backward one `64x128 w8 s2 dq 128x64 w8 s2 pointer`, where the
    tiles of dQ's own kernel follow those of dK and dV, and `dq atomic` or `dq ordered` stands for none; of decoding
    `16x64 w4 s3 pointer r128 h2 single dependent m32 p2 b4`, with the parts that are merged at once, the programs of a
    multiprocessor and the least key tiles of a part; or of one for Hopper `hopper 2x64 n128 s2 registers alternate late
    rescale8 out-half half overlap named g4+32`: consumers and their rows, keys, stages, then what is not as usual, and
    the heads of a group and of the last, or of decoding `b4` as above.
    """
    match config:
        case TritonForwardConfig():
            tile = [f"{config.block_m}x{config.block_n}", f"w{config.num_warps}", f"s{config.num_stages}"]
            return _short_triton(config, tile, [f"h{config.head_tiles}"] if config.head_tiles != 1 else [])
        case TritonBackwardConfig():
            tile = [f"{config.block_m1}x{config.block_n1}", f"w{config.num_warps}", f"s{config.num_stages}", "dq"]
            own = [f"{config.block_m2}x{config.block_n2}", f"w{config.num_warps2}", f"s{config.num_stages2}"]
            return _short_triton(config, tile + (own if config.dq == "kernel" else [config.dq]), [])
        case TritonDecodeConfig():
            return _short_decode(config)
        case HopperForwardConfig() | HopperDecodeConfig():
            return _short_hopper(config)
    return str(config)


def _short_triton(config: TritonForwardConfig | TritonBackwardConfig, tile: list[str], cut: list[str]) -> str:
    words = [*tile, config.loads]
    words += [f"r{config.maxnreg}"] if config.maxnreg else []
    words += [f"g{config.head_group}"] if config.head_group != 1 else []
    words += [*cut, *([config.loops] if config.loops != "split" else [])]
    return " ".join(words)


def _short_decode(config: TritonDecodeConfig) -> str:
    words = [f"{config.block_m}x{config.block_n}", f"w{config.num_warps}", f"s{config.num_stages}", config.loads]
    words += [f"r{config.maxnreg}"] if config.maxnreg else []
    words += [f"h{config.head_tiles}"] if config.head_tiles != 1 else []
    words += [config.loops] if config.loops != "split" else []
    words += [config.launch] if config.launch != "plain" else []
    words += [f"m{config.merge_parts}"] if config.merge_parts != 16 else []
    return " ".join([*words, f"p{config.programs}", *([f"b{config.min_blocks}"] if config.min_blocks != 1 else [])])


def _short_hopper(config: HopperConfig) -> str:
    words = ["hopper", f"{config.consumers}x{ROWS_OF_CONSUMER}", f"n{config.block_n}", f"s{config.num_stages}"]
    unusual = [
        (config.pack, config.pack != "rows"),
        (f"p{config.programs}", config.programs != 1),
        (config.queries, config.queries != "shared"),
        (config.turns, config.turns != "free"),
        (config.convert, config.convert != "early"),
        (f"rescale{config.rescale}", config.rescale > 0),
    ]
    if isinstance(config, HopperForwardConfig):
        unusual += [
            (f"out-{config.out_buffer}", config.out_buffer != "own"),
            (config.diagonal, config.diagonal != "whole"),
            (config.tiles, config.tiles != "apart"),
        ]
    unusual += [(config.loops, config.loops != "split"), (config.release, config.release != "mbarrier")]
    words += [word for word, is_unusual in unusual if is_unusual]
    if isinstance(config, HopperDecodeConfig):
        words += [f"b{config.min_blocks}"] if config.min_blocks != 1 else []
    if isinstance(config, HopperForwardConfig):
        tail = f"+{config.tail_heads}" if config.tail_heads else ""
        words += [f"g{config.head_group}{tail}"] if config.head_group != 1 or tail else []
    return " ".join(words)
