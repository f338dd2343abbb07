"""flashgen behind PyTorch's own flash attention: `F.scaled_dot_product_attention` and `varlen_attn` on NVIDIA GPUs.

    flashgen.integrations.register_torch_flash()
    torch.nn.attention.activate_flash_attention_impl("flashgen")
    ...
    torch.nn.attention.restore_flash_attention_impl()

Calls for which the registries hold a tuned kernel run by flashgen, all others by PyTorch's kernel as before: each phase
for itself, as the gradients are computed from the log-sum-exp and out, whoever they come from.
"""

from __future__ import annotations

import functools
import typing
import warnings

import torch
from torch import Tensor
from torch.library import Library

from flashgen.dispatch import Rung, Selection
from flashgen.errors import FlashgenError, UnsupportedError
from flashgen.integrations.torch_flash_calls import Cuts, FlashOptions, Original, layout_of, takes
from flashgen.integrations.torch_flash_gradients import flash_backward, sdpa_backward
from flashgen.ops import attention, attention_varlen, explain
from flashgen.registry import generation

NAME = "flashgen"
"""By which PyTorch knows the implementation."""

TUNED: frozenset[Rung] = frozenset(("exact", "other software", "nearest", "other device", "other features"))
"""Choices founded on a measurement; for others PyTorch's kernel is the better bet."""

_MEMO_LIMIT = 8192
_tuned: dict[tuple[object, ...], bool] = {}

# out, logsumexp, rng_state, unused, debug_attn_mask
_Forward = tuple[Tensor, Tensor, Tensor, Tensor, Tensor]


def register() -> None:
    """Make "flashgen" known to `torch.nn.attention.activate_flash_attention_impl`; nothing changes until that.

    Raises:
        UnsupportedError: if this PyTorch has no such hook (before 2.11).
    """
    if not hasattr(torch.nn.attention, "register_flash_attention_impl"):
        raise UnsupportedError(
            f"this PyTorch ({torch.__version__}) takes no other flash attention; it needs "
            "torch.nn.attention.register_flash_attention_impl, of 2.11 and later"
        )
    torch.nn.attention.register_flash_attention_impl(NAME, register_fn=activate)


class Handle:
    """The overridden operators; PyTorch keeps it until another implementation is activated or the own one restored."""

    def __init__(self, library: Library) -> None:
        self._library: Library | None = library

    def remove(self) -> None:
        """Put PyTorch's kernels back."""
        self._library = None


def activate() -> Handle:
    """Put flashgen before PyTorch's flash kernels; `activate_flash_attention_impl` calls it.

    Raises:
        UnsupportedError: if this PyTorch has no flash kernels for NVIDIA GPUs to fall back on.
    """
    if torch.version.cuda is None:
        raise UnsupportedError(f"this PyTorch ({torch.__version__}) is not built for NVIDIA GPUs")
    library = Library("aten", "IMPL")
    with warnings.catch_warnings():
        # PyTorch warns that a kernel is overridden, which is the purpose.
        warnings.simplefilter("ignore", UserWarning)
        for name, forward in (
            ("_scaled_dot_product_flash_attention", sdpa_forward),
            ("_flash_attention_forward", flash_forward),
        ):
            original = torch.library.get_kernel(f"aten::{name}", "CUDA")
            library.impl(name, functools.partial(forward, original), "CUDA", with_keyset=True)
        for name, backward in (
            ("_scaled_dot_product_flash_attention_backward", sdpa_backward),
            ("_flash_attention_backward", flash_backward),
        ):
            original = torch.library.get_kernel(f"aten::{name}", "CUDA")
            library.impl(name, functools.partial(backward, original, _is_tuned), "CUDA", with_keyset=True)
    return Handle(library)


def sdpa_forward(
    original: Original,
    keyset: torch.DispatchKeySet,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    return_debug_mask: bool = False,
    *,
    scale: float | None = None,
) -> typing.Any:
    """Return what aten::_scaled_dot_product_flash_attention does: tensors are [batch, heads, seqlen, head_dim]."""
    result = None
    if not dropout_p and not return_debug_mask:
        result = _dense(query, key, value, FlashOptions(causal=is_causal, scale=scale))
    if result is None:
        return original.call_boxed(keyset, query, key, value, dropout_p, is_causal, return_debug_mask, scale=scale)
    out, lse, *rest = result
    return out, lse, None, None, query.shape[2], key.shape[2], *rest


