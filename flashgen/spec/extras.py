"""What a call gives besides Q, K and V."""

from __future__ import annotations

import dataclasses
import typing

from flashgen.spec.mods import ModFunction

if typing.TYPE_CHECKING:
    from torch import Tensor

    from flashgen.spec.masks import Mask
    from flashgen.spec.problem import AttentionSpec


@dataclasses.dataclass(frozen=True, kw_only=True)
class Extras:
    """Numbers and tensors of one call; a tensor is None unless the spec asks for it.

    Attributes:
        softmax_scale: factor of the scores.
        softcap: c of c * tanh(s / c), positive where the spec has it.
        dropout_p: share of the probabilities that is dropped.
        bias: [batch, nheads_q, seqlen_q, seqlen_k]; 1 or stride 0 where it is broadcast.
        alibi_slopes: float32 [nheads_q] or [batch, nheads_q].
        sinks: float32 [nheads_q].
        rng_state: int64 [2] on the device: seed and offset of the dropout.
        cu_seqlens_q, cu_seqlens_k: int32 [batch + 1], where packed sequences start and end.
        seqused_q, seqused_k: int32 [batch].
        q_descale, k_descale, v_descale: float32 [batch, nheads_kv].
        cache_seqlens: int32 [batch], how many rows of the cache each sequence uses, before anything is appended.
        page_table: int32 [batch, pages], the page that holds each page_size keys of a sequence.
        cache_batch_idx: int32 [batch], which entry of the cache each sequence has.
        cache_leftpad: int32 [batch], the first row of the cache that each sequence uses.
        rotary_cos, rotary_sin: [positions, rotary_dim / 2], of Q's dtype or float32.
        k_new, v_new: [batch, nheads_kv, seqlen_new, head_dim], what is appended.
        num_splits: into how many parts the keys of a tile of queries are cut; 0 leaves it to the config.
        captures: dense tensors that the mask's functions and then score_mod index, in their order.
    """

    softmax_scale: float
    softcap: float = 0.0
    dropout_p: float = 0.0
    bias: Tensor | None = None
    alibi_slopes: Tensor | None = None
    sinks: Tensor | None = None
    rng_state: Tensor | None = None
    cu_seqlens_q: Tensor | None = None
    cu_seqlens_k: Tensor | None = None
    seqused_q: Tensor | None = None
    seqused_k: Tensor | None = None
    q_descale: Tensor | None = None
    k_descale: Tensor | None = None
    v_descale: Tensor | None = None
    cache_seqlens: Tensor | None = None
    page_table: Tensor | None = None
    cache_batch_idx: Tensor | None = None
    cache_leftpad: Tensor | None = None
    rotary_cos: Tensor | None = None
    rotary_sin: Tensor | None = None
    k_new: Tensor | None = None
    v_new: Tensor | None = None
    num_splits: int = 0
    captures: tuple[Tensor, ...] = ()

    def bound_mask(self, spec: AttentionSpec) -> Mask:
        """Return the spec's mask holding the captured tensors of this call."""
        return spec.mask.with_tensors(self.captures[: spec.mask.capture_count])

    def bound_score_mod(self, spec: AttentionSpec) -> ModFunction | None:
        """Return the spec's score_mod holding the captured tensors of this call."""
        if spec.score_mod is None:
            return None
        return dataclasses.replace(spec.score_mod, tensors=self.captures[spec.mask.capture_count :])
