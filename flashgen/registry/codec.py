"""Plain values back into a `RegistryEntry`: the inverse of `RegistryEntry.as_dict`, for YAML and for the index."""

from __future__ import annotations

import typing

from flashgen.codegen.config import config_from_dict
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
        config=config_from_dict(content["config"]),
        origin=content["origin"],
        resources=KernelResources(**content["resources"]),
        performance=Performance(**content["performance"]),
        accuracy=Accuracy(**content["accuracy"]),
        runners_up=tuple(
            RunnerUp(config=config_from_dict(item["config"]), median_us=item["median_us"])
            for item in content["runners_up"]
        ),
        provenance=Provenance(**content["provenance"]),
    )


def _spec(phase: typing.Any, fields: Plain) -> AttentionSpec:
    spec = AttentionSpec(
        phase=phase,
        dtype=parse_dtype(fields["dtype"]),
        head_dim_qk=fields["head_dim_qk"],
        head_dim_v=fields["head_dim_v"],
        mask=parse_mask(fields["mask"]),
        score_mod=_score_mod(fields["score_mod"]) if "score_mod" in fields else None,
    )
    return with_features(spec, fields.get("features", ()))


def _score_mod(text: str) -> ModFunction:
    function = parse_mod(text)
    if function.role != "score":
        raise InputError(f"score_mod must be the text of a score_mod, got that of a {function.role}_mod")
    return function
