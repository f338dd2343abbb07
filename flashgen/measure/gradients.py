"""The gradients of attention in plain PyTorch: the oracle in float64, and the same at the inputs' own precision."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import torch
from torch import Tensor

from flashgen.errors import InputError
from flashgen.measure.arithmetic import Arithmetic, Precision, torch_dtype
from flashgen.measure.entries import Entry, join_heads
from flashgen.measure.reference import (
    Part,
    bent,
    check_call,
    dropped,
    entries_of,
    kept,
    masked,
    positions,
    softmax,
)
from flashgen.spec import AttentionSpec, Extras, Positions

# Scores alive at a time: 64 MiB in float64, and about a dozen buffers of that size (dropout's counters are int64).
MAX_GRADIENT_ELEMENTS = 2**23


@dataclasses.dataclass(frozen=True, kw_only=True)
class Gradients:
    """What the backward pass returns.

    Attributes:
        dq, dk, dv: of the shapes of q, k and v.
        dbias: [batch or 1, nheads_q or 1, seqlen_q or 1, seqlen_k or 1]: 1 where the bias is broadcast; None where it
            is not asked for.
        dsinks: [nheads_q]; None where there are no sinks, or the kernel does not compute it.
    """

    dq: Tensor
    dk: Tensor
    dv: Tensor
    dbias: Tensor | None = None
    dsinks: Tensor | None = None


def gradient_reference(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    dout: Tensor,
    *,
    spec: AttentionSpec,
    extras: Extras,
    precision: Precision,
    dlse: Tensor | None = None,
    heads: Sequence[tuple[int, int]] | None = None,
) -> Gradients:
    """Return the exact gradients of attention, a block of query rows at a time so that memory stays bounded.

    FlashAttention's equations (Dao et al. 2022, appendix B.4), with delta = rowsum(dout * out) - dlse.

    Args:
        q: [batch, nheads_q, seqlen_q, head_dim_qk], or packed [tokens_q, nheads_q, head_dim_qk] where the spec is
            varlen; any strides.
        k: [batch, nheads_kv, seqlen_k, head_dim_qk] or [tokens_k, nheads_kv, head_dim_qk]; nheads_kv divides nheads_q.
        v: likewise, with head_dim_v.
        dout: the gradient of out, of its shape: that of q with head_dim_v.
        spec: what to compute; of the backward phase.
        extras: its numbers and tensors.
        precision: `float64` is the oracle. `input` rounds as plain PyTorch does at the inputs' dtype: products and
            their operands, P and dS among them, and out before delta is taken; sums over blocks are float32.
        dlse: the gradient of lse, [batch, nheads_q, seqlen_q] or packed [nheads_q, tokens_q]; None is 0.
        heads: (batch entry, key/value head) pairs to compute alone, with all query heads of their groups; None is all.

    Returns:
        Gradients in float64, or of the dtype of their inputs; dsinks in float64 or float32. dbias has size 1 where
        the bias has, and where it is an expanded view: a dimension of stride 0 is broadcast, its gradient is the sum.
        With `heads`, dq, dk and dv are rows as `pick_gradients` of `flashgen.measure.gradient_accuracy` takes them,
        and dbias and dsinks are sums over those heads alone. Rows that see no key, are not used or belong to
        no sequence have gradients of 0.

    Raises:
        InputError: if the shapes do not belong together, the spec is not of the backward phase, or it asks for what
            `extras` does not hold.
    """
    return differentiate(q, k, v, dout, spec=spec, extras=extras, precision=precision, dlse=dlse, heads=heads)[0]


def differentiate(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    dout: Tensor | None,
    *,
    spec: AttentionSpec,
    extras: Extras,
    precision: Precision,
    dlse: Tensor | None,
    heads: Sequence[tuple[int, int]] | None,
) -> tuple[Gradients, Tensor]:
    """Return what `gradient_reference` does, a dout of None being 0, and rowsum(|dout * out|) in the shape of lse."""
    check_call(q, k, v, spec, extras)
    rows = (q.shape[1], q.shape[0]) if spec.varlen else tuple(q.shape[:3])
    _check_gradients(q, v, dout, dlse, spec, rows)
    with torch.no_grad():
        backward = _Backward(q, dout, dlse, spec, extras, Arithmetic(dtype=spec.dtype, precision=precision), rows)
        entries = entries_of(q, k, spec, extras)
        if heads is not None:
            dq, dk, dv = _of_heads(backward, entries, heads, q, k, v)
        else:
            dq, dk, dv = (torch.zeros(t.shape, dtype=backward.gradient_type, device=t.device) for t in (q, k, v))
            for entry in entries:
                part_dq, part_dk, part_dv = backward.part(Part.of_entry(entry, q, k, v))
                entry.queries(dq).copy_(part_dq)
                key_rows(entry, dk).copy_(part_dk)
                key_rows(entry, dv).copy_(part_dv)
    dbias = backward.dbias
    if dbias is not None and extras.bias is not None and precision == "input":
        dbias = dbias.to(extras.bias.dtype)
    return Gradients(dq=dq, dk=dk, dv=dv, dbias=dbias, dsinks=backward.dsinks), backward.magnitude


def key_rows(entry: Entry, tensor: Tensor) -> Tensor:
    """Return the entry's rows of K or V, used or not, as a [nheads_kv, rows, head_dim] view."""
    return tensor[entry.rows_k].transpose(0, 1) if entry.varlen else tensor[entry.b]


