"""Launching the backward kernels: delta, dK and dV, dQ where it has a kernel of its own, dbias where asked for."""

from __future__ import annotations

import typing
from collections.abc import Callable, Mapping

import torch

from flashgen.codegen import (
    EntryPlan,
    KernelConfig,
    RenderedKernel,
    TritonBackwardConfig,
    argument_kind,
    constant_values,
    render,
)
from flashgen.codegen.backward_plan import BackwardPlan
from flashgen.compile import CompiledEntry, CompiledKernel
from flashgen.errors import ConfigError
from flashgen.launch.arguments import entry_arguments
from flashgen.launch.descriptors import entry_descriptors
from flashgen.launch.forward import check_sizes, launch_values
from flashgen.launch.kernel import BoundKernel
from flashgen.launch.operands import Layout4D, Operands
from flashgen.launch.side_tensors import SideTensors
from flashgen.launch.tile_table import TableShape, tile_table
from flashgen.spec import Extras, Problem

Tensors = Mapping[str, torch.Tensor]
_STRIDED = {"q": "m", "k": "n", "v": "n", "do": "m", "dq": "m", "dk": "n", "dv": "n"}


class BackwardLaunch:
    """Compiled backward kernels bound to sizes, strides and numbers; call it with tensors of exactly those.

    Args (of a call): the tensors by name, as `bind_backward` takes them, and the extras of the call. Nothing is
    checked then: the caller has.
    """

    def __init__(
        self,
        *,
        problem: Problem,
        config: KernelConfig,
        compiled: CompiledKernel,
        extras: Extras,
        layouts: Mapping[str, Layout4D],
    ) -> None:
        self._call = BackwardCall(problem, config, extras, layouts)
        self._kernels = [
            (entry.name, self._bind(entry, built) if self._call.grid(entry) else None)
            for entry, built in zip(self._call.plan.entries, compiled.entries, strict=True)
        ]

    def _bind(self, entry: EntryPlan, built: CompiledEntry) -> BoundKernel:
        call = self._call
        tensors = (name.removesuffix("_ptr") for name in entry.arguments if argument_kind(name) == "pointer")
        return BoundKernel(
            entry,
            built,
            grid=call.grid(entry),
            values=call.values(entry),
            descriptors=entry_descriptors(entry, call.plan, call.layouts, call.constants),
            slots={name: name for name in (*tensors, *call.layouts)},
        )

    def __call__(self, tensors: Tensors, extras: Extras) -> None:
        given = self._call.with_scratch(tensors, extras)
        for name, kernel in self._kernels:
            if kernel is not None:
                kernel(given)
            self._call.after(name, given)


