"""Other attention implementations, to measure beside: PyTorch's SDPA backends, FlexAttention, FlashAttention-3."""

from __future__ import annotations

import contextlib
import dataclasses
import importlib
import typing
import warnings
from collections.abc import Callable, Mapping

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.attention.flex_attention import create_block_mask, flex_attention

from flashgen.measure.autograd_calls import Attend, Run, bind_attend
from flashgen.measure.flex_mods import flex_mask_mod, flex_score_mod
from flashgen.spec import AttentionSpec, Causal, DType, Extras, Full, Problem
from flashgen.spec.masks import SlidingWindow

Make = Callable[[Tensor, Tensor, Tensor, Problem, Extras], "Run | str"]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Peer:
    """One implementation.

    Attributes:
        name: short name, as on the command line.
        make: takes q, k, v [batch, heads, seqlen, head_dim], their problem and what else the call gives, tries one
            call, and returns a call without arguments that gives (out,), [batch, nheads_q, seqlen_q, head_dim_v], or of
            a backward problem (dq, dk, dv), like q, k and v; or the reason why this peer cannot run the problem. Its
            other device work (a block mask, the forward before a backward pass) is done in `make`. A deterministic
            problem is run twice, and refused where the bits differ.
    """

    name: str
    make: Make


def _tried(name: str, attend: Attend, q: Tensor, k: Tensor, v: Tensor, problem: Problem) -> Run | str:
    """Return a call of what the problem asks for if it works, else why not, with what the peer warned about."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        try:
            run = bind_attend(attend, q, k, v, problem)
            first = run()
            if problem.spec.deterministic and not all(map(torch.equal, first, run())):
                return f"{name} is not deterministic: two runs differ in their bits"
            torch.cuda.synchronize()
        # A peer is foreign code: whatever it raises is a reason, and the comparison goes on without it.
        except Exception as error:
            first_line = next(iter(str(error).splitlines()), repr(error))
            return " ".join([f"{name}: {first_line}", *_causes([str(w.message) for w in caught])])
    return run


def _causes(messages: list[str]) -> list[str]:
    """Return what SDPA warned about, without its headings and the backends that were not asked for."""
    texts = dict.fromkeys(message.split(" (Triggered")[0] for message in messages)
    return [text for text in texts if not text.endswith("because:") and "runtime disabled" not in text]


def _needs_gpu(name: str, q: Tensor) -> str | None:
    return None if q.is_cuda else f"{name} needs a GPU, the tensors are on {q.device}"


def _plain_spec(name: str, spec: AttentionSpec) -> str | None:
    """Return what of a spec is beyond a dtype, head dimensions and a mask."""
    beyond = [word for word in spec.features if word != "deterministic"] + ["score_mod"] * (spec.score_mod is not None)
    if beyond:
        return f"{name} has no adapter for {', '.join(beyond)}"
    return f"{name} has no adapter for {spec.dtype}" if spec.dtype in (DType.FP8, DType.TF32) else None


def _sdpa_mask(name: str, problem: Problem, lower_right: bool) -> tuple[Tensor | None, bool] | str:
    """Return SDPA's (attn_mask, is_causal) for the problem's mask; SDPA aligns is_causal to the top left."""
    mask, shape = problem.spec.mask, problem.shape
    if isinstance(mask, Full):
        return None, False
    if not isinstance(mask, Causal):
        return f"{name} has no mask {mask}"
    if mask.align == "top_left" or shape.seqlen_q == shape.seqlen_k:
        return None, True
    if lower_right and shape.seqlen_q < shape.seqlen_k:
        from torch.nn.attention.bias import causal_lower_right

        return causal_lower_right(shape.seqlen_q, shape.seqlen_k), False
    return (
        f"{name} cannot align causal to the bottom right with seqlen_q={shape.seqlen_q} and seqlen_k={shape.seqlen_k}"
    )


def _sdpa(name: str, backend: SDPBackend, *, lower_right: bool) -> Peer:
    def make(q: Tensor, k: Tensor, v: Tensor, problem: Problem, extras: Extras) -> Run | str:
        refusal = _needs_gpu(name, q) or _plain_spec(name, problem.spec)
        if refusal is not None:
            return refusal
        arguments = _sdpa_mask(name, problem, lower_right)
        if isinstance(arguments, str):
            return arguments
        attn_mask, is_causal = arguments
        grouped = problem.shape.group > 1

        def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            with sdpa_kernel([backend]):
                return F.scaled_dot_product_attention(
                    q, k, v, attn_mask=attn_mask, is_causal=is_causal, scale=extras.softmax_scale, enable_gqa=grouped
                )

        return _tried(name, attend, q, k, v, problem)

    return Peer(name=name, make=make)


def _make_flex(q: Tensor, k: Tensor, v: Tensor, problem: Problem, extras: Extras) -> Run | str:
    refusal = _needs_gpu("flex", q)
    if refusal is not None:
        return refusal
    spec, shape = problem.spec, problem.shape
    unknown = spec.varlen or spec.seqused or spec.dropout or spec.sinks or spec.dbias
    if unknown or spec.dtype in (DType.FP8, DType.TF32):
        return f"flex has no adapter for {spec}"
    mask_mod = flex_mask_mod(extras.bound_mask(spec), shape.seqlen_q, shape.seqlen_k)
    score_mod = flex_score_mod(spec, extras, shape.seqlen_k - shape.seqlen_q)
    if isinstance(mask_mod, str) or isinstance(score_mod, str):
        return f"flex: {mask_mod if isinstance(mask_mod, str) else score_mod}"
    block_mask = None
    if mask_mod is not None:
        batch = shape.batch if "b" in spec.mask.uses else None
        heads = shape.nheads_q if "h" in spec.mask.uses else None
        block_mask = create_block_mask(mask_mod, batch, heads, shape.seqlen_q, shape.seqlen_k, device=q.device)
    # Dynamo keeps one cache for the function, and past a few shapes it would fall back to eager.
    torch.compiler.reset()
    compiled = torch.compile(flex_attention, fullgraph=True, dynamic=False)
    grouped = shape.group > 1

    def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        out: Tensor = compiled(
            q,
            k,
            v,
            score_mod=score_mod,
            block_mask=block_mask,
            scale=extras.softmax_scale,
            enable_gqa=grouped,
        )
        return out

    return _tried("flex", attend, q, k, v, problem)


_FA3_MODULES = ("flash_attn_interface", "flash_attn_3.flash_attn_interface", "fa3_fwd_interface")


def _fa3_function() -> Callable[..., object] | None:
    for module in _FA3_MODULES:
        with contextlib.suppress(ImportError, OSError):
            return typing.cast("Callable[..., object]", importlib.import_module(module).flash_attn_func)
    return None


def _make_fa3(q: Tensor, k: Tensor, v: Tensor, problem: Problem, extras: Extras) -> Run | str:
    spec = dataclasses.replace(problem.spec, softcap=False)
    refusal = _needs_gpu("fa3", q) or _plain_spec("fa3", spec)
    if refusal is not None:
        return refusal
    function = _fa3_function()
    if function is None:
        return f"fa3 is not installed (looked for {', '.join(_FA3_MODULES)})"
    mask, shape = problem.spec.mask, problem.shape
    if not isinstance(mask, Full | Causal | SlidingWindow):
        return f"fa3 has no adapter for mask {mask}"
    causal = isinstance(mask, Causal)
    if isinstance(mask, Causal) and mask.align == "top_left" and shape.seqlen_q != shape.seqlen_k:
        return "fa3 cannot align causal to the top left"
    window = (mask.left, mask.right) if isinstance(mask, SlidingWindow) else (-1, -1)
    # Only where it is asked for: builds for inference alone have no such argument.
    deterministic = {"deterministic": True} if spec.deterministic else {}

    def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        result = function(
            *(x.transpose(1, 2) for x in (q, k, v)),
            softmax_scale=extras.softmax_scale,
            causal=causal,
            window_size=window,
            softcap=extras.softcap,
            **deterministic,
        )
        # Some versions return lse beside out.
        out = typing.cast(Tensor, result[0] if isinstance(result, tuple) else result)
        return out.transpose(1, 2)

    return _tried("fa3", attend, q, k, v, problem)


CUDNN = _sdpa("cudnn", SDPBackend.CUDNN_ATTENTION, lower_right=False)
FLASH = _sdpa("flash", SDPBackend.FLASH_ATTENTION, lower_right=True)
EFFICIENT = _sdpa("efficient", SDPBackend.EFFICIENT_ATTENTION, lower_right=True)
FLEX = Peer(name="flex", make=_make_flex)
FA3 = Peer(name="fa3", make=_make_fa3)

PEERS: Mapping[str, Peer] = {peer.name: peer for peer in (CUDNN, FLASH, EFFICIENT, FLEX, FA3)}
"""Every peer by name."""


def default_baselines(device: torch.device | str) -> tuple[Peer, ...]:
    """Return what a kernel on `device` is measured beside unless told otherwise; nothing on a CPU."""
    if torch.device(device).type != "cuda":
        return ()
    return (FLASH,) if torch.version.hip else (CUDNN, FLASH)
