"""The arguments of one kernel by name, as a call of its `@triton.jit` function takes them."""

from __future__ import annotations

import typing

import torch
from triton.tools.tensor_descriptor import TensorDescriptor

from flashgen.codegen import EntryPlan, argument_kind
from flashgen.compile import descriptor_dtype, descriptor_operand
from flashgen.launch.operands import Layout4D
from flashgen.spec import AttentionSpec, DType


def entry_arguments(
    entry: EntryPlan,
    spec: AttentionSpec,
    *,
    values: typing.Mapping[str, int | float],
    tensors: typing.Mapping[str, torch.Tensor],
    layouts: typing.Mapping[str, Layout4D],
    constants: dict[str, int],
) -> dict[str, object]:
    """Return every argument of a kernel.

    Args:
        entry: the kernel.
        spec: what it computes.
        values: its numbers by name.
        tensors: what its pointers and descriptors are of, by name.
        layouts: of the tensors that descriptors describe.
        constants: compile-time arguments, those of other kernels among them.
    """
    arguments: dict[str, object] = {}
    for name in entry.arguments:
        kind = argument_kind(name)
        if kind == "pointer":
            arguments[name] = tensors[name.removesuffix("_ptr")]
        elif kind == "descriptor":
            operand = descriptor_operand(name)
            fields = descriptor_fields(layouts[operand], descriptor_dtype(name, spec), entry.box(name, constants))
            fields["base"] = tensors[operand]
            arguments[name] = TensorDescriptor(**typing.cast("dict[str, typing.Any]", fields))
        else:
            arguments[name] = values[name]
    return arguments | {name: constants[name] for name in entry.constants}


def descriptor_fields(layout: Layout4D, dtype: DType, box: tuple[int, ...]) -> dict[str, object]:
    """Return the fields of a `TensorDescriptor` that moves tiles of the size `box`, all but its base tensor."""
    elements = torch.empty(0, dtype=getattr(torch, dtype.torch_name))
    return dict(TensorDescriptor(elements, list(layout.size), list(layout.stride), list(box)).__dict__)
