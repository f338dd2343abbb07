"""The versions that a measurement depends on."""

from __future__ import annotations

import dataclasses


@dataclasses.dataclass(frozen=True, kw_only=True)
class Software:
    """Versions by name; `none` where there is no such thing (a driver on a machine without a GPU)."""

    flashgen: str
    triton: str
    torch: str
    driver: str
