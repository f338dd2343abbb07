"""`flashgen.attention`."""

from __future__ import annotations

import os
import typing

import torch
from torch.autograd import forward_ad

from flashgen.codegen import KernelConfig
from flashgen.ops.autograd import run
from flashgen.ops.call import NO_TENSORS, PACKED, Layout, Options, encode_config
from flashgen.ops.checks import check_layout
from flashgen.ops.gradients import check_gradients
from flashgen.ops.recent import RecentRunners
from flashgen.ops.request import (
    PLAIN_MASKS,
    MaskLike,
    Request,
    ScoreModLike,
    arguments_of,
    autocast,
    autocast_bias,
    plain_mask_text,
)
from flashgen.ops.runtime import Runner
from flashgen.ops.torch_op import known_runner, plain

# The mask as text, then arguments of `attention`: softmax_scale, layout, return_lse, deterministic, config, registry.
_Asked = tuple[str, float | None, str, bool, bool, KernelConfig | None, "str | os.PathLike[str] | None"]
# Of calls in which nobody but flashgen has a part: no autograd, no autocast, nobody's mode or transform, no profiler.
_recent: RecentRunners[Runner] = RecentRunners()
_traced = torch.compiler.is_dynamo_compiling
_function_modes = torch._C._len_torch_function_stack
_profiled = torch._C._autograd._profiler_enabled


@typing.overload
def attention(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    *,
    causal: bool = ...,
    window: tuple[int, int] = ...,
    mask: MaskLike | None = ...,
    score_mod: ScoreModLike | None = ...,
    bias: torch.Tensor | None = ...,
    softmax_scale: float | None = ...,
    softcap: float = ...,
    alibi_slopes: torch.Tensor | None = ...,
    sinks: torch.Tensor | None = ...,
    dropout_p: float = ...,
    seed: int | torch.Tensor | None = ...,
    layout: Layout = ...,
    return_lse: typing.Literal[False] = ...,
    deterministic: bool = ...,
    config: KernelConfig | None = ...,
    registry: str | os.PathLike[str] | None = ...,
    q_descale: torch.Tensor | float | None = ...,
    k_descale: torch.Tensor | float | None = ...,
    v_descale: torch.Tensor | float | None = ...,
) -> torch.Tensor: ...


@typing.overload
def attention(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    *,
    causal: bool = ...,
    window: tuple[int, int] = ...,
    mask: MaskLike | None = ...,
    score_mod: ScoreModLike | None = ...,
    bias: torch.Tensor | None = ...,
    softmax_scale: float | None = ...,
    softcap: float = ...,
    alibi_slopes: torch.Tensor | None = ...,
    sinks: torch.Tensor | None = ...,
    dropout_p: float = ...,
    seed: int | torch.Tensor | None = ...,
    layout: Layout = ...,
    return_lse: typing.Literal[True],
    deterministic: bool = ...,
    config: KernelConfig | None = ...,
    registry: str | os.PathLike[str] | None = ...,
    q_descale: torch.Tensor | float | None = ...,
    k_descale: torch.Tensor | float | None = ...,
    v_descale: torch.Tensor | float | None = ...,
) -> tuple[torch.Tensor, torch.Tensor]: ...


