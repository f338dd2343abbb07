"""Tensor descriptors on the host: all of one but the address is known before the first call."""

from __future__ import annotations

import dataclasses
import typing

import torch
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor as GluonDescriptor
from triton.tools.tensor_descriptor import TensorDescriptor

from flashgen.codegen import EntryPlan, KernelPlan, argument_kind
from flashgen.compile import descriptor_dtype, descriptor_operand, shared_layout
from flashgen.launch.operands import Layout4D
from flashgen.launch.ragged import ragged_view
from flashgen.spec import DType


@dataclasses.dataclass(frozen=True, kw_only=True)
class DescriptorForm:
    """A tensor descriptor without its tensor.

    Attributes:
        kind: Triton's class of it, or Gluon's.
        fields: of the class, by name, all but `base`.
    """

    kind: type
    fields: typing.Mapping[str, typing.Any]

    def of(self, base: torch.Tensor) -> typing.Any:
        """Return the descriptor of a tensor that has the sizes and strides of the form."""
        # Made without __init__: its checks of what was checked once cost 3 us.
        descriptor: typing.Any = object.__new__(self.kind)
        descriptor.__dict__.update(self.fields)
        descriptor.base = base
        return descriptor


def entry_descriptors(
    entry: EntryPlan, plan: KernelPlan, layouts: typing.Mapping[str, Layout4D], constants: dict[str, int]
) -> dict[str, DescriptorForm]:
    """Return the descriptors that a kernel takes, by their names in it.

    Args:
        entry: the kernel.
        plan: of its module.
        layouts: of the tensors behind the descriptors, by name.
        constants: compile-time arguments, those of other kernels among them.
    """
    forms = {}
    for name in entry.arguments:
        if argument_kind(name) == "descriptor":
            layout = layouts[descriptor_operand(name)]
            view = ragged_view(layout.size, layout.stride) if name in entry.ragged else (layout.size, layout.stride)
            box, dtype = entry.box(name, constants), descriptor_dtype(name, plan.spec)
            forms[name] = descriptor_form(view, box, dtype, gluon=entry.language == "gluon")
    return forms


def descriptor_form(
    view: tuple[tuple[int, ...], tuple[int, ...]], box: tuple[int, ...], dtype: DType, *, gluon: bool
) -> DescriptorForm:
    """Return the form of a descriptor that moves tiles of the size `box` of a tensor with these sizes and strides.

    Triton's own checks of the class run here, once.
    """
    elements = torch.empty(0, dtype=getattr(torch, dtype.torch_name))
    size, stride, sides = list(view[0]), list(view[1]), list(box)
    made: typing.Any
    if gluon:
        made = GluonDescriptor(elements, size, stride, sides, shared_layout(box, dtype))
    else:
        made = TensorDescriptor(elements, size, stride, sides)
    fields = {name: value for name, value in vars(made).items() if name != "base"}
    return DescriptorForm(kind=type(made), fields=fields)
