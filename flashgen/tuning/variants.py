"""The kernels that share a winner's registry entry without having been timed."""

from __future__ import annotations

import dataclasses

from flashgen.spec import AttentionSpec


def confirmed_variant(spec: AttentionSpec) -> AttentionSpec | None:
    """Return the spec of the variant that writes more: lse of a forward pass, gradients of a bias; None without one.

    It is other code, which the registry's key covers.
    """
    if spec.phase == "forward":
        return dataclasses.replace(spec, lse=True)
    if spec.bias in ("none", "bool"):
        return None
    return dataclasses.replace(spec, dbias=True)
