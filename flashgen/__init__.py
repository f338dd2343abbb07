"""flashgen: attention kernels generated, tuned and dispatched for your GPU.

`flashgen.attention(q, k, v)` runs the best kernel known for the call; `flashgen tune` finds it. Nothing heavy is
imported until it is used: `import flashgen` alone loads neither torch nor triton.
"""

from __future__ import annotations

import importlib
import time
import typing

if typing.TYPE_CHECKING:
    from flashgen import compat as compat
    from flashgen.errors import FlashgenError as FlashgenError
    from flashgen.integrations.sdpa import scaled_dot_product_attention as scaled_dot_product_attention
    from flashgen.ops import attention as attention
    from flashgen.ops import attention_varlen as attention_varlen
    from flashgen.ops import attention_with_kvcache as attention_with_kvcache
    from flashgen.ops import explain as explain
    from flashgen.ops import explain_with_kvcache as explain_with_kvcache
    from flashgen.ops import interpreting as interpreting
    from flashgen.ops import warmup as warmup
    from flashgen.registry import use_bundle as use
    from flashgen.spec import masks as masks
    from flashgen.spec import score_mods as score_mods
    from flashgen.tuning import tune as tune

__version__ = "0.1.0"
# Code that changes on the disk from now on may not be what this process runs.
loaded_ns = time.time_ns()

_HOME = {
    "FlashgenError": ("flashgen.errors", "FlashgenError"),
    "attention": ("flashgen.ops", "attention"),
    "attention_varlen": ("flashgen.ops", "attention_varlen"),
    "attention_with_kvcache": ("flashgen.ops", "attention_with_kvcache"),
    "compat": ("flashgen.compat", None),
    "explain": ("flashgen.ops", "explain"),
    "explain_with_kvcache": ("flashgen.ops", "explain_with_kvcache"),
    "interpreting": ("flashgen.ops", "interpreting"),
    "masks": ("flashgen.spec.masks", None),
    "scaled_dot_product_attention": ("flashgen.integrations.sdpa", "scaled_dot_product_attention"),
    "score_mods": ("flashgen.spec.score_mods", None),
    "tune": ("flashgen.tuning", "tune"),
    "use": ("flashgen.registry", "use_bundle"),
    "warmup": ("flashgen.ops", "warmup"),
}

__all__ = [
    "FlashgenError",
    "attention",
    "attention_varlen",
    "attention_with_kvcache",
    "compat",
    "explain",
    "explain_with_kvcache",
    "interpreting",
    "masks",
    "scaled_dot_product_attention",
    "score_mods",
    "tune",
    "use",
    "warmup",
]


def __getattr__(name: str) -> typing.Any:
    if name not in _HOME:
        raise AttributeError(f"module 'flashgen' has no attribute {name!r}; it has {', '.join(__all__)}")
    module_name, attribute = _HOME[name]
    module = importlib.import_module(module_name)
    value = module if attribute is None else getattr(module, attribute)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
