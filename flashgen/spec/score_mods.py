"""Score mods that many models share, as plain functions with FlexAttention's signature.

Each is read like a user's own, and can be called on torch tensors just as well.
"""

from __future__ import annotations

import math
import typing
from collections.abc import Callable

from flashgen.errors import InputError
from flashgen.spec.mods import ModFunction, read_mod

# torch's tensors, of which this floor knows no type.
_Tensor = typing.Any
ScoreMod = Callable[[_Tensor, _Tensor, _Tensor, _Tensor, _Tensor], _Tensor]


def softcap(cap: float) -> ScoreMod:
    """Return the score mod `cap * tanh(score / cap)`, which keeps scores within (-cap, cap), as in Gemma 2.

    Raises:
        InputError: unless `cap` is a positive number.
    """
    if not isinstance(cap, (int, float)) or not 0 < cap < math.inf:
        raise InputError(f"softcap must be a positive number, got {cap!r}; leave the score mod out for no cap")

    def softcap_mod(score: _Tensor, b: _Tensor, h: _Tensor, q_idx: _Tensor, kv_idx: _Tensor) -> _Tensor:
        return cap * (score / cap).tanh()

    return softcap_mod


def alibi(slopes: _Tensor) -> ScoreMod:
    """Return the score mod `score - slopes[h] * |q_idx - kv_idx|` (Press et al. 2022, arXiv:2108.12409, section 3).

    Positions are counted from the start of queries and keys alike.

    Args:
        slopes: tensor [nheads_q].

    Raises:
        InputError: unless `slopes` has one dimension.
    """
    if getattr(slopes, "ndim", None) != 1:
        shape = tuple(getattr(slopes, "shape", ()))
        raise InputError(f"alibi slopes must be a tensor [nheads_q], got {type(slopes).__name__} of shape {shape}")

    def alibi_mod(score: _Tensor, b: _Tensor, h: _Tensor, q_idx: _Tensor, kv_idx: _Tensor) -> _Tensor:
        return score - slopes[h] * abs(q_idx - kv_idx)

    return alibi_mod


def relative_position() -> ScoreMod:
    """Return the score mod `score + (q_idx - kv_idx)`."""

    def relative_position_mod(score: _Tensor, b: _Tensor, h: _Tensor, q_idx: _Tensor, kv_idx: _Tensor) -> _Tensor:
        return score + (q_idx - kv_idx)

    return relative_position_mod


def function(score_mod: ScoreMod) -> ModFunction:
    """Return a plain Python function of (score, b, h, q_idx, kv_idx) as a value, read from its source once.

    What `flashgen.attention(score_mod=...)` takes inside `torch.compile`, where functions cannot be read.

    Raises:
        InputError: for what the language of score mods does not have, pointing at the line.
    """
    return read_mod(score_mod, "score")
