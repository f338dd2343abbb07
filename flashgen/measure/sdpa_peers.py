"""PyTorch's own attention: the backends of SDPA, and where SDPA has no argument for a problem, the ops below it."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.attention.bias import causal_lower_right

from flashgen.measure.autograd_calls import Attend
from flashgen.measure.peer import HALF, Bind, flash_mask, unsupported
from flashgen.spec import Causal, DType, Extras, Full, Problem
from flashgen.spec.masks import SlidingWindow

_DENSE = HALF | {DType.FP32}


def bind_cudnn(problem: Problem, extras: Extras, device: torch.device) -> Attend | str:
    """Return cuDNN through SDPA, or for packed sequences through the op that nested tensors use."""
    if problem.spec.varlen:
        return _packed_cudnn(problem, extras)
    return _sdpa(SDPBackend.CUDNN_ATTENTION, lower_right=False)(problem, extras, device)


def bind_flash(problem: Problem, extras: Extras, device: torch.device) -> Attend | str:
    """Return PyTorch's FlashAttention-2: through SDPA, or for windows and packed sequences through its op."""
    if problem.spec.varlen or isinstance(problem.spec.mask, SlidingWindow):
        return _flash_op(problem, extras)
    return _sdpa(SDPBackend.FLASH_ATTENTION, lower_right=True)(problem, extras, device)


def bind_efficient(problem: Problem, extras: Extras, device: torch.device) -> Attend | str:
    """Return PyTorch's memory-efficient attention through SDPA."""
    return _sdpa(SDPBackend.EFFICIENT_ATTENTION, lower_right=True)(problem, extras, device)


def _sdpa(backend: SDPBackend, *, lower_right: bool) -> Bind:
    def bind(problem: Problem, extras: Extras, device: torch.device) -> Attend | str:
        arguments = unsupported(problem.spec, dtypes=_DENSE, features=()) or _sdpa_mask(problem, lower_right)
        if isinstance(arguments, str):
            return arguments
        attn_mask, is_causal = arguments
        grouped = problem.shape.group > 1

        def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            with sdpa_kernel([backend]):
                return F.scaled_dot_product_attention(
                    q, k, v, attn_mask=attn_mask, is_causal=is_causal, scale=extras.softmax_scale, enable_gqa=grouped
                )

        return attend

    return bind


def _sdpa_mask(problem: Problem, lower_right: bool) -> tuple[Tensor | None, bool] | str:
    """Return SDPA's (attn_mask, is_causal) for the problem's mask; SDPA aligns is_causal to the top left."""
    mask, shape = problem.spec.mask, problem.shape
    if isinstance(mask, Full):
        return None, False
    if not isinstance(mask, Causal):
        return f"has no mask {mask}"
    if mask.align == "top_left" or shape.seqlen_q == shape.seqlen_k:
        return None, True
    if lower_right and shape.seqlen_q < shape.seqlen_k:
        return causal_lower_right(shape.seqlen_q, shape.seqlen_k), False
    return f"cannot align causal to the bottom right with seqlen_q={shape.seqlen_q} and seqlen_k={shape.seqlen_k}"


def _packed_cudnn(problem: Problem, extras: Extras) -> Attend | str:
    spec, shape = problem.spec, problem.shape
    refusal = unsupported(spec, dtypes=HALF, features={"varlen"})
    if refusal is not None:
        return refusal
    if not isinstance(spec.mask, Full | Causal):
        return f"has no mask {spec.mask}"
    if isinstance(spec.mask, Causal) and shape.seqlen_q != shape.seqlen_k:
        return "no adapter for causal packed sequences whose queries and keys differ in length"
    causal = isinstance(spec.mask, Causal)
    needs_lse = spec.lse or spec.phase == "backward"

    def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        out: Tensor = torch.ops.aten._cudnn_attention_forward(
            q,
            k,
            v,
            None,
            extras.cu_seqlens_q,
            extras.cu_seqlens_k,
            shape.seqlen_q,
            shape.seqlen_k,
            needs_lse,
            0.0,
            causal,
            scale=extras.softmax_scale,
        )[0]
        return out

    return attend


def _flash_op(problem: Problem, extras: Extras) -> Attend | str:
    spec, shape = problem.spec, problem.shape
    arguments = unsupported(spec, dtypes=HALF, features={"varlen"}) or flash_mask(problem)
    if isinstance(arguments, str):
        return arguments
    causal, left, right = arguments

    def op(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        out: Tensor = torch.ops.aten._flash_attention_forward(
            q,
            k,
            v,
            extras.cu_seqlens_q,
            extras.cu_seqlens_k,
            shape.seqlen_q,
            shape.seqlen_k,
            0.0,
            causal,
            False,
            scale=extras.softmax_scale,
            window_size_left=left,
            window_size_right=right,
        )[0]
        return out

    if spec.varlen:
        return op
    return lambda q, k, v: op(*(x.transpose(1, 2) for x in (q, k, v))).transpose(1, 2)
