"""Attention over a cache of keys and values in plain PyTorch, and what a call appends to the cache."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import torch
from torch import Tensor

from flashgen.errors import InputError
from flashgen.measure.arithmetic import Arithmetic, Precision, torch_dtype
from flashgen.measure.entries import Entry, join_heads
from flashgen.measure.reference import Part, attend, check_given
from flashgen.spec import AttentionSpec, Causal, Extras, Mask
from flashgen.spec.masks import SlidingWindow


def decode_reference(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    spec: AttentionSpec,
    extras: Extras,
    precision: Precision,
    heads: Sequence[tuple[int, int]] | None = None,
) -> tuple[Tensor, Tensor]:
    """Return exact attention of a few queries over each sequence's cache, and its log-sum-exp; changes nothing.

    The keys of a sequence are gathered from the cache, what is appended is put behind them, and `attention_reference`'s
    own arithmetic does the rest. Rotated queries and keys are rounded to the types of Q and of the cache.

    Args:
        q: [batch, nheads_q, seqlen_q, head_dim_qk]; any strides, as the rest.
        k: the cache, [entries, nheads_kv, capacity, head_dim_qk] or [pages, nheads_kv, page_size, head_dim_qk].
        v: likewise, with head_dim_v.
        spec: what to compute, of the decode phase.
        extras: its numbers and tensors.
        precision: `float64` is the oracle; `input` rounds as plain PyTorch does at Q's dtype (see `Arithmetic`), to
            which an e4m3 cache is widened; its factors are applied to the products.
        heads: (batch entry, query head) pairs to compute alone; None is all.

    Returns:
        out [batch, nheads_q, seqlen_q, head_dim_v] in float64 or Q's dtype, and lse [batch, nheads_q, seqlen_q],
        natural log, in float64 or float32. With `heads`, only their rows: [pairs, seqlen_q, ...]. A row that sees no
        key has out = 0 and lse = -inf (the sink, where there is one).

    Raises:
        InputError: if the shapes do not belong together, or the spec asks for what `extras` does not hold.
    """
    check_decode_call(q, k, v, spec, extras)
    arithmetic = Arithmetic(dtype=spec.dtype, precision=precision)
    kind, entries = arithmetic.softmax_type, decode_entries(q, spec, extras)
    if heads is not None:
        # One at a time: the float64 keys of one head of a long sequence are large enough.
        parts = [
            attend(_part(entries[b], [h], q, k, v, spec, extras, kind), spec, extras, arithmetic) for b, h in heads
        ]
        return join_heads([out[0] for out, _ in parts], entries), join_heads([lse[0] for _, lse in parts], entries)
    out = torch.zeros(*q.shape[:-1], v.shape[-1], dtype=arithmetic.out_type, device=q.device)
    lse = torch.full(q.shape[:3], float("-inf"), dtype=arithmetic.softmax_type, device=q.device)
    for entry in entries:
        part = _part(entry, range(q.shape[1]), q, k, v, spec, extras, kind)
        out[entry.b], lse[entry.b] = attend(part, spec, extras, arithmetic)
    return out, lse


def append_to_cache(k: Tensor, v: Tensor, *, spec: AttentionSpec, extras: Extras) -> None:
    """Write what the call appends, its keys rotated, into the caches in place.

    Args:
        k: the cache, as of `decode_reference`.
        v: likewise.
        spec: of the decode phase; nothing is written unless it appends.
        extras: the call's numbers and tensors.

    Raises:
        InputError: if `extras` lacks what the spec asks for, or a cache has no room for the new rows.
    """
    check_given(spec, extras)
    if not spec.append:
        return
    assert extras.k_new is not None
    assert extras.v_new is not None
    assert extras.cache_seqlens is not None
    for b, seqlen in enumerate(extras.cache_seqlens.tolist()):
        places = cache_places(b, seqlen, seqlen + extras.k_new.shape[2], k, spec, extras)
        new = rotated_keys(extras.k_new[b], seqlen, spec, extras, torch.float32), extras.v_new[b]
        for cache, rows in zip((k, v), new, strict=True):
            cache[places.entry, :, places.row] = rows.transpose(0, 1)


@dataclasses.dataclass(frozen=True, kw_only=True)
class CachePlaces:
    """Where rows of one sequence lie: entry or page, and the row in it, [rows] each."""

    entry: Tensor
    row: Tensor


def cache_places(b: int, start: int, stop: int, k: Tensor, spec: AttentionSpec, extras: Extras) -> CachePlaces:
    """Return where the keys start to stop of sequence b lie in a cache.

    Raises:
        InputError: if the sequence's entry, or its row of the page table, has no room for them.
    """
    keys = torch.arange(start, stop, device=k.device)
    if not spec.page_size:
        if stop > k.shape[2]:
            raise InputError(f"sequence {b} has {stop} keys, its entry of the cache room for {k.shape[2]}")
        entry = b if extras.cache_batch_idx is None else int(extras.cache_batch_idx[b])
        if not 0 <= entry < k.shape[0]:
            raise InputError(f"sequence {b} has entry {entry} of a cache of {k.shape[0]}")
        return CachePlaces(entry=torch.full_like(keys, entry), row=keys)
    assert extras.page_table is not None
    room = extras.page_table.shape[1] * spec.page_size
    if stop > room:
        raise InputError(f"sequence {b} has {stop} keys, its pages room for {room}")
    pages = extras.page_table[b].long()[keys // spec.page_size]
    if ((pages < 0) | (pages >= k.shape[0])).any():
        raise InputError(f"sequence {b} has pages {int(pages.min())} to {int(pages.max())} of {k.shape[0]}")
    return CachePlaces(entry=pages, row=keys % spec.page_size)


def rotated(x: Tensor, positions: Tensor, spec: AttentionSpec, extras: Extras, kind: torch.dtype) -> Tensor:
    """Return x [heads, rows, head_dim] rotated by the angles of `positions` [rows], not rounded beyond `kind`.

    The first rotary_dim columns are pairs (x1, x2) that become (x1 cos - x2 sin, x1 sin + x2 cos); the rest stay.

    Raises:
        InputError: if the tables end before a position.
    """
    assert extras.rotary_cos is not None
    assert extras.rotary_sin is not None
    if positions.numel() and int(positions.max()) >= extras.rotary_cos.shape[0]:
        raise InputError(f"rotary_cos has {extras.rotary_cos.shape[0]} rows, position {int(positions.max())} is needed")
    cos, sin = extras.rotary_cos[positions].to(kind), extras.rotary_sin[positions].to(kind)
    half = cos.shape[1]
    x = x.to(kind)
    turned = x.clone()
    if spec.rotary == "pairs":
        first, second = slice(0, 2 * half, 2), slice(1, 2 * half, 2)
    else:
        first, second = slice(0, half), slice(half, 2 * half)
    turned[..., first] = x[..., first] * cos - x[..., second] * sin
    turned[..., second] = x[..., first] * sin + x[..., second] * cos
    return turned


def rotated_keys(k_new: Tensor, seqlen: int, spec: AttentionSpec, extras: Extras, kind: torch.dtype) -> Tensor:
    """Return keys [nheads_kv, rows, head_dim_qk] to append at `seqlen`, rotated in `kind` if the spec says so."""
    if not spec.rotary:
        return k_new
    positions = torch.arange(seqlen, seqlen + k_new.shape[1], device=k_new.device)
    return rotated(k_new, positions, spec, extras, kind).to(k_new.dtype)


def decode_entries(q: Tensor, spec: AttentionSpec, extras: Extras) -> tuple[Entry, ...]:
    """Return the sequences of a call with this q; seqlen_k counts what is appended."""
    assert extras.cache_seqlens is not None
    batch, _, seqlen_q, _ = q.shape
    new = extras.k_new.shape[2] if spec.append and extras.k_new is not None else 0
    padding = [0] * batch if extras.cache_leftpad is None or not spec.leftpad else extras.cache_leftpad.tolist()
    return tuple(
        Entry(
            b=b,
            rows_q=slice(0, seqlen_q),
            rows_k=slice(0, seqlen + new),
            seqlen_q=seqlen_q,
            seqlen_k=seqlen + new,
            varlen=False,
            first_k=padding[b],
        )
        for b, seqlen in enumerate(extras.cache_seqlens.tolist())
    )


def turns_each_query(mask: Mask) -> bool:
    """Whether query i is rotated by the position cache_seqlens + i; else all are by cache_seqlens.

    FlashAttention's rule: under a causal mask or a window queries have positions of their own.
    """
    return any(isinstance(leaf, Causal | SlidingWindow) for leaf in mask.leaves)


def check_decode_call(q: Tensor, k: Tensor, v: Tensor, spec: AttentionSpec, extras: Extras) -> None:
    """Check that the tensors belong together and the call gives what the spec asks for.

    Raises:
        InputError: if they do not.
    """
    got = f"got q {list(q.shape)}, k {list(k.shape)}, v {list(v.shape)}"
    if spec.phase != "decode":
        raise InputError(f"of the decode phase alone, got {spec}")
    if {q.dim(), k.dim(), v.dim()} != {4} or k.shape[:-1] != v.shape[:-1] or q.shape[-1] != k.shape[-1]:
        raise InputError(f"q must be [batch, heads, seqlen, head_dim], k and v [entries, heads, rows, head_dim]; {got}")
    if k.shape[1] == 0 or q.shape[1] % k.shape[1]:
        raise InputError(f"nheads_q must be a multiple of nheads_kv; {got}")
    if spec.page_size and (k.shape[2] != spec.page_size or spec.batch_idx):
        raise InputError(f"pages have {spec.page_size} rows and need no batch_idx; {got}")
    if k.dtype != torch_dtype(spec.kv_dtype):
        raise InputError(f"{spec} has a cache of {spec.kv_dtype}, got {k.dtype}")
    check_given(spec, extras)
    assert extras.cache_seqlens is not None
    if extras.cache_seqlens.shape != q.shape[:1]:
        raise InputError(f"cache_seqlens must be [{q.shape[0]}], got {list(extras.cache_seqlens.shape)}")


def _part(
    entry: Entry,
    heads: Sequence[int],
    q: Tensor,
    k: Tensor,
    v: Tensor,
    spec: AttentionSpec,
    extras: Extras,
    kind: torch.dtype,
) -> Part:
    """Return what query heads of a sequence attend to: all heads, or some, each with a key/value head of its own."""
    h = torch.tensor(list(heads), device=q.device)
    every = len(heads) == q.shape[1]
    h_kv = torch.arange(k.shape[1], device=q.device) if every else h // (q.shape[1] // k.shape[1])
    k_new = v_new = None
    cached = entry.seqlen_k
    if spec.append and extras.k_new is not None and extras.v_new is not None:
        cached -= extras.k_new.shape[2]
        k_new = rotated_keys(extras.k_new[entry.b][h_kv], cached, spec, extras, kind)
        v_new = extras.v_new[entry.b][h_kv]
    places = cache_places(entry.b, 0, cached, k, spec, extras)
    return Part(
        entry=entry,
        q=_queries(q[entry.b][h], cached, spec, extras, kind),
        k=_rows(k, h_kv, places, entry.first_k, k_new),
        v=_rows(v, h_kv, places, entry.first_k, v_new),
        h=h,
        h_kv=h_kv,
        nheads_q=q.shape[1],
    )


def _queries(q: Tensor, seqlen: int, spec: AttentionSpec, extras: Extras, kind: torch.dtype) -> Tensor:
    """Return queries [heads, rows, head_dim_qk], rotated in `kind` if the spec says so."""
    if not spec.rotary:
        return q
    steps = torch.arange(q.shape[1], device=q.device)
    positions = seqlen + (steps if turns_each_query(spec.mask) else torch.zeros_like(steps))
    return rotated(q, positions, spec, extras, kind).to(q.dtype)


def _rows(cache: Tensor, h_kv: Tensor, places: CachePlaces, first_k: int, new: Tensor | None) -> Tensor:
    """Return the rows of some heads of a cache with new ones behind, [heads, rows, head_dim].

    What lies before the first key is whatever an unused row holds: 0 here, as 0 times NaN would be NaN.
    """
    # Indexed as bytes: not every version of torch indexes e4m3.
    narrow = cache.view(torch.uint8) if cache.dtype == torch.float8_e4m3fn else cache
    rows = narrow[places.entry[None, :], h_kv[:, None], places.row[None, :]]
    rows[:, :first_k] = 0
    rows = rows.view(cache.dtype)
    return rows if new is None else torch.cat([rows, new.to(cache.dtype)], dim=1)
