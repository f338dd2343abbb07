"""The operator under `torch.vmap`: the mapped dimension joins the batch."""

from __future__ import annotations

import typing

import torch

from flashgen.errors import UnsupportedError
from flashgen.ops.call import Tensors
from flashgen.ops.torch_op import arguments, library, split_arguments
from flashgen.spec import parse_mask
from flashgen.spec.mods import parse_mod

# One number a head, whatever the batch.
_SHARED = ("sinks", "alibi_slopes")


def attention_forward_vmap(
    info: typing.Any, in_dims: tuple[typing.Any, ...], *operands: typing.Any
) -> tuple[tuple[torch.Tensor, torch.Tensor], tuple[int | None, int | None]]:
    """Return out and lse of a mapped call, with the mapped dimension first.

    Raises:
        UnsupportedError: where what is mapped, or an option, has a batch dimension of its own.
    """
    tensors, options = split_arguments(operands[3:])
    _check_mappable(tensors, in_dims[3:], options.mask, options.score_mod, options.packed)
    folded = []
    for tensor, dim in zip(operands[:3], in_dims[:3], strict=True):
        whole = tensor.expand(info.batch_size, *tensor.shape) if dim is None else tensor.movedim(dim, 0)
        folded.append(whole.flatten(0, 1))
    q, k, v = folded
    out, lse = torch.ops.flashgen.attention_forward(q, k, v, *arguments(tensors, options))
    out = out.unflatten(0, (info.batch_size, -1) if out.shape[0] else (info.batch_size, 0))
    if not options.return_lse:
        return (out, lse), (0, None)
    return (out, lse.view(*out.shape[:2], *lse.shape[1:])), (0, 0)


def _check_mappable(tensors: Tensors, in_dims: tuple[typing.Any, ...], mask: str, score_mod: str, packed: bool) -> None:
    refused = [name for name in Tensors._fields[:-1] if name not in _SHARED and getattr(tensors, name) is not None]
    refused += [name for name in _SHARED if getattr(tensors, name) is not None and getattr(tensors, name).dim() != 1]
    mapped = (dim for dims in in_dims for dim in (dims if isinstance(dims, (list, tuple)) else (dims,)))
    if any(dim is not None for dim in mapped):
        refused.append("a mapped tensor besides q, k and v")
    if "b" in parse_mask(mask).uses or (score_mod and "b" in parse_mod(score_mod).uses):
        refused.append("a mask or score_mod that depends on b")
    if packed or refused:
        what = ", ".join(["packed sequences"] * packed + refused)
        raise UnsupportedError(
            f"torch.vmap over flashgen.attention cannot take {what}; make a batch of the mapped calls"
        )


torch.library.register_vmap("flashgen::attention_forward", attention_forward_vmap, lib=library)
