"""Random calls of the backward kernels, drawn and replayed as those of `product`.

PYTHONPATH=tests python -c "import backward_product; backward_product.replay(17, 'cpu')"
"""

from __future__ import annotations

import contextlib
import dataclasses
import math
import random
import typing
from collections.abc import Callable, Iterator
from unittest import mock

import product
import torch

from flashgen.codegen import TritonBackwardConfig, render
from flashgen.codegen.constraints import check_config
from flashgen.compile import CompiledKernel, compile_job, compile_kernel
from flashgen.heuristics import safe_configs
from flashgen.launch import bind_backward, detect_target, interpret_backward
from flashgen.measure import (
    GradientOracle,
    Gradients,
    attention_reference,
    poisoned_empty,
    random_lse_gradients,
    random_output_gradients,
)
from flashgen.measure.entries import batch_entries
from flashgen.measure.gradients import bias_sizes
from flashgen.ops import run_problem
from flashgen.spec import AttentionSpec, DType, Extras, Problem, Shape
from flashgen.target import GpuTarget

Tensors = dict[str, torch.Tensor]


@dataclasses.dataclass(frozen=True, kw_only=True)
class BackwardDraw:
    """One call of the backward kernels, at several lengths; see `product.Draw`.

    Attributes:
        memory: how q, k and v lie in memory; out and its gradient lie like q.
        dlse: whether lse has a gradient.
    """

    seed: int
    where: product.Where
    spec: AttentionSpec
    config: TritonBackwardConfig
    shapes: tuple[Shape, ...]
    memory: tuple[product.Memory, product.Memory, product.Memory]
    dlse: bool

    @property
    def problems(self) -> tuple[Problem, ...]:
        return tuple(Problem(spec=self.spec, shape=shape) for shape in self.shapes)

    def told(self, problem: Problem) -> str:
        """Return what the call was, and how to make it again."""
        call = f"import backward_product; backward_product.replay({self.seed}, '{self.where}')"
        return (
            f"draw {self.seed}: {problem}{' with dlse' * self.dlse}\n{self.config}\n"
            f'memory of q, k, v: {", ".join(self.memory)}\nreplay: PYTHONPATH=tests python -c "{call}"'
        )


def draw(seed: int, where: product.Where) -> BackwardDraw:
    """Return the call with that seed."""
    rng = random.Random(f"{seed} {where} backward")
    spec = _spec(rng, where)
    memory = product.draw_memory(rng, spec)
    config = _config(rng, spec, memory, where)
    shapes = tuple(product.draw_shape(rng, spec, where, lengths) for lengths in product.draw_lengths(rng, where))
    dlse = rng.random() < 0.5
    return BackwardDraw(seed=seed, where=where, spec=spec, config=config, shapes=shapes, memory=memory, dlse=dlse)


def _spec(rng: random.Random, where: product.Where) -> AttentionSpec:
    while True:
        spec = product.draw_spec(rng, where)
        if spec.dtype is not DType.FP8 and max(spec.head_dim_qk, spec.head_dim_v) <= 256:
            dbias = spec.bias in ("input", "fp32") and rng.random() < 0.7
            return spec.backward(deterministic=rng.random() < 0.2, dbias=dbias)


def _config(
    rng: random.Random, spec: AttentionSpec, memory: tuple[product.Memory, ...], where: product.Where
) -> TritonBackwardConfig:
    expanded = any(word in ("one-head", "one-entry") for word in memory)
    # As likely as the rest, where the mask allows it.
    dqs: list[typing.Literal["kernel", "atomic", "ordered"]] = ["kernel", "atomic", "ordered"]
    for _ in range(5000):
        dq = rng.choice(dqs)
        own = {
            "block_m2": rng.choice((16, 32, 64, 128)),
            "block_n2": rng.choice((16, 32, 64)),
            "num_warps2": rng.choice((1, 2, 4, 8)),
            "num_stages2": rng.choice((1, 2, 3)),
        }
        config = TritonBackwardConfig(
            block_m1=rng.choice((16, 32, 64)),
            block_n1=rng.choice((16, 32, 64, 128)),
            num_warps=rng.choice((1, 2, 4, 8)),
            num_stages=rng.choice((1, 2, 3)),
            dq=dq,
            loads="pointer" if expanded else rng.choice(("pointer", "descriptor")),
            head_group=rng.choice((1, 2, 3, 16)),
            loops=rng.choice(("split", "single")),
            **(own if dq == "kernel" else {}),
        )
        if where == "cuda" and _compiles_for_long(config, spec):
            continue
        if not check_config(config, spec, product.TARGET):
            return config
    raise AssertionError(f"no config was found legal for {spec}")


