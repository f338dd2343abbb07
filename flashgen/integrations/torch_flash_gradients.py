"""PyTorch's flash backward operators, run by flashgen where it has tuned kernels of that phase.

The forward pass may have been PyTorch's: out and the log-sum-exp are all that the phases share, and a row that sees no
key has +inf there, by which its probabilities are 0.
"""

from __future__ import annotations

import typing
from collections.abc import Callable

import torch
from torch import Tensor

from flashgen.dispatch import Selection
from flashgen.integrations.torch_flash_calls import Cuts, FlashOptions, Original, layout_of, takes
from flashgen.ops import explain
from flashgen.ops.backward_op import run_backward_op
from flashgen.ops.backward_runtime import BackwardInputs
from flashgen.ops.call import LAYOUTS, PACKED
from flashgen.ops.checks import check_layout
from flashgen.ops.request import Request, arguments_of
from flashgen.registry import generation

IsTuned = Callable[[tuple[object, ...], Callable[[], Selection]], bool]
"""From what tells kinds of calls apart, and the look-up for one, to whether a tuned kernel was found."""

Gradients = tuple[Tensor, ...]


def sdpa_backward(
    original: Original,
    is_tuned: IsTuned,
    keyset: torch.DispatchKeySet,
    grad_out: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    out: Tensor,
    logsumexp: Tensor,
    cum_seq_q: Tensor | None,
    cum_seq_k: Tensor | None,
    max_q: int,
    max_k: int,
    dropout_p: float,
    is_causal: bool,
    *rest: typing.Any,
    scale: float | None = None,
) -> typing.Any:
    """Return what aten::_scaled_dot_product_flash_attention_backward does: [batch, heads, seqlen, head_dim]."""
    found = None
    given = BackwardInputs(query, key, value, out, logsumexp, grad_out, None)
    if not dropout_p and cum_seq_q is None and cum_seq_k is None:
        found = _dense(given, FlashOptions(causal=is_causal, scale=scale), is_tuned)
    if found is not None:
        return found
    return original.call_boxed(
        keyset,
        grad_out,
        query,
        key,
        value,
        out,
        logsumexp,
        cum_seq_q,
        cum_seq_k,
        max_q,
        max_k,
        dropout_p,
        is_causal,
        *rest,
        scale=scale,
    )


def flash_backward(
    original: Original,
    is_tuned: IsTuned,
    keyset: torch.DispatchKeySet,
    grad_out: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    out: Tensor,
    logsumexp: Tensor,
    cum_seq_q: Tensor | None,
    cum_seq_k: Tensor | None,
    max_q: int,
    max_k: int,
    dropout_p: float,
    is_causal: bool,
    *rest: typing.Any,
    **options: typing.Any,
) -> typing.Any:
    """Return what aten::_flash_attention_backward does: [batch, seqlen, heads, head_dim], or packed with cum_seq_q."""
    found: Gradients | None = None
    asked = FlashOptions.read(is_causal, options)
    given = BackwardInputs(query, key, value, out, logsumexp, grad_out, None)
    if asked is not None and not dropout_p:
        if cum_seq_q is None and cum_seq_k is None:
            found = _dense(_turned(given), asked, is_tuned)
            found = found and tuple(gradient.transpose(1, 2) for gradient in found)
        elif cum_seq_q is not None and cum_seq_k is not None:
            found = _packed(given, Cuts(cum_seq_q, cum_seq_k, max_q, max_k), asked, is_tuned)
    if found is not None:
        return found
    return original.call_boxed(
        keyset,
        grad_out,
        query,
        key,
        value,
        out,
        logsumexp,
        cum_seq_q,
        cum_seq_k,
        max_q,
        max_k,
        dropout_p,
        is_causal,
        *rest,
        **options,
    )


