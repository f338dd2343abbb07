"""The forward kernel for Hopper on one: random structures, equal bits, no races, no access outside of its tensors."""

from __future__ import annotations

import concurrent.futures
import dataclasses
import json
import math
import multiprocessing
import os
import random
import shutil
import subprocess
import sys
import typing
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

import flashgen
from flashgen.codegen import HopperForwardConfig, KernelConfig, TritonForwardConfig, render
from flashgen.codegen.constraints import check_config
from flashgen.compile import compile_job, compile_kernel
from flashgen.launch import Operands, bind_forward, detect_target
from flashgen.measure import accuracy_error, poisoned_outputs, random_extras, random_inputs
from flashgen.spec import AttentionSpec, DType, Extras, Problem, causal, full, parse_mask, parse_problem
from flashgen.target import named_target
from flashgen.tuning.gpu_cases import Case, make_case

# A kernel that hangs blocks the process inside the driver: only another thread can end it.
pytestmark = [pytest.mark.gpu, pytest.mark.timeout(240, method="thread")]

DRAWS = 60
# The configs are legal there.
TARGET = named_target("sm_90")
ROOT = Path(__file__).parents[2]
BASE = HopperForwardConfig(consumers=2, block_n=128, num_warps=4, num_stages=2)
# Head dimension, mask: what won there.
WINNERS = {
    (64, "full"): dataclasses.replace(BASE, consumers=3, convert="held", turns="alternate", head_group=4),
    (64, "causal"): dataclasses.replace(BASE, consumers=3, tiles="overlap", head_group=8, tail_heads=16),
    (128, "full"): dataclasses.replace(BASE, queries="registers", convert="late", tiles="overlap", release="named"),
    (128, "causal"): dataclasses.replace(BASE, convert="late", release="named", head_group=8),
    (256, "full"): dataclasses.replace(
        BASE, block_n=64, convert="held", rescale=8, out_buffer="half", tiles="overlap", release="named"
    ),
    (256, "causal"): dataclasses.replace(
        BASE, block_n=64, convert="late", rescale=8, out_buffer="half", head_group=8, tail_heads=16
    ),
}
_KNOBS: dict[str, tuple[int | str, ...]] = {
    "consumers": (1, 2, 3),
    "block_n": (32, 64, 128, 128),
    "num_stages": (2, 3),
    "programs": (1, 1, 2),
    "queries": ("shared", "registers"),
    "turns": ("free", "alternate"),
    "convert": ("early", "late", "held"),
    "rescale": (0, 1, 8),
    "out_buffer": ("own", "half", "queries"),
    "diagonal": ("whole", "half"),
    "tiles": ("apart", "overlap"),
    "loops": ("split", "single"),
    "release": ("mbarrier", "named"),
    "pack": ("rows", "rows", "heads"),
    "head_group": (1, 2, 3, 16),
    "tail_heads": (0, 1, 5, 64),
}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Draw:
    """A random spec, config and shapes; `memory` says how q, k, v and out lie."""

    seed: int
    spec: AttentionSpec
    config: HopperForwardConfig
    problems: tuple[Problem, ...]
    memory: tuple[typing.Any, ...]
    scale: float | None

    def told(self, problem: Problem) -> str:
        where = f"memory of q, k, v, out: {', '.join(self.memory)}; scale {self.scale}"
        return f"draw {self.seed}: {problem}\n{self.config}\n{where}\nreplay: --draws 1 --draw-seed {self.seed}"


def draw(product: typing.Any, seed: int) -> Draw:
    """Return the call with that seed; the same on every machine."""
    rng = random.Random(f"{seed} hopper")
    dims = (16, 32, 40, 64, 64, 80, 96, 128, 128, 160, 192, 256)
    head_dim = rng.choice(dims)
    spec = dataclasses.replace(
        product.draw_spec(rng, "cuda"),
        dtype=DType(rng.choice(("fp16", "bf16"))),
        head_dim_qk=head_dim,
        head_dim_v=head_dim if rng.random() < 0.7 else rng.choice(dims),
        **{"bias": "none", "bias_aligned": True, "dropout": False, "seqused": "", "descale": False},
    )
    config = _legal_config(rng, spec)
    lengths = product.draw_lengths(rng, "cuda")
    shapes = [product.draw_shape(rng, spec, "cuda", pair) for pair in lengths]
    if config.heads_of_tile > 1:
        # All heads of a tile are of one group.
        shapes = [dataclasses.replace(shape, nheads_q=shape.nheads_q * config.heads_of_tile) for shape in shapes]
    return Draw(
        seed=seed,
        spec=spec,
        config=config,
        problems=tuple(Problem(spec=spec, shape=shape) for shape in shapes),
        memory=tuple(rng.choice(("dense", "transposed", "sliced")) for _ in range(4)),
        scale=rng.choice((None, None, None, 0.0, 0.3)),
    )


