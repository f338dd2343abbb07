"""FlexAttention, compiled, with the problem's mask and scores as closures."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.attention.flex_attention import AuxRequest, BlockMask, create_block_mask, flex_attention

from flashgen.measure.autograd_calls import Attend
from flashgen.measure.flex_mods import MaskMod, ScoreMod, flex_mask_mod, flex_score_mod
from flashgen.spec import Causal, DType, Extras, Full, Problem
from flashgen.spec.masks import SlidingWindow


def bind_flex(problem: Problem, extras: Extras, device: torch.device) -> Attend | str:
    """Return compiled FlexAttention for the problem, its block mask built, or why there is none."""
    spec, shape = problem.spec, problem.shape
    if spec.seqused or spec.dropout or spec.dbias or spec.dtype in (DType.FP8, DType.TF32):
        return f"no adapter for {spec}"
    packed_refusal = _packed_refusal(problem, extras) if spec.varlen else None
    if packed_refusal is not None:
        return packed_refusal
    mask_mod = flex_mask_mod(extras.bound_mask(spec), shape.seqlen_q, shape.seqlen_k)
    score_mod = flex_score_mod(spec, extras, shape.seqlen_k - shape.seqlen_q)
    if isinstance(mask_mod, str):
        return mask_mod
    if isinstance(score_mod, str):
        return score_mod
    block_mask = None
    if spec.varlen:
        block_mask = _packed_block_mask(mask_mod, extras, device)
    elif mask_mod is not None:
        batch = shape.batch if "b" in spec.mask.uses else None
        heads = shape.nheads_q if "h" in spec.mask.uses else None
        block_mask = create_block_mask(mask_mod, batch, heads, shape.seqlen_q, shape.seqlen_k, device=device)
    # Dynamo keeps one cache for the function, and past a few shapes it would fall back to eager.
    torch.compiler.reset()
    compiled = torch.compile(_attend, fullgraph=True, dynamic=False)
    grouped = shape.group > 1

    def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        if not spec.varlen:
            return compiled(q, k, v, score_mod, block_mask, extras.softmax_scale, grouped, extras.sinks)
        q, k, v = (x.transpose(0, 1).unsqueeze(0) for x in (q, k, v))
        out = compiled(q, k, v, score_mod, block_mask, extras.softmax_scale, grouped, extras.sinks)
        return out.squeeze(0).transpose(0, 1)

    return attend


def _attend(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    score_mod: ScoreMod | None,
    block_mask: BlockMask | None,
    scale: float,
    enable_gqa: bool,
    sinks: Tensor | None,
) -> Tensor:
    if sinks is None:
        out: Tensor = flex_attention(
            q, k, v, score_mod=score_mod, block_mask=block_mask, scale=scale, enable_gqa=enable_gqa
        )
        return out
    out, aux = flex_attention(
        q,
        k,
        v,
        score_mod=score_mod,
        block_mask=block_mask,
        scale=scale,
        enable_gqa=enable_gqa,
        return_aux=AuxRequest(lse=True),
    )
    assert aux.lse is not None
    # The sink's share of the denominator, taken off afterwards: exp(lse) / (exp(lse) + exp(sink)).
    return (out * torch.sigmoid(aux.lse - sinks[:, None]).unsqueeze(-1)).to(out.dtype)


def _packed_refusal(problem: Problem, extras: Extras) -> str | None:
    """Return why packed sequences cannot be one long one under a mask of documents: None where they can."""
    spec, shape = problem.spec, problem.shape
    # These masks, softcap and ALiBi know distances alone, which within a sequence are those of the packed tensors.
    if not isinstance(spec.mask, Full | Causal | SlidingWindow):
        return f"no adapter for packed sequences under mask {spec.mask}"
    if shape.seqlen_q != shape.seqlen_k:
        return "no adapter for packed sequences whose queries and keys differ in length"
    if spec.bias != "none" or (extras.alibi_slopes is not None and extras.alibi_slopes.dim() == 2):
        return "no adapter for a bias or alibi_slopes per sequence of packed sequences"
    return None


def _packed_block_mask(inner: MaskMod | None, extras: Extras, device: torch.device) -> BlockMask:
    assert extras.cu_seqlens_q is not None
    lengths = extras.cu_seqlens_q.diff()
    sequence = torch.repeat_interleave(torch.arange(len(lengths), device=device), lengths)

    def mask_mod(b: Tensor, h: Tensor, q_idx: Tensor, kv_idx: Tensor) -> Tensor:
        same = sequence[q_idx] == sequence[kv_idx]
        return same if inner is None else same & inner(b, h, q_idx, kv_idx)

    return create_block_mask(mask_mod, None, None, len(sequence), len(sequence), device=device)
