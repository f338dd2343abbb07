"""A problem on the GPU: what its kernels read and write, and the right answer, made once for all candidates."""

from __future__ import annotations

import collections.abc
import dataclasses
import functools

import torch
from torch import Tensor

from flashgen.codegen import render
from flashgen.codegen.constraints import check_config
from flashgen.compile import compile_kernel
from flashgen.errors import FlashgenError
from flashgen.heuristics import default_configs
from flashgen.launch import bind_forward, detect_target, poison_scratch
from flashgen.measure import (
    POISON,
    AccuracyReport,
    CacheOracle,
    DecodeCall,
    GradientOracle,
    Gradients,
    Oracle,
    attention_reference,
    poisoned_gradients,
    poisoned_outputs,
    random_decode_call,
    random_extras,
    random_inputs,
    random_lse_gradients,
    random_output_gradients,
    sampled_heads,
)
from flashgen.measure.decode_reference import cache_places
from flashgen.measure.gradients import bias_sizes
from flashgen.measure.graph_clock import rotation_size
from flashgen.spec import Extras, Problem
from flashgen.tuning.guarded import Guarded, bit_sums

# (batch entry, head) pairs that a large problem is judged by; of gradients key/value heads, with all of their groups.
_CHECKED_HEADS = 3
_CHECKED_GROUPS = 2


@dataclasses.dataclass(frozen=True, kw_only=True)
class Case:
    """One problem with its tensors.

    Attributes:
        problem: of any phase.
        extras: of its calls.
        tensors: by name, as `bind_forward`, `bind_backward` or `bind_decode` takes them.
        written: the names of those that kernels fill.
        judge: returns how far off what they hold is; the references are made at its first call.
        guards: the memory of those that kernels fill, by name.
        read: what kernels only read.
        calls: of decoding, calls with a cache of their own each: enough that the L2 cache of a GPU holds none of them
            when its turn comes. The first is that of `tensors`.
    """

    problem: Problem
    extras: Extras
    tensors: dict[str, Tensor]
    written: tuple[str, ...]
    judge: collections.abc.Callable[[], AccuracyReport]
    guards: dict[str, Guarded]
    read: tuple[Tensor, ...]
    calls: tuple[DecodeCall, ...] = ()

    @functools.cached_property
    def _sums_of_read(self) -> list[int]:
        return bit_sums(self.read)

    def poison(self) -> None:
        """Fill with NaN what kernels are to fill, and what they leave for themselves."""
        assert self._sums_of_read is not None
        for name in self.written:
            self.tensors[name].fill_(POISON)
        poison_scratch()
        if self.problem.spec.append:
            _spoil_appended(self.calls[0])

    def stray(self) -> str:
        """Return what kernels have written where nothing is theirs, or nothing; what it says leaves no case sound."""
        for name, guard in self.guards.items():
            if not guard.is_intact():
                return f"memory outside of {name} was written"
        return "" if bit_sums(self.read) == self._sums_of_read else "an input was written"

    def hole(self) -> str:
        """Return what of all that kernels are to fill is not a number, or nothing."""
        holes = {name: int(self.tensors[name].isnan().sum()) for name in self.written}
        found = (
            f"{count} of {self.tensors[name].numel()} elements of {name}" for name, count in holes.items() if count
        )
        return next((f"{words} are not written, or NaN" for words in found), "")

    def in_turn(self) -> tuple[Case, ...]:
        """Return the case once for each of the calls, in whose turn its inputs come from memory."""
        turns = ({**self.tensors, "k": call.k, "v": call.v} for call in self.calls)
        return tuple(dataclasses.replace(self, tensors=tensors) for tensors in turns) or (self,)

    def results(self) -> list[Tensor]:
        """Return copies of what kernels have filled."""
        return [self.tensors[name].clone() for name in self.written]


def make_case(problem: Problem, *, device: torch.device, seed: int, whole: bool) -> Case:
    """Return a case of random inputs.

    Args:
        problem: of any phase.
        device: a GPU.
        seed: of the inputs.
        whole: judge every head, and give lse a gradient, too: for small problems, and caches lengths of their own. Else
            a sample of the heads is judged, and what gradients need of the forward pass comes from a kernel, which is
            checked.
    """
    if problem.spec.phase == "decode":
        return _decode_case(problem, device, seed, whole)
    inputs = dict(zip("qkv", random_inputs(problem, device=device, seed=seed), strict=True))
    if whole:
        inputs = _spread(inputs)
    extras = random_extras(problem, device=device, seed=seed)
    make = _backward_case if problem.spec.phase == "backward" else _forward_case
    return make(problem, inputs, extras, seed, whole)


