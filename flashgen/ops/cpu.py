"""Calls on CPU tensors: the kernel itself in Triton's interpreter where that is asked for, else eager PyTorch."""

from __future__ import annotations

import contextlib
import contextvars
import dataclasses
import functools
from collections.abc import Iterator

import torch

from flashgen.codegen.constraints import require_legal
from flashgen.errors import UnsupportedError
from flashgen.launch import interpret_forward, readable
from flashgen.measure import attention_reference
from flashgen.ops.call import Options, Tensors, decode_config, heads_first
from flashgen.ops.checks import extras_of, problem_of
from flashgen.ops.runtime import Outputs, choose, logger, negated, nothing_to_see, run_unseen, sequences_fill
from flashgen.ops.unseen import used_rows
from flashgen.resources import interpret_requested
from flashgen.spec import Extras, Problem
from flashgen.target import named_target

# CPU tensors know no GPU: what runs for them, and is explained, is the choice for Hopper.
INTERPRETED_AS = named_target("sm_90")
_DENSE = torch.contiguous_format
_interpreting: contextvars.ContextVar[bool] = contextvars.ContextVar("flashgen_interpreting", default=False)


@contextlib.contextmanager
def interpreting() -> Iterator[None]:
    """Run CPU tensors through Triton's interpreter inside this block: the very kernel, about 1 ms a tile."""
    token = _interpreting.set(True)
    try:
        yield
    finally:
        _interpreting.reset(token)


def is_interpreting() -> bool:
    """Return whether CPU tensors run through Triton's interpreter here."""
    return _interpreting.get() or interpret_requested()


def forward_cpu(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, tensors: Tensors, options: Options) -> Outputs:
    """Return out, and lse where asked for.

    Raises:
        InputError, ConfigError: for what a GPU call would refuse, too.
        UnsupportedError: for devices that are neither GPUs nor CPUs.
    """
    problem = problem_of(q, k, v, tensors, options)
    config = decode_config(options.config)
    if config is not None:
        require_legal(config, problem.spec, INTERPRETED_AS)
    if q.device.type != "cpu":
        raise UnsupportedError(f"flashgen runs on CUDA and ROCm GPUs and on the CPU, not on {q.device}")
    filled = not options.packed or sequences_fill(q, k, tensors, options)[0]
    extras = extras_of(problem, tensors, options)
    if nothing_to_see(q, k, problem):
        return run_unseen(q, k, v, tensors, problem=problem, layout=options.layout)
    views = tuple(heads_first(t, options.layout) for t in (q, k, v))
    if is_interpreting():
        out, lse = _interpret(views, problem, extras, options)
        if not filled:
            _clear_unowned(out, lse, tensors)
    else:
        say_eager()
        out, lse = attention_reference(*views, spec=problem.spec, extras=extras, precision="input")
    # An operator's outputs have the strides that its fake promises.
    out = heads_first(out, options.layout).contiguous()
    return out, lse.float().contiguous() if lse is not None and options.return_lse else None


def _interpret(
    views: tuple[torch.Tensor, ...], problem: Problem, extras: Extras, options: Options
) -> tuple[torch.Tensor, torch.Tensor | None]:
    # As on a GPU: tensors that no kernel can read in place are copied.
    q, k, v = (t if readable(t) and t.data_ptr() % 16 == 0 else t.clone(memory_format=_DENSE) for t in views)
    if extras.softmax_scale < 0:
        q, extras = negated(q), dataclasses.replace(extras, softmax_scale=-extras.softmax_scale)
    config = choose(problem, INTERPRETED_AS, options).config
    return interpret_forward(q, k, v, problem=problem, config=config, extras=extras)


def _clear_unowned(out: torch.Tensor, lse: torch.Tensor | None, tensors: Tensors) -> None:
    # A kernel writes the rows of sequences alone.
    owned = used_rows(out.shape[0], tensors)
    assert owned is not None
    out[~owned] = 0
    if lse is not None:
        lse[:, ~owned] = float("-inf")


@functools.lru_cache(maxsize=1)
def say_eager() -> None:
    """Log, once, that attention of CPU tensors is computed without a kernel."""
    logger.warning(
        "CPU tensors: computing attention with eager PyTorch, not with a kernel; `with flashgen.interpreting():` runs "
        "the kernel itself in Triton's interpreter"
    )
