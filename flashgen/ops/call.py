"""One call of attention as the operator takes it: Q, K and V, the other tensors, and plain options."""

from __future__ import annotations

import functools
import typing

import torch

from flashgen.codegen import KernelConfig, config_from_dict
from flashgen.spec import Extras, Problem

Layout = typing.Literal["bhsd", "bshd"]
LAYOUTS: tuple[Layout, ...] = typing.get_args(Layout)
PACKED = "thd"
"""The layout of packed sequences, [tokens, heads, head_dim]; never named by a caller."""


class Tensors(typing.NamedTuple):
    """The tensors of a call besides Q, K and V, in the order of the operator; `Extras` says what each is.

    A bias is as the caller gave it, with up to 4 dimensions.
    """

    bias: torch.Tensor | None = None
    alibi_slopes: torch.Tensor | None = None
    sinks: torch.Tensor | None = None
    rng_state: torch.Tensor | None = None
    cu_seqlens_q: torch.Tensor | None = None
    cu_seqlens_k: torch.Tensor | None = None
    seqused_q: torch.Tensor | None = None
    seqused_k: torch.Tensor | None = None
    q_descale: torch.Tensor | None = None
    k_descale: torch.Tensor | None = None
    v_descale: torch.Tensor | None = None
    captures: tuple[torch.Tensor, ...] = ()

    @classmethod
    def of(cls, extras: Extras) -> Tensors:
        """Return the tensors of a call whose extras are known; `NO_TENSORS` where there are none."""
        found = cls(**{name: getattr(extras, name) for name in cls._fields})
        return NO_TENSORS if not found.captures and all(t is None for t in found[:-1]) else found


NO_TENSORS = Tensors()


class Options(typing.NamedTuple):
    """What a call asks for besides its tensors, in the order of the operator; nothing here but numbers and text.

    Attributes:
        max_seqlen_q, max_seqlen_k: the longest packed sequence; 0 otherwise.
        mask: text of the mask, as `parse_mask` reads it.
        score_mod: text of the score mod, or empty.
        softmax_scale: factor of the scores; None is the default.
        softcap: 0 for none.
        dropout_p: share of the probabilities that is dropped.
        layout: `bhsd`, `bshd`, or `thd` for packed sequences.
        return_lse: whether lse is asked for.
        deterministic: whether gradients must be equal bit for bit from run to run.
        config: a kernel config as text, or empty.
        registry: a path to look in first, or empty.
    """

    max_seqlen_q: int
    max_seqlen_k: int
    mask: str
    score_mod: str
    softmax_scale: float | None
    softcap: float
    dropout_p: float
    layout: str
    return_lse: bool
    deterministic: bool
    config: str
    registry: str

    @property
    def packed(self) -> bool:
        """Whether sequences are packed."""
        return self.layout == PACKED

    @classmethod
    def of(
        cls, problem: Problem, extras: Extras, *, layout: Layout = "bhsd", config: str = "", registry: str = ""
    ) -> Options:
        """Return the options of a call whose problem and extras are known."""
        spec, shape = problem.spec, problem.shape
        return cls(
            max_seqlen_q=shape.seqlen_q if spec.varlen else 0,
            max_seqlen_k=shape.seqlen_k if spec.varlen else 0,
            mask=str(spec.mask),
            score_mod="" if spec.score_mod is None else str(spec.score_mod),
            softmax_scale=extras.softmax_scale,
            softcap=extras.softcap,
            dropout_p=extras.dropout_p,
            layout=PACKED if spec.varlen else layout,
            return_lse=spec.lse,
            deterministic=spec.deterministic,
            config=config,
            registry=registry,
        )


def heads_first(tensor: torch.Tensor, layout: str) -> torch.Tensor:
    """Return the tensor as a [batch, heads, seqlen, head_dim] view; packed ones as they are."""
    return tensor.transpose(1, 2) if layout == "bshd" else tensor


def encode_config(config: KernelConfig | None) -> str:
    """Return a config as the text that the operator takes; empty for None."""
    if config is None:
        return ""
    # torch.compile traces what it calls, and takes no caches.
    return str(config) if torch.compiler.is_compiling() else _config_text(config)


@functools.lru_cache(maxsize=256)
def _config_text(config: KernelConfig) -> str:
    return str(config)


@functools.lru_cache(maxsize=256)
def decode_config(text: str) -> KernelConfig | None:
    """Return the config that `encode_config` wrote; None for an empty text."""
    if not text:
        return None
    template, *numbers = text.split(" ")
    values = (number.split("=", 1) for number in numbers)
    return config_from_dict(
        {"template": template, **{name: int(value) if value.isdecimal() else value for name, value in values}}
    )
