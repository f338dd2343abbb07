"""One call of decoding as the operator takes it: Q and the caches, the other tensors, and plain options."""

from __future__ import annotations

import typing

import torch


class DecodeTensors(typing.NamedTuple):
    """The tensors of a call besides Q and the caches, in the order of the operator; `Extras` says what each is.

    k_new and v_new are in the caller's layout.
    """

    k_new: torch.Tensor | None
    v_new: torch.Tensor | None
    cache_seqlens: torch.Tensor
    page_table: torch.Tensor | None = None
    cache_batch_idx: torch.Tensor | None = None
    cache_leftpad: torch.Tensor | None = None
    rotary_cos: torch.Tensor | None = None
    rotary_sin: torch.Tensor | None = None
    alibi_slopes: torch.Tensor | None = None
    sinks: torch.Tensor | None = None
    k_descale: torch.Tensor | None = None
    v_descale: torch.Tensor | None = None
    captures: tuple[torch.Tensor, ...] = ()


class DecodeOptions(typing.NamedTuple):
    """What a call asks for besides its tensors, in the order of the operator; nothing here but numbers and text.

    Attributes:
        num_splits: into how many parts keys are cut; 0 leaves it to the config.
        mask: text of the mask, as `parse_mask` reads it.
        score_mod: text of the score mod, or empty.
        softmax_scale: factor of the scores; None is the default.
        softcap: 0 for none.
        rotary_interleaved: whether rotated columns are neighbours.
        layout: `bhsd` or `bshd`.
        return_lse: whether lse is asked for.
        check: whether lengths, pages and entries of the cache are looked at.
        config: a kernel config as text, or empty.
        registry: a path to look in first, or empty.
    """

    num_splits: int
    mask: str
    score_mod: str
    softmax_scale: float | None
    softcap: float
    rotary_interleaved: bool
    layout: str
    return_lse: bool
    check: bool
    config: str
    registry: str
