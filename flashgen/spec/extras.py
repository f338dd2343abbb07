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
    captures: tuple[Tensor, ...] = ()

    def bound_mask(self, spec: AttentionSpec) -> Mask:
        """Return the spec's mask holding the captured tensors of this call."""
        return spec.mask.with_tensors(self.captures[: spec.mask.capture_count])

    def bound_score_mod(self, spec: AttentionSpec) -> ModFunction | None:
        """Return the spec's score_mod holding the captured tensors of this call."""
        if spec.score_mod is None:
            return None
        return dataclasses.replace(spec.score_mod, tensors=self.captures[spec.mask.capture_count :])