def _of_heads(
    backward: _Backward,
    entries: Sequence[Entry],
    heads: Sequence[tuple[int, int]],
    q: Tensor,
    k: Tensor,
    v: Tensor,
) -> tuple[Tensor, Tensor, Tensor]:
    group = q.shape[1] // k.shape[1]
    found: dict[tuple[int, int], tuple[Tensor, Tensor, Tensor]] = {}
    for entry in entries:
        own = sorted({h for b, h in heads if b == entry.b})
        if own:
            dq, dk, dv = backward.part(Part.of_groups(entry, own, q, k, v))
            found.update({(entry.b, h): (dq[i * group :][:group], dk[i], dv[i]) for i, h in enumerate(own)})
    queries = [head for pair in heads for head in found[pair][0]]
    keys, values = ([found[pair][i] for pair in heads] for i in (1, 2))
    return join_heads(queries, entries), join_heads(keys, entries), join_heads(values, entries)


@dataclasses.dataclass(frozen=True, kw_only=True)
class _Block:
    """Some query rows of a part against all its keys; tensors are [heads, rows, seqlen_k].

    Attributes:
        rows: where the rows are in the entry.
        at: their positions.
        p: probabilities before dropout.
        lse: [heads, rows].
        unseen: where a key is hidden.
        slope: derivative of the score after softcap and score_mod with respect to the scaled one; None is 1.
    """

    rows: slice
    at: Positions
    p: Tensor
    lse: Tensor
    unseen: Tensor
    slope: Tensor | None


