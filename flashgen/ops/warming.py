"""`flashgen.warmup`, and calls of a problem whose extras are known."""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Iterable, Iterator

import torch

from flashgen.errors import InputError
from flashgen.measure import DecodeCall, Gradients, random_decode_call, random_extras, random_inputs
from flashgen.ops.autograd import run
from flashgen.ops.backward_op import run_backward_op
from flashgen.ops.backward_runtime import BackwardInputs
from flashgen.ops.call import LAYOUTS, Layout, Options, Tensors, heads_first
from flashgen.ops.checks import check_layout
from flashgen.ops.decode_call import DecodeOptions, DecodeTensors
from flashgen.ops.decode_op import run_decode
from flashgen.ops.gradients import sink_gradient
from flashgen.ops.runtime import Outputs
from flashgen.spec import DType, Extras, Problem, parse_problem


def warmup(
    problems: Iterable[Problem | str], *, device: torch.device | str = "cuda", layout: Layout | None = None
) -> None:
    """Choose, compile and load the kernels for `problems`, so that a CUDA graph capture finds them ready.

    Args:
        problems: problems, or their text (`b=4 hq=32 hkv=8 sq=4096 sk=4096 d=128 causal bf16`); one of the backward
            phase (`... bf16 backward`) prepares a training step: the forward pass with lse, and the gradients; of one
            of decoding (`... sq=1 sk=4096 ... decode`), sk is the room that a sequence has in the cache.
        device: the GPU that will run them.
        layout: of dense tensors; both when not given. Calls with other strides are prepared on their first use, and
            masks that only their tensors bound need one call on those.

    Raises:
        InputError: if the device is no GPU, or a text is no problem.
    """
    device = torch.device(device)
    if device.type != "cuda":
        raise InputError(f"warmup prepares GPU kernels, got device {device}")
    for item in problems:
        problem = parse_problem(item) if isinstance(item, str) else item
        orders = LAYOUTS if layout is None else (check_layout(layout),)
        for order in orders[:1] if problem.spec.varlen else orders:
            _run_once(problem, order, device)


def _run_once(problem: Problem, layout: Layout, device: torch.device) -> None:
    if problem.spec.phase == "decode":
        _decode_once(problem, layout, device)
        return
    q, k, v = (heads_first(t, layout) for t in random_inputs(problem, device=device, seed=0, layout=layout))
    extras = random_extras(problem, device=device, seed=0)
    # What the memo knows calls of the default scale by is None.
    options = Options.of(problem, extras, layout=layout)._replace(softmax_scale=None)
    tensors = Tensors.of(extras)
    with torch.no_grad(), products_of(problem.spec.dtype):
        if problem.spec.phase == "forward":
            run(q, k, v, tensors, options._replace(return_lse=False))
        out, lse = run(q, k, v, tensors, options._replace(return_lse=True))
        if problem.spec.phase == "backward":
            assert lse is not None
            given = BackwardInputs(q, k, v, out, lse, torch.zeros_like(out), None)
            run_backward_op(given, tensors, options._replace(return_lse=True), problem.spec.dbias)


