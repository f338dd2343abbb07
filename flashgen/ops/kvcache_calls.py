"""Calls of decoding: the short way of those that were made before, and the way of all others."""

from __future__ import annotations

import typing

import torch
from torch.autograd import forward_ad

from flashgen.dispatch import Selection
from flashgen.launch import detect_target
from flashgen.ops.cpu import INTERPRETED_AS
from flashgen.ops.decode_call import DecodeOptions, DecodeTensors
from flashgen.ops.decode_checks import decode_problem
from flashgen.ops.decode_op import known_runner, run_decode, say_written
from flashgen.ops.decode_request import DecodeRequest, decode_arguments, refuse_gradients
from flashgen.ops.decode_runtime import DecodeRunner, decode_operands
from flashgen.ops.recent import RecentRunners
from flashgen.ops.request import PLAIN_MASKS, autocast
from flashgen.ops.runtime import Outputs, choose
from flashgen.ops.torch_op import plain

# Of calls in which nobody but flashgen has a part: no autograd, no autocast, nobody's mode or transform, no profiler.
# With whether V lies in K's memory, which nothing else tells.
_recent: RecentRunners[tuple[bool, DecodeRunner]] = RecentRunners()
_traced = torch.compiler.is_dynamo_compiling
_function_modes = torch._C._len_torch_function_stack
_profiled = torch._C._autograd._profiler_enabled


def call(q: torch.Tensor, k_cache: torch.Tensor, v_cache: torch.Tensor, request: DecodeRequest) -> Outputs:
    """Return what `attention_with_kvcache` returns for a request: out, and lse where asked for."""
    if not (_traced() or _function_modes() or _profiled() or forward_ad._current_level >= 0):
        outputs = _short_way(q, k_cache, v_cache, request)
        if outputs is not None:
            return outputs
    if torch.is_grad_enabled():
        refuse_gradients(q, k_cache, v_cache, request)
    kind = "cuda" if q.is_cuda else "cpu"
    if torch.is_autocast_enabled(kind):
        q, k, v = (_as_cached(t, k_cache, kind) for t in (q, request.k, request.v))
        request = request._replace(k=k, v=v)
    tensors, options = decode_arguments(q, k_cache, v_cache, request)
    if q.is_cuda:
        _keep(q, k_cache, v_cache, request, tensors, options)
    return run_decode(q, k_cache, v_cache, tensors, options)


def explain_call(q: torch.Tensor, k_cache: torch.Tensor, v_cache: torch.Tensor, request: DecodeRequest) -> Selection:
    """Return which kernel `call` would run; for CPU tensors, which it would run on `sm_90`."""
    tensors, options = decode_arguments(q, k_cache, v_cache, request)
    problem = decode_problem(q, k_cache, v_cache, tensors, options)
    if not q.is_cuda:
        return choose(problem, INTERPRETED_AS, options)
    operands = decode_operands(q, k_cache, v_cache, problem, tensors, options)
    return choose(problem, detect_target(q.device), options, operands)


def _as_cached(tensor: typing.Any, k_cache: torch.Tensor, kind: str) -> typing.Any:
    """Return what autocast makes of a tensor: of the type of the cache, which nobody casts in every call."""
    if not isinstance(tensor, torch.Tensor):
        return tensor
    if k_cache.dtype.itemsize == 1:
        return autocast(kind, tensor)[0]
    return tensor.to(k_cache.dtype) if tensor.is_floating_point() and tensor.dtype.itemsize > 1 else tensor


def _short_way(q: torch.Tensor, k_cache: torch.Tensor, v_cache: torch.Tensor, request: DecodeRequest) -> Outputs | None:
    """Return the outputs of a call whose runner is known, None of all others; see `RecentRunners`."""
    given = request.given
    found = _recent.find((q, k_cache, v_cache, *[t for t in given if t is not None]), _asked(request))
    if found is None:
        return None
    shared, runner = found
    of_q, of_k, of_v = q.data_ptr(), k_cache.data_ptr(), v_cache.data_ptr()
    addresses = of_q | of_k | of_v
    if request.k is not None and request.v is not None:
        addresses |= request.k.data_ptr() | request.v.data_ptr()
    if addresses & 15 or (of_k == of_v) != shared:
        return None
    outputs = runner(q, k_cache, v_cache, DecodeTensors(*given))
    if request.k is not None:
        say_written(k_cache, v_cache)
    return outputs


def _asked(request: DecodeRequest) -> tuple[object, ...]:
    """Return all that tells a call from others, but for what its tensors are like."""
    return tuple(map(type, request.given)), request.asked


def _keep(
    q: torch.Tensor,
    k_cache: torch.Tensor,
    v_cache: torch.Tensor,
    request: DecodeRequest,
    tensors: DecodeTensors,
    options: DecodeOptions,
) -> None:
    """Keep the runner of a call that was made before; there will be more of those."""
    short = (
        not (request.check or torch.compiler.is_compiling() or torch.is_autocast_enabled("cuda"))
        and (request.mask is None or type(request.mask) in PLAIN_MASKS)
        and request.score_mod is None
        # A scale that is a tensor may become another number unseen.
        and not isinstance(request.softmax_scale, torch.Tensor)
        and plain(q, k_cache, v_cache, tensors)
        # Nothing was made of what was given.
        and all(a is b for a, b in zip(request.given, tensors, strict=False))
    )
    if not short or not _recent.has_room(asked := _asked(request)):
        return
    everything = (q, k_cache, v_cache, *[t for t in request.given if t is not None])
    if any(t.requires_grad for t in everything):
        return
    runner = known_runner(q, k_cache, v_cache, tensors, options)
    if runner is not None:
        _recent.keep(everything, asked, (k_cache.data_ptr() == v_cache.data_ptr(), runner))
