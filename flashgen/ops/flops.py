"""The flops of the operators, for `torch.utils.flop_counter`."""

from __future__ import annotations

import itertools
import typing

import torch
import torch.utils.flop_counter

from flashgen.ops.backward_op import split_backward
from flashgen.ops.call import Options, Tensors, heads_first
from flashgen.ops.torch_op import split_arguments
from flashgen.spec import parse_mask


def attention_forward_flops(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    *rest: typing.Any,
    out_val: object = None,
) -> int:
    """Return the multiply-adds, counted twice, of the two products over the visible pairs of one call.

    Packed sequences count as long as they are, or as `max_seqlen` where nothing can be read of them.
    """
    tensors, options = split_arguments(rest)
    return 2 * _pairs(q, k, tensors, options) * (q.shape[-1] + v.shape[-1])


def attention_backward_flops(*operands: typing.Any, out_val: object = None) -> int:
    """Return the same of the five products of a backward pass, of which the scores are computed once more."""
    given, tensors, options, _ = split_backward(operands)
    return 2 * _pairs(given.q, given.k, tensors, options) * (3 * given.q.shape[-1] + 2 * given.v.shape[-1])


def _pairs(q: torch.Tensor, k: torch.Tensor, tensors: Tensors, options: Options) -> int:
    """Return how many pairs of a query and a key are visible over all heads."""
    mask = parse_mask(options.mask)
    pairs = sum(mask.visible_pairs(sq, sk) for sq, sk in _lengths(q, k, tensors, options))
    return pairs * heads_first(q, options.layout).shape[1]


def _lengths(q: torch.Tensor, k: torch.Tensor, tensors: Tensors, options: Options) -> typing.Iterable[tuple[int, int]]:
    if not options.packed:
        q, k = heads_first(q, options.layout), heads_first(k, options.layout)
        return [(q.shape[2], k.shape[2])] * q.shape[0]
    starts = (tensors.cu_seqlens_q, tensors.cu_seqlens_k)
    assert starts[0] is not None
    if any(type(t) is not torch.Tensor or t.is_meta for t in starts):
        return [(options.max_seqlen_q, options.max_seqlen_k)] * (len(starts[0]) - 1)
    return zip(*([b - a for a, b in itertools.pairwise(t.tolist())] for t in starts if t is not None), strict=True)


for _operator, _formula in (
    (torch.ops.flashgen.attention_forward, attention_forward_flops),
    (torch.ops.flashgen.attention_backward, attention_backward_flops),
):
    torch.utils.flop_counter.register_flop_formula(_operator, get_raw=True)(_formula)
