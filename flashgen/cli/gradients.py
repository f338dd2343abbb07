"""One backward pass to check or to time: what it reads, what it fills, and the right answer."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from flashgen.codegen import KernelConfig
from flashgen.dispatch import Selection
from flashgen.launch import bind_backward, interpret_backward
from flashgen.measure import (
    POISON,
    GradientOracle,
    Gradients,
    attention_reference,
    poisoned_gradients,
    random_lse_gradients,
    random_output_gradients,
)
from flashgen.measure.gradients import bias_sizes
from flashgen.ops.runtime import compiled_kernel
from flashgen.ops.warming import run_problem
from flashgen.spec import Extras, Problem


@dataclasses.dataclass(frozen=True, kw_only=True)
class GradientCase:
    """The inputs of one backward pass.

    Attributes:
        problem: of the backward phase.
        extras: what its call gives besides tensors of the pass.
        tensors: q, k, v, what the forward gave (out, lse), the gradient of out (do), and that of lse (dlse) if it has
            one.
    """

    problem: Problem
    extras: Extras
    tensors: dict[str, Tensor]

    @classmethod
    def of(
        cls, problem: Problem, q: Tensor, k: Tensor, v: Tensor, extras: Extras, *, lse_gradient: bool
    ) -> GradientCase:
        """Return a case of these inputs and random gradients; its forward is flashgen's own, or on a CPU PyTorch's.

        Args:
            lse_gradient: whether lse has a gradient, too.
        """
        device = q.device
        forward = Problem(spec=problem.spec.forward(), shape=problem.shape)
        if q.is_cuda:
            out, lse = run_problem(q, k, v, forward, extras)
            assert lse is not None
        else:
            out, lse = attention_reference(q, k, v, spec=forward.spec, extras=extras, precision="input")
        dout = random_output_gradients(problem, device=device, seed=0)
        tensors = {"q": q, "k": k, "v": v, "out": out, "lse": lse, "do": dout}
        if lse_gradient:
            tensors["dlse"] = random_lse_gradients(problem, device=device, seed=0)
        return cls(problem=problem, extras=extras, tensors=tensors)

    def bind(self, selection: Selection) -> tuple[Callable[[], None], Gradients]:
        """Return a call of the kernels that were selected, and the gradients, full of NaN, that it fills."""
        spec, config = self.problem.spec, selection.config
        dq, dk, dv = poisoned_gradients(self.problem, device=self.tensors["q"].device)
        filled = {"dq": dq, "dk": dk, "dv": dv, **self._poisoned_dbias()}
        compiled = compiled_kernel(spec, config, selection.target)
        run = bind_backward(self.problem, config, compiled, self.extras, {**self.tensors, **filled})
        return run, Gradients(**filled)

    def interpret(self, config: KernelConfig) -> Gradients:
        """Return the gradients of the kernels of a config in Triton's interpreter."""
        tensors = {**self.tensors, **self._poisoned_dbias()}
        return Gradients(**interpret_backward(tensors, problem=self.problem, config=config, extras=self.extras))

    def oracle(self, heads: Sequence[tuple[int, int]] | None = None) -> GradientOracle:
        """Return the right answer, of a few (batch entry, key/value head) pairs and their groups, or of all."""
        q, k, v, dout = (self.tensors[name] for name in ("q", "k", "v", "do"))
        dlse = self.tensors.get("dlse")
        return GradientOracle(q, k, v, dout, spec=self.problem.spec, extras=self.extras, dlse=dlse, heads=heads)

    def _poisoned_dbias(self) -> dict[str, Tensor]:
        bias = self.extras.bias
        if bias is None or not self.problem.spec.dbias:
            return {}
        return {"dbias": torch.full(bias_sizes(bias), POISON, dtype=torch.float32, device=bias.device)}
