"""`torch.ops.flashgen.attention_backward`: the raw operator of the backward phase."""

from __future__ import annotations

import typing

import torch
from torch._compile import _disable_dynamo

from flashgen.ops.backward_cpu import backward_cpu
from flashgen.ops.backward_runtime import (
    BackwardInputs,
    Gradients,
    Runner,
    aligned_inputs,
    dense_inputs,
    prepare_backward,
)
from flashgen.ops.call import NO_TENSORS, Options, Tensors
from flashgen.ops.checks import tf32_allowed
from flashgen.ops.torch_op import SIDE_SCHEMA, TAGS, arguments, kinds_of, library, plain, split_arguments
from flashgen.registry import generation

NUM_INPUTS = len(BackwardInputs._fields)
_MEMO_LIMIT = 8192
_memo: dict[tuple[object, ...], Runner] = {}


def run_backward_op(given: BackwardInputs, tensors: Tensors, options: Options, dbias: bool) -> Gradients:
    """Return dq, dk, dv, and dbias where asked for: through PyTorch's dispatcher where it has a part in the call."""
    direct = not torch.compiler.is_compiling() and not torch.is_grad_enabled() and plain(*given[:3], tensors)
    if direct and all(t is None or type(t) is torch.Tensor for t in given[3:]):
        return backward(given, tensors, options, dbias)
    gradients = torch.ops.flashgen.attention_backward(*given, *arguments(tensors, options), dbias)
    return (*gradients[:3], gradients[3] if dbias else None)


def backward(given: BackwardInputs, tensors: Tensors, options: Options, dbias: bool) -> Gradients:
    """Return dq, dk, dv, and dbias where asked for; the first call of a kind prepares, later ones only launch."""
    if torch.are_deterministic_algorithms_enabled() and not options.deterministic:
        options = options._replace(deterministic=True)
    if not given.q.is_cuda:
        if given.q.is_meta:
            gradients = _fake_backward(*given, *arguments(tensors, options), dbias)
            return (*gradients[:3], gradients[3] if dbias else None)
        return backward_cpu(given, tensors, options, dbias)
    given = aligned_inputs(dense_inputs(given))
    q, k, v, out, lse, dout, dlse = given
    assert dout is not None
    dtype = q.dtype
    key = (
        q.shape, k.shape, v.shape, out.shape, lse.shape, dout.shape,
        q.stride(), k.stride(), v.stride(), out.stride(), dout.stride(),
        dtype, k.dtype, v.dtype, out.dtype, lse.dtype, dout.dtype, q.device, k.device, v.device, out.device,
        lse.device, dout.device, None if dlse is None else (dlse.shape, dlse.dtype, dlse.device),
        options, dbias, generation(), dtype is torch.float32 and tf32_allowed(),
        None if tensors is NO_TENSORS else kinds_of(tensors),
    )  # fmt: skip
    runner = _memo.get(key)
    if runner is None:
        runner = prepare_backward(given, tensors, options, dbias)
        if len(_memo) >= _MEMO_LIMIT:
            _memo.clear()
        _memo[key] = runner
    return runner(given, tensors)


def split_backward(args: tuple[typing.Any, ...]) -> tuple[BackwardInputs, Tensors, Options, bool]:
    """Return what the operator's arguments are."""
    tensors, options = split_arguments(args[NUM_INPUTS:-1])
    return BackwardInputs(*args[:NUM_INPUTS]), tensors, options, args[-1]


def _backward_op(*args: typing.Any) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """Return what the operator's schema promises: an empty dbias where none was asked for."""
    given, tensors, options, asked = split_backward(args)
    dq, dk, dv, dbias = backward(given, tensors, options, asked)
    return dq, dk, dv, given.q.new_empty((0,)) if dbias is None else dbias


def _fake_backward(*args: typing.Any) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    given, tensors, _, asked = split_backward(args)
    q, k, v = (t.new_empty(t.shape) for t in given[:3])
    bias = tensors.bias if asked else None
    return q, k, v, given.q.new_empty((0,)) if bias is None else bias.new_empty(bias.shape)


library.define(
    "attention_backward(Tensor q, Tensor k, Tensor v, Tensor out, Tensor lse, Tensor? dout, Tensor? dlse, "
    f"{SIDE_SCHEMA}, bool dbias) -> (Tensor, Tensor, Tensor, Tensor)",
    tags=TAGS,
)
# As for the forward operator: nothing of its body is to be compiled.
library.impl("attention_backward", _disable_dynamo(_backward_op), "CompositeExplicitAutograd")
torch.library.register_fake("flashgen::attention_backward", _fake_backward, lib=library)