def _decode_once(problem: Problem, layout: Layout, device: torch.device) -> None:
    made = random_decode_call(problem, device=device, seed=0, layout=layout)
    table, room, page_size = made.extras.page_table, problem.shape.seqlen_k, problem.spec.page_size
    # Without the room that it has to spare: kernels are chosen by it.
    if table is None:
        call = dataclasses.replace(made, k=made.k[:, :, :room], v=made.v[:, :, :room])
    else:
        extras = dataclasses.replace(made.extras, page_table=table[:, : -(-room // page_size)])
        call = dataclasses.replace(made, extras=extras)
    for lse in (False, True):
        spec = dataclasses.replace(problem.spec, lse=lse)
        run_decode_call(dataclasses.replace(call, problem=dataclasses.replace(problem, spec=spec)), layout=layout)


def run_decode_call(call: DecodeCall, *, layout: Layout = "bhsd", config: str = "", registry: str = "") -> Outputs:
    """Return out and lse, None unless the spec has it, of a call of decoding, and append what it appends.

    Args:
        call: for example of `random_decode_call`; its views are heads first.
        layout: that the caches are handed over in, and out is given in.
        config: a config of the decode phase as `encode_config` writes it, or empty.
        registry: a path to look in first, or empty.

    Raises:
        InputError: if a tensor does not fit; and what `attention_with_kvcache` raises.
    """
    q, k, v = (heads_first(t, layout) for t in (call.q, call.k, call.v))
    options = DecodeOptions.of(call.problem, call.extras, layout=layout, config=config, registry=registry)
    with torch.no_grad(), products_of(call.problem.spec.dtype):
        return run_decode(q, k, v, DecodeTensors.of(call.extras, layout), options)


def run_problem(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    problem: Problem,
    extras: Extras,
    *,
    layout: Layout = "bhsd",
    config: str = "",
    registry: str = "",
) -> Outputs:
    """Return out and lse, None unless the spec has it, of a call whose problem and extras are known.

    Args:
        q, k, v: in the order of `layout`, or packed.
        problem: what the tensors pose, of the forward phase.
        extras: for example of `random_extras`.
        layout: of dense tensors.
        config: a kernel config as `encode_config` writes it, or empty.
        registry: a path to look in first, or empty.

    Raises:
        InputError: if the problem is of the backward phase, among others.
    """
    if problem.spec.phase != "forward":
        raise InputError(f"run_problem runs the forward phase, got {problem}; run_backward runs the other")
    options = Options.of(problem, extras, layout=layout, config=config, registry=registry)
    with products_of(problem.spec.dtype):
        return run(q, k, v, Tensors.of(extras), options)


def run_backward(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    out: torch.Tensor,
    lse: torch.Tensor,
    dout: torch.Tensor,
    dlse: torch.Tensor | None,
    problem: Problem,
    extras: Extras,
    *,
    layout: Layout = "bhsd",
    config: str = "",
    registry: str = "",
) -> Gradients:
    """Return the gradients of a call whose problem and extras are known, from what its forward pass gave.

    Args:
        q, k, v, out, dout: in the order of `layout`, or packed.
        lse, dlse: float32 [batch, nheads_q, seqlen_q] or packed [nheads_q, tokens_q]; a dlse of None is 0.
        problem: what the tensors pose, of the backward phase.
        extras: of the forward pass.
        layout: of dense tensors.
        config: a config of the backward phase as `encode_config` writes it, or empty.
        registry: a path to look in first, or empty.

    Returns:
        Gradients of the dtypes of their inputs, in the order of `layout`; dbias, where the spec asks for it, has size 1
        where the bias has, or a stride of 0.

    Raises:
        InputError: if the problem is of the forward phase, or a tensor does not fit; and what `attention` raises.
    """
    if problem.spec.phase != "backward":
        raise InputError(f"run_backward runs the backward phase, got {problem}; run_problem runs the other")
    options = Options.of(problem, extras, layout=layout, config=config, registry=registry)._replace(return_lse=True)
    tensors = Tensors.of(extras)
    if tensors.bias is not None:
        narrow = tuple(slice(0, 1) if stride == 0 else slice(None) for stride in tensors.bias.stride())
        tensors = tensors._replace(bias=tensors.bias[narrow])
    given = BackwardInputs(q, k, v, out, lse, dout, dlse)
    with torch.no_grad(), products_of(problem.spec.dtype):
        dq, dk, dv, dbias = run_backward_op(given, tensors, options, problem.spec.dbias)
        dsinks = None if tensors.sinks is None else sink_gradient(given, tensors.sinks, options)
    return Gradients(dq=dq, dk=dk, dv=dv, dbias=dbias, dsinks=dsinks)


@contextlib.contextmanager
def products_of(dtype: DType) -> Iterator[None]:
    """Let PyTorch's setting for float32 products be what `dtype` says inside this block."""
    if dtype not in (DType.FP32, DType.TF32):
        yield
        return
    before = torch.backends.cuda.matmul.fp32_precision
    torch.backends.cuda.matmul.fp32_precision = "tf32" if dtype is DType.TF32 else "ieee"
    try:
        yield
    finally:
        torch.backends.cuda.matmul.fp32_precision = before
