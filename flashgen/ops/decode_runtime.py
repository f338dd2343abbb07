"""What stands behind decoding on a GPU: select, compile and bind once for each kind of call, then only launch."""

from __future__ import annotations

import functools
import typing

import torch

from flashgen.codegen import DecodeConfig, render
from flashgen.dispatch import Selection
from flashgen.launch import DecodeLaunch, DecodeOperands, detect_target, readable
from flashgen.ops.call import Tensors, heads_first
from flashgen.ops.decode_call import DecodeOptions, DecodeTensors
from flashgen.ops.decode_checks import check_in_place, decode_extras, decode_problem
from flashgen.ops.runtime import NewTensor, Outputs, choose, compiled_kernel, negated, say_copied
from flashgen.ops.unseen import unseen_outputs
from flashgen.spec import Extras, Problem


class DecodeRunner(typing.Protocol):
    """Runs calls of one kind."""

    def __call__(
        self, q: torch.Tensor, k_cache: torch.Tensor, v_cache: torch.Tensor, tensors: DecodeTensors
    ) -> Outputs:
        """Return out, and lse where asked for, and write what is appended into the caches."""
        ...


def prepare_decode(
    q: torch.Tensor, k_cache: torch.Tensor, v_cache: torch.Tensor, tensors: DecodeTensors, options: DecodeOptions
) -> DecodeRunner:
    """Return a function that runs calls of exactly these shapes, strides and options on this device.

    Raises:
        InputError, ConfigError, NoKernelError: see `decode_problem` and `select`.
        FlashgenError: inside a CUDA graph capture, where nothing may be compiled.
    """
    problem = decode_problem(q, k_cache, v_cache, tensors, options)
    check_in_place(k_cache, v_cache)
    if nothing_to_decode(problem):
        return functools.partial(run_unseen_decode, problem=problem, options=options)
    extras = decode_extras(problem, tensors, options)
    copied = [name for name, t in _movable(q, tensors).items() if _unreadable(t)]
    if copied:
        say_copied(", ".join(copied))
    if copied or extras.softmax_scale < 0:
        return _with_inputs(extras, options)
    operands = decode_operands(q, k_cache, v_cache, problem, tensors, options)
    return _Bound(choose(problem, detect_target(q.device), options, operands), operands, q, extras, options)


def nothing_to_decode(problem: Problem) -> bool:
    """Return whether a call has no query, or a cache without room for any key."""
    return 0 in (problem.shape.batch, problem.shape.seqlen_q, problem.shape.seqlen_k)


def run_unseen_decode(
    q: torch.Tensor,
    k_cache: torch.Tensor,
    v_cache: torch.Tensor,
    tensors: DecodeTensors,
    *,
    problem: Problem,
    options: DecodeOptions,
) -> Outputs:
    """Return the outputs of a call without any key or without any query: nothing to launch."""
    out = q.new_empty((*q.shape[:-1], problem.spec.head_dim_v))
    lse = q.new_empty(lse_size(q, options.layout), dtype=torch.float32) if problem.spec.lse else None
    return unseen_outputs(out, lse, Tensors(sinks=tensors.sinks))


def lse_size(q: torch.Tensor, layout: str) -> tuple[int, ...]:
    """Return the shape of lse, [batch, nheads_q, seqlen_q]."""
    return tuple(heads_first(q, layout).shape[:3])


def decode_operands(
    q: torch.Tensor,
    k_cache: torch.Tensor,
    v_cache: torch.Tensor,
    problem: Problem,
    tensors: DecodeTensors,
    options: DecodeOptions,
) -> DecodeOperands:
    """Return the strides that a kernel meets: of the caches as they are, of the rest as it is or as it is copied."""
    met = {name: t if readable(t) else torch.empty(t.shape, device="meta") for name, t in _movable(q, tensors).items()}
    out = torch.empty((*q.shape[:-1], problem.spec.head_dim_v), device="meta")
    named = {"q": met["q"], "k": k_cache, "v": v_cache, "out": out}
    extras = decode_extras(problem, tensors._replace(k_new=met.get("k"), v_new=met.get("v")), options)
    return DecodeOperands.of({name: heads_first(t, options.layout) for name, t in named.items()}, extras)


def _movable(q: torch.Tensor, tensors: DecodeTensors) -> dict[str, torch.Tensor]:
    """Return by name what may be copied before a call."""
    given = {"q": q, "k": tensors.k_new, "v": tensors.v_new}
    return {name: t for name, t in given.items() if t is not None}


def readable_inputs(q: torch.Tensor, tensors: DecodeTensors) -> tuple[torch.Tensor, DecodeTensors]:
    """Return Q and the tensors of a call, those that no kernel can read in place copied."""
    dense = {
        name: t.clone(memory_format=torch.contiguous_format) if _unreadable(t) else t
        for name, t in _movable(q, tensors).items()
    }
    return dense["q"], tensors._replace(k_new=dense.get("k"), v_new=dense.get("v"))


def _unreadable(tensor: torch.Tensor) -> bool:
    return not readable(tensor) or tensor.data_ptr() % 16 != 0


def _with_inputs(extras: Extras, options: DecodeOptions) -> DecodeRunner:
    """Return a runner that copies what no kernel reads in place; what it becomes is prepared on its own first call.

    A negative scale goes into Q: the kernels' running maximum assumes one of at least 0, and a sign is exact to move.
    """
    negative = extras.softmax_scale < 0
    positive = options._replace(softmax_scale=abs(extras.softmax_scale))
    prepared: list[DecodeRunner] = []

    def run(q: torch.Tensor, k_cache: torch.Tensor, v_cache: torch.Tensor, tensors: DecodeTensors) -> Outputs:
        q, tensors = readable_inputs(q, tensors)
        q = negated(q) if negative else q
        if not prepared:
            prepared.append(prepare_decode(q, k_cache, v_cache, tensors, positive))
        return prepared[0](q, k_cache, v_cache, tensors)

    return run


class _Bound:
    """A launch bound to one kind of call; allocates the outputs and what parts of the keys leave in between."""

    def __init__(
        self, selection: Selection, operands: DecodeOperands, q: torch.Tensor, extras: Extras, options: DecodeOptions
    ) -> None:
        problem, config = selection.problem, selection.config
        spec = problem.spec
        assert isinstance(config, DecodeConfig)
        self._launch = DecodeLaunch(
            plan=render(spec, config).plan,
            compiled=compiled_kernel(spec, config, selection.target),
            problem=problem,
            config=config,
            operands=operands,
            extras=extras,
            device=q.device,
        )
        self._device = q.device
        self._index = q.device.index
        self._out = NewTensor((*q.shape[:-1], spec.head_dim_v), q.dtype)
        self._lse = NewTensor(lse_size(q, options.layout), torch.float32) if spec.lse else None
        self._partial = NewTensor((self._launch.partial_size,), torch.float32)

    def __call__(
        self, q: torch.Tensor, k_cache: torch.Tensor, v_cache: torch.Tensor, tensors: DecodeTensors
    ) -> Outputs:
        if torch._C._cuda_getDevice() != self._index:
            with torch.cuda.device(self._device):
                return self(q, k_cache, v_cache, tensors)
        out = self._out(q)
        lse = None if self._lse is None else self._lse(q)
        self._launch(q, k_cache, v_cache, out, lse, self._partial(q), tensors)
        return out, lse
