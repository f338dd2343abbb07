"""`flashgen.attention` and what goes with it."""

from __future__ import annotations

import os
import typing
from collections.abc import Iterable

import torch
from torch.autograd import forward_ad

from flashgen.codegen import KernelConfig
from flashgen.dispatch import Selection
from flashgen.errors import InputError, UnsupportedError
from flashgen.launch import detect_target
from flashgen.ops.checks import LAYOUTS, Layout, autocast, check_layout, combine_mask, problem_of
from flashgen.ops.runtime import Options, choose, operands_of
from flashgen.ops.torch_op import INTERPRETED_AS, encode_config, run
from flashgen.spec import Mask, Problem, parse_problem


@typing.overload
def attention(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    *,
    causal: bool = ...,
    mask: Mask | None = ...,
    softmax_scale: float | None = ...,
    layout: Layout = ...,
    return_lse: typing.Literal[False] = ...,
    config: KernelConfig | None = ...,
    registry: str | os.PathLike[str] | None = ...,
) -> torch.Tensor: ...


@typing.overload
def attention(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    *,
    causal: bool = ...,
    mask: Mask | None = ...,
    softmax_scale: float | None = ...,
    layout: Layout = ...,
    return_lse: typing.Literal[True],
    config: KernelConfig | None = ...,
    registry: str | os.PathLike[str] | None = ...,
) -> tuple[torch.Tensor, torch.Tensor]: ...


def attention(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    *,
    causal: bool = False,
    mask: Mask | None = None,
    softmax_scale: float | None = None,
    layout: Layout = "bhsd",
    return_lse: bool = False,
    config: KernelConfig | None = None,
    registry: str | os.PathLike[str] | None = None,
) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor]:
    """Return exact attention, softmax(softmax_scale * q k^T under the mask) v, by the best kernel known for the call.

    Grouped heads need no expanding: `nheads_q` is any multiple of `nheads_kv`. A row that sees no key gives 0 and
    lse -inf. Forward only in this version.

    Args:
        q: [batch, nheads_q, seqlen_q, head_dim_qk] (`bhsd`) or [batch, seqlen_q, nheads_q, head_dim_qk] (`bshd`);
            float16, bfloat16 or float32, any strides (a last dimension that is not contiguous costs a copy).
        k: the same with nheads_kv and seqlen_k; head dimensions are multiples of 8 from 16 to 256.
        v: the same as k with head_dim_v, which need not equal head_dim_qk.
        causal: query i sees keys up to i + seqlen_k - seqlen_q (bottom right, as FlashAttention).
        mask: a value of `flashgen.masks`; combined with `causal` where both are given.
        softmax_scale: default head_dim_qk ** -0.5.
        layout: order of the dimensions of q, k, v and out.
        return_lse: also return the natural-log log-sum-exp, float32 [batch, nheads_q, seqlen_q].
        config: run exactly this kernel configuration.
        registry: a registry file or folder to look in first.

    Returns:
        out, like q with head_dim_v columns; with `return_lse`, the pair (out, lse).

    Raises:
        InputError: for tensors or options that do not fit; the message says what is allowed.
        UnsupportedError: where a gradient is asked for.
        ConfigError: if `config` is illegal here.
        NoKernelError: if nothing can run the call; the message lists why.

    The kernels' algorithm is FlashAttention-2 (Dao 2023, arXiv:2307.08691, section 3.1).
    """
    if torch.is_grad_enabled() and (q.requires_grad or k.requires_grad or v.requires_grad):
        raise UnsupportedError(
            "this version of flashgen has no backward pass, and an input requires a gradient; call under "
            "torch.no_grad(), or detach the inputs"
        )
    if forward_ad._current_level >= 0 and any(forward_ad.unpack_dual(t).tangent is not None for t in (q, k, v)):
        raise UnsupportedError("flashgen has no forward-mode derivative (torch.func.jvp); detach the inputs")
    kind = "cuda" if q.is_cuda else "cpu"
    if torch.is_autocast_enabled(kind):
        q, k, v = autocast(kind, q, k, v)
    out, lse = run(
        q,
        k,
        v,
        ("causal" if causal else "full") if mask is None else str(combine_mask(causal, mask)),
        softmax_scale,
        layout,
        return_lse,
        "" if config is None else encode_config(config),
        "" if registry is None else os.fspath(registry),
    )
    return out if lse is None else (out, lse)


def explain(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    *,
    causal: bool = False,
    mask: Mask | None = None,
    softmax_scale: float | None = None,
    layout: Layout = "bhsd",
    return_lse: bool = False,
    config: KernelConfig | None = None,
    registry: str | os.PathLike[str] | None = None,
) -> Selection:
    """Return which kernel `attention` would run for the same call, from which entry, and why not the others.

    For CPU tensors the answer is for `sm_90`, as in the interpreter. Arguments and errors are those of `attention`.
    """
    options = Options(
        mask=combine_mask(causal, mask),
        softmax_scale=1.0 if softmax_scale is None else softmax_scale,
        layout=check_layout(layout),
        return_lse=return_lse,
        config=config,
        registry=None if registry is None else os.fspath(registry),
    )
    problem = problem_of(q, k, v, mask=options.mask, layout=layout, lse=return_lse)
    if not q.is_cuda:
        return choose(problem, INTERPRETED_AS, options)
    return choose(problem, detect_target(q.device), options, operands_of(q, k, v, problem, layout))


def warmup(
    problems: Iterable[Problem | str], *, device: torch.device | str = "cuda", layout: Layout | None = None
) -> None:
    """Choose, compile and load the kernels for `problems`, so that a CUDA graph capture finds them ready.

    Args:
        problems: problems, or their text (`b=4 hq=32 hkv=8 sq=4096 sk=4096 d=128 causal bf16`).
        device: the GPU that will run them.
        layout: of dense tensors; both when not given. Calls with other strides are prepared on their first use.

    Raises:
        InputError: if the device is no GPU, or a text is no problem.
    """
    device = torch.device(device)
    if device.type != "cuda":
        raise InputError(f"warmup prepares GPU kernels, got device {device}")
    for item in problems:
        problem = parse_problem(item) if isinstance(item, str) else item
        for order in LAYOUTS if layout is None else (check_layout(layout),):
            _run_once(problem, order, device)


def _run_once(problem: Problem, layout: Layout, device: torch.device) -> None:
    spec, shape = problem.spec, problem.shape
    dtype = getattr(torch, spec.dtype.torch_name)

    def empty(heads: int, seqlen: int, head_dim: int) -> torch.Tensor:
        rows = (heads, seqlen) if layout == "bhsd" else (seqlen, heads)
        return torch.empty((shape.batch, *rows, head_dim), dtype=dtype, device=device)

    q = empty(shape.nheads_q, shape.seqlen_q, spec.head_dim_qk)
    k = empty(shape.nheads_kv, shape.seqlen_k, spec.head_dim_qk)
    v = empty(shape.nheads_kv, shape.seqlen_k, spec.head_dim_v)
    for return_lse in (False, True):
        torch.ops.flashgen.attention_forward(q, k, v, str(spec.mask), spec.default_scale, layout, return_lse, "", "")
