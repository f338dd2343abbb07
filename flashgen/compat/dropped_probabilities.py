"""The probabilities of a call with dropout, negative where they were dropped: FlashAttention's `S_dmask`.

Of size seqlen_q x seqlen_k and so for tests alone: a caller asks for it by `return_attn_probs=True`.
"""

from __future__ import annotations

import dataclasses

import torch
from torch import Tensor

from flashgen.measure.philox import dropout_keep
from flashgen.spec import Mask, Positions

_ROUNDED_TO = 128


@dataclasses.dataclass(frozen=True, kw_only=True)
class DroppedProbabilities:
    """What the probabilities of a call depend on besides Q and K.

    Attributes:
        mask: which keys a query sees.
        softmax_scale: factor of the scores.
        softcap: 0 is none.
        alibi_slopes: float32 [nheads] or [batch, nheads], or None.
        dropout_p: share that is dropped.
        rng_state: int64 [2], what the call was given.
    """

    mask: Mask
    softmax_scale: float
    softcap: float
    alibi_slopes: Tensor | None
    dropout_p: float
    rng_state: Tensor

    def dense(self, q: Tensor, k: Tensor, lse: Tensor) -> Tensor:
        """Return S_dmask [batch, nheads, seqlen_q, seqlen_k], the last two rounded up to multiples of 128.

        Args:
            q: [batch, seqlen_q, nheads, head_dim].
            k: [batch, seqlen_k, nheads_k, head_dim].
            lse: [batch, nheads, seqlen_q].
        """
        result = _zeros(q, q.shape[0], q.shape[1], k.shape[1])
        for b in range(q.shape[0]):
            result[b, :, : q.shape[1], : k.shape[1]] = self._entry(b, q[b], k[b], lse[b])
        return result

    def packed(
        self, q: Tensor, k: Tensor, lse: Tensor, cu_seqlens: tuple[Tensor, Tensor], max_seqlens: tuple[int, int]
    ) -> Tensor:
        """Return S_dmask [batch, nheads, max_seqlen_q, max_seqlen_k], the last two rounded up to multiples of 128.

        Args:
            q: [total_q, nheads, head_dim].
            k: [total_k, nheads_k, head_dim].
            lse: [nheads, total_q].
            cu_seqlens: int32 [batch + 1], of queries and keys.
            max_seqlens: of queries and keys.
        """
        starts_q, starts_k = (starts.tolist() for starts in cu_seqlens)
        result = _zeros(q, len(starts_q) - 1, *max_seqlens)
        for b in range(result.shape[0]):
            rows, keys = slice(starts_q[b], starts_q[b + 1]), slice(starts_k[b], starts_k[b + 1])
            own = self._entry(b, q[rows], k[keys], lse[:, rows])
            result[b, :, : own.shape[1], : own.shape[2]] = own
        return result

    def _entry(self, b: int, q: Tensor, k: Tensor, lse: Tensor) -> Tensor:
        """Return [nheads, seqlen_q, seqlen_k] of one batch entry."""
        (seqlen_q, nheads, _), seqlen_k = q.shape, k.shape[0]
        keys = k.float().repeat_interleave(nheads // k.shape[1], 1)
        scores = torch.einsum("qhd,khd->hqk", q.float(), keys) * self.softmax_scale
        if self.softcap > 0:
            scores = self.softcap * torch.tanh(scores / self.softcap)
        at = Positions(
            q_idx=torch.arange(seqlen_q, device=q.device)[:, None],
            kv_idx=torch.arange(seqlen_k, device=q.device)[None, :],
            seqlen_q=seqlen_q,
            seqlen_k=seqlen_k,
        )
        if self.alibi_slopes is not None:
            slopes = self.alibi_slopes if self.alibi_slopes.dim() == 1 else self.alibi_slopes[b]
            scores = scores - slopes[:, None, None] * at.distance.abs()
        seen = self.mask.sees(at)
        probabilities = torch.where(seen, torch.exp(scores - lse[:, :, None]), 0.0)
        heads = torch.arange(b * nheads, (b + 1) * nheads, device=q.device)[:, None, None]
        kept = dropout_keep(self.rng_state, self.dropout_p, heads, at.q_idx, at.kv_idx)
        return torch.where(kept, probabilities, -probabilities)


def _zeros(q: Tensor, batch: int, seqlen_q: int, seqlen_k: int) -> Tensor:
    rows, columns = (-(-size // _ROUNDED_TO) * _ROUNDED_TO for size in (seqlen_q, seqlen_k))
    return q.new_zeros((batch, q.shape[-2], rows, columns))
