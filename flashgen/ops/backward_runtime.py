"""What stands behind the backward operator on a GPU: select, compile and bind once for each kind of call."""

from __future__ import annotations

import collections.abc
import dataclasses
import functools
import typing

import torch

from flashgen.codegen import KernelConfig, TritonBackwardConfig
from flashgen.dispatch import Selection
from flashgen.errors import InputError
from flashgen.launch import BackwardLaunch, detect_target, layouts_of, readable
from flashgen.launch.operands import Layout4D, descriptor_refusal
from flashgen.ops.call import Options, Tensors, heads_first
from flashgen.ops.checks import extras_of, problem_of
from flashgen.ops.runtime import (
    choose,
    compiled_kernel,
    extras_need_side,
    lse_size,
    nothing_to_see,
    say_copied,
    sequences_fill,
)
from flashgen.spec import AttentionSpec, Problem

Gradients = tuple[torch.Tensor, torch.Tensor, torch.Tensor, "torch.Tensor | None"]
"""dq, dk, dv, and dbias where it was asked for: contiguous, of the shapes and dtypes of what they are gradients of."""


class BackwardInputs(typing.NamedTuple):
    """What a backward pass reads besides the side tensors of its forward pass, all in the caller's layout.

    Attributes:
        q, k, v: of the forward pass.
        out, lse: what it gave.
        dout: the gradient of out, None for 0.
        dlse: the gradient of lse, None for 0.
    """

    q: torch.Tensor
    k: torch.Tensor
    v: torch.Tensor
    out: torch.Tensor
    lse: torch.Tensor
    dout: torch.Tensor | None
    dlse: torch.Tensor | None


Runner = collections.abc.Callable[[BackwardInputs, Tensors], Gradients]


def backward_problem(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, tensors: Tensors, options: Options, dbias: bool
) -> Problem:
    """Return the problem of the backward pass of a call.

    Raises:
        InputError: see `problem_of`.
    """
    problem = problem_of(q, k, v, tensors, options._replace(return_lse=False))
    spec = problem.spec.backward(deterministic=options.deterministic, dbias=dbias)
    return dataclasses.replace(problem, spec=spec)


def check_outputs(given: BackwardInputs, problem: Problem, options: Options) -> None:
    """Check that out, lse and their gradients are those of such a forward pass.

    Raises:
        InputError: if one has another shape, dtype or device.
    """
    rows = (lse_size(given.q, problem, options.layout), torch.float32)
    out = ((*given.q.shape[:-1], problem.spec.head_dim_v), given.q.dtype)
    for name, (size, dtype) in {"out": out, "lse": rows, "dout": out, "dlse": rows}.items():
        tensor: torch.Tensor | None = getattr(given, name)
        if tensor is None:
            continue
        if tuple(tensor.shape) != size or tensor.dtype != dtype or tensor.device != given.q.device:
            raise InputError(
                f"{name} must be {dtype} {list(size)} on {given.q.device}, got {tensor.dtype} {list(tensor.shape)} on "
                f"{tensor.device}"
            )


def dense_inputs(given: BackwardInputs) -> BackwardInputs:
    """Return the inputs as kernels take them: a gradient of out in any case, lse and its gradient contiguous.

    Where lse is -inf, out and lse are constants: a gradient of lse there, NaN as it may be, is none.
    """
    dout, dlse, lse = given.dout, given.dlse, given.lse.contiguous()
    if dout is None:
        dout = torch.zeros_like(given.out)
    if dlse is not None:
        dlse = dlse.masked_fill(lse == float("-inf"), 0.0).contiguous()
    return given._replace(dout=dout, dlse=dlse, lse=lse)


def aligned_inputs(given: BackwardInputs) -> BackwardInputs:
    """Return the inputs with copies in place of those that do not begin at whole 16 bytes."""
    q, k, v, out, _, dout, _ = given
    assert dout is not None
    if not (q.data_ptr() | k.data_ptr() | v.data_ptr() | out.data_ptr() | dout.data_ptr()) & 15:
        return given
    named = {"q": q, "k": k, "v": v, "out": out, "dout": dout}
    copied = {name: t.clone(memory_format=torch.contiguous_format) for name, t in named.items() if t.data_ptr() & 15}
    return given._replace(**copied)


def readable_inputs(given: BackwardInputs) -> BackwardInputs:
    """Return the inputs with copies in place of those whose strides kernels cannot read."""
    tensors = {name: getattr(given, name) for name in ("q", "k", "v", "out", "dout")}
    copied = {name: t.contiguous() for name, t in tensors.items() if not readable(t)}
    if copied.keys() & {"q", "k", "v"}:
        say_copied(", ".join(name for name in "qkv" if name in copied))
    return given._replace(**copied) if copied else given


def bias_shape(bias: torch.Tensor) -> tuple[int, ...]:
    """Return the sizes of a bias with 4 dimensions; those of size 1 are summed over in its gradient, no others."""
    return (1,) * (4 - bias.dim()) + tuple(bias.shape)


def own_bias_gradient(dbias: torch.Tensor | None, tensors: Tensors) -> torch.Tensor | None:
    """Return the gradient of a bias in the bias's own shape and dtype."""
    if dbias is None or tensors.bias is None:
        return None
    return dbias.to(tensors.bias.dtype).view(tensors.bias.shape)


def zero_gradients(given: BackwardInputs, tensors: Tensors, dbias: bool) -> Gradients:
    """Return the gradients of a call in which no query sees a key."""
    bias = tensors.bias if dbias else None
    dq, dk, dv = (t.new_zeros(t.shape) for t in given[:3])
    return dq, dk, dv, None if bias is None else bias.new_zeros(bias.shape)


