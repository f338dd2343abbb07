"""Calls that PyTorch may differentiate: which of the ways to its autograd each of them takes."""

from __future__ import annotations

import typing

import torch

from flashgen.ops.backward_op import run_backward_op
from flashgen.ops.call import Options, Tensors
from flashgen.ops.gradients import FIELDS, Gradient, gradients, refuse_second_derivative, save, side_tensors
from flashgen.ops.runtime import Outputs
from flashgen.ops.torch_op import arguments, forward, library, plain, split_arguments
from flashgen.ops.transforms import active, transformed_forward


def run(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, tensors: Tensors, options: Options) -> Outputs:
    """Return out, and lse where asked for, differentiable where an input requires a gradient.

    Where PyTorch's dispatcher has no part in the call the operator's body is called directly, which saves a third of
    the host's time; an autograd function around it costs a third of the formula that is registered with the operator.
    """
    compiling = torch.compiler.is_compiling()
    differentiated = torch.is_grad_enabled() and (
        q.requires_grad or k.requires_grad or v.requires_grad or _side_requires_grad(tensors)
    )
    transformed = not compiling and active()
    # The backward pass starts from lse. Whether a tensor inside transforms will need it is not for it to say.
    asked = options._replace(return_lse=True) if differentiated or transformed else options
    lse: torch.Tensor | None
    if transformed:
        out, lse = transformed_forward(q, k, v, tensors, asked)
    elif compiling or not plain(q, k, v, tensors):
        out, lse = torch.ops.flashgen.attention_forward(q, k, v, *arguments(tensors, asked))
    elif differentiated:
        out, lse = _Attention.apply(asked, q, k, v, *tensors[:-1], *tensors.captures)  # type: ignore[no-untyped-call]
    else:
        return forward(q, k, v, tensors, options)
    return out, lse if options.return_lse else None


def _side_requires_grad(tensors: Tensors) -> bool:
    bias, sinks = tensors.bias, tensors.sinks
    return (bias is not None and bias.requires_grad) or (sinks is not None and sinks.requires_grad)


class _Attention(torch.autograd.Function):
    """The forward operator's body, and its gradients."""

    @staticmethod
    def forward(ctx: typing.Any, options: Options, *flat: typing.Any) -> Outputs:
        q, k, v, *side = flat
        tensors = side_tensors(side)
        out, lse = forward(q, k, v, tensors, options)
        assert lse is not None
        save(ctx, (q, k, v, out, lse), tensors, options)
        return out, lse

    @staticmethod
    def backward(ctx: typing.Any, dout: Gradient, dlse: Gradient) -> tuple[Gradient, ...]:
        return (None, *gradients(ctx, dout, dlse, ctx.needs_input_grad[1:], run_backward_op))


def _setup_context(ctx: typing.Any, inputs: tuple[typing.Any, ...], output: tuple[torch.Tensor, ...]) -> None:
    tensors, options = split_arguments(tuple(inputs[3:]))
    save(ctx, (*inputs[:3], *output), tensors, options)


def _backward(ctx: typing.Any, dout: Gradient, dlse: Gradient) -> tuple[typing.Any, ...]:
    """Return what the operator's arguments get, a list for the list of captured tensors."""
    named = 3 + len(FIELDS)
    *needed, of_captures = ctx.needs_input_grad[: named + 1]
    found = gradients(ctx, dout, dlse, [*needed, *of_captures], run_backward_op)
    return *found[:named], found[named:], *([None] * len(Options._fields))


torch.library.register_autograd("flashgen::attention_forward", _backward, setup_context=_setup_context, lib=library)
torch.library.register_autograd("flashgen::attention_backward", refuse_second_derivative, lib=library)
