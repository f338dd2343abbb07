"""Attention in plain PyTorch: the oracle in float64, and the same computation at the inputs' own precision."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import torch
from torch import Tensor

from flashgen.errors import InputError
from flashgen.measure.arithmetic import Arithmetic, Precision
from flashgen.measure.entries import Entry, batch_entries, join_heads
from flashgen.measure.philox import dropout_keep
from flashgen.spec import AttentionSpec, Extras, Full, Mask, Positions

# Scores alive at a time: 256 MiB in float64, and a handful of buffers of that size.
MAX_SCORE_ELEMENTS = 2**25


def attention_reference(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    spec: AttentionSpec,
    extras: Extras,
    precision: Precision,
    heads: Sequence[tuple[int, int]] | None = None,
) -> tuple[Tensor, Tensor]:
    """Return exact attention and its log-sum-exp, a block of query rows at a time so that memory stays bounded.

    Args:
        q: [batch, nheads_q, seqlen_q, head_dim_qk], or packed [tokens_q, nheads_q, head_dim_qk] where the spec is
            varlen; any strides.
        k: [batch, nheads_kv, seqlen_k, head_dim_qk] or [tokens_k, nheads_kv, head_dim_qk]; nheads_kv divides nheads_q.
        v: likewise, with head_dim_v.
        spec: what to compute.
        extras: its numbers and tensors.
        precision: `float64` is the oracle. `input` rounds as plain PyTorch does at the inputs' dtype (see
            `Arithmetic`): the yardstick of the accuracy rule.
        heads: (batch entry, query head) pairs to compute alone; None is all.

    Returns:
        out [batch, nheads_q, seqlen_q, head_dim_v] in float64 or the type of out, and lse [batch, nheads_q, seqlen_q],
        natural log, in float64 or float32. Packed: out [tokens_q, nheads_q, head_dim_v], lse [nheads_q, tokens_q].
        With `heads`, only their rows, as `pick_heads` takes them from those. A row that sees no key, is not used or
        belongs to no sequence has out = 0 and lse = -inf (the sink, where it is used and there is one).

    Raises:
        InputError: if the shapes do not belong together, or the spec asks for what `extras` does not hold.
    """
    check_call(q, k, v, spec, extras)
    arithmetic = Arithmetic(dtype=spec.dtype, precision=precision)
    entries = entries_of(q, k, spec, extras)
    nheads_q = q.shape[1]
    if heads is not None:
        parts: dict[tuple[int, int], tuple[Tensor, Tensor]] = {}
        for entry in entries:
            own = sorted({h for b, h in heads if b == entry.b})
            if own:
                part = Part.of_heads(entry, own, q, k, v)
                found = attend(part, spec, extras, arithmetic)
                parts.update({(entry.b, h): (found[0][i], found[1][i]) for i, h in enumerate(own)})
        picked = [parts[pair] for pair in heads]
        return join_heads([out for out, _ in picked], entries), join_heads([lse for _, lse in picked], entries)
    out = torch.zeros(*q.shape[:-1], v.shape[-1], dtype=arithmetic.out_type, device=q.device)
    rows = (nheads_q, q.shape[0]) if spec.varlen else q.shape[:3]
    lse = torch.full(rows, float("-inf"), dtype=arithmetic.softmax_type, device=q.device)
    for entry in entries:
        part_out, part_lse = attend(Part.of_entry(entry, q, k, v), spec, extras, arithmetic)
        entry.queries(out).copy_(part_out)
        entry.statistics(lse).copy_(part_lse)
    return out, lse


def entries_of(q: Tensor, k: Tensor, spec: AttentionSpec, extras: Extras) -> tuple[Entry, ...]:
    """Return the batch entries of a call with these q and k."""
    seqlen_q, seqlen_k = (0, 0) if spec.varlen else (q.shape[2], k.shape[2])
    return batch_entries(spec, extras, batch=q.shape[0], seqlen_q=seqlen_q, seqlen_k=seqlen_k)


def visible(mask: Mask, at: Positions) -> Tensor | None:
    """Return where the mask lets queries see keys, of a shape that broadcasts; None where it hides nothing."""
    if isinstance(mask, Full):
        return None
    return torch.as_tensor(mask.sees(at), dtype=torch.bool, device=at.q_idx.device)


def positions(entry: Entry, heads: Tensor, start: int, stop: int) -> Positions:
    """Return rows start to stop of an entry against its keys: [1, 1, 1], [heads, 1, 1], [rows, 1] and [1, seqlen_k]."""
    device = heads.device
    return Positions(
        b=torch.full((1, 1, 1), entry.b, device=device),
        h=heads[:, None, None],
        q_idx=torch.arange(start, stop, device=device)[:, None],
        kv_idx=torch.arange(entry.seqlen_k, device=device)[None, :],
        seqlen_q=entry.seqlen_q,
        seqlen_k=entry.seqlen_k,
        ops=torch,
    )


@dataclasses.dataclass(frozen=True, kw_only=True)
class Part:
    """Heads of one batch entry: q [heads, rows, head_dim_qk], k and v [kv_heads, seqlen_k, ...].

    The query heads of one key/value head follow each other. `h` and `h_kv` number both kinds of heads within the call.
    """

    entry: Entry
    q: Tensor
    k: Tensor
    v: Tensor
    h: Tensor
    h_kv: Tensor
    nheads_q: int

    @classmethod
    def of_entry(cls, entry: Entry, q: Tensor, k: Tensor, v: Tensor) -> Part:
        """Return all heads of an entry."""
        h, h_kv = (torch.arange(t.shape[1], device=q.device) for t in (q, k))
        queries, keys, values = entry.queries(q), entry.keys(k), entry.keys(v)
        return cls(entry=entry, q=queries, k=keys, v=values, h=h, h_kv=h_kv, nheads_q=q.shape[1])

    @classmethod
    def of_heads(cls, entry: Entry, heads: Sequence[int], q: Tensor, k: Tensor, v: Tensor) -> Part:
        """Return some heads of an entry, each with a key/value head of its own."""
        h = torch.tensor(heads, device=q.device)
        h_kv = h // (q.shape[1] // k.shape[1])
        queries, keys, values = entry.queries(q)[h], entry.keys(k)[h_kv], entry.keys(v)[h_kv]
        return cls(entry=entry, q=queries, k=keys, v=values, h=h, h_kv=h_kv, nheads_q=q.shape[1])

    @classmethod
    def of_groups(cls, entry: Entry, heads: Sequence[int], q: Tensor, k: Tensor, v: Tensor) -> Part:
        """Return some key/value heads of an entry, with all query heads of their groups."""
        h_kv, group = torch.tensor(heads, device=q.device), q.shape[1] // k.shape[1]
        h = (h_kv[:, None] * group + torch.arange(group, device=q.device)).flatten()
        queries, keys, values = entry.queries(q)[h], entry.keys(k)[h_kv], entry.keys(v)[h_kv]
        return cls(entry=entry, q=queries, k=keys, v=values, h=h, h_kv=h_kv, nheads_q=q.shape[1])

    def sinks(self, spec: AttentionSpec, extras: Extras, kind: torch.dtype) -> Tensor | None:
        """Return the sinks of the query heads, [heads, 1]; None where there are none."""
        return extras.sinks[self.h].to(kind)[:, None] if spec.sinks and extras.sinks is not None else None


def attend(part: Part, spec: AttentionSpec, extras: Extras, arithmetic: Arithmetic) -> tuple[Tensor, Tensor]:
    """Return out [heads, rows, head_dim_v] and lse [heads, rows] of all rows of the entry, used or not.

    Attention itself, of every phase: the rest of this module and of the decode reference say what K and V are.
    """
    entry, nheads, nheads_kv, kind = part.entry, len(part.h), len(part.h_kv), arithmetic.softmax_type
    out = part.q.new_zeros((nheads, part.q.shape[1], part.v.shape[2]), dtype=arithmetic.out_type)
    lse = part.q.new_full(out.shape[:2], float("-inf"), dtype=kind)
    sinks = part.sinks(spec, extras, kind)
    if entry.seqlen_k == 0:
        if sinks is not None:
            lse[:, : entry.seqlen_q] = sinks
        return out, lse
    keys, values = arithmetic.operand(part.k).transpose(1, 2), arithmetic.operand(part.v)
    scale_qk, scale_v = _scales(part, spec, extras, kind)
    rows = max(1, MAX_SCORE_ELEMENTS // (nheads * entry.seqlen_k))
    for start in range(0, entry.seqlen_q, rows):
        block = slice(start, min(start + rows, entry.seqlen_q))
        # One product per key/value head: the query heads of a group are stacked as rows, K and V never repeated.
        queries = arithmetic.operand(part.q[:, block]).reshape(nheads_kv, -1, part.q.shape[2])
        scores = (queries @ keys).to(kind).mul_(scale_qk).view(nheads, -1, entry.seqlen_k)
        at = positions(entry, part.h, block.start, block.stop)
        scores = masked(bent(scores, at, spec, extras), at, part, spec, extras)
        weights, total, lse[:, block] = softmax(scores, sinks)
        if not arithmetic.divides_last:
            weights = weights.div_(total)
        weights = arithmetic.probabilities(weights)
        if spec.dropout:
            weights = dropped(weights, kept(at, part.nheads_q, extras), extras.dropout_p)
        product = weights.view(nheads_kv, -1, entry.seqlen_k) @ values
        product = (product if scale_v is None else product * scale_v).view(nheads, -1, out.shape[2])
        out[:, block] = product / total if arithmetic.divides_last else product
    return out, lse


def _scales(part: Part, spec: AttentionSpec, extras: Extras, kind: torch.dtype) -> tuple[Tensor | float, Tensor | None]:
    """Return the factor of the products q k^T, softmax_scale included, and that of the products with V."""
    if not spec.descale:
        return extras.softmax_scale, None
    q, k, v = (
        1.0 if factor is None else factor[part.entry.b, part.h_kv].to(kind)[:, None, None]
        for factor in (extras.q_descale, extras.k_descale, extras.v_descale)
    )
    return q * k * extras.softmax_scale, v if isinstance(v, Tensor) else None


def bent(scores: Tensor, at: Positions, spec: AttentionSpec, extras: Extras) -> Tensor:
    """Return scaled scores [heads, rows, seqlen_k] after softcap and score_mod; differentiable."""
    if spec.softcap:
        scores = (scores / extras.softcap).tanh() * extras.softcap
    score_mod = extras.bound_score_mod(spec)
    if score_mod is not None:
        changed = score_mod.evaluate(torch, score=scores, b=at.b, h=at.h, q_idx=at.q_idx, kv_idx=at.kv_idx)
        scores = changed.to(scores.dtype).expand(scores.shape)
    return scores


def masked(scores: Tensor, at: Positions, part: Part, spec: AttentionSpec, extras: Extras) -> Tensor:
    """Return scores [heads, rows, seqlen_k] with bias and ALiBi: -inf where a key is hidden."""
    if spec.bias != "none" and extras.bias is not None:
        bias = _bias_block(extras.bias, at, part)
        scores = scores.masked_fill(~bias, float("-inf")) if spec.bias == "bool" else scores + bias.to(scores.dtype)
    if spec.alibi and extras.alibi_slopes is not None:
        slopes = extras.alibi_slopes if extras.alibi_slopes.dim() == 1 else extras.alibi_slopes[part.entry.b]
        scores = scores - slopes[at.h].to(scores.dtype) * at.distance.abs()
    if part.entry.first_k:
        scores = scores.masked_fill(at.kv_idx < part.entry.first_k, float("-inf"))
    seen = visible(extras.bound_mask(spec), at)
    return scores if seen is None else scores.masked_fill(~seen, float("-inf"))


def _bias_block(bias: Tensor, at: Positions, part: Part) -> Tensor:
    """Return the part of bias [batch, nheads_q, seqlen_q, seqlen_k] for these rows; a size of 1 is broadcast."""
    own = bias[part.entry.b if bias.shape[0] > 1 else 0]
    if own.shape[1] > 1:
        own = own[:, int(at.q_idx[0]) : int(at.q_idx[-1]) + 1]
    if own.shape[2] > 1:
        own = own[:, :, : at.seqlen_k]
    return own[part.h] if own.shape[0] > 1 else own


def softmax(scores: Tensor, sinks: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
    """Return exp(scores - row maximum), what it is to be divided by [heads, rows, 1], and lse [heads, rows].

    A sink is one more logit of the row, of its maximum too.
    """
    largest = scores.amax(dim=-1, keepdim=True)
    if sinks is not None:
        largest = largest.maximum(sinks.unsqueeze(-1))
    largest = largest.masked_fill(largest == float("-inf"), 0.0)
    weights = (scores - largest).exp_()
    total = weights.sum(dim=-1, keepdim=True)
    if sinks is not None:
        total = total + (sinks.unsqueeze(-1) - largest).exp()
    lse = (largest + total.log()).squeeze(-1)
    return weights, total.masked_fill(total == 0, 1.0), lse


def kept(at: Positions, nheads_q: int, extras: Extras) -> Tensor:
    """Return which probabilities dropout keeps, [heads, rows, seqlen_k]."""
    assert extras.rng_state is not None
    return dropout_keep(extras.rng_state, extras.dropout_p, at.b * nheads_q + at.h, at.q_idx, at.kv_idx)


def dropped(weights: Tensor, keep: Tensor, dropout_p: float) -> Tensor:
    """Return the probabilities after dropout: 0, or divided by the share that is kept."""
    if dropout_p >= 1:
        return torch.zeros_like(weights)
    return weights.masked_fill(~keep, 0.0) / (1 - dropout_p)


def check_call(q: Tensor, k: Tensor, v: Tensor, spec: AttentionSpec, extras: Extras) -> None:
    """Check that the tensors belong together and the call gives what the spec asks for.

    Raises:
        InputError: if they do not.
    """
    got = f"got q {list(q.shape)}, k {list(k.shape)}, v {list(v.shape)}"
    wanted, dims = ("[tokens, heads, head_dim]", 3) if spec.varlen else ("[batch, heads, seqlen, head_dim]", 4)
    if {q.dim(), k.dim(), v.dim()} != {dims}:
        raise InputError(f"q, k and v must be {wanted}; {got}")
    if k.shape[:-1] != v.shape[:-1] or (not spec.varlen and q.shape[0] != k.shape[0]) or q.shape[-1] != k.shape[-1]:
        raise InputError(f"batch, key length, key/value heads or head_dim_qk differ; {got}")
    if k.shape[1] == 0 or q.shape[1] % k.shape[1]:
        raise InputError(f"nheads_q must be a multiple of nheads_kv; {got}")
    check_given(spec, extras)


def check_given(spec: AttentionSpec, extras: Extras) -> None:
    """Check that the call gives what the spec asks for.

    Raises:
        InputError: if it does not.
    """
    decode = spec.phase == "decode"
    needed = {
        "bias": spec.bias != "none",
        "alibi_slopes": spec.alibi,
        "sinks": spec.sinks,
        "rng_state": spec.dropout,
        "q_descale": spec.descale and not decode,
        **dict.fromkeys(("k_descale", "v_descale"), spec.descale),
        "cache_seqlens": decode,
        "page_table": spec.page_size > 0,
        "cache_batch_idx": spec.batch_idx,
        "cache_leftpad": spec.leftpad,
        **dict.fromkeys(("k_new", "v_new"), spec.append),
        **dict.fromkeys(("rotary_cos", "rotary_sin"), bool(spec.rotary)),
    }
    missing = [name for name, wanted_by_spec in needed.items() if wanted_by_spec and getattr(extras, name) is None]
    if missing:
        raise InputError(f"{spec} needs {', '.join(missing)}, the call gives none")
    captures = spec.mask.capture_count + (len(spec.score_mod.captures) if spec.score_mod else 0)
    if len(extras.captures) != captures:
        raise InputError(f"{spec} captures {captures} tensors, the call gives {len(extras.captures)}")
    if spec.softcap and extras.softcap <= 0:
        raise InputError(f"{spec} needs a softcap above 0, got {extras.softcap}")