def _legal_config(rng: random.Random, spec: AttentionSpec) -> HopperForwardConfig:
    for _ in range(10000):
        numbers: dict[str, typing.Any] = {name: rng.choice(values) for name, values in _KNOBS.items()}
        config = dataclasses.replace(BASE, **numbers)
        if check_config(config, spec, TARGET):
            continue
        # What few combinations allow would hardly be drawn.
        half = dataclasses.replace(config, block_n=128, turns="free", diagonal="half")
        return half if rng.random() < 0.5 and not check_config(half, spec, TARGET) else config
    raise AssertionError(f"no config was found legal for {spec}")


@pytest.fixture(autouse=True)
def _on_hopper() -> None:
    target = detect_target(_device())
    if not target.has_wgmma:
        pytest.skip(f"the kernel needs an sm_90 GPU, this is {target.arch}")


def _device() -> torch.device:
    return torch.device("cuda", torch.cuda.current_device())


@pytest.fixture(scope="module")
def refused(product: typing.Any, request: pytest.FixtureRequest) -> dict[int, str]:
    """Compile the kernels of all collected draws side by side; return what went wrong, by seed."""
    items = (item for item in request.session.items if item.path == request.path)
    params = (getattr(getattr(item, "callspec", None), "params", {}) for item in items)
    seeds = sorted({found["draw_seed"] for found in params if "draw_seed" in found})
    target = detect_target(_device())
    # Not forked: this process holds a CUDA context and threads.
    context = multiprocessing.get_context("spawn")
    workers = max(2, min(16, len(os.sched_getaffinity(0)) - 2))
    with concurrent.futures.ProcessPoolExecutor(workers, mp_context=context) as pool:
        drawn = {seed: draw(product, seed) for seed in seeds}
        jobs = {s: pool.submit(compile_job, d.spec.structure(), d.config, target) for s, d in drawn.items()}
        failures = {seed: job.exception() for seed, job in jobs.items()}
    return {seed: f"{type(error).__name__}: {error}" for seed, error in failures.items() if error is not None}


def test_a_drawn_call(product: typing.Any, refused: dict[int, str], draw_seed: int) -> None:
    drawn = draw(product, draw_seed)
    assert draw_seed not in refused, f"{refused[draw_seed]}\n{drawn.told(drawn.problems[0])}"
    for problem in drawn.problems:
        try:
            reason = _run(product, drawn, problem)
        except Exception as error:
            raise AssertionError(drawn.told(problem)) from error
        assert not reason, f"{reason}\n{drawn.told(problem)}"


def _run(product: typing.Any, drawn: Draw, problem: Problem) -> str:
    spec, config = problem.spec, drawn.config
    (q, k, v), extras = product.spoilt_inputs(problem, drawn.memory[:3], "cuda", drawn.seed)
    if drawn.scale is not None:
        extras = dataclasses.replace(extras, softmax_scale=drawn.scale)
    out, lse = poisoned_outputs(problem, device="cuda")
    out = product.laid_out(out, drawn.memory[3])
    tensors = {"q": q, "k": k, "v": v, "out": out} | ({"lse": lse} if lse is not None else {})
    refusal = Operands.of(tensors).refusal(config, spec)
    assert refusal is None, refusal
    compiled = compile_kernel(render(spec, config), spec.structure(), config, detect_target(_device()))
    bind_forward(problem, config, compiled, extras, tensors)()
    return accuracy_error(out, lse, q, k, v, spec=spec, extras=extras).reason


def _bound(case: Case, config: KernelConfig) -> Callable[[], None]:
    spec = case.problem.spec
    compiled = compile_kernel(render(spec, config), spec.structure(), config, detect_target(_device()))
    return bind_forward(case.problem, config, compiled, case.extras, case.tensors)


@pytest.mark.parametrize("shape", ["b=2 hq=18 hkv=3 sq=1000 sk=1100", "b=1 hq=3 hkv=1 sq=130 sk=70", "b=1 h=1 s=1"])
@pytest.mark.parametrize(("head_dim", "mask"), WINNERS)
def test_same_bits_a_thousand_times(head_dim: int, mask: str, shape: str) -> None:
    _same_bits(f"{shape} d={head_dim} {mask} bf16 lse", WINNERS[head_dim, mask])


