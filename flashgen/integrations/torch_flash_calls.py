"""What PyTorch's flash operators are asked for, in flashgen's terms."""

from __future__ import annotations

import dataclasses
import typing

import torch
from torch import Tensor

from flashgen.ops.call import Layout

_DTYPES = (torch.float16, torch.bfloat16)


class Original(typing.Protocol):
    """PyTorch's own kernel of an operator."""

    def call_boxed(self, keyset: torch.DispatchKeySet, *args: typing.Any, **kwargs: typing.Any) -> typing.Any: ...


@dataclasses.dataclass(frozen=True, kw_only=True)
class FlashOptions:
    """What a call asks for besides Q, K and V."""

    causal: bool
    scale: float | None
    window: tuple[int, int] = (-1, -1)
    seqused_k: Tensor | None = None

    @classmethod
    def read(cls, causal: bool, options: dict[str, typing.Any]) -> FlashOptions | None:
        """Return an operator's keyword arguments, or None if one is given that flashgen does not take."""
        known = ("scale", "window_size_left", "window_size_right", "seqused_k")
        if any(value is not None for name, value in options.items() if name not in known):
            return None
        left, right = (options.get(f"window_size_{side}") for side in ("left", "right"))
        return cls(
            causal=causal,
            scale=options.get("scale"),
            window=(-1 if left is None else max(left, -1), -1 if right is None else max(right, -1)),
            seqused_k=options.get("seqused_k"),
        )


class Cuts(typing.NamedTuple):
    """Where packed sequences lie, as `attention_varlen` takes it."""

    cu_seqlens_q: Tensor
    cu_seqlens_k: Tensor
    max_seqlen_q: int
    max_seqlen_k: int


def takes(query: Tensor, key: Tensor, value: Tensor) -> bool:
    """Return whether flashgen is to look at a call at all."""
    if query.dtype not in _DTYPES or not query.dtype == key.dtype == value.dtype:
        return False
    if query.numel() == 0 or key.numel() == 0:
        return False
    # flashgen's functions follow autocast, and these operators do not.
    kind = query.device.type
    return not torch.is_autocast_enabled(kind) or torch.get_autocast_dtype(kind) == query.dtype


def layout_of(query: Tensor) -> Layout | None:
    """Return the layout whose dense out has the order of query's strides, which PyTorch's compiler relies on."""
    of_batch, of_head, of_row, of_column = query.stride()
    if of_column != 1:
        return None
    if of_batch >= of_head >= of_row:
        return "bhsd"
    return "bshd" if of_batch >= of_row >= of_head else None