def _compiles_for_long(config: TritonBackwardConfig, spec: AttentionSpec) -> bool:
    """Return whether a thread has thousands of products to unroll, as float32's are."""
    tiles = [(config.block_m1 * config.block_n1, config.num_warps)]
    if config.dq == "kernel":
        tiles.append((config.block_m2 * config.block_n2, config.num_warps2))
    products = max(tile * (spec.head_dim_qk + spec.head_dim_v) // (32 * warps) for tile, warps in tiles)
    return spec.dtype is DType.FP32 and products > 2048


def call_of(
    problem: Problem, memory: tuple[product.Memory, product.Memory, product.Memory], device: product.Where, seed: int
) -> tuple[Tensors, Extras]:
    """Return the tensors of a call by name, as `bind_backward` takes them, but for dq, dk and dv; and the extras.

    There is NaN in all rows that the call does not use, and in the gradient of lse where that is -inf. out and its
    gradient lie in memory like q.
    """
    (q, k, v), extras = product.spoilt_inputs(problem, memory, device, seed)
    spec, shape = problem.spec, problem.shape
    exact, exact_lse = attention_reference(q, k, v, spec=spec.forward(), extras=extras, precision="float64")
    assert exact_lse is not None
    lse = exact_lse.float().contiguous()
    out, do = (
        product.laid_out(t, memory[0] if memory[0] in ("dense", "transposed", "sliced") else "dense")
        for t in (exact.to(q.dtype), random_output_gradients(problem, device=device, seed=seed))
    )
    dlse = random_lse_gradients(problem, device=device, seed=seed).masked_fill_(lse == -math.inf, math.nan)
    for entry in batch_entries(spec, extras, batch=shape.batch, seqlen_q=shape.seqlen_q, seqlen_k=shape.seqlen_k):
        for rows in (entry.queries(out), entry.queries(do), entry.statistics(lse), entry.statistics(dlse)):
            rows[:, entry.seqlen_q :] = math.nan
    given = {"q": q, "k": k, "v": v, "out": out, "do": do, "lse": lse, "dlse": dlse}
    if spec.dbias:
        assert extras.bias is not None
        given["dbias"] = poisoned_empty(bias_sizes(extras.bias), torch.float32, device)
    return given, extras


def judge(problem: Problem, given: Tensors, extras: Extras, got: Tensors) -> str:
    """Return what is wrong with gradients by name, empty if nothing is."""
    q, k, v = (given[name] for name in "qkv")
    oracle = GradientOracle(q, k, v, given["do"], spec=problem.spec, extras=extras, dlse=given.get("dlse"))
    gradients = Gradients(dq=got["dq"], dk=got["dk"], dv=got["dv"], dbias=got.get("dbias"))
    return oracle.judge(gradients).reason


@contextlib.contextmanager
def poisoned() -> Iterator[None]:
    """Make every new tensor of floats NaN: outputs and scratch that a kernel leaves as they are fail."""

    def spoilt(make: Callable[..., torch.Tensor]) -> Callable[..., torch.Tensor]:
        def made(*args: object, **kwargs: object) -> torch.Tensor:
            tensor = make(*args, **kwargs)
            return tensor.fill_(math.nan) if tensor.is_floating_point() and not tensor.is_meta else tensor

        return made

    with (
        mock.patch("torch.empty", spoilt(torch.empty)),
        mock.patch("torch.empty_like", spoilt(torch.empty_like)),
        mock.patch("torch.Tensor.new_empty", spoilt(torch.Tensor.new_empty)),
    ):
        yield


def interpreted(problem: Problem, config: TritonBackwardConfig, given: Tensors, extras: Extras) -> Tensors:
    """Return the gradients of a call by name, from the interpreter, where nothing new is clean."""
    with poisoned():
        return interpret_backward(given, problem=problem, config=config, extras=extras)


def run_interpreted(drawn: BackwardDraw, problem: Problem) -> str:
    """Run a call in the interpreter; return what is wrong with its result, empty if nothing is."""
    given, extras = _call(drawn, problem)
    return judge(problem, given, extras, interpreted(problem, drawn.config, given, extras))


def _call(drawn: BackwardDraw, problem: Problem) -> tuple[Tensors, Extras]:
    given, extras = call_of(problem, drawn.memory, drawn.where, drawn.seed)
    if not drawn.dlse:
        del given["dlse"]
    return given, extras


def run_on_gpu(drawn: BackwardDraw, problem: Problem) -> str:
    """Run a call on the current GPU; return what is wrong with its result, empty if nothing is."""
    spec = problem.spec
    given, extras = _call(drawn, problem)
    if spec.dtype is DType.TF32:
        # Its operands are cut: lse must be that of scores cut alike, as it is in training.
        forward = dataclasses.replace(problem, spec=spec.forward())
        given["out"], lse = run_problem(given["q"], given["k"], given["v"], forward, extras)
        assert lse is not None
        given["lse"] = lse
    # As the caller of a "bshd" layout has them, every other time.
    how: product.Memory = "transposed" if drawn.seed % 2 else "dense"
    names = ("dq", "dk", "dv")
    given |= {name: product.laid_out(t, how) for name, t in zip(names, _outputs(given), strict=True)}
    target = detect_target(torch.device("cuda", torch.cuda.current_device()))
    config, compiled = _that_fits(drawn, target)
    with poisoned():
        call = bind_backward(problem, config, compiled, extras, given)
        call()
        first = {name: given[name].clone() for name in names}
        call()
    if config.dq != "atomic" and not all(torch.equal(first[name], given[name]) for name in names):
        return f"gradients differ from one run to the next with dq={config.dq}"
    return judge(problem, given, extras, {name: given[name] for name in (*names, "dbias") if name in given})


def _that_fits(drawn: BackwardDraw, target: GpuTarget) -> tuple[TritonBackwardConfig, CompiledKernel]:
    """Return the drawn config, or the first safe one, whose kernels find shared memory enough; Triton alone knows."""
    for config in (drawn.config, *safe_configs("backward")):
        assert isinstance(config, TritonBackwardConfig)
        if check_config(config, drawn.spec, target):
            continue
        compiled = compile_kernel(render(drawn.spec, config), drawn.spec.structure(), config, target)
        if compiled.resources.smem_bytes <= target.smem_bytes:
            return config, compiled
    raise AssertionError(f"no config fits {target} for {drawn.spec}")


def _outputs(given: Tensors) -> list[torch.Tensor]:
    return [poisoned_empty(tuple(given[name].shape), given[name].dtype, given[name].device) for name in "qkv"]


def prepare(seed: int) -> str:
    """Compile what a call needs on the current GPU into Triton's disk cache; return what went wrong, or nothing."""
    drawn = draw(seed, "cuda")
    try:
        target = detect_target(torch.device("cuda", torch.cuda.current_device()))
        compile_job(drawn.spec.structure(), drawn.config, target)
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    return ""


def replay(seed: int, where: product.Where) -> None:
    """Run the call with that seed and print what it is and how it went."""
    drawn = draw(seed, where)
    for problem in drawn.problems:
        reason = run_interpreted(drawn, problem) if where == "cpu" else run_on_gpu(drawn, problem)
        print(drawn.told(problem), reason or "ok", sep="\n")
