"""One call of a decode kernel to check or to time: what it reads, what it fills, and the right answer."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from flashgen.codegen import KernelConfig
from flashgen.dispatch import Selection
from flashgen.launch import bind_decode, interpret_decode
from flashgen.measure import AccuracyReport, CacheOracle, DecodeCall, Oracle, poisoned_outputs, random_decode_call
from flashgen.measure.autograd_calls import Run
from flashgen.ops.runtime import compiled_kernel
from flashgen.spec import Problem


@dataclasses.dataclass(frozen=True, kw_only=True)
class DecodeCase:
    """The inputs of one call, and what its kernel fills.

    Attributes:
        call: the inputs, caches among them.
        out: [batch, nheads_q, seqlen_q, head_dim_v], full of NaN.
        lse: float32 [batch, nheads_q, seqlen_q] where the problem has it, full of NaN.
    """

    call: DecodeCall
    out: Tensor
    lse: Tensor | None

    @classmethod
    def of(
        cls, problem: Problem, device: torch.device | str, *, seed: int = 0, ragged: bool = False, num_splits: int = 0
    ) -> DecodeCase:
        """Return a case of random inputs; see `random_decode_call`.

        Args:
            num_splits: what the call asks for; 0 leaves it to the config.
        """
        call = random_decode_call(problem, device=device, seed=seed, ragged=ragged)
        call = dataclasses.replace(call, extras=dataclasses.replace(call.extras, num_splits=num_splits))
        return cls._around(call)

    @classmethod
    def _around(cls, call: DecodeCall) -> DecodeCase:
        out, lse = poisoned_outputs(call.problem, device=call.q.device)
        return cls(call=call, out=out, lse=lse)

    def copies(self, count: int) -> tuple[DecodeCase, ...]:
        """Return this case and others like it, with caches and outputs of their own: `count` in all."""
        return (self, *(self._around(call) for call in self.call.copies(count)[1:]))

    def bind(self, selection: Selection) -> Run:
        """Return a call of the kernel that was selected, which gives (out,); on a CPU in Triton's interpreter."""
        call, config = self.call, selection.config
        if call.q.is_cuda:
            compiled = compiled_kernel(call.problem.spec, config, selection.target)
            launch = bind_decode(call.problem, config, compiled, call.extras, self._tensors())
        else:
            launch = functools.partial(self.interpret, config)

        def run() -> tuple[Tensor, ...]:
            launch()
            return (self.out,)

        return run

    def interpret(self, config: KernelConfig) -> None:
        """Run the kernel of a config once in Triton's interpreter."""
        interpret_decode(self._tensors(), problem=self.call.problem, config=config, extras=self.call.extras)

    def oracle(self, heads: Sequence[tuple[int, int]] | None = None) -> Oracle:
        """Return the right answer, of a few (batch entry, query head) pairs or of all; made before the call."""
        call = self.call
        return Oracle(call.q, call.k, call.v, spec=call.problem.spec, extras=call.extras, heads=heads)

    def check(self, run: Callable[[], object], heads: Sequence[tuple[int, int]] | None = None) -> AccuracyReport:
        """Run once, and return how far off out, lse and the caches are."""
        oracle, caches = self.oracle(heads), CacheOracle(self.call)
        run()
        report = oracle.judge(self.out, self.lse)
        fault = caches.fault()
        return dataclasses.replace(report, ok=False, reason=fault) if report.ok and fault else report

    def _tensors(self) -> dict[str, Tensor]:
        tensors = {"q": self.call.q, "k": self.call.k, "v": self.call.v, "out": self.out}
        return tensors if self.lse is None else {**tensors, "lse": self.lse}
