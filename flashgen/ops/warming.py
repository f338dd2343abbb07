"""`flashgen.warmup`, and calls of a problem whose extras are known."""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Iterator

import torch

from flashgen.errors import InputError
from flashgen.measure import random_extras, random_inputs
from flashgen.ops.call import LAYOUTS, Layout, Options, Tensors, heads_first
from flashgen.ops.checks import check_layout
from flashgen.ops.runtime import Outputs
from flashgen.ops.torch_op import run
from flashgen.spec import DType, Extras, Problem, parse_problem


def warmup(
    problems: Iterable[Problem | str], *, device: torch.device | str = "cuda", layout: Layout | None = None
) -> None:
    """Choose, compile and load the kernels for `problems`, so that a CUDA graph capture finds them ready.

    Args:
        problems: problems, or their text (`b=4 hq=32 hkv=8 sq=4096 sk=4096 d=128 causal bf16`).
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
    q, k, v = (heads_first(t, layout) for t in random_inputs(problem, device=device, seed=0, layout=layout))
    tensors = Tensors.of(random_extras(problem, device=device, seed=0))
    options = Options.of(problem, random_extras(problem, device=device, seed=0), layout=layout)
    with products_of(problem.spec.dtype):
        for return_lse in (False, True):
            # What the memo knows calls of the default scale by is None.
            run(q, k, v, tensors, options._replace(softmax_scale=None, return_lse=return_lse))


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
        problem: what the tensors pose.
        extras: for example of `random_extras`.
        layout: of dense tensors.
        config: a kernel config as `encode_config` writes it, or empty.
        registry: a path to look in first, or empty.
    """
    options = Options.of(problem, extras, layout=layout, config=config, registry=registry)
    with products_of(problem.spec.dtype):
        return run(q, k, v, Tensors.of(extras), options)


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