@pytest.mark.parametrize("release", ["mbarrier", "named"])
@pytest.mark.parametrize("tiles", ["apart", "overlap"])
@pytest.mark.parametrize("mask", ["causal", "sliding_window(127,0)"])
def test_queries_are_read_before_the_next_ones_come(mask: str, tiles: typing.Any, release: typing.Any) -> None:
    # The copy of a last tile of three rows is quick: what lies past the end of Q is zeros from nowhere. The first
    # consumer passes over a tile of keys, and reads its queries when the producer already waits to replace them.
    config = dataclasses.replace(BASE, block_n=64, queries="registers", tiles=tiles, release=release)
    _same_bits(f"b=50 h=2 sq=131 sk=129 d=128 {mask} bf16", config)


def _same_bits(text: str, config: KernelConfig) -> None:
    case = make_case(parse_problem(text), device=_device(), seed=0, whole=True)
    launch = _bound(case, config)
    launch()
    report = case.judge()
    assert report.ok, report.reason
    first = case.results()
    others = torch.zeros((), dtype=torch.int64, device=_device())
    for _ in range(1000):
        case.poison()
        launch()
        for name, want in zip(case.written, first, strict=True):
            bits = torch.int32 if want.dtype == torch.float32 else torch.int16
            others += (case.tensors[name].view(bits) != want.view(bits)).sum()
    assert int(others) == 0


@pytest.mark.parametrize("head_dim", [64, 128])
@pytest.mark.parametrize("lengths", [(1, 1), (113, 203), (1023, 1024), (640, 128)], ids=str)
def test_by_its_config(check: Callable[..., torch.Tensor], head_dim: int, lengths: tuple[int, int]) -> None:
    for mask in (full(), causal()):
        for layout in ("bhsd", "bshd"):
            q, k, v = random_inputs(
                parse_problem(f"b=2 hq=6 hkv=2 sq={lengths[0]} sk={lengths[1]} d={head_dim} bf16"),
                device="cuda", seed=1, layout=layout,
            )  # fmt: skip
            given = [t if layout == "bhsd" else t.transpose(1, 2) for t in (q, k, v)]
            check(*given, mask, layout=layout, config=WINNERS[head_dim, str(mask)])


@pytest.mark.parametrize("mask", ["full", "causal"])
def test_graphs_give_the_same_bits(mask: str) -> None:
    problem = parse_problem(f"b=2 hq=8 hkv=2 sq=700 sk=900 d=128 {mask} bf16 lse")
    q, k, v = random_inputs(problem, device="cuda", seed=0)

    def call() -> tuple[torch.Tensor, torch.Tensor]:
        return flashgen.attention(q, k, v, mask=problem.spec.mask, return_lse=True, config=WINNERS[128, mask])

    want, want_lse = call()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out, lse = call()
    for _ in range(100):
        out.fill_(math.nan)
        lse.fill_(math.nan)
        graph.replay()
        assert torch.equal(out, want)
        assert torch.equal(lse, want_lse)


# Neighbours of sequences, and sequences of nothing.

LENGTHS_Q = (0, 300, 0, 1, 65, 0)
LENGTHS_K = (7, 333, 0, 0, 200, 64)


