"""Both phases under `torch.func`: autograd functions that its transforms take apart, level by level.

An operator with a registered formula is none of those (torch 2.13: `Function.apply` asks for a setup_context).
"""

from __future__ import annotations

import typing

import torch

from flashgen.ops.backward_op import NUM_INPUTS, run_backward_op
from flashgen.ops.backward_runtime import BackwardInputs, Gradients
from flashgen.ops.batching import InDims, map_backward, map_forward
from flashgen.ops.call import Options, Tensors
from flashgen.ops.gradients import Gradient, gradients, refuse_second_derivative, save, side_tensors
from flashgen.ops.torch_op import run_forward_op

_Mapped = tuple[tuple[torch.Tensor, ...], tuple[int | None, ...]]


def active() -> bool:
    """Return whether a call runs inside a transform of `torch.func`."""
    return torch._C._functorch.maybe_current_level() is not None


def transformed_forward(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, tensors: Tensors, options: Options
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return out and lse, empty where it was not asked for."""
    out, lse = _Forward.apply(options, q, k, v, *tensors[:-1], *tensors.captures)  # type: ignore[no-untyped-call]
    return out, lse


def transformed_backward(given: BackwardInputs, tensors: Tensors, options: Options, dbias: bool) -> Gradients:
    """Return dq, dk, dv, and dbias where asked for."""
    found = _Backward.apply(options, dbias, *given, *tensors[:-1], *tensors.captures)  # type: ignore[no-untyped-call]
    return (*found[:3], found[3] if dbias else None)


class _Forward(torch.autograd.Function):
    @staticmethod
    def forward(options: Options, *flat: typing.Any) -> tuple[torch.Tensor, torch.Tensor]:
        q, k, v, *side = flat
        return run_forward_op(q, k, v, side_tensors(side), options)

    @staticmethod
    def setup_context(ctx: typing.Any, inputs: tuple[typing.Any, ...], output: typing.Any) -> None:
        options, *flat = inputs
        save(ctx, (*flat[:3], *output), side_tensors(flat[3:]), options)

    @staticmethod
    def backward(ctx: typing.Any, dout: Gradient, dlse: Gradient) -> tuple[Gradient, ...]:
        return (None, *gradients(ctx, dout, dlse, ctx.needs_input_grad[1:], transformed_backward))

    @staticmethod
    def vmap(info: typing.Any, in_dims: InDims, options: Options, *flat: typing.Any) -> _Mapped:
        return map_forward(transformed_forward, info.batch_size, in_dims[1:], flat[:3], side_tensors(flat[3:]), options)


class _Backward(torch.autograd.Function):
    @staticmethod
    def forward(options: Options, dbias: bool, *flat: typing.Any) -> tuple[torch.Tensor, ...]:
        given = BackwardInputs(*flat[:NUM_INPUTS])
        *found, of_bias = run_backward_op(given, side_tensors(flat[NUM_INPUTS:]), options, dbias)
        return (*found, given.q.new_empty((0,)) if of_bias is None else of_bias)

    @staticmethod
    def setup_context(ctx: typing.Any, inputs: tuple[typing.Any, ...], output: typing.Any) -> None:
        pass

    @staticmethod
    def backward(ctx: typing.Any, *given: Gradient) -> typing.NoReturn:
        refuse_second_derivative(ctx, *given)

    @staticmethod
    def vmap(info: typing.Any, in_dims: InDims, options: Options, dbias: bool, *flat: typing.Any) -> _Mapped:
        given, tensors = BackwardInputs(*flat[:NUM_INPUTS]), side_tensors(flat[NUM_INPUTS:])
        return map_backward(transformed_backward, info.batch_size, in_dims[2:], given, tensors, options, dbias)
