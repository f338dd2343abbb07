"""Backward passes on CPU tensors: the kernels in Triton's interpreter where that is asked for, else eager PyTorch."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import torch

from flashgen.errors import UnsupportedError
from flashgen.launch import interpret_backward, layouts_of
from flashgen.measure import gradient_reference
from flashgen.ops.backward_runtime import (
    BackwardInputs,
    GradientLayouts,
    Gradients,
    aligned_inputs,
    backward_problem,
    bias_shape,
    check_outputs,
    dense_inputs,
    named_views,
    own_bias_gradient,
    readable_inputs,
    zero_gradients,
)
from flashgen.ops.call import Options, Tensors, heads_first
from flashgen.ops.checks import extras_of
from flashgen.ops.cpu import INTERPRETED_AS, is_interpreting, say_eager
from flashgen.ops.runtime import choose, nothing_to_see, sequences_fill
from flashgen.ops.unseen import used_rows
from flashgen.spec import Problem


def backward_cpu(given: BackwardInputs, tensors: Tensors, options: Options, dbias: bool) -> Gradients:
    """Return dq, dk, dv, and dbias where asked for.

    Raises:
        InputError, ConfigError, NoKernelError: for what a GPU call would refuse, too.
        UnsupportedError: for devices that are neither GPUs nor CPUs.
    """
    problem = backward_problem(*given[:3], tensors, options, dbias)
    check_outputs(given, problem, options)
    if given.q.device.type != "cpu":
        raise UnsupportedError(f"flashgen runs on CUDA and ROCm GPUs and on the CPU, not on {given.q.device}")
    if options.packed:
        sequences_fill(given.q, given.k, tensors, options)
    if nothing_to_see(given.q, given.k, problem):
        return zero_gradients(given, tensors, dbias)
    if not is_interpreting():
        say_eager()
        return _eager(given, tensors, options, problem)
    gradients = _interpreted(readable_inputs(aligned_inputs(dense_inputs(given))), tensors, options, problem)
    if options.packed:
        _clear_unowned(gradients, tensors)
    # An operator's outputs have the strides that its fake promises.
    dq, dk, dv = (heads_first(gradients[name], options.layout).contiguous() for name in ("dq", "dk", "dv"))
    return dq, dk, dv, own_bias_gradient(gradients.get("dbias"), tensors)


def _interpreted(
    given: BackwardInputs, tensors: Tensors, options: Options, problem: Problem
) -> dict[str, torch.Tensor]:
    """Return the gradients by name, heads first."""
    assert given.dout is not None
    named = {"q": given.q, "k": given.k, "v": given.v, "out": given.out, "do": given.dout, "lse": given.lse}
    if given.dlse is not None:
        named["dlse"] = given.dlse
    if problem.spec.dbias and tensors.bias is not None:
        named["dbias"] = torch.empty(bias_shape(tensors.bias))
    views = named_views(named, options.layout)
    # Nothing is compiled here, but a config that cannot read the strides is no choice either.
    config = choose(problem, INTERPRETED_AS, options).config
    layouts = layouts_of({**views, **{f"d{name}": views[name] for name in "qkv"}})
    if GradientLayouts(by_name=layouts).refusal(config, problem.spec):
        views = {name: t.contiguous() for name, t in views.items()}
    extras = extras_of(problem, tensors, options)
    return interpret_backward(views, problem=problem, config=config, extras=extras)


def _clear_unowned(gradients: dict[str, torch.Tensor], tensors: Tensors) -> None:
    # Kernels write the rows of sequences alone.
    for name, starts in (("dq", tensors.cu_seqlens_q), ("dk", tensors.cu_seqlens_k), ("dv", tensors.cu_seqlens_k)):
        owned = used_rows(gradients[name].shape[0], Tensors(cu_seqlens_q=starts))
        assert owned is not None
        gradients[name][~owned] = 0


def _eager(given: BackwardInputs, tensors: Tensors, options: Options, problem: Problem) -> Gradients:
    if problem.spec.dbias and tensors.bias is not None:
        # To the reference a stride of 0 says broadcast, to the caller only a size of 1 does.
        tensors = tensors._replace(bias=tensors.bias.contiguous())
    dout = torch.zeros_like(given.out) if given.dout is None else given.dout
    q, k, v, dout = (heads_first(t, options.layout) for t in (given.q, given.k, given.v, dout))
    extras = extras_of(problem, tensors, options)
    with _autograd_inside():
        found = gradient_reference(q, k, v, dout, spec=problem.spec, extras=extras, precision="input", dlse=given.dlse)
    dq, dk, dv = (heads_first(t, options.layout).contiguous() for t in (found.dq, found.dk, found.dv))
    return dq, dk, dv, own_bias_gradient(found.dbias, tensors)


@contextlib.contextmanager
def _autograd_inside() -> Iterator[None]:
    """Switch on what PyTorch switches off in an operator's body: the reference differentiates a score_mod by it."""
    excluded = torch._C._dispatch_tls_local_exclude_set()
    for key in ("AutogradFunctionality", "AutogradOther", "AutogradNestedTensor", "ADInplaceOrView"):
        excluded = excluded.remove(getattr(torch._C.DispatchKey, key))
    with torch._C._ForceDispatchKeyGuard(torch._C._dispatch_tls_local_include_set(), excluded):
        yield
