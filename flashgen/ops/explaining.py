"""`flashgen.explain`: which kernel a call would get, and why not the others."""

from __future__ import annotations

import os

import torch

from flashgen.codegen import KernelConfig
from flashgen.dispatch import Selection
from flashgen.errors import InputError
from flashgen.launch import detect_target
from flashgen.ops.backward_runtime import backward_problem, expected_layouts
from flashgen.ops.call import PACKED, Layout
from flashgen.ops.checks import check_layout, problem_of
from flashgen.ops.cpu import INTERPRETED_AS
from flashgen.ops.request import MaskLike, Request, ScoreModLike, arguments_of
from flashgen.ops.runtime import Layouts, choose, operands_of
from flashgen.spec.problem import Phase

_PHASES: tuple[Phase, ...] = ("forward", "backward")


def explain(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    cu_seqlens_q: torch.Tensor | None = None,
    cu_seqlens_k: torch.Tensor | None = None,
    max_seqlen_q: int | None = None,
    max_seqlen_k: int | None = None,
    *,
    causal: bool = False,
    window: tuple[int, int] = (-1, -1),
    mask: MaskLike | None = None,
    score_mod: ScoreModLike | None = None,
    bias: torch.Tensor | None = None,
    softmax_scale: float | None = None,
    softcap: float = 0.0,
    alibi_slopes: torch.Tensor | None = None,
    sinks: torch.Tensor | None = None,
    dropout_p: float = 0.0,
    seed: int | torch.Tensor | None = None,
    layout: Layout = "bhsd",
    return_lse: bool = False,
    deterministic: bool = False,
    config: KernelConfig | None = None,
    registry: str | os.PathLike[str] | None = None,
    q_descale: torch.Tensor | float | None = None,
    k_descale: torch.Tensor | float | None = None,
    v_descale: torch.Tensor | float | None = None,
    seqused_q: torch.Tensor | None = None,
    seqused_k: torch.Tensor | None = None,
    phase: Phase = "forward",
) -> Selection:
    """Return which kernel `attention` would run for the same call, from which entry, and why not the others.

    Given what `attention_varlen` takes, the answer is for that. For CPU tensors it is for `sm_90`, as in the
    interpreter. Arguments and errors are those of the two functions, but for `phase`: `backward` asks for the kernels
    of the gradients, that of the bias among them where it requires one; `config` is then one of theirs. Of decoding
    tells `explain_with_kvcache`.
    """
    if phase not in _PHASES:
        more = ", of which explain_with_kvcache tells" if phase == "decode" else ""
        raise InputError(f"phase must be one of {', '.join(_PHASES)}, got {phase!r}{more}")
    packed = cu_seqlens_q is not None or cu_seqlens_k is not None
    if not packed:
        check_layout(layout)
        if (max_seqlen_q, max_seqlen_k, seqused_q, seqused_k) != (None, None, None, None):
            raise InputError(
                "max_seqlen_q, max_seqlen_k, seqused_q and seqused_k belong to packed sequences (cu_seqlens_q)"
            )
    request = Request(
        causal=causal,
        window=window,
        mask=mask,
        score_mod=score_mod,
        bias=bias,
        softmax_scale=softmax_scale,
        softcap=softcap,
        alibi_slopes=alibi_slopes,
        sinks=sinks,
        dropout_p=dropout_p,
        seed=seed,
        layout=PACKED if packed else layout,
        return_lse=return_lse,
        deterministic=deterministic,
        config=config,
        registry=registry,
        q_descale=q_descale,
        k_descale=k_descale,
        v_descale=v_descale,
        cu_seqlens_q=cu_seqlens_q,
        cu_seqlens_k=cu_seqlens_k,
        max_seqlen_q=0 if max_seqlen_q is None else max_seqlen_q,
        max_seqlen_k=0 if max_seqlen_k is None else max_seqlen_k,
        seqused_q=seqused_q,
        seqused_k=seqused_k,
    )
    tensors, options = arguments_of(q, k, request)
    layouts: Layouts
    if phase == "backward":
        dbias = tensors.bias is not None and tensors.bias.requires_grad
        problem = backward_problem(q, k, v, tensors, options, dbias)
        layouts = expected_layouts(q, k, v, options.layout)
    else:
        problem = problem_of(q, k, v, tensors, options)
        layouts = operands_of(q, k, v, problem, options.layout)
    if not q.is_cuda:
        return choose(problem, INTERPRETED_AS, options)
    return choose(problem, detect_target(q.device), options, layouts)