def _forward_case(problem: Problem, inputs: dict[str, Tensor], extras: Extras, seed: int, whole: bool) -> Case:
    sizes = dict(zip(("out", "lse"), poisoned_outputs(problem, device="meta"), strict=True))
    given = {name: tensor for name, tensor in sizes.items() if tensor is not None}
    guards = _guards(given, inputs["q"].device, whole)
    written = {name: guard.tensor for name, guard in guards.items()}
    oracle = functools.cache(lambda: _forward_oracle(problem, inputs, extras, None if whole else _CHECKED_HEADS))
    return Case(
        problem=problem,
        extras=extras,
        tensors={**inputs, **written},
        written=tuple(written),
        judge=lambda: oracle().judge(written["out"], written.get("lse")),
        guards=guards,
        read=_all_read(inputs, extras),
    )


def _forward_oracle(problem: Problem, inputs: dict[str, Tensor], extras: Extras, limit: int | None) -> Oracle:
    shape = problem.shape
    heads = None if limit is None else sampled_heads(shape.batch, shape.nheads_q, limit, seed=0)
    return Oracle(inputs["q"], inputs["k"], inputs["v"], spec=problem.spec, extras=extras, heads=heads)


def _backward_case(problem: Problem, inputs: dict[str, Tensor], extras: Extras, seed: int, whole: bool) -> Case:
    q, k, v = inputs.values()
    spec, shape, device = problem.spec, problem.shape, q.device
    dout = random_output_gradients(problem, device=device, seed=seed)
    dlse = random_lse_gradients(problem, device=device, seed=seed) if whole else None
    forward = Problem(spec=spec.forward(), shape=shape)
    out, lse = _exact_forward(forward, inputs, extras) if whole else _launched_forward(forward, inputs, extras)
    sizes = dict(zip(("dq", "dk", "dv"), poisoned_gradients(problem, device="meta"), strict=True))
    if spec.dbias and extras.bias is not None:
        sizes["dbias"] = torch.empty(bias_sizes(extras.bias), device="meta")
    guards = _guards(sizes, device, whole)
    written = {name: guard.tensor for name, guard in guards.items()}
    heads = None if whole else sampled_heads(shape.batch, shape.nheads_kv, _CHECKED_GROUPS, seed=0)
    oracle = functools.cache(
        lambda: GradientOracle(q, k, v, dout, spec=spec, extras=extras, dlse=dlse, heads=heads),
    )
    given = {"out": out, "do": dout}
    # lse and its gradient have no strides of their own.
    read = {**inputs, **(_spread(given, first_gap=len(inputs) + 1) if whole else given), "lse": lse}
    if dlse is not None:
        read["dlse"] = dlse
    return Case(
        problem=problem,
        extras=extras,
        tensors={**read, **written},
        written=tuple(written),
        judge=lambda: oracle().judge(Gradients(**written)),
        guards=guards,
        read=_all_read(read, extras),
    )


def _decode_case(problem: Problem, device: torch.device, seed: int, whole: bool) -> Case:
    spec, shape = problem.spec, problem.shape
    call = random_decode_call(problem, device=device, seed=seed, ragged=whole)
    call = _spread_call(call) if whole else call
    sizes = dict(zip(("out", "lse"), poisoned_outputs(problem, device="meta"), strict=True))
    guards = _guards({name: tensor for name, tensor in sizes.items() if tensor is not None}, device, whole)
    written = {name: guard.tensor for name, guard in guards.items()}
    heads = None if whole else sampled_heads(shape.batch, shape.nheads_q, _CHECKED_HEADS, seed=0)
    oracle = functools.cache(lambda: Oracle(call.q, call.k, call.v, spec=spec, extras=call.extras, heads=heads))
    # Before anything is appended; where nothing is, the caches are inputs like others.
    caches = CacheOracle(call) if spec.append else None
    if spec.append:
        oracle()

    def judge() -> AccuracyReport:
        report = oracle().judge(written["out"], written.get("lse"))
        fault = caches.fault() if caches is not None and report.ok else ""
        return dataclasses.replace(report, ok=False, reason=fault) if fault else report

    count = 1 if whole or device.type != "cuda" else rotation_size(problem.min_bytes(), device)
    return Case(
        problem=problem,
        extras=call.extras,
        tensors={"q": call.q, "k": call.k, "v": call.v, **written},
        written=tuple(written),
        judge=judge,
        guards=guards,
        read=_all_read({"q": call.q} if spec.append else {"q": call.q, "k": call.k, "v": call.v}, call.extras),
        calls=call.copies(count),
    )


