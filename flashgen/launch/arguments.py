"""The arguments of one kernel by name, as a call of its JIT function takes them."""

from __future__ import annotations

import typing

import torch

from flashgen.codegen import EntryPlan, KernelPlan, argument_kind
from flashgen.compile import descriptor_operand
from flashgen.launch.descriptors import entry_descriptors
from flashgen.launch.operands import Layout4D


def entry_arguments(
    entry: EntryPlan,
    plan: KernelPlan,
    *,
    values: typing.Mapping[str, int | float],
    tensors: typing.Mapping[str, torch.Tensor],
    layouts: typing.Mapping[str, Layout4D],
    constants: dict[str, int],
) -> dict[str, object]:
    """Return every argument of a kernel.

    Args:
        entry: the kernel.
        plan: of its module.
        values: its numbers by name.
        tensors: what its pointers and descriptors are of, by name.
        layouts: of the tensors that descriptors describe.
        constants: compile-time arguments, those of other kernels among them.
    """
    forms = entry_descriptors(entry, plan, layouts, constants)
    arguments: dict[str, object] = {}
    for name in entry.arguments:
        kind = argument_kind(name)
        if kind == "pointer":
            arguments[name] = tensors[name.removesuffix("_ptr")]
        elif kind == "descriptor":
            form = forms[name]
            arguments[name] = form.kind(base=tensors[descriptor_operand(name)], **form.fields)
        else:
            arguments[name] = values[name]
    return arguments | {name: constants[name] for name in entry.constants}
