"""An attention function of PyTorch's as it is timed: its forward alone, or one backward pass of it."""

from __future__ import annotations

import contextlib
import typing
from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from flashgen.measure.cases import random_output_gradients
from flashgen.spec import Problem

Attend = Callable[[Tensor, Tensor, Tensor], Tensor]
"""From q, k and v to out."""

Run = Callable[[], tuple[Tensor, ...]]
"""One call of what a problem asks for: gives (out,), or of a backward problem (dq, dk, dv)."""


def bind_attend(attend: Attend, q: Tensor, k: Tensor, v: Tensor, problem: Problem) -> Run:
    """Return a call that gives what `problem` asks for, each time anew.

    Of a backward problem the forward runs here, once, and the call is one backward pass for the gradient of out that
    `random_output_gradients` gives for seed 0. A forward with lse runs as in training: on inputs that require
    gradients, without which some implementations keep no lse.
    """
    spec = problem.spec
    if spec.phase == "forward" and not spec.lse:
        return lambda: (attend(q, k, v),)
    leaves = tuple(x.detach().requires_grad_() for x in (q, k, v))
    if spec.phase == "forward":
        return lambda: (attend(*leaves).detach(),)
    dout = random_output_gradients(problem, device=q.device, seed=0)
    with algorithms(deterministic=spec.deterministic):
        out = attend(*leaves)

    def run() -> tuple[Tensor, ...]:
        with algorithms(deterministic=spec.deterministic):
            return torch.autograd.grad(out, leaves, dout, retain_graph=True)

    return run


@contextlib.contextmanager
def algorithms(*, deterministic: bool) -> Iterator[None]:
    """Let PyTorch use deterministic algorithms alone inside this block, or refuse; where not asked to, change nothing.

    Setting it costs nothing but the choice: memory is not filled, as PyTorch otherwise does in that mode.
    """
    if not deterministic:
        yield
        return
    enabled = torch.are_deterministic_algorithms_enabled()
    warn_only = torch.is_deterministic_algorithms_warn_only_enabled()
    # A module whose attribute is a property, which is more than its annotations say.
    memory: typing.Any = torch.utils.deterministic
    filled = memory.fill_uninitialized_memory
    torch.use_deterministic_algorithms(True)
    memory.fill_uninitialized_memory = False
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(enabled, warn_only=warn_only)
        memory.fill_uninitialized_memory = filled