def named_views(tensors: dict[str, torch.Tensor], layout: str) -> dict[str, torch.Tensor]:
    """Return the tensors of a pass as [batch, heads, seqlen, head_dim] views; packed ones as they are."""
    one_order = ("lse", "dlse", "dbias")
    return {name: t if name in one_order else heads_first(t, layout) for name, t in tensors.items()}


@dataclasses.dataclass(frozen=True, kw_only=True)
class GradientLayouts:
    """Layouts of the tensors of a backward pass, by name."""

    by_name: collections.abc.Mapping[str, Layout4D]

    def refusal(self, config: KernelConfig, spec: AttentionSpec) -> str | None:
        """Return why a config cannot read these layouts, or None."""
        if not isinstance(config, TritonBackwardConfig) or config.loads != "descriptor":
            return None
        return descriptor_refusal(self.by_name, dict.fromkeys(("q", "k", "v", "do"), spec.dtype.itemsize))


def expected_layouts(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, layout: str) -> GradientLayouts:
    """Return the layouts of a pass whose inputs these are, where the gradient of out is dense."""
    named = {
        name: torch.empty_strided(t.shape, t.stride(), device="meta") if readable(t) else _empty_like(t)
        for name, t in zip("qkv", (q, k, v), strict=True)
    }
    named["out"] = named["do"] = torch.empty((*q.shape[:-1], v.shape[-1]), device="meta")
    named |= {f"d{name}": _empty_like(t) for name, t in zip("qkv", (q, k, v), strict=True)}
    return GradientLayouts(by_name=layouts_of(named_views(named, layout)))


def _empty_like(tensor: torch.Tensor) -> torch.Tensor:
    return torch.empty(tensor.shape, device="meta")


def prepare_backward(given: BackwardInputs, tensors: Tensors, options: Options, dbias: bool) -> Runner:
    """Return a function that runs passes of exactly these shapes, strides and options on this device.

    Args:
        given: as `dense_inputs` gives them.
        tensors: of the call.
        options: of the call; `config`, if any, is one of the backward phase.
        dbias: whether the gradient of the bias is asked for.

    Raises:
        InputError, ConfigError, NoKernelError: see `backward_problem` and `select`.
        FlashgenError: inside a CUDA graph capture, where nothing may be compiled.
    """
    problem = backward_problem(*given[:3], tensors, options, dbias)
    check_outputs(given, problem, options)
    if nothing_to_see(given.q, given.k, problem):
        return functools.partial(zero_gradients, dbias=dbias)
    return _Bound(problem, readable_inputs(given), tensors, options)


class _Bound:
    """The kernels of one kind of pass; allocates the gradients."""

    def __init__(self, problem: Problem, given: BackwardInputs, tensors: Tensors, options: Options) -> None:
        self._problem = problem
        self._options = options
        self._bias_size = bias_shape(tensors.bias) if problem.spec.dbias and tensors.bias is not None else None
        self._device = given.q.device
        self._index = given.q.device.index
        extras = extras_of(problem, tensors, options)
        layouts = layouts_of(self._named(given, self._empty(given)))
        selection: Selection = choose(problem, detect_target(given.q.device), options, GradientLayouts(by_name=layouts))
        self._launch = BackwardLaunch(
            problem=problem,
            config=selection.config,
            compiled=compiled_kernel(problem.spec, selection.config, selection.target),
            extras=extras,
            layouts=layouts,
        )
        # What stays the same from call to call, unless other tensors come with each.
        self._extras = None if extras_need_side(extras) else extras

    def __call__(self, given: BackwardInputs, tensors: Tensors) -> Gradients:
        given = readable_inputs(given)
        gradients = self._empty(given)
        if torch._C._cuda_getDevice() == self._index:
            self._run(given, gradients, tensors)
        else:
            with torch.cuda.device(self._device):
                self._run(given, gradients, tensors)
        dq, dk, dv = (gradients[name] for name in ("dq", "dk", "dv"))
        return dq, dk, dv, own_bias_gradient(gradients.get("dbias"), tensors)

    def _empty(self, given: BackwardInputs) -> dict[str, torch.Tensor]:
        gradients = {
            f"d{name}": torch.empty_like(t, memory_format=torch.contiguous_format)
            for name, t in zip("qkv", given[:3], strict=True)
        }
        if self._bias_size is not None:
            gradients["dbias"] = torch.empty(self._bias_size, dtype=torch.float32, device=self._device)
        return gradients

    def _named(self, given: BackwardInputs, gradients: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        assert given.dout is not None
        named = {"q": given.q, "k": given.k, "v": given.v, "out": given.out, "do": given.dout, "lse": given.lse}
        if given.dlse is not None:
            named["dlse"] = given.dlse
        return named_views({**named, **gradients}, self._options.layout)

    def _run(self, given: BackwardInputs, gradients: dict[str, torch.Tensor], tensors: Tensors) -> None:
        extras = self._extras
        if extras is None:
            extras = extras_of(self._problem, tensors, self._options)
        if self._options.packed:
            # A kernel writes the rows of sequences alone.
            clear_unowned(gradients, sequences_fill(given.q, given.k, tensors, self._options))
        self._launch(self._named(given, gradients), extras)


def clear_unowned(gradients: dict[str, torch.Tensor], filled: tuple[bool, bool]) -> None:
    """Fill with 0 the gradients of packed tensors that sequences may not fill: of queries, of keys and values."""
    names = (() if filled[0] else ("dq",)) + (() if filled[1] else ("dk", "dv"))
    for name in names:
        gradients[name].zero_()
