"""Appending to caches by a kernel of its own, before another one reads them."""

from __future__ import annotations

import typing
from collections.abc import Mapping

import torch

from flashgen.codegen import EntryPlan
from flashgen.codegen.decode_names import NEW_KEYS
from flashgen.compile import CompiledEntry
from flashgen.launch.kernel import BoundKernel
from flashgen.launch.operands import Layout4D
from flashgen.spec import Problem


class AppendLaunch:
    """The kernel that writes what is new into the caches and, where there are rotary positions, turns queries.

    Attributes:
        slots: where the next kernel finds what it reads instead of the call's own: how long the sequences are then, and
            queries as a dense [batch, nheads_q, seqlen_q, head_dim_qk].
        layouts: of those that descriptors may describe.
    """

    def __init__(
        self,
        entry: EntryPlan,
        built: CompiledEntry,
        problem: Problem,
        values: Mapping[str, int | float],
        slots: Mapping[str, int],
    ) -> None:
        """Bind; `values` and `slots` are those of `BoundKernel`, without what is left."""
        shape, spec = problem.shape, problem.spec
        self._lengths, self._queries = (shape.batch,), (shape.batch, shape.nheads_q, shape.seqlen_q, spec.head_dim_qk)
        made = {"lengths": len(slots)}
        self.slots = {"cache_seqlens": made["lengths"]}
        self.layouts: dict[str, Layout4D] = {}
        if spec.rotary:
            made["q_turned"] = self.slots["q"] = len(slots) + 1
            self.layouts["q"] = Layout4D.of(torch.empty(self._queries, device="meta"))
        grid = append_programs(problem, int(values["seqlen_new"]))
        self._kernel = BoundKernel(entry, built, grid=grid, values=values, descriptors={}, slots={**slots, **made})

    def __call__(self, tensors: tuple[torch.Tensor | None, ...]) -> tuple[torch.Tensor | None, ...]:
        """Launch on the current stream; return the tensors, and behind them what the next kernel finds at `slots`."""
        q = typing.cast("torch.Tensor", tensors[0])
        left = [torch.empty(self._lengths, dtype=torch.int32, device=q.device)]
        if "q" in self.slots:
            left.append(torch.empty(self._queries, dtype=q.dtype, device=q.device))
        tensors = (*tensors, *left)
        self._kernel(tensors)
        return tensors


def append_programs(problem: Problem, seqlen_new: int) -> int:
    """Return how many programs append so many rows: one for some rows of a head, and one for each sequence at least."""
    shape = problem.shape
    programs = shape.batch * shape.nheads_kv * -(-seqlen_new // NEW_KEYS)
    if problem.spec.rotary:
        programs += shape.batch * shape.nheads_q * -(-shape.seqlen_q // NEW_KEYS)
    return max(programs, shape.batch)
