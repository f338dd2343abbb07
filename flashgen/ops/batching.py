"""Both phases under `torch.vmap`: the mapped dimension joins the batch."""

from __future__ import annotations

import collections.abc
import typing

import torch

from flashgen.errors import UnsupportedError
from flashgen.ops.backward_op import NUM_INPUTS, run_backward_op, split_backward
from flashgen.ops.backward_runtime import BackwardInputs
from flashgen.ops.call import Options, Tensors
from flashgen.ops.gradients import BackwardPass
from flashgen.ops.torch_op import library, run_forward_op, split_arguments
from flashgen.spec import parse_mask
from flashgen.spec.mods import parse_mod

InDims = collections.abc.Sequence[typing.Any]
"""For each operand the mapped dimension, or None."""

_ForwardPass = collections.abc.Callable[
    [torch.Tensor, torch.Tensor, torch.Tensor, Tensors, Options], tuple[torch.Tensor, torch.Tensor]
]
# One number a head, whatever the batch.
_SHARED = ("sinks", "alibi_slopes")


def map_forward(
    forward_pass: _ForwardPass,
    size: int,
    in_dims: InDims,
    qkv: collections.abc.Sequence[torch.Tensor],
    tensors: Tensors,
    options: Options,
) -> tuple[tuple[torch.Tensor, torch.Tensor], tuple[int | None, int | None]]:
    """Return out and lse of a mapped call, with the mapped dimension first, and where that is.

    Args:
        forward_pass: the call of a whole batch.
        size: of the mapped dimension.
        in_dims: of q, k, v and the other tensors.
        qkv: q, k and v.
        tensors: of the call.
        options: of the call.

    Raises:
        UnsupportedError: where what is mapped, or an option, has a batch dimension of its own.
    """
    _check_mappable(tensors, in_dims[3:], options)
    q, k, v = (_folded(t, dim, size) for t, dim in zip(qkv, in_dims, strict=False))
    out, lse = forward_pass(q, k, v, tensors, options)
    out = _unfolded(out, size)
    if not options.return_lse:
        return (out, lse), (0, None)
    return (out, lse.view(*out.shape[:2], *lse.shape[1:])), (0, 0)


def map_backward(
    backward_pass: BackwardPass,
    size: int,
    in_dims: InDims,
    given: BackwardInputs,
    tensors: Tensors,
    options: Options,
    dbias: bool,
) -> tuple[tuple[torch.Tensor, ...], tuple[int | None, ...]]:
    """Return dq, dk, dv of a mapped backward pass, with the mapped dimension first, and an empty dbias.

    Raises:
        UnsupportedError: as the forward pass.
    """
    _check_mappable(tensors, in_dims[NUM_INPUTS:], options)
    dims = dict(zip(given._fields, in_dims, strict=False))
    folded = {name: _folded(t, dims[name], size) for name, t in given._asdict().items() if t is not None}
    dq, dk, dv, _ = backward_pass(given._replace(**folded), tensors, options, dbias)
    return (*(_unfolded(t, size) for t in (dq, dk, dv)), dq.new_empty((0,))), (0, 0, 0, None)


def _folded(tensor: torch.Tensor, dim: int | None, size: int) -> torch.Tensor:
    """Return the tensor with the mapped dimension, which it gets if it has none, as part of the batch."""
    tensor = tensor.expand(size, *tensor.shape) if dim is None else tensor.movedim(dim, 0)
    return tensor.flatten(0, 1)


def _unfolded(tensor: torch.Tensor, size: int) -> torch.Tensor:
    return tensor.view(size, tensor.shape[0] // size, *tensor.shape[1:])


def _check_mappable(tensors: Tensors, in_dims: InDims, options: Options) -> None:
    refused = [name for name in Tensors._fields[:-1] if name not in _SHARED and getattr(tensors, name) is not None]
    refused += [name for name in _SHARED if getattr(tensors, name) is not None and getattr(tensors, name).dim() != 1]
    mapped = (dim for dims in in_dims for dim in (dims if isinstance(dims, (list, tuple)) else (dims,)))
    if any(dim is not None for dim in mapped):
        refused.append("a mapped tensor besides q, k and v")
    if "b" in parse_mask(options.mask).uses or (options.score_mod and "b" in parse_mod(options.score_mod).uses):
        refused.append("a mask or score_mod that depends on b")
    if options.packed or refused:
        what = ", ".join(["packed sequences"] * options.packed + refused)
        raise UnsupportedError(
            f"torch.vmap over flashgen.attention cannot take {what}; make a batch of the mapped calls"
        )


def _forward_vmap(
    info: typing.Any, in_dims: InDims, *operands: typing.Any
) -> tuple[tuple[torch.Tensor, torch.Tensor], tuple[int | None, int | None]]:
    tensors, options = split_arguments(operands[3:])
    return map_forward(run_forward_op, info.batch_size, in_dims, operands[:3], tensors, options)


def _backward_vmap(
    info: typing.Any, in_dims: InDims, *operands: typing.Any
) -> tuple[tuple[torch.Tensor, ...], tuple[int | None, ...]]:
    return map_backward(run_backward_op, info.batch_size, in_dims, *split_backward(operands))


torch.library.register_vmap("flashgen::attention_forward", _forward_vmap, lib=library)
torch.library.register_vmap("flashgen::attention_backward", _backward_vmap, lib=library)
