"""The kernels that share a winner's registry entry without having been timed."""

from __future__ import annotations

import dataclasses

from flashgen.spec import AttentionSpec

# Whole tiles of keys, whatever the config.
_PAGE_SIZE = 256


def confirmed_variant(spec: AttentionSpec) -> AttentionSpec | None:
    """Return the spec of the variant that writes more, with the same config; None without one.

    That is lse of a forward pass, gradients of a bias, and of decoding lse and, into pages, rotated keys.

    It is other code, which the registry's key covers.
    """
    if spec.phase == "forward":
        return dataclasses.replace(spec, lse=True)
    if spec.phase == "decode":
        appends = not (spec.fp8_kv or spec.shared_kv)
        return dataclasses.replace(
            spec, lse=True, page_size=_PAGE_SIZE, append=appends, rotary="halves" if appends else ""
        )
    if spec.bias in ("none", "bool"):
        return None
    return dataclasses.replace(spec, dbias=True)