def _dense(given: BackwardInputs, asked: FlashOptions, is_tuned: IsTuned) -> Gradients | None:
    """Return the gradients of [batch, heads, seqlen, head_dim] tensors, or None where PyTorch's kernel is to run."""
    layout = layout_of(given.q) if given.q.dim() == 4 else None
    if layout is None or not _belongs(given, tuple(given.q.shape[:3])):
        return None
    found = _gradients(
        given if layout == "bhsd" else _turned(given),
        Request(causal=asked.causal, window=asked.window, softmax_scale=asked.scale, layout=layout, return_lse=True),
        is_tuned,
    )
    if found is None:
        return None
    in_order = found if layout == "bhsd" else tuple(gradient.transpose(1, 2) for gradient in found)
    return tuple(_promised(gradient, t) for gradient, t in zip(in_order, given[:3], strict=True))


def _packed(given: BackwardInputs, cuts: Cuts, asked: FlashOptions, is_tuned: IsTuned) -> Gradients | None:
    """Return the gradients of packed [tokens, heads, head_dim] tensors, or None where PyTorch's kernel is to run."""
    if given.q.dim() != 3 or not _belongs(given, (given.q.shape[1], given.q.shape[0])):
        return None
    request = Request(
        causal=asked.causal,
        window=asked.window,
        softmax_scale=asked.scale,
        layout=PACKED,
        return_lse=True,
        cu_seqlens_q=cuts.cu_seqlens_q,
        cu_seqlens_k=cuts.cu_seqlens_k,
        max_seqlen_q=cuts.max_seqlen_q,
        max_seqlen_k=cuts.max_seqlen_k,
    )
    found = _gradients(given, request, is_tuned)
    if found is None:
        return None
    return tuple(_promised(gradient, t) for gradient, t in zip(found, given[:3], strict=True))


def _gradients(given: BackwardInputs, request: Request, is_tuned: IsTuned) -> Gradients | None:
    deterministic = torch.are_deterministic_algorithms_enabled()
    q, k, v = given[:3]
    cuts: tuple[Tensor, Tensor, int, int] | None = None
    if request.cu_seqlens_q is not None and request.cu_seqlens_k is not None:
        cuts = (request.cu_seqlens_q, request.cu_seqlens_k, request.max_seqlen_q, request.max_seqlen_k)
    sizes = (q.shape, k.shape, v.shape) if cuts is None else (q.shape[1:], k.shape[1:], v.shape[1:], len(cuts[0]))
    memo = (
        "backward", sizes, q.stride(), k.stride(), v.stride(), q.dtype, q.device, request.causal, request.window,
        request.layout, request.max_seqlen_q, request.max_seqlen_k, deterministic, generation(),
    )  # fmt: skip

    def choice() -> Selection:
        return explain(
            q,
            k,
            v,
            *(cuts or ()),
            causal=request.causal,
            window=request.window,
            layout=LAYOUTS[0] if cuts else check_layout(request.layout),
            deterministic=deterministic,
            phase="backward",
        )

    if not is_tuned(memo, choice):
        return None
    # Autograd is PyTorch's matter here: this is below it.
    with torch.no_grad():
        tensors, options = arguments_of(q, k, request)
        return run_backward_op(given, tensors, options, False)[:3]


def _belongs(given: BackwardInputs, rows: tuple[int, ...]) -> bool:
    """Return whether a call is of the kinds that flashgen knows, and its log-sum-exp as flashgen's own would be."""
    q, k, v, out, lse, dout, _ = given
    assert dout is not None
    return (
        takes(q, k, v)
        and out.dtype == dout.dtype == q.dtype
        and out.shape == dout.shape == (*q.shape[:-1], v.shape[-1])
        and lse.dtype == torch.float32
        and tuple(lse.shape) == rows
    )


def _turned(given: BackwardInputs) -> BackwardInputs:
    """Return the inputs with heads and rows exchanged; lse has one order."""
    assert given.dout is not None
    q, k, v, out, dout = (t.transpose(1, 2) for t in (given.q, given.k, given.v, given.out, given.dout))
    return BackwardInputs(q, k, v, out, given.lse, dout, None)


def _promised(gradient: Tensor, tensor: Tensor) -> Tensor:
    """Return a gradient with the strides that PyTorch's shape function promises its compiler."""
    if gradient.stride() == torch.empty_like(tensor, device="meta").stride():
        return gradient
    return torch.empty_like(tensor).copy_(gradient)