class _Backward:
    """One call: what its heads share, and the sums over them."""

    def __init__(
        self,
        q: Tensor,
        dout: Tensor | None,
        dlse: Tensor | None,
        spec: AttentionSpec,
        extras: Extras,
        arithmetic: Arithmetic,
        rows: tuple[int, ...],
    ) -> None:
        self._dout, self._dlse = dout, dlse
        self._spec, self._extras, self._arithmetic = spec, extras, arithmetic
        self._kind = arithmetic.softmax_type
        self.gradient_type = torch.float64 if arithmetic.exact else torch_dtype(spec.dtype)
        self.magnitude = torch.zeros(rows, dtype=self._kind, device=q.device)
        self.dsinks = torch.zeros(q.shape[1], dtype=self._kind, device=q.device) if spec.sinks else None
        self.dbias: Tensor | None = None
        if spec.dbias and extras.bias is not None:
            self.dbias = torch.zeros(bias_sizes(extras.bias), dtype=self._kind, device=q.device)

    def part(self, part: Part) -> tuple[Tensor, Tensor, Tensor]:
        """Return dq [heads, rows, head_dim_qk], dk [kv_heads, rows_k, head_dim_qk] and dv of all rows, used or not."""
        entry, nheads, nheads_kv = part.entry, len(part.h), len(part.h_kv)
        rows_k = int(entry.rows_k.stop) - int(entry.rows_k.start)
        dq = part.q.new_zeros(part.q.shape, dtype=self.gradient_type)
        dk = part.k.new_zeros((nheads_kv, rows_k, part.k.shape[2]), dtype=self._kind)
        dv = part.v.new_zeros((nheads_kv, rows_k, part.v.shape[2]), dtype=self._kind)
        if entry.seqlen_k == 0:
            sinks, used = part.sinks(self._spec, self._extras, self._kind), slice(0, entry.seqlen_q)
            if sinks is not None:
                self._add_to_sinks(part, sinks.expand(-1, entry.seqlen_q), -self._lse_gradient(part, used))
            return dq, dk.to(self.gradient_type), dv.to(self.gradient_type)
        keys, values = self._arithmetic.operand(part.k), self._arithmetic.operand(part.v)
        rows = max(1, MAX_GRADIENT_ELEMENTS // (nheads * entry.seqlen_k))
        for start in range(0, entry.seqlen_q, rows):
            used = slice(start, min(start + rows, entry.seqlen_q))
            # One product per key/value head: the query heads of a group are stacked as rows, so that its sums over
            # them are the group's and K and V are never repeated.
            queries = self._arithmetic.operand(part.q[:, used]).reshape(nheads_kv, -1, part.q.shape[2])
            block = self._block(part, used, queries, keys)
            dscores = self._score_gradient(part, block, values, dv)
            dproducts = dscores * self._extras.softmax_scale
            if block.slope is not None:
                # Where a key is hidden, the derivative of a score_mod may be infinite.
                dproducts = (dproducts * block.slope).masked_fill_(block.unseen, 0.0)
            stacked = self._arithmetic.operand(dproducts).reshape(nheads_kv, -1, entry.seqlen_k)
            dq[:, used] = (stacked @ keys).view(nheads, -1, dq.shape[2])
            dk[:, : entry.seqlen_k] += stacked.transpose(1, 2) @ queries
        return dq, dk.to(self.gradient_type), dv.to(self.gradient_type)

    def _block(self, part: Part, rows: slice, queries: Tensor, keys: Tensor) -> _Block:
        """Return the forward pass of some rows, as far as the probabilities."""
        spec, extras = self._spec, self._extras
        products = (queries @ keys.transpose(1, 2)).to(self._kind)
        scaled = products.mul_(extras.softmax_scale).view(len(part.h), -1, part.entry.seqlen_k)
        at = positions(part.entry, part.h, rows.start, rows.stop)
        slope = None
        if spec.softcap or spec.score_mod is not None:
            slope = _slope(scaled, at, spec, extras)
        scores = masked(bent(scaled, at, spec, extras), at, part, spec, extras)
        p, total, lse = softmax(scores, part.sinks(spec, extras, self._kind))
        return _Block(rows=rows, at=at, p=p.div_(total), lse=lse, unseen=scores == float("-inf"), slope=slope)

    def _score_gradient(self, part: Part, block: _Block, values: Tensor, dv: Tensor) -> Tensor:
        """Return dS before softcap and score_mod [heads, rows, seqlen_k]; add to dv, dbias, dsinks and magnitude."""
        delta = -self._lse_gradient(part, block.rows)
        dp: Tensor | float = 0.0
        if self._dout is not None:
            dout = part.entry.queries(self._dout)[part.h, block.rows]
            out, dp = self._through_values(part, block, dout, values, dv)
            terms = dout.to(self._kind) * out
            delta += terms.sum(dim=-1)
            part.entry.statistics(self.magnitude)[part.h, block.rows] = terms.abs().sum(dim=-1)
        # A gradient of lse may be NaN where lse is -inf.
        dscores = (dp - delta.unsqueeze(-1)).mul(block.p).masked_fill_(block.unseen, 0.0)
        self._add_to_bias(part, block, dscores)
        self._add_to_sinks(part, block.lse, delta)
        return dscores

    def _through_values(
        self, part: Part, block: _Block, dout: Tensor, values: Tensor, dv: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Return out, rounded to its dtype, and dP [heads, rows, seqlen_k]; add to dv."""
        nheads, nheads_kv, seqlen_k = len(part.h), len(part.h_kv), part.entry.seqlen_k
        weights = self._arithmetic.probabilities(block.p)
        keep = kept(block.at, part.nheads_q, self._extras) if self._spec.dropout else None
        if keep is not None:
            weights = dropped(weights, keep, self._extras.dropout_p)
        stacked = weights.reshape(nheads_kv, -1, seqlen_k)
        out = (stacked @ values).to(self._arithmetic.out_type).to(self._kind).view(nheads, -1, values.shape[2])
        stacked_dout = self._arithmetic.operand(dout).reshape(nheads_kv, -1, values.shape[2])
        dv[:, :seqlen_k] += stacked.transpose(1, 2) @ stacked_dout
        dp = (stacked_dout @ values.transpose(1, 2)).to(self._kind).view(nheads, -1, seqlen_k)
        return out, dp if keep is None else dropped(dp, keep, self._extras.dropout_p)

    def _lse_gradient(self, part: Part, rows: slice) -> Tensor:
        """Return dlse of some rows, [heads, rows]."""
        if self._dlse is None:
            return torch.zeros((len(part.h), rows.stop - rows.start), dtype=self._kind, device=part.q.device)
        return part.entry.statistics(self._dlse)[part.h, rows].to(self._kind)

    def _add_to_sinks(self, part: Part, lse: Tensor, delta: Tensor) -> None:
        sinks = part.sinks(self._spec, self._extras, self._kind)
        if self.dsinks is not None and sinks is not None:
            terms = ((sinks - lse).exp() * delta).masked_fill(lse == float("-inf"), 0.0)
            self.dsinks[part.h] -= terms.sum(dim=-1)

    def _add_to_bias(self, part: Part, block: _Block, dscores: Tensor) -> None:
        if self.dbias is None:
            return
        own = self.dbias[part.entry.b if self.dbias.shape[0] > 1 else 0]
        for dim in range(3):
            if own.shape[dim] == 1:
                dscores = dscores.sum(dim=dim, keepdim=True)
        everything = slice(None)
        own[
            part.h if own.shape[0] > 1 else everything,
            block.rows if own.shape[1] > 1 else everything,
            slice(0, part.entry.seqlen_k) if own.shape[2] > 1 else everything,
        ] += dscores


def bias_sizes(bias: Tensor) -> tuple[int, ...]:
    """Return the sizes of the gradient of a bias: 1 where it is broadcast, as a size of 1 or a stride of 0 says."""
    return tuple(
        1 if stride == 0 and size > 1 else size for size, stride in zip(bias.shape, bias.stride(), strict=True)
    )


def _slope(scaled: Tensor, at: Positions, spec: AttentionSpec, extras: Extras) -> Tensor:
    """Return the derivative of `bent`, which is elementwise."""
    with torch.enable_grad():
        scores = scaled.detach().requires_grad_()
        if not (scores + 0.0).requires_grad:
            raise InputError("softcap and score_mod are differentiated by autograd, which is switched off here")
        changed = bent(scores, at, spec, extras)
    if not changed.requires_grad:
        return torch.zeros_like(scaled)
    (slope,) = torch.autograd.grad(changed, scores, torch.ones_like(changed))
    return slope


def _check_gradients(
    q: Tensor, v: Tensor, dout: Tensor | None, dlse: Tensor | None, spec: AttentionSpec, rows: tuple[int, ...]
) -> None:
    if spec.phase != "backward":
        raise InputError(f"gradients need a spec of the backward phase (spec.backward()), got {spec}")
    wanted = (*q.shape[:-1], v.shape[-1])
    if dout is not None and tuple(dout.shape) != wanted:
        raise InputError(f"dout must have the shape of out, {list(wanted)}; got {list(dout.shape)}")
    if dlse is not None and tuple(dlse.shape) != rows:
        raise InputError(f"dlse must have the shape of lse, {list(rows)}; got {list(dlse.shape)}")