def flash_forward(
    original: Original,
    keyset: torch.DispatchKeySet,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    cum_seq_q: Tensor | None,
    cum_seq_k: Tensor | None,
    max_q: int,
    max_k: int,
    dropout_p: float,
    is_causal: bool,
    return_debug_mask: bool,
    **options: typing.Any,
) -> typing.Any:
    """Return what aten::_flash_attention_forward does: [batch, seqlen, heads, head_dim], or packed with cum_seq_q.

    `options` are the operator's keyword arguments, which PyTorch adds to from version to version; one that is given and
    not known here goes to PyTorch's kernel with the rest.
    """
    result = None
    asked = FlashOptions.read(is_causal, options)
    if asked is not None and not dropout_p and not return_debug_mask:
        if cum_seq_q is None and cum_seq_k is None and asked.seqused_k is None:
            result = _dense(query.transpose(1, 2), key.transpose(1, 2), value.transpose(1, 2), asked)
            result = result and (result[0].transpose(1, 2), *result[1:])
        elif cum_seq_q is not None and cum_seq_k is not None:
            result = _packed(query, key, value, Cuts(cum_seq_q, cum_seq_k, max_q, max_k), asked)
    if result is not None:
        return result
    return original.call_boxed(
        keyset,
        query,
        key,
        value,
        cum_seq_q,
        cum_seq_k,
        max_q,
        max_k,
        dropout_p,
        is_causal,
        return_debug_mask,
        **options,
    )


def _dense(query: Tensor, key: Tensor, value: Tensor, options: FlashOptions) -> _Forward | None:
    """Return the outputs for [batch, heads, seqlen, head_dim] tensors, or None where PyTorch's kernel is to run."""
    layout = layout_of(query)
    if layout is None or not takes(query, key, value):
        return None
    q, k, v = (t if layout == "bhsd" else t.transpose(1, 2) for t in (query, key, value))
    memo = (
        q.shape, k.shape, v.shape, q.stride(), k.stride(), v.stride(), q.dtype, q.device, options.causal,
        options.window, layout, generation(),
    )  # fmt: skip

    def choice() -> Selection:
        return explain(q, k, v, causal=options.causal, window=options.window, layout=layout, return_lse=True)

    if not _is_tuned(memo, choice):
        return None
    # Autograd is PyTorch's matter here: this is below it.
    with torch.no_grad():
        out, lse = attention(
            q,
            k,
            v,
            causal=options.causal,
            window=options.window,
            softmax_scale=options.scale,
            layout=layout,
            return_lse=True,
        )
    may_be_blind = options.window != (-1, -1) or (options.causal and query.shape[2] > key.shape[2])
    return _outputs(out if layout == "bhsd" else out.transpose(1, 2), lse, may_be_blind)


def _packed(query: Tensor, key: Tensor, value: Tensor, cuts: Cuts, options: FlashOptions) -> _Forward | None:
    """Return the outputs for packed [tokens, heads, head_dim] tensors, or None where PyTorch's kernel is to run."""
    if not query.is_contiguous() or not takes(query, key, value):
        return None
    seqused_k = options.seqused_k
    memo = (
        query.shape[1:], key.shape[1:], value.shape[1:], key.stride(), value.stride(), query.dtype, query.device,
        len(cuts.cu_seqlens_q), cuts.max_seqlen_q, cuts.max_seqlen_k, options.causal, options.window,
        seqused_k is None, generation(),
    )  # fmt: skip

    def choice() -> Selection:
        return explain(
            query,
            key,
            value,
            *cuts,
            causal=options.causal,
            window=options.window,
            return_lse=True,
            seqused_k=seqused_k,
        )

    if not _is_tuned(memo, choice):
        return None
    with torch.no_grad():
        out, lse = attention_varlen(
            query,
            key,
            value,
            *cuts,
            causal=options.causal,
            window=options.window,
            softmax_scale=options.scale,
            return_lse=True,
            seqused_k=seqused_k,
        )
    return _outputs(out, lse, True)


def _is_tuned(memo: tuple[object, ...], choice: typing.Callable[[], Selection]) -> bool:
    """Return whether the dispatcher finds a tuned kernel, looked up once for each kind of call."""
    known = _tuned.get(memo)
    if known is not None:
        return known
    try:
        known = choice().rung in TUNED
    except FlashgenError:
        # Whatever flashgen cannot run is PyTorch's, as without flashgen; its kernel knows what to say of bad input.
        known = False
    if not _is_capturing():
        # Inside a capture nothing can be compiled: a refusal says nothing of later calls.
        if len(_tuned) >= _MEMO_LIMIT:
            _tuned.clear()
        _tuned[memo] = known
    return known


def _is_capturing() -> bool:
    return torch.cuda.is_available() and torch.cuda.is_current_stream_capturing()


def _outputs(out: Tensor, lse: Tensor, may_be_blind: bool) -> _Forward:
    if may_be_blind:
        # PyTorch's backward expects +inf for a row that sees no key, so that exp(score - lse) is 0 and not NaN.
        lse = lse.masked_fill_(lse == float("-inf"), float("inf"))
    # Read by a backward pass with dropout alone.
    rng_state = torch.empty((2,), dtype=torch.uint64, device=out.device)
    unused = torch.empty((), dtype=torch.uint64, device=out.device)
    return out, lse, rng_state, unused, out.new_empty((0,))