def attention(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
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
) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor]:
    """Return exact attention, softmax(softmax_scale * q k^T, modified and masked) v, by the best kernel known for it.

    A score is scaled, then capped, given to `score_mod`, added to bias and ALiBi, then masked. Grouped heads need no
    expanding: `nheads_q` is any multiple of `nheads_kv`. A row that sees no key gives 0 and lse -inf.

    Differentiable, out and lse, in q, k, v, a bias of numbers and sinks, for head dimensions up to 256 and all dtypes
    but float8; not twice. What is kept for the backward pass are the inputs, out and lse: nothing of size seqlen_q x
    seqlen_k. It runs the kernels that are best known for it, whatever `config` says of the forward pass.

    Args:
        q: [batch, nheads_q, seqlen_q, head_dim_qk] (`bhsd`) or [batch, seqlen_q, nheads_q, head_dim_qk] (`bshd`);
            float16, bfloat16, float32 or float8_e4m3fn, any strides (a last dimension that is not contiguous costs a
            copy).
        k: the same with nheads_kv and seqlen_k; head dimensions are multiples of 8 from 16 to 512.
        v: the same as k with head_dim_v, which need not equal head_dim_qk.
        causal: query i sees keys up to i + seqlen_k - seqlen_q (bottom right, as FlashAttention).
        window: (left, right), for position p = i + seqlen_k - seqlen_q of query i: it sees the keys from p - left to
            p + right; -1 is no bound.
        mask: a value of `flashgen.masks`, or a plain function of (b, h, q_idx, kv_idx), read and never called; all of
            `causal`, `window` and `mask` must let a key be seen.
        score_mod: a plain function of (score, b, h, q_idx, kv_idx) that gives the new score; read likewise.
        bias: added to the scores: q's dtype (bfloat16 for fp8) or float32, broadcast to [batch, nheads_q, seqlen_q,
            seqlen_k]; of a bool one, False hides the key.
        softmax_scale: default head_dim_qk ** -0.5.
        softcap: scores s become softcap * tanh(s / softcap); 0 is off.
        alibi_slopes: [nheads_q] or [batch, nheads_q]: slope * |p - j| is taken off the score of key j.
        sinks: [nheads_q], one extra logit in the denominator of every row; lse counts it.
        dropout_p: share of the probabilities that is dropped, the rest scaled up.
        seed: of the dropout: a whole number, or seed and offset as an int64 tensor [2] on q's device; by default drawn
            from PyTorch's generator of the device.
        layout: order of the dimensions of q, k, v and out.
        return_lse: also return the natural-log log-sum-exp, float32 [batch, nheads_q, seqlen_q].
        deterministic: gradients of equal calls are equal bit for bit, as out always is; also where
            `torch.use_deterministic_algorithms(True)` is in force during the backward pass.
        config: run the forward pass by exactly this kernel configuration.
        registry: a registry file or folder to look in first.
        q_descale, k_descale, v_descale: factors of fp8 q, k and v per (batch, key/value head), [batch, nheads_kv] or
            what broadcasts to it.

    Returns:
        out, like q with head_dim_v columns (bfloat16 for fp8); with `return_lse`, the pair (out, lse).

    Raises:
        InputError: for tensors or options that do not fit; the message says what is allowed.
        UnsupportedError: where a gradient is asked for that does not exist: of alibi_slopes, of tensors that a mask or
            score_mod captures, of descale factors, of float8 or wider heads.
        ConfigError: if `config` is illegal here.
        NoKernelError: if nothing can run the call; the message lists why.

    The kernels' algorithm is FlashAttention-2 (Dao 2023, arXiv:2307.08691, section 3.1).
    """
    if (
        (mask is None or type(mask) in PLAIN_MASKS)
        and score_mod is None
        and bias is None
        and alibi_slopes is None
        and sinks is None
        and not softcap
        and not dropout_p
        and q_descale is None
        and k_descale is None
        and v_descale is None
    ):
        text = "causal" if causal else "full"
        if mask is not None or window != (-1, -1):
            text = plain_mask_text(causal, window, mask)
        asked = (text, softmax_scale, layout, return_lse, deterministic, config, registry)
        # What the kept check of the tensors does not tell: who else may have a part in the call, see `RecentRunners`.
        alone = not (_traced() or _function_modes() or _profiled() or forward_ad._current_level >= 0)
        if alone and (runner := _recent.find((q, k, v), asked)) is not None:
            of_q, of_k, of_v = q.data_ptr(), k.data_ptr(), v.data_ptr()
            if not (of_q | of_k | of_v) & 15:
                out, lse = runner(q, k, v, NO_TENSORS, (of_q, of_k, of_v))
                return out if lse is None else (out, lse)
        return _plain_call(q, k, v, asked)
    check_layout(layout)
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
        layout=layout,
        return_lse=return_lse,
        deterministic=deterministic,
        config=config,
        registry=registry,
        q_descale=q_descale,
        k_descale=k_descale,
        v_descale=v_descale,
    )
    return call(q, k, v, request)


def call(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, request: Request
) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor]:
    """Return what `attention`, or `attention_varlen` for packed sequences, returns for a request."""
    kind = "cuda" if q.is_cuda else "cpu"
    autocasts = torch.is_autocast_enabled(kind)
    if autocasts:
        q, k, v = autocast(kind, q, k, v)
    tensors, options = arguments_of(q, k, request)
    if autocasts and tensors.bias is not None:
        tensors = tensors._replace(bias=autocast_bias(kind, tensors.bias))
    if torch.is_grad_enabled() or forward_ad._current_level >= 0:
        check_gradients(q, k, v, tensors)
    out, lse = run(q, k, v, tensors, options)
    return out if lse is None else (out, lse)


def _plain_call(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, asked: _Asked
) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor]:
    """Return the same for a call of nothing but Q, K and V; what `attention` does not know of yet, or not for sure."""
    mask, softmax_scale, layout, return_lse, deterministic, config, registry = asked
    if layout == PACKED:
        check_layout(layout)
    requires_grad = q.requires_grad or k.requires_grad or v.requires_grad
    if (requires_grad and torch.is_grad_enabled()) or forward_ad._current_level >= 0:
        check_gradients(q, k, v)
    kind = "cuda" if q.is_cuda else "cpu"
    autocasts = torch.is_autocast_enabled(kind)
    if autocasts:
        q, k, v = autocast(kind, q, k, v)
    options = Options(
        0,
        0,
        mask,
        "",
        softmax_scale,
        0.0,
        0.0,
        layout,
        return_lse,
        deterministic,
        encode_config(config),
        "" if registry is None else os.fspath(registry),
    )
    out, lse = run(q, k, v, NO_TENSORS, options)
    # Also where gradients are off: the check tells tensors that require one from others, not when they get it.
    alone = not (requires_grad or autocasts or torch.compiler.is_compiling()) and plain(q, k, v, NO_TENSORS)
    # A scale that is a tensor may become another number unseen.
    if alone and not isinstance(softmax_scale, torch.Tensor) and _recent.has_room(asked):
        runner = known_runner(q, k, v, options)
        if runner is not None:
            _recent.keep((q, k, v), asked, runner)
    return out if lse is None else (out, lse)