class BackwardCall:
    """What the kernels of one kind of call are given: on a GPU and in the interpreter alike.

    Attributes:
        plan: structure of the module.
        constants: compile-time arguments of all kernels.
        layouts: of q, k, v, out, do, dq, dk and dv as the kernels meet them.
    """

    def __init__(self, problem: Problem, config: KernelConfig, extras: Extras, layouts: Mapping[str, Layout4D]) -> None:
        if not isinstance(config, TritonBackwardConfig):
            raise ConfigError(f"template {config.template!r} has no backward kernels")
        self.rendered: RenderedKernel = render(problem.spec, config)
        assert isinstance(self.rendered.plan, BackwardPlan)
        self.plan = self.rendered.plan
        self.constants = constant_values(problem.spec, config)
        self.layouts = dict(layouts)
        if not self.plan.own_dq:
            self.layouts["dq"] = _dense(layouts["q"], problem.spec.varlen)
        self._problem = problem
        self._config = config
        self._scale = extras.softmax_scale
        self._side = SideTensors(self.plan)
        operands = Operands(**{name: self.layouts[name] for name in ("q", "k", "v", "out")})
        rows = self.layouts["q"].size[2]
        whole = max(self.constants["BLOCK_M1"], self.constants["BLOCK_M2"])
        # Packed sequences follow each other without a gap.
        self._padded_rows = rows if problem.spec.varlen else -(-rows // whole) * whole
        self._values = launch_values(problem, config, operands, extras) | self._numbers()

    def _numbers(self) -> dict[str, int | float]:
        shape, rows = self._problem.shape, self.layouts["q"].size[2]
        values: dict[str, int | float] = {
            "softmax_scale": self._scale,
            "batch": shape.batch,
            "nheads_kv": shape.nheads_kv,
            "max_seqlen_k": shape.seqlen_k,
            "rows": rows,
            "padded_rows": self._padded_rows,
        }
        for name, row in _STRIDED.items():
            for axis, stride in zip(("z", "h", row), self.layouts[name].stride, strict=False):
                values[f"stride_{name}{axis}"] = stride
        dbias = self.layouts.get("dbias")
        if dbias is not None:
            values |= dict(zip(("bias_batch", "bias_heads", "bias_rows", "bias_keys"), dbias.size, strict=True))
        return values

    def values(self, entry: EntryPlan) -> dict[str, int | float]:
        """Return the numbers of one kernel's arguments by name."""
        shape = self._problem.shape
        heads = shape.nheads_kv if entry.name == "attn_bwd_dkdv" else shape.nheads_q
        return {**self._values, "num_heads_total": shape.batch * heads}

    def grid(self, entry: EntryPlan) -> int:
        """Return the number of programs of one kernel.

        Raises:
            InputError: if it is past what a GPU can launch.
        """
        shape, blocks = self._problem.shape, self.constants
        if entry.name == "attn_bwd_delta":
            batch = self.layouts["q"].size[0]
            tiles = -(-self._padded_rows // blocks["BLOCK_ROWS"]) * batch * shape.nheads_q
        elif entry.name == "attn_bwd_dkdv":
            tiles = -(-shape.seqlen_k // blocks["BLOCK_N1"]) * shape.batch * shape.nheads_kv
        elif entry.name == "attn_bwd_dq":
            tiles = -(-shape.seqlen_q // blocks["BLOCK_M2"]) * shape.batch * shape.nheads_q
        else:
            sizes = self.layouts["dbias"].size
            tiles = sizes[0] * sizes[1] * -(-sizes[2] // blocks["BLOCK_M1"]) * -(-sizes[3] // blocks["BLOCK_N1"])
        check_sizes(shape, tiles, max(blocks.values()))
        return tiles

    def with_scratch(self, tensors: Tensors, extras: Extras) -> dict[str, torch.Tensor]:
        """Return all tensors of a call by their names in the kernels; what is only needed meanwhile is made here.

        It is linear in the lengths: float32 lse2 and delta like lse, up to whole tiles, and dQ in float32 where key
        tiles add to it.
        """
        given = dict(tensors)
        lse, q = given["lse"], given["q"]
        given |= {name: lse.new_empty((*lse.shape[:-1], self._padded_rows)) for name in ("lse2", "delta")}
        if not self.plan.own_dq:
            given["dq_out"] = given["dq"]
            given["dq"] = torch.zeros(q.shape, dtype=torch.float32, device=q.device)
        if self.plan.ordered:
            shape = self._problem.shape
            turns = shape.batch * shape.nheads_q * -(-shape.seqlen_q // self.constants["BLOCK_M1"])
            given["turn"] = torch.zeros(turns, dtype=torch.int32, device=q.device)
        table, turned = (self._table(name, extras, q.device) for name in ("2", "1"))
        given |= zip(self._side.names, self._side(extras, table, turned), strict=True)
        return given

    def _table(self, suffix: str, extras: Extras, device: torch.device) -> typing.Any:
        block_m, block_n = self.constants[f"BLOCK_M{suffix}"], self.constants[f"BLOCK_N{suffix}"]
        if not self.plan.mask.table or not block_m:
            return None
        tiles = TableShape(block_m=block_m, block_n=block_n, turned=suffix == "1")
        return tile_table(self._problem, self.rendered, tiles, extras, device)

    def arguments(self, entry: EntryPlan, given: Tensors) -> dict[str, object]:
        """Return every argument of one kernel by name, as a call of the JIT function takes them."""
        return entry_arguments(
            entry,
            self.plan,
            values=self.values(entry),
            tensors=given,
            layouts=self.layouts,
            constants=self.constants,
        )

    def after(self, entry_name: str, given: dict[str, torch.Tensor]) -> None:
        """Do what follows one kernel: the part of lse's own gradient in delta, dQ from its float32 sums."""
        if entry_name == "attn_bwd_delta" and "dlse" in given:
            # Where a row sees nothing the gradient of its lse may be NaN, and weighs nothing.
            dlse = given["dlse"].masked_fill(given["lse"] == float("-inf"), 0.0)
            given["delta"][..., : dlse.shape[-1]].sub_(dlse)
        if entry_name == "attn_bwd_dkdv" and "dq_out" in given:
            torch.mul(given["dq"], self._scale, out=given["dq_out"])


def layouts_of(tensors: Tensors) -> dict[str, Layout4D]:
    """Return the layouts of the tensors of a backward call that have strides of their own."""
    names = (*_STRIDED, "out", "dbias")
    return {name: Layout4D.of(tensors[name]) for name in names if name in tensors}


def bind_backward(
    problem: Problem, config: KernelConfig, compiled: CompiledKernel, extras: Extras, tensors: Tensors
) -> Callable[[], None]:
    """Return a call without arguments that launches compiled kernels on fixed tensors: what a benchmark times.

    Args:
        problem: of the backward phase.
        config: a config of a backward template.
        compiled: its kernels.
        extras: of the call.
        tensors: by name: q, k, v, out, do (the gradient of out), dq, dk and dv as [batch, heads, seqlen, head_dim]
            views or packed [tokens, heads, head_dim]; lse, float32 and contiguous; dlse, its gradient, where there is
            one; dbias, float32 and contiguous, where the spec asks for it, of the bias's own sizes.
    """
    bound = BackwardLaunch(
        problem=problem, config=config, compiled=compiled, extras=extras, layouts=layouts_of(tensors)
    )
    return lambda: bound(tensors, extras)


def _dense(layout: Layout4D, packed: bool) -> Layout4D:
    """Return the layout of a new contiguous tensor of these sizes; packed ones are [tokens, heads, head_dim]."""
    batch, heads, rows, dims = layout.size
    return Layout4D.of(torch.empty((rows, heads, dims) if packed else (batch, heads, rows, dims), device="meta"))