def _spread_call(call: DecodeCall) -> DecodeCall:
    """Return the call with gaps of NaN in its tensors, as `_spread`; V that is shared stays part of K."""
    shared = call.problem.spec.shared_kv
    tensors = _spread({"q": call.q, "k": call.k} if shared else {"q": call.q, "k": call.k, "v": call.v})
    v = tensors["k"][..., : call.v.shape[3]] if shared else tensors["v"]
    return dataclasses.replace(call, q=tensors["q"], k=tensors["k"], v=v)


def _spoil_appended(call: DecodeCall) -> None:
    """Fill the rows of the caches with NaN that are appended."""
    spec, extras = call.problem.spec, call.extras
    assert extras.cache_seqlens is not None
    assert extras.k_new is not None
    for b, seqlen in enumerate(extras.cache_seqlens.tolist()):
        places = cache_places(b, seqlen, seqlen + extras.k_new.shape[2], call.k, spec, extras)
        for cache in (call.k, call.v):
            cache[places.entry, :, places.row] = POISON


def _spread(tensors: dict[str, Tensor], first_gap: int = 1) -> dict[str, Tensor]:
    """Return copies with gaps of NaN in memory, each with strides of its own: a stride taken for another shows."""
    return {
        name: Guarded.copy_of(tensor, gap=gap).tensor for gap, (name, tensor) in enumerate(tensors.items(), first_gap)
    }


def _guards(sizes: dict[str, Tensor], device: torch.device, whole: bool) -> dict[str, Guarded]:
    """Return guarded tensors of these sizes; those of small problems, but for dense lse and dbias, with gaps."""
    gaps = {name: gap for gap, name in enumerate(("dq", "dk", "dv", "out"), 2)} if whole else {}
    return {name: Guarded.like(size, device=device, gap=gaps.get(name, 0)) for name, size in sizes.items()}


def _all_read(tensors: dict[str, Tensor], extras: Extras) -> tuple[Tensor, ...]:
    given = (getattr(extras, field.name) for field in dataclasses.fields(extras))
    return (*tensors.values(), *(t for t in given if isinstance(t, Tensor)), *extras.captures)


def _exact_forward(problem: Problem, inputs: dict[str, Tensor], extras: Extras) -> tuple[Tensor, Tensor]:
    """Return out and lse of the reference: the errors of gradients are then those of their own kernels."""
    q, k, v = inputs.values()
    out, lse = attention_reference(q, k, v, spec=problem.spec, extras=extras, precision="float64")
    return out.to(q.dtype), lse.float().contiguous()


def _launched_forward(problem: Problem, inputs: dict[str, Tensor], extras: Extras) -> tuple[Tensor, Tensor]:
    """Return out and lse of the first default config that computes them right.

    Raises:
        FlashgenError: if none does.
    """
    spec, device = problem.spec, inputs["q"].device
    target = detect_target(device)
    oracle = _forward_oracle(problem, inputs, extras, _CHECKED_HEADS)
    out, lse = poisoned_outputs(problem, device=device)
    assert lse is not None
    reasons: list[str] = []
    for config in default_configs(problem, target):
        if check_config(config, spec, target):
            continue
        try:
            compiled = compile_kernel(render(spec, config), spec, config, target)
            bind_forward(problem, config, compiled, extras, {**inputs, "out": out, "lse": lse})()
        except FlashgenError as error:
            reasons.append(f"{config}: {error}")
            continue
        report = oracle.judge(out, lse)
        if report.ok:
            return out, lse
        reasons.append(f"{config}: {report.reason}")
    raise FlashgenError(f"gradients need the forward pass, which no default config computes: {'; '.join(reasons)}")
