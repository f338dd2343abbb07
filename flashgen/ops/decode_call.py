"""One call of decoding as the operator takes it: Q and the caches, the other tensors, and plain options."""

from __future__ import annotations

import typing

import torch

from flashgen.ops.call import Layout, heads_first
from flashgen.spec import Extras, Problem


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

    @classmethod
    def of(cls, extras: Extras, layout: Layout) -> DecodeTensors:
        """Return the tensors of a call whose extras are known, what is appended in a caller's layout."""
        found = cls(**{name: getattr(extras, name) for name in cls._fields})
        if found.k_new is None or found.v_new is None:
            return found
        return found._replace(k_new=heads_first(found.k_new, layout), v_new=heads_first(found.v_new, layout))


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

    @classmethod
    def of(
        cls, problem: Problem, extras: Extras, *, layout: Layout, config: str = "", registry: str = ""
    ) -> DecodeOptions:
        """Return the options of a call whose problem and extras are known."""
        spec = problem.spec
        return cls(
            num_splits=extras.num_splits,
            mask=str(spec.mask),
            score_mod="" if spec.score_mod is None else str(spec.score_mod),
            softmax_scale=extras.softmax_scale,
            softcap=extras.softcap,
            rotary_interleaved=spec.rotary == "pairs",
            layout=layout,
            return_lse=spec.lse,
            check=False,
            config=config,
            registry=registry,
        )