@pytest.mark.parametrize("tiles", ["apart", "overlap"])
@pytest.mark.parametrize("mask", ["full", "causal", "sliding_window(60,10)", "document", "causal&chunked(100)"])
def test_empty_sequences_and_neighbours(mask: str, tiles: typing.Any) -> None:
    config = dataclasses.replace(BASE, block_n=64, tiles=tiles)
    spec = dataclasses.replace(parse_problem("h=1 s=1 d=64 dv=80 bf16 varlen lse").spec, mask=parse_mask(mask))
    shape = dataclasses.replace(
        parse_problem("b=6 hq=6 hkv=2 sq=300 sk=333 d=64").shape, seqlen_q=max(LENGTHS_Q), seqlen_k=max(LENGTHS_K)
    )
    problem = Problem(spec=spec, shape=shape)
    extras = _packed_extras(problem)
    q = torch.randn(sum(LENGTHS_Q), 6, 64, device="cuda", dtype=torch.bfloat16)
    k = torch.randn(sum(LENGTHS_K), 2, 64, device="cuda", dtype=torch.bfloat16)
    v = torch.randn(sum(LENGTHS_K), 2, 80, device="cuda", dtype=torch.bfloat16)
    compiled = compile_kernel(render(spec, config), spec.structure(), config, detect_target(_device()))

    def run(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        out = torch.full((len(q), 6, 80), math.nan, device="cuda", dtype=torch.bfloat16)
        lse = torch.full((6, len(q)), math.nan, device="cuda")
        bind_forward(problem, config, compiled, extras, {"q": q, "k": k, "v": v, "out": out, "lse": lse})()
        return out, lse

    clean, clean_lse = run(q, k, v)
    report = accuracy_error(clean, clean_lse, q, k, v, spec=spec, extras=extras)
    assert report.ok, report.reason
    assert extras.cu_seqlens_q is not None
    assert extras.cu_seqlens_k is not None
    starts_q, starts_k = extras.cu_seqlens_q.tolist(), extras.cu_seqlens_k.tolist()
    # What one sequence holds never reaches another.
    for broken in (1, 4):
        bad = [t.clone() for t in (q, k, v)]
        for t, starts in zip(bad, (starts_q, starts_k, starts_k), strict=True):
            t[starts[broken] : starts[broken + 1]] = math.nan
        out, lse = run(*bad)
        others = torch.ones(len(out), dtype=torch.bool, device="cuda")
        others[starts_q[broken] : starts_q[broken + 1]] = False
        assert torch.equal(out[others], clean[others])
        assert torch.equal(lse[:, others], clean_lse[:, others])
        assert out[~others].isnan().any()


def _packed_extras(problem: Problem) -> Extras:
    """Return extras of the lengths above."""
    starts = [
        torch.tensor([sum(lengths[:i]) for i in range(len(lengths) + 1)], dtype=torch.int32, device="cuda")
        for lengths in (LENGTHS_Q, LENGTHS_K)
    ]
    extras = random_extras(problem, device="cuda", seed=0)
    return dataclasses.replace(extras, cu_seqlens_q=starts[0], cu_seqlens_k=starts[1])


# Sanitizers, each in a process of its own.

ONE = dataclasses.replace(BASE, consumers=1, block_n=32)
TWO = dataclasses.replace(BASE, block_n=32)
RACES = {
    "one consumer": ("b=1 h=2 s=200 d=32 bf16", ONE, ""),
    # Read before they have come: what the sanitizer must find.
    "planted in keys": ("b=1 h=2 s=200 d=32 bf16", ONE, "wait(k_full.index(stage), step // NUM_STAGES & 1)"),
    "planted in values": ("b=1 h=2 s=200 d=32 bf16", ONE, "wait(v_full.index(before), (step - 1) // NUM_STAGES & 1)"),
    "two consumers": ("b=1 h=1 s=70 d=32 causal bf16", TWO, ""),
}


def _run_apart(
    command: list[str], arguments: tuple[str, KernelConfig, str], folder: Path, **variables: str
) -> subprocess.CompletedProcess[str]:
    text, config, dropped = arguments
    path = os.pathsep.join(filter(None, [os.environ.get("PYTHONPATH"), str(ROOT)]))
    script = [sys.executable, str(Path(__file__).with_name("run_kernel.py")), text, json.dumps(config.as_dict())]
    environment = {**os.environ, "PYTHONPATH": path, "TRITON_CACHE_DIR": str(folder), **variables}
    return subprocess.run(
        [*command, *script, *([dropped] if dropped else [])],
        env=environment, capture_output=True, text=True, timeout=400, check=False,
    )  # fmt: skip


@pytest.mark.timeout(450, method="thread")
@pytest.mark.parametrize("name", RACES)
def test_no_races(name: str, tmp_path: Path) -> None:
    # Triton's concurrency sanitizer: it asserts on the device that nothing is read before it has come, nor overwritten
    # while it is read. Its kernels take the assembler a minute.
    result = _run_apart([], RACES[name], tmp_path, TRITON_INSTRUMENTATION_MODE="consan")
    told = result.stdout[-2000:] + result.stderr[-4000:]
    if "instrumented False" in result.stdout:
        pytest.skip("this Triton takes no sanitizer from TRITON_INSTRUMENTATION_MODE: kernels come out as without it")
    assert "instrumented True" in result.stdout, told
    if name.startswith("planted"):
        assert result.returncode != 0, told
    else:
        assert result.returncode == 0, told
        assert "right" in result.stdout, told


TEMPLATES: tuple[KernelConfig, ...] = (
    WINNERS[128, "causal"],
    TritonForwardConfig(block_m=64, block_n=64, num_warps=4, num_stages=2, loads="descriptor"),
)


@pytest.mark.timeout(450, method="thread")
@pytest.mark.skipif(shutil.which("compute-sanitizer") is None, reason="compute-sanitizer is not on PATH")
@pytest.mark.parametrize("config", TEMPLATES, ids=lambda config: config.template)
def test_no_access_outside_of_tensors(config: KernelConfig, tmp_path: Path) -> None:
    command = ["compute-sanitizer", "--tool=memcheck", "--error-exitcode=7", "--target-processes=all"]
    result = _run_apart(command, ("b=2 hq=6 hkv=2 sq=333 sk=400 d=128 causal bf16 lse", config, ""), tmp_path)
    assert result.returncode == 0, result.stdout[-4000:] + result.stderr[-2000:]
    assert "right" in result.stdout
