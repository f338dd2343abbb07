"""`torch.ops.flashgen.attention_decode` and `attention_decode_append`: raw operators that hold the dispatcher.

Two, as compilers copy what an operator says it writes to: only the second one writes, to the caches.
"""

from __future__ import annotations

import typing

import torch
from torch._compile import _disable_dynamo

from flashgen.ops.checks import check_layout, tf32_allowed
from flashgen.ops.decode_call import DecodeOptions, DecodeTensors
from flashgen.ops.decode_checks import decode_problem, is_shared
from flashgen.ops.decode_contents import check_contents
from flashgen.ops.decode_cpu import decode_cpu
from flashgen.ops.decode_runtime import DecodeRunner, prepare_decode
from flashgen.ops.runtime import Outputs
from flashgen.ops.torch_op import TAGS, library, plain
from flashgen.registry import generation

_SIDE_SCHEMA = (
    "Tensor cache_seqlens, Tensor? page_table, Tensor? cache_batch_idx, Tensor? cache_leftpad, Tensor? rotary_cos, "
    "Tensor? rotary_sin, Tensor? alibi_slopes, Tensor? sinks, Tensor? k_descale, Tensor? v_descale, Tensor[] captures, "
    "SymInt num_splits, str mask, str score_mod, float? softmax_scale, float softcap, bool rotary_interleaved, "
    "str layout, bool return_lse, bool check, str config, str registry"
)
_NUM_NEW = 2
_NUM_TENSORS = len(DecodeTensors._fields)
_MEMO_LIMIT = 8192
_memo: dict[tuple[object, ...], DecodeRunner] = {}


def run_decode(
    q: torch.Tensor, k_cache: torch.Tensor, v_cache: torch.Tensor, tensors: DecodeTensors, options: DecodeOptions
) -> Outputs:
    """Return out, and lse where asked for: through PyTorch's dispatcher where it has a part in the call."""
    if not torch.compiler.is_compiling() and plain(q, k_cache, v_cache, tensors):
        return decode(q, k_cache, v_cache, tensors, options)
    rest = (*tensors[_NUM_NEW:-1], list(tensors.captures), *options)
    if tensors.k_new is None and tensors.v_new is None:
        out, lse = torch.ops.flashgen.attention_decode(q, k_cache, v_cache, *rest)
    else:
        out, lse = torch.ops.flashgen.attention_decode_append(q, k_cache, v_cache, *tensors[:_NUM_NEW], *rest)
    return out, lse if options.return_lse else None


def decode(
    q: torch.Tensor, k_cache: torch.Tensor, v_cache: torch.Tensor, tensors: DecodeTensors, options: DecodeOptions
) -> Outputs:
    """Return out, and lse where asked for: select, compile and bind on the first call of a kind, then only launch."""
    if not q.is_cuda:
        if q.is_meta:
            out, lse = _fake(q, v_cache, options)
            return out, lse if options.return_lse else None
        outputs = decode_cpu(q, k_cache, v_cache, tensors, options)
    else:
        runner = runner_for(q, k_cache, v_cache, tensors, options)
        if options.check:
            problem = decode_problem(q, k_cache, v_cache, tensors, options)
            check_contents(q, k_cache, problem, tensors, options)
        outputs = runner(q, k_cache, v_cache, tensors)
    if tensors.k_new is not None:
        say_written(k_cache, v_cache)
    return outputs


def runner_for(
    q: torch.Tensor, k_cache: torch.Tensor, v_cache: torch.Tensor, tensors: DecodeTensors, options: DecodeOptions
) -> DecodeRunner:
    """Return what runs calls of this kind on a GPU; the first one of a kind is prepared."""
    key = _key(q, k_cache, v_cache, tensors, options)
    runner = _memo.get(key)
    if runner is None:
        runner = prepare_decode(q, k_cache, v_cache, tensors, options)
        if len(_memo) >= _MEMO_LIMIT:
            _memo.clear()
        _memo[key] = runner
    return runner


def known_runner(
    q: torch.Tensor, k_cache: torch.Tensor, v_cache: torch.Tensor, tensors: DecodeTensors, options: DecodeOptions
) -> DecodeRunner | None:
    """Return what runs calls of this kind, once there was one."""
    return _memo.get(_key(q, k_cache, v_cache, tensors, options))


