"""What a kernel is tried on: random Q, K and V, poisoned outputs, awkward shapes, a sample of heads of a large problem.

What a call gives besides Q, K and V is made by `flashgen.measure.random_extras`.
"""

from __future__ import annotations

import math
import random
import typing

import torch
from torch import Tensor

from flashgen.errors import InputError
from flashgen.measure.arithmetic import torch_dtype
from flashgen.spec import DType, Problem, Shape

Layout = typing.Literal["bhsd", "bshd"]

POISON = math.nan
"""What outputs are filled with before a kernel runs: an element that it never writes then fails the accuracy rule."""

# Away from those of inputs and extras, whose numbers those of gradients must not repeat.
_OUTPUT_GRADIENT_SEED, _LSE_GRADIENT_SEED = 1_000_003, 2_000_003

API_LENGTHS: tuple[tuple[int, int], ...] = (
    (1, 1),
    (3, 3),
    (64, 128),
    (239, 1),
    (799, 3),
    (113, 203),
    (128, 217),
    (113, 211),
    (108, 256),
    (384, 256),
    (640, 128),
    (512, 256),
    (1023, 1024),
    (1024, 1023),
    (4224, 4224),
)
"""The (seqlen_q, seqlen_k) that every public function is tested on."""


def awkward_shapes(problem: Problem, block_m: int, block_n: int) -> tuple[Shape, ...]:
    """Return small shapes that break a careless kernel with tiles of block_m queries and block_n keys.

    One row and one key, lengths one off a tile, whole tiles, fewer keys than a tile, many more keys than queries and
    the reverse (under a bottom-right causal mask: rows that see nothing), and no key at all. Batch 2 and, unless the
    problem has a single key/value head, two of them, with the problem's group: a wrong batch or head stride shows.
    """
    lengths = (
        (1, 1),
        (block_m + 1, 2 * block_n - 1),
        (block_m - 1, block_n + 1),
        (2 * block_m, 2 * block_n),
        (block_m, block_m + block_n + 1),
        (block_m + 3, max(1, block_n // 2 - 1)),
        (2 * block_m + 5, block_n + 7),
        (block_m // 2 + 1, 2 * block_m + 3 * block_n + 1),
        (7, 0),
    )
    nheads_kv = min(problem.shape.nheads_kv, 2)
    return tuple(
        Shape(
            batch=2,
            seqlen_q=seqlen_q,
            seqlen_k=seqlen_k,
            nheads_q=nheads_kv * problem.shape.group,
            nheads_kv=nheads_kv,
        )
        for seqlen_q, seqlen_k in dict.fromkeys(lengths)
    )


def random_inputs(
    problem: Problem, *, device: torch.device | str, seed: int, layout: Layout = "bhsd"
) -> tuple[Tensor, Tensor, Tensor]:
    """Return normal random q, k and v as [batch, heads, seqlen, head_dim] views, or packed [tokens, heads, head_dim].

    Args:
        problem: gives sizes and dtype; packed sequences have its `lengths()`.
        device: where they are made.
        seed: the same seed gives the same numbers on the same kind of device.
        layout: order in memory; `bshd` gives transposed views of [batch, seqlen, heads, head_dim]. Packed tensors have
            one order.
    """
    generator = torch.Generator(device=device).manual_seed(seed)
    spec, shape = problem.spec, problem.shape
    dtype = torch_dtype(spec.dtype)
    # Random numbers are not made in 8 bits.
    made = torch.float16 if spec.dtype is DType.FP8 else dtype

    def normal(heads: int, seqlen: int, tokens: int, head_dim: int) -> Tensor:
        logical = (tokens, heads, head_dim) if spec.varlen else (shape.batch, heads, seqlen, head_dim)
        sizes = logical if spec.varlen else _memory_order(logical, layout)
        numbers = torch.randn(sizes, generator=generator, device=device, dtype=made).to(dtype)
        return numbers if spec.varlen else _logical_view(numbers, layout)

    tokens_q, tokens_k = token_counts(problem)
    return (
        normal(shape.nheads_q, shape.seqlen_q, tokens_q, spec.head_dim_qk),
        normal(shape.nheads_kv, shape.seqlen_k, tokens_k, spec.head_dim_qk),
        normal(shape.nheads_kv, shape.seqlen_k, tokens_k, spec.head_dim_v),
    )


def random_output_gradients(
    problem: Problem, *, device: torch.device | str, seed: int, layout: Layout = "bhsd"
) -> Tensor:
    """Return a normal random dout, laid out as `poisoned_outputs` lays out out.

    Args:
        problem: gives sizes and dtype.
        device: where it is made.
        seed: the same seed gives the same numbers, other ones than those of `random_inputs`.
        layout: order in memory, unless it is packed.
    """
    spec, shape = problem.spec, problem.shape
    if spec.varlen:
        sizes: tuple[int, ...] = (token_counts(problem)[0], shape.nheads_q, spec.head_dim_v)
    else:
        sizes = _memory_order((shape.batch, shape.nheads_q, shape.seqlen_q, spec.head_dim_v), layout)
    generator = torch.Generator(device=device).manual_seed(seed + _OUTPUT_GRADIENT_SEED)
    dout = torch.randn(sizes, generator=generator, device=device, dtype=torch_dtype(spec.dtype.out))
    return dout if spec.varlen else _logical_view(dout, layout)


def random_lse_gradients(problem: Problem, *, device: torch.device | str, seed: int) -> Tensor:
    """Return a normal random float32 dlse, [batch, nheads_q, seqlen_q] or packed [nheads_q, tokens_q]."""
    shape = problem.shape
    if problem.spec.varlen:
        rows: tuple[int, ...] = (shape.nheads_q, token_counts(problem)[0])
    else:
        rows = (shape.batch, shape.nheads_q, shape.seqlen_q)
    generator = torch.Generator(device=device).manual_seed(seed + _LSE_GRADIENT_SEED)
    return torch.randn(rows, generator=generator, device=device)


def token_counts(problem: Problem) -> tuple[int, int]:
    """Return how many query and key rows all batch entries have together."""
    lengths = problem.lengths()
    return sum(q for q, _ in lengths), sum(k for _, k in lengths)


def poisoned_outputs(
    problem: Problem, *, device: torch.device | str, layout: Layout = "bhsd"
) -> tuple[Tensor, Tensor | None]:
    """Return out and lse of NaN for a kernel to fill; lse is None unless the spec writes it.

    Args:
        problem: gives sizes and dtype.
        device: where they are made.
        layout: order of out in memory, unless it is packed.

    Returns:
        out [batch, nheads_q, seqlen_q, head_dim_v] and float32 lse [batch, nheads_q, seqlen_q], or packed
        [tokens_q, nheads_q, head_dim_v] and [nheads_q, tokens_q].
    """
    spec, shape = problem.spec, problem.shape
    dtype = torch_dtype(spec.dtype.out)
    if spec.varlen:
        tokens = token_counts(problem)[0]
        out = poisoned_empty((tokens, shape.nheads_q, spec.head_dim_v), dtype, device)
        rows: tuple[int, ...] = (shape.nheads_q, tokens)
    else:
        rows = (shape.batch, shape.nheads_q, shape.seqlen_q)
        out = poisoned_empty((*rows, spec.head_dim_v), dtype, device, layout=layout)
    return out, poisoned_empty(rows, torch.float32, device) if spec.lse else None


def poisoned_gradients(
    problem: Problem, *, device: torch.device | str, layout: Layout = "bhsd"
) -> tuple[Tensor, Tensor, Tensor]:
    """Return dq, dk and dv of NaN for a kernel to fill, of the shapes, dtype and layout of `random_inputs`."""
    spec, shape = problem.spec, problem.shape
    tokens_q, tokens_k = token_counts(problem)

    def poisoned(heads: int, seqlen: int, tokens: int, head_dim: int) -> Tensor:
        dtype = torch_dtype(spec.dtype)
        if spec.varlen:
            return poisoned_empty((tokens, heads, head_dim), dtype, device)
        return poisoned_empty((shape.batch, heads, seqlen, head_dim), dtype, device, layout=layout)

    return (
        poisoned(shape.nheads_q, shape.seqlen_q, tokens_q, spec.head_dim_qk),
        poisoned(shape.nheads_kv, shape.seqlen_k, tokens_k, spec.head_dim_qk),
        poisoned(shape.nheads_kv, shape.seqlen_k, tokens_k, spec.head_dim_v),
    )


def poisoned_empty(
    shape: tuple[int, ...], dtype: torch.dtype, device: torch.device | str, *, layout: Layout = "bhsd"
) -> Tensor:
    """Return a tensor of NaN for a kernel to fill.

    Args:
        shape: logical shape: [batch, heads, seqlen, head_dim] for out, [batch, heads, seqlen] for lse.
        dtype: a floating-point type.
        device: where it is made.
        layout: order in memory; `bshd` (four dimensions only) gives a transposed view.
    """
    sizes = _memory_order(shape, layout)
    return _logical_view(torch.full(sizes, POISON, dtype=dtype, device=device), layout)


def _memory_order(shape: tuple[int, ...], layout: Layout) -> tuple[int, ...]:
    if layout == "bhsd":
        return shape
    if layout != "bshd" or len(shape) != 4:
        raise InputError(f"layout must be 'bhsd', or 'bshd' for four dimensions; got {layout!r} and {len(shape)}")
    return (shape[0], shape[2], shape[1], shape[3])


def _logical_view(tensor: Tensor, layout: Layout) -> Tensor:
    return tensor.transpose(1, 2) if layout == "bshd" else tensor


def sampled_heads(batch: int, nheads_q: int, limit: int, seed: int) -> tuple[tuple[int, int], ...]:
    """Return at most `limit` (batch, query head) pairs in order, always the first and the last, the rest at random.

    Raises:
        InputError: if limit is below 2.
    """
    if limit < 2:
        raise InputError(f"limit must be at least 2 (the first head and the last), got {limit}")
    total = batch * nheads_q
    if total <= limit:
        picked = list(range(total))
    else:
        picked = sorted({0, total - 1, *random.Random(seed).sample(range(1, total - 1), limit - 2)})
    return tuple(divmod(index, nheads_q) for index in picked)
