"""What a decode kernel is tried on: caches whose unused rows are NaN, and shapes that are awkward."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence

import torch
from torch import Tensor

from flashgen.errors import InputError
from flashgen.measure.arithmetic import torch_dtype
from flashgen.measure.cases import Layout, random_inputs
from flashgen.measure.decode_reference import cache_places
from flashgen.measure.extras import random_extras
from flashgen.spec import AttentionSpec, Extras, Problem, Shape

# Rows of a cache beyond the longest sequence, entries beyond those of the batch, and pages beyond those in use.
_SPARE_ROWS, _SPARE_ENTRIES, _SPARE_PAGES = 8, 2, 3
_ROTARY_BASE = 10000.0
# An exponent and a mantissa of ones: the NaN of e4m3.
_E4M3_NAN = 0x7F
_NOT_A_PAGE = -1
# Away from those of inputs and extras, whose numbers those of the cache and of what is appended must not repeat.
_CACHE_SEED, _NEW_SEED = 3_000_003, 4_000_003


@dataclasses.dataclass(frozen=True, kw_only=True)
class DecodeCall:
    """One call of a decode problem.

    Attributes:
        problem: what it computes.
        q: [batch, nheads_q, seqlen_q, head_dim_qk].
        k: the cache, [entries, nheads_kv, capacity, head_dim_qk] or [pages, nheads_kv, page_size, head_dim_qk].
        v: likewise, with head_dim_v; of a spec with shared_kv a view of k.
        extras: the rest.
    """

    problem: Problem
    q: Tensor
    k: Tensor
    v: Tensor
    extras: Extras

    def copies(self, count: int) -> tuple[DecodeCall, ...]:
        """Return this call and others like it with caches of their own: `count` in all."""
        return (self, *(self._copy() for _ in range(count - 1)))

    def _copy(self) -> DecodeCall:
        k = _cloned(self.k)
        v = k[..., : self.v.shape[3]] if self.problem.spec.shared_kv else _cloned(self.v)
        return dataclasses.replace(self, k=k, v=v)


def random_decode_call(
    problem: Problem,
    *,
    device: torch.device | str,
    seed: int,
    ragged: bool = False,
    lengths: Sequence[int] | None = None,
    layout: Layout = "bhsd",
) -> DecodeCall:
    """Return a call of random numbers; rows of the caches that hold no key yet are NaN.

    Pages are shuffled, spare ones lie between them, and entries of the batch are permuted.

    Args:
        problem: of the decode phase.
        device: where tensors are made.
        seed: the same seed gives the same numbers on the same kind of device. Odd seeds rotate half of the columns,
            others all of them.
        ragged: each sequence has a length of its own, from nothing to the problem's; table entries beyond the last page
            of a sequence are no pages; one sequence may be all padding; another number of keys is appended than there
            are queries. Otherwise all have the problem's length.
        lengths: rows of the cache that each sequence uses instead, before anything is appended.
        layout: order of Q and of the caches in memory; `bshd` has the rows of all heads of a key side by side.

    Raises:
        InputError: if `lengths` are not as many as there are sequences, or longer than the problem's.
    """
    spec, shape = problem.spec, problem.shape
    generator = torch.Generator().manual_seed(seed + _CACHE_SEED)
    seqlen_new = min(shape.seqlen_q + ragged, shape.seqlen_k) if spec.append else 0
    longest = shape.seqlen_k - seqlen_new
    if lengths is None:
        lengths = _ragged_lengths(shape.batch, longest, generator) if ragged else [longest] * shape.batch
    elif len(lengths) != shape.batch or not all(0 <= length <= longest for length in lengths):
        raise InputError(f"lengths must be {shape.batch} from 0 to {longest}, got {list(lengths)}")
    capacity = shape.seqlen_k + _SPARE_ROWS
    batch_idx = torch.randperm(shape.batch + _SPARE_ENTRIES, generator=generator)[: shape.batch]
    ends = [length + seqlen_new for length in lengths]
    pages = math.ceil(capacity / spec.page_size) if spec.page_size else 0
    plain = random_extras(problem, device=device, seed=seed)
    sized = _sized(problem, batch=shape.batch, seqlen_q=shape.seqlen_q)
    q = random_inputs(sized, device=device, seed=seed, layout=layout)[0]
    sized = _sized(problem, batch=shape.batch, seqlen_k=seqlen_new)
    _, k_new, v_new = random_inputs(sized, device=device, seed=seed + _NEW_SEED, layout=layout)
    positions = max(capacity, pages * spec.page_size)
    tables = _rotary_tables(spec, positions, device, seed) if spec.rotary else (None, None)
    extras = dataclasses.replace(
        plain,
        q_descale=None,
        cache_seqlens=_int32(lengths, device),
        page_table=_page_table(pages, ends, spec, generator, ragged).to(device) if pages else None,
        cache_batch_idx=batch_idx.to(torch.int32).to(device) if spec.batch_idx else None,
        cache_leftpad=_int32(_paddings(lengths, ragged, generator), device) if spec.leftpad else None,
        rotary_cos=tables[0],
        rotary_sin=tables[1],
        k_new=k_new if spec.append else None,
        v_new=v_new if spec.append else None,
    )
    entries = shape.batch * pages + _SPARE_PAGES if pages else shape.batch + _SPARE_ENTRIES * spec.batch_idx
    sized = _sized(problem, batch=entries, seqlen_k=spec.page_size or capacity)
    _, k, v = random_inputs(sized, device=device, seed=seed + _CACHE_SEED, layout=layout)
    k, v = _as_caches(k, v, spec, extras)
    return DecodeCall(problem=problem, q=q, k=k, v=v, extras=extras)


def awkward_decode_shapes(problem: Problem, block_m: int, block_n: int) -> tuple[Shape, ...]:
    """Return small shapes that break a careless decode kernel with tiles of block_m rows and block_n keys.

    Lengths one off a tile and odd ones, many tiles, more queries than a tile has rows; batches of several sequences,
    whose lengths `random_decode_call` spreads from nothing to the shape's; the problem's group, and groups of 1, 3, 6
    and 8.
    """
    nheads_kv, group = min(problem.shape.nheads_kv, 2), problem.shape.group
    sizes = (
        (2, 1, 1, group),
        (5, 1, block_n - 1, 8),
        (3, 2, block_n, 3),
        (4, 1, block_n + 1, group),
        (2, 5, 3 * block_n + 7, 6),
        (3, 17, 2 * block_n + 1, 1),
        (5, 3, 9 * block_n + 5, group),
        (2, block_m // group + 1, 4 * block_n, group),
        (1, 1, 37 * block_n + 3, group),
    )
    shapes = (
        Shape(
            batch=batch,
            seqlen_q=seqlen_q,
            seqlen_k=max(1, seqlen_k),
            nheads_q=nheads_kv * heads,
            nheads_kv=nheads_kv,
        )
        for batch, seqlen_q, seqlen_k, heads in sizes
    )
    return tuple(dict.fromkeys(shapes))


def _ragged_lengths(batch: int, longest: int, generator: torch.Generator) -> list[int]:
    """Return the longest first, then none, one, half, and the rest at random."""
    fixed = [longest, 0, min(1, longest), longest // 2]
    drawn = torch.randint(0, longest + 1, (max(0, batch - len(fixed)),), generator=generator).tolist()
    return [*fixed[:batch], *drawn]


def _paddings(lengths: Sequence[int], ragged: bool, generator: torch.Generator) -> list[int]:
    """Return the first row of each sequence: a few rows off, or of a ragged batch up to all, and all of the last."""
    shares = torch.rand(len(lengths), generator=generator).tolist()
    most = [length if ragged else min(length // 2, _SPARE_ROWS) for length in lengths]
    padded = [round(share * each) for share, each in zip(shares, most, strict=True)]
    return [*padded[:-1], most[-1]] if ragged else padded


def _page_table(
    pages: int, ends: Sequence[int], spec: AttentionSpec, generator: torch.Generator, ragged: bool
) -> Tensor:
    """Return [batch, pages] shuffled pages; of a ragged batch none beyond the last key of each sequence."""
    shuffled = torch.randperm(len(ends) * pages + _SPARE_PAGES, generator=generator)[: len(ends) * pages]
    table = shuffled.view(len(ends), pages).to(torch.int32)
    if ragged:
        used = torch.tensor([math.ceil(end / spec.page_size) for end in ends])
        table[torch.arange(pages) >= used[:, None]] = _NOT_A_PAGE
    return table


def _rotary_tables(spec: AttentionSpec, positions: int, device: torch.device | str, seed: int) -> tuple[Tensor, Tensor]:
    """Return cos and sin [positions, rotary_dim / 2] (Su et al., RoFormer, section 3.2.2)."""
    columns = spec.head_dim_qk if seed % 2 == 0 else max(8, spec.head_dim_qk // 32 * 16)
    frequencies = _ROTARY_BASE ** (-torch.arange(0, columns, 2, device=device) / columns)
    angles = torch.arange(positions, device=device)[:, None] * frequencies
    dtype = torch.float32 if spec.rotary_fp32 else torch_dtype(spec.dtype)
    return angles.cos().to(dtype), angles.sin().to(dtype)


def _sized(problem: Problem, *, batch: int, seqlen_q: int = 0, seqlen_k: int = 0) -> Problem:
    """Return the problem with other sizes, for `random_inputs` to make q, or k and v."""
    shape = dataclasses.replace(problem.shape, batch=batch, seqlen_q=seqlen_q, seqlen_k=seqlen_k)
    return dataclasses.replace(problem, shape=shape)


def _as_caches(k: Tensor, v: Tensor, spec: AttentionSpec, extras: Extras) -> tuple[Tensor, Tensor]:
    """Return k and v in the types of caches, NaN where no sequence has a key."""
    assert extras.cache_seqlens is not None
    lengths = extras.cache_seqlens.tolist()
    padding = [0] * len(lengths) if extras.cache_leftpad is None else extras.cache_leftpad.tolist()
    unused = torch.ones(k.shape[0], k.shape[2], dtype=torch.bool, device=k.device)
    for b, (first, length) in enumerate(zip(padding, lengths, strict=True)):
        places = cache_places(b, first, length, k, spec, extras)
        unused[places.entry, places.row] = False
    if spec.fp8_kv:
        k, v = (x.to(torch.float8_e4m3fn) for x in (k, v))
    for x in (k, v):
        if spec.fp8_kv:
            x.view(torch.uint8).masked_fill_(unused[:, None, :, None], _E4M3_NAN)
        else:
            x.masked_fill_(unused[:, None, :, None], math.nan)
    return k, k[..., : spec.head_dim_v] if spec.shared_kv else v


def _int32(numbers: Sequence[int], device: torch.device | str) -> Tensor:
    return torch.tensor(list(numbers), dtype=torch.int32, device=device)


def _cloned(tensor: Tensor) -> Tensor:
    """Return a copy with the same strides; what lies between the elements is not copied."""
    copy = torch.empty_strided(tensor.shape, tensor.stride(), dtype=tensor.dtype, device=tensor.device)
    return copy.copy_(tensor)
