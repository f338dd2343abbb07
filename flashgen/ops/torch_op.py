"""`torch.ops.flashgen.attention_forward`: a raw operator that holds the dispatcher.

Raw (`Library.define`) and not `custom_op`, which costs 2 us more a call; not `triton_op`, which freezes the choice of
kernel at trace time.
"""

from __future__ import annotations

import typing

import torch
from torch._compile import _disable_dynamo

from flashgen.ops.call import NO_TENSORS, Options, Tensors
from flashgen.ops.checks import check_layout, tf32_allowed
from flashgen.ops.cpu import forward_cpu
from flashgen.ops.decode_call import DecodeTensors
from flashgen.ops.recent import RecentRunners
from flashgen.ops.runtime import Outputs, Runner, prepare, say_copied
from flashgen.registry import generation

SIDE_SCHEMA = (
    "Tensor? bias, Tensor? alibi_slopes, Tensor? sinks, Tensor? rng_state, Tensor? cu_seqlens_q, Tensor? cu_seqlens_k, "
    "Tensor? seqused_q, Tensor? seqused_k, Tensor? q_descale, Tensor? k_descale, Tensor? v_descale, Tensor[] captures, "
    "SymInt max_seqlen_q, SymInt max_seqlen_k, str mask, str score_mod, float? softmax_scale, float softcap, "
    "float dropout_p, str layout, bool return_lse, bool deterministic, str config, str registry"
)
"""What the operators of both phases take after their own tensors: the fields of `Tensors`, then of `Options`."""
TAGS = (torch.Tag.pt2_compliant_tag, torch.Tag.needs_exact_strides)
_NUM_TENSORS = len(Tensors._fields)
# Lengths change from call to call in some programs: past this many kinds of call, the memo starts anew.
_MEMO_LIMIT = 8192
_memo: dict[tuple[object, ...], Runner] = {}
_recent: RecentRunners[Runner] = RecentRunners()


def run_forward_op(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, tensors: Tensors, options: Options
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return what the operator does: through PyTorch's dispatcher, which has its part in the call."""
    out, lse = torch.ops.flashgen.attention_forward(q, k, v, *arguments(tensors, options))
    return out, lse


def arguments(tensors: Tensors, options: Options) -> tuple[typing.Any, ...]:
    """Return what the operator takes after Q, K and V."""
    return (*tensors[:-1], list(tensors.captures), *options)


def split_arguments(rest: tuple[typing.Any, ...]) -> tuple[Tensors, Options]:
    """Return what `arguments` took apart."""
    tensors = Tensors(*rest[:_NUM_TENSORS])
    return tensors._replace(captures=tuple(tensors.captures)), Options(*rest[_NUM_TENSORS:])


def plain(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, tensors: Tensors | DecodeTensors) -> bool:
    """Return whether no subclass, mode, function transform or profiler wants to see an operator on these tensors."""
    return (
        type(q) is torch.Tensor
        and type(k) is torch.Tensor
        and type(v) is torch.Tensor
        and (tensors is NO_TENSORS or _all_plain(tensors))
        and torch._C._len_torch_dispatch_stack() == 0
        and torch._C._len_torch_function_stack() == 0
        and torch._C._functorch.maybe_current_level() is None
        and not torch._C._autograd._profiler_enabled()
    )


def _all_plain(tensors: Tensors | DecodeTensors) -> bool:
    # Parameters are plain enough: nothing is dispatched on them.
    kinds = (torch.Tensor, torch.nn.Parameter)
    return all(t is None or type(t) in kinds for t in tensors[:-1]) and all(type(t) in kinds for t in tensors.captures)


def forward(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, tensors: Tensors, options: Options) -> Outputs:
    """Return out, and lse where asked for: select, compile and bind on the first call of a kind, then only launch."""
    if not q.is_cuda:
        if q.is_meta:
            out, lse = _fake_forward(q, k, v, *arguments(tensors, options))
            return out, lse if options.return_lse else None
        return forward_cpu(q, k, v, tensors, options)
    addresses = q.data_ptr(), k.data_ptr(), v.data_ptr()
    if (addresses[0] | addresses[1] | addresses[2]) & 15:
        say_copied("tensors that are not 16-byte aligned")
        q, k, v = (t.clone(memory_format=torch.contiguous_format) if t.data_ptr() & 15 else t for t in (q, k, v))
        addresses = q.data_ptr(), k.data_ptr(), v.data_ptr()
    is_plain = tensors is NO_TENSORS
    if is_plain and (runner := _recent.find((q, k, v), options)) is not None:
        return runner(q, k, v, tensors, addresses)
    dtype = q.dtype
    key = (
        q.shape, k.shape, v.shape, q.stride(), k.stride(), v.stride(), dtype, k.dtype, v.dtype,
        q.device, k.device, v.device, options, generation(),
        dtype is torch.float32 and tf32_allowed(),
        None if is_plain else kinds_of(tensors),
    )  # fmt: skip
    runner = _memo.get(key)
    if runner is None:
        runner = prepare(q, k, v, tensors, options)
        if len(_memo) >= _MEMO_LIMIT:
            _memo.clear()
        _memo[key] = runner
    elif is_plain:
        # Its second call: there will be more.
        _recent.keep((q, k, v), options, runner)
    return runner(q, k, v, tensors, addresses)


def known_runner(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, options: Options) -> Runner | None:
    """Return what runs calls like this one, of nothing but Q, K and V, once there was more than one."""
    return _recent.find((q, k, v), options)


def kinds_of(tensors: Tensors) -> tuple[object, ...]:
    """Return what of the tensors a launch is bound to."""
    named = tuple(None if t is None else (t.shape, t.stride(), t.dtype, t.device) for t in tensors[:-1])
    captured = tuple((t.shape, t.dtype, t.device) for t in tensors.captures)
    return named, captured, tensors.bias is not None and tensors.bias.data_ptr() & 15 == 0


def _forward_op(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, *rest: typing.Any
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return what the operator's schema promises: an empty lse where none was asked for."""
    out, lse = forward(q, k, v, *split_arguments(rest))
    return out, q.new_empty((0,), dtype=torch.float32) if lse is None else lse


def _fake_forward(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, *rest: typing.Any
) -> tuple[torch.Tensor, torch.Tensor]:
    options = split_arguments(rest)[1]
    out = q.new_empty((*q.shape[:-1], v.shape[-1]), dtype=torch.bfloat16 if q.dtype.itemsize == 1 else q.dtype)
    rows: tuple[int, ...] = (0,)
    if options.return_lse and options.packed:
        rows = (q.shape[1], q.shape[0])
    elif options.return_lse:
        batch, first, second = q.shape[:3]
        rows = (batch, first, second) if check_layout(options.layout) == "bhsd" else (batch, second, first)
    return out, q.new_empty(rows, dtype=torch.float32)


library = torch.library.Library("flashgen", "DEF")
library.define(f"attention_forward(Tensor q, Tensor k, Tensor v, {SIDE_SCHEMA}) -> (Tensor, Tensor)", tags=TAGS)
# What runs inside a compiled function would be compiled, too: tables of tiles, the eager reference.
library.impl("attention_forward", _disable_dynamo(_forward_op), "CompositeExplicitAutograd")
torch.library.register_fake("flashgen::attention_forward", _fake_forward, lib=library)
