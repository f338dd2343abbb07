"""The packages of FlashAttention-3 and FlashAttention-4, where they are installed."""

from __future__ import annotations

import dataclasses
import functools
import importlib
import typing
from collections.abc import Callable

import torch
from torch import Tensor

from flashgen.measure.autograd_calls import Attend
from flashgen.measure.decode_cases import DecodeCall
from flashgen.measure.peer import HALF, first_line, flash_mask, unsupported
from flashgen.spec import DType, Extras, Problem

Function = Callable[..., object]


@dataclasses.dataclass(frozen=True, kw_only=True)
class _Package:
    """A package with flash_attn_func and flash_attn_varlen_func for tensors [..., seqlen, heads, head_dim].

    Attributes:
        modules: where the functions may be; the first that can be imported is taken.
        dtypes: element types that some build of it has.
        features: words of a spec's features that it takes an argument for.
        open_side: how it spells that a window has no bound on a side.
    """

    modules: tuple[str, ...]
    dtypes: frozenset[DType]
    features: frozenset[str]
    open_side: int | None


_FA3 = _Package(
    # The repository's own build under both of its names, and the wheel of its forward pass alone: bf16 and fp8,
    # without windows.
    modules=("flash_attn_interface", "flash_attn_3.flash_attn_interface", "fa3_fwd_interface"),
    dtypes=HALF | {DType.FP8},
    features=frozenset({"softcap", "varlen", "descale"}),
    open_side=-1,
)
# And pages of any size.
_FA3_DECODE = frozenset({"softcap", "append", "leftpad", "batch_idx", "rotary=halves", "rotary=pairs"})
_FA4 = _Package(
    modules=("flash_attn.cute",),
    dtypes=HALF,
    features=frozenset({"softcap", "varlen", "sinks"}),
    open_side=None,
)


def bind_fa3(problem: Problem, extras: Extras, device: torch.device) -> Attend | str:
    """Return FlashAttention-3's function for the problem, or why there is none."""
    return _bind(_FA3, problem, extras)


def bind_fa4(problem: Problem, extras: Extras, device: torch.device) -> Attend | str:
    """Return FlashAttention-4's function for the problem, or why there is none."""
    return _bind(_FA4, problem, extras)


def bind_fa3_decode(call: DecodeCall) -> Attend | str:
    """Return FlashAttention-3's function of queries and a cache, or why there is none.

    It is given what the call gives; what a build lacks (pages, windows, appending) it says when it is called.
    """
    spec, extras = call.problem.spec, call.extras
    mask = unsupported(spec, dtypes=HALF, features=_FA3_DECODE | {f"page={spec.page_size}"}) or flash_mask(call.problem)
    if isinstance(mask, str):
        return mask
    function = _imported(_FA3.modules, "flash_attn_with_kvcache")
    if isinstance(function, str):
        return function
    causal, *window = mask
    given = {
        "softcap": extras.softcap if spec.softcap else None,
        "page_table": extras.page_table,
        "cache_batch_idx": extras.cache_batch_idx,
        "cache_leftpad": extras.cache_leftpad,
        "k": None if extras.k_new is None else extras.k_new.transpose(1, 2),
        "v": None if extras.v_new is None else extras.v_new.transpose(1, 2),
        "rotary_cos": extras.rotary_cos,
        "rotary_sin": extras.rotary_sin,
        "rotary_interleaved": spec.rotary == "pairs" if spec.rotary else None,
    }
    decode = functools.partial(
        function,
        cache_seqlens=extras.cache_seqlens,
        softmax_scale=extras.softmax_scale,
        causal=causal,
        window_size=tuple(window),
        **{name: value for name, value in given.items() if value is not None},
    )
    return lambda q, k, v: _out(decode(*(x.transpose(1, 2) for x in (q, k, v)))).transpose(1, 2)


def _bind(package: _Package, problem: Problem, extras: Extras) -> Attend | str:
    spec, shape = problem.spec, problem.shape
    mask = unsupported(spec, dtypes=package.dtypes, features=package.features) or flash_mask(problem)
    if isinstance(mask, str):
        return mask
    function = _imported(package.modules, "flash_attn_varlen_func" if spec.varlen else "flash_attn_func")
    if isinstance(function, str):
        return function
    causal, *window = mask
    call = functools.partial(
        function,
        softmax_scale=extras.softmax_scale,
        causal=causal,
        window_size=tuple(package.open_side if side < 0 else side for side in window),
    )
    # Only what is asked for: builds for inference alone, or older ones, lack some of these arguments.
    if spec.softcap:
        call = functools.partial(call, softcap=extras.softcap)
    if spec.sinks:
        call = functools.partial(call, learnable_sink=extras.sinks)
    if spec.descale:
        call = functools.partial(
            call, q_descale=extras.q_descale, k_descale=extras.k_descale, v_descale=extras.v_descale
        )
    if spec.deterministic:
        call = functools.partial(call, deterministic=True)
    if spec.varlen:
        call = functools.partial(
            call,
            cu_seqlens_q=extras.cu_seqlens_q,
            cu_seqlens_k=extras.cu_seqlens_k,
            max_seqlen_q=shape.seqlen_q,
            max_seqlen_k=shape.seqlen_k,
        )
        return lambda q, k, v: _out(call(q, k, v))
    return lambda q, k, v: _out(call(*(x.transpose(1, 2) for x in (q, k, v)))).transpose(1, 2)


def _out(result: object) -> Tensor:
    # Some versions return lse beside out.
    return typing.cast(Tensor, result[0] if isinstance(result, tuple) else result)


def _imported(modules: tuple[str, ...], name: str) -> Function | str:
    """Return the function of that name of the first module that has it, or why none has."""
    broken = []
    for module in modules:
        try:
            return typing.cast(Function, getattr(importlib.import_module(module), name))
        # A module that links against another PyTorch or CUDA may raise anything.
        except Exception as error:
            if not _is_absent(error, module):
                broken.append(f"{module}: {type(error).__name__}: {first_line(error)}")
    if broken:
        return f"is installed but cannot be used ({'; '.join(broken)})"
    return f"is not installed (looked for {', '.join(modules)})"


def _is_absent(error: Exception, module: str) -> bool:
    """Return whether it is the module itself, or a package around it, that was not found."""
    missing = error.name if isinstance(error, ModuleNotFoundError) else None
    return missing is not None and f"{module}.".startswith(f"{missing}.")