def _key(
    q: torch.Tensor, k_cache: torch.Tensor, v_cache: torch.Tensor, tensors: DecodeTensors, options: DecodeOptions
) -> tuple[object, ...]:
    dtype = q.dtype
    return (
        q.shape, k_cache.shape, v_cache.shape, q.stride(), k_cache.stride(), v_cache.stride(),
        dtype, k_cache.dtype, v_cache.dtype, q.device, k_cache.device, v_cache.device,
        options, generation(), dtype is torch.float32 and tf32_allowed(),
        is_shared(k_cache, v_cache), _misalignment(q, k_cache, v_cache, tensors.k_new, tensors.v_new),
        tuple(None if t is None else (t.shape, t.stride(), t.dtype, t.device) for t in tensors[:-1]),
        tuple((t.shape, t.dtype, t.device) for t in tensors.captures),
    )  # fmt: skip


def _misalignment(*tensors: torch.Tensor | None) -> tuple[int, ...]:
    """Return how far past whole 16 bytes, which kernels read at a time, each tensor starts; nothing if none does."""
    past = tuple(0 if t is None else t.data_ptr() & 15 for t in tensors)
    return past if any(past) else ()


def say_written(*caches: torch.Tensor) -> None:
    """Tell autograd that caches have changed: what was saved of them for a backward pass is no longer there."""
    for cache in caches:
        if not cache.is_inference():
            torch.autograd.graph.increment_version(cache)


def _fake(q: torch.Tensor, v_cache: torch.Tensor, options: DecodeOptions) -> tuple[torch.Tensor, torch.Tensor]:
    out = q.new_empty((*q.shape[:-1], v_cache.shape[-1]))
    rows: tuple[int, ...] = (0,)
    if options.return_lse:
        batch, first, second = q.shape[:3]
        rows = (batch, first, second) if check_layout(options.layout) == "bhsd" else (batch, second, first)
    return out, q.new_empty(rows, dtype=torch.float32)


def _split(k_new: typing.Any, v_new: typing.Any, rest: tuple[typing.Any, ...]) -> tuple[DecodeTensors, DecodeOptions]:
    count = _NUM_TENSORS - _NUM_NEW
    tensors = DecodeTensors(k_new, v_new, *rest[:count])
    return tensors._replace(captures=tuple(tensors.captures)), DecodeOptions(*rest[count:])


def _append_op(*args: typing.Any) -> tuple[torch.Tensor, torch.Tensor]:
    """Return what the operators' schemas promise: an empty lse where none was asked for."""
    q, k_cache, v_cache, k_new, v_new, *rest = args
    tensors, options = _split(k_new, v_new, tuple(rest))
    out, lse = decode(q, k_cache, v_cache, tensors, options)
    return out, q.new_empty((0,), dtype=torch.float32) if lse is None else lse


def _decode_op(*args: typing.Any) -> tuple[torch.Tensor, torch.Tensor]:
    return _append_op(*args[:3], None, None, *args[3:])


def _fake_append(*args: typing.Any) -> tuple[torch.Tensor, torch.Tensor]:
    return _fake(args[0], args[2], _split(None, None, args[5:])[1])


def _fake_decode(*args: typing.Any) -> tuple[torch.Tensor, torch.Tensor]:
    return _fake(args[0], args[2], _split(None, None, args[3:])[1])


library.define(
    f"attention_decode(Tensor q, Tensor k_cache, Tensor v_cache, {_SIDE_SCHEMA}) -> (Tensor, Tensor)", tags=TAGS
)
library.define(
    "attention_decode_append(Tensor q, Tensor(a!) k_cache, Tensor(b!) v_cache, Tensor? k_new, Tensor? v_new, "
    f"{_SIDE_SCHEMA}) -> (Tensor, Tensor)",
    tags=TAGS,
)
# As for the forward operator: nothing of their bodies is to be compiled.
library.impl("attention_decode", _disable_dynamo(_decode_op), "CompositeExplicitAutograd")
library.impl("attention_decode_append", _disable_dynamo(_append_op), "CompositeExplicitAutograd")
torch.library.register_fake("flashgen::attention_decode", _fake_decode, lib=library)
torch.library.register_fake("flashgen::attention_decode_append", _fake_append, lib=library)
