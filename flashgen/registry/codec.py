"""Plain values back into a `RegistryEntry`: the inverse of `RegistryEntry.as_dict`, for YAML and for the index."""

from __future__ import annotations

import functools
import typing

from flashgen.codegen.config import config_from_dict
from flashgen.codegen.kernel_config import KernelConfig
from flashgen.codegen.kernel_resources import KernelResources
from flashgen.errors import InputError
from flashgen.registry.entry import (
    Accuracy,
    Interval,
    MeasuredRange,
    Performance,
    Provenance,
    RegistryEntry,
    RunnerUp,
)
from flashgen.spec import AttentionSpec, parse_dtype, parse_mask
from flashgen.spec.mods import ModFunction, parse_mod
from flashgen.spec.text import with_features

# Plain values are untyped by nature: this is the codec, and nothing past it sees them.
Plain = typing.Mapping[str, typing.Any]


def entry_from_dict(content: Plain) -> RegistryEntry:
    """Return the entry that `as_dict` wrote; types are taken as they are, see `schema` for untrusted content.

    Raises:
        InputError: for a value out of its range.
        ConfigError: for a config no template of this version has.
        KeyError, TypeError: for a missing or an unknown field.
    """
    return RegistryEntry(
        device_name=content["device"],
        arch=content["arch"],
        spec=_spec(content["phase"], content["spec"]),
        range=MeasuredRange(**{name: Interval(lo=lo, hi=hi) for name, (lo, hi) in content["range"].items()}),
        config=_config(content["config"]),
        origin=content["origin"],
        resources=KernelResources(**content["resources"]),
        performance=Performance(**content["performance"]),
        accuracy=Accuracy(**content["accuracy"]),
        runners_up=tuple(
            RunnerUp(config=_config(item["config"]), median_us=item["median_us"]) for item in content["runners_up"]
        ),
        provenance=Provenance(**content["provenance"]),
    )


def _config(fields: Plain) -> KernelConfig:
    # With the types: to a dictionary 1, 1.0 and True are the same.
    return _config_of(tuple(fields.items()), tuple(map(type, fields.values())))


# The same configs do well at many sizes, and each is checked field by field.
@functools.lru_cache(maxsize=1024)
def _config_of(fields: tuple[tuple[str, typing.Any], ...], types: tuple[type, ...]) -> KernelConfig:
    return config_from_dict(dict(fields))


def _spec(phase: typing.Any, fields: Plain) -> AttentionSpec:
    sizes = fields["head_dim_qk"], fields["head_dim_v"]
    texts = fields["mask"], fields.get("score_mod"), tuple(fields.get("features", ()))
    return _spec_of(phase, fields["dtype"], *sizes, *texts)


# Entries of one spec follow each other, and its mask may hold a function, which takes a while to read.
@functools.lru_cache(maxsize=64, typed=True)
def _spec_of(
    phase: typing.Any,
    dtype: str,
    head_dim_qk: int,
    head_dim_v: int,
    mask: str,
    score_mod: str | None,
    features: tuple[str, ...],
) -> AttentionSpec:
    spec = AttentionSpec(
        phase=phase,
        dtype=parse_dtype(dtype),
        head_dim_qk=head_dim_qk,
        head_dim_v=head_dim_v,
        mask=parse_mask(mask),
        score_mod=None if score_mod is None else _score_mod(score_mod),
    )
    return with_features(spec, features)


def _score_mod(text: str) -> ModFunction:
    function = parse_mod(text)
    if function.role != "score":
        raise InputError(f"score_mod must be the text of a score_mod, got that of a {function.role}_mod")
    return function
