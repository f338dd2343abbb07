"""The decode kernel for Hopper on one: random structures, any split, equal bits, graphs, and who gets it."""

from __future__ import annotations

import dataclasses
import random

import pytest
import torch

from flashgen.cli.lookup import load_registry, select_all
from flashgen.codegen import HopperDecodeConfig
from flashgen.codegen.constraints import check_config
from flashgen.launch import bind_decode, detect_target, poison_scratch
from flashgen.measure import CacheOracle, Oracle, random_decode_call
from flashgen.ops import run_decode_call
from flashgen.ops.runtime import compiled_kernel
from flashgen.spec import Problem, parse_problem
from flashgen.target import GpuTarget, named_target
from flashgen.tuning import gpu_jobs
from flashgen.tuning.gpu_cases import make_case

# A kernel that hangs blocks the process inside the driver: only another thread can end it.
pytestmark = [pytest.mark.gpu, pytest.mark.timeout(240, method="thread")]

DRAWS = 24
BASE = HopperDecodeConfig(consumers=2, block_n=128, num_warps=4, num_stages=2)
PAGES = ("page=256", "page=64", "page=16", "page=8", "", "", "")
MASKS = ("full", "causal", "sliding_window(300,0)", "sliding_window(100,7)", "causal(align=top_left)", "prefix_lm(100)")
APPENDED = ("append", "append rotary=halves", "append rotary=pairs rotary_fp32", "", "", "")
EXTRAS = ("lse", "sinks", "softcap", "alibi", "batch_idx", "score_mod('return score * 2.0')")
KNOBS: dict[str, tuple[int | str, ...]] = {
    "consumers": (1, 2, 2, 3),
    "block_n": (64, 128),
    "num_stages": (2, 3),
    "programs": (1, 1, 2),
    "pack": ("rows", "heads"),
    "queries": ("shared", "registers"),
    "turns": ("free", "alternate"),
    "convert": ("early", "late", "held"),
    "rescale": (0, 8),
    "loops": ("split", "single"),
    "release": ("mbarrier", "named"),
    "min_blocks": (1, 1, 3),
}


@pytest.fixture(scope="module")
def target() -> GpuTarget:
    found = detect_target(torch.device("cuda", torch.cuda.current_device()))
    if not found.has_wgmma:
        pytest.skip(f"the kernel is written for sm_90, this is {found.arch}")
    return found


def drawn(seed: int) -> tuple[Problem, HopperDecodeConfig]:
    """Return a random problem and a random config that is legal for it."""
    rng = random.Random(seed)
    while True:
        dims = rng.choice(("d=64", "d=128", "d=128", "d=256", "d=192 dv=128", "d=96", "d=80 dv=72", "d=32"))
        words = [dims, rng.choice(MASKS), rng.choice(("bf16", "fp16")), *rng.sample(EXTRAS, rng.choice((0, 1, 2, 4)))]
        words.append(rng.choice(APPENDED))
        words += [rng.choice(PAGES)] if "batch_idx" not in words else []
        sizes = f"b=2 hq={rng.choice((2, 8, 12))} hkv=2 sq={rng.choice((64, 100, 257))} sk={rng.choice((1000, 2049))}"
        problem = parse_problem(f"{sizes} {' '.join(words)} decode")
        numbers = {name: rng.choice(values) for name, values in KNOBS.items()}
        config = dataclasses.replace(BASE, **numbers)
        fits = problem.shape.group % config.heads_of_tile == 0
        if fits and not check_config(config, problem.spec, named_target("H200")):
            return problem, config


@pytest.mark.parametrize("seed", range(DRAWS))
def test_drawn_structures(target: GpuTarget, seed: int) -> None:
    problem, config = drawn(seed)
    # Outputs and scratch are full of NaN, rows no sequence uses too, and memory around them is guarded.
    assert gpu_jobs.check_awkward(problem, config) is None, f"{problem} {config}"
    gpu_jobs.forget_cases()


@pytest.mark.parametrize("words", ["d=128 causal bf16 lse", "d=64 sliding_window(100,0) sinks fp16 lse page=128"])
def test_any_number_of_splits(target: GpuTarget, words: str) -> None:
    problem = parse_problem(f"b=5 hq=8 hkv=2 sq=100 sk=2000 {words} decode")
    compiled = compiled_kernel(problem.spec, BASE, target)
    for splits in range(33):
        call = random_decode_call(problem, device="cuda", seed=splits, ragged=True)
        call = dataclasses.replace(call, extras=dataclasses.replace(call.extras, num_splits=splits))
        out = torch.full((5, 8, 100, problem.spec.head_dim_v), torch.nan, device="cuda", dtype=call.q.dtype)
        lse = torch.full((5, 8, 100), torch.nan, device="cuda")
        tensors = {"q": call.q, "k": call.k, "v": call.v, "out": out, "lse": lse}
        oracle = Oracle(call.q, call.k, call.v, spec=problem.spec, extras=call.extras)
        # Twice: the counters of the first launch must be back at zero.
        for _ in range(2):
            poison_scratch()
            bind_decode(problem, BASE, compiled, call.extras, tensors)()
            report = oracle.judge(out, lse)
            assert report.ok, f"{splits} splits: {report.reason}"


def test_equal_bits(target: GpuTarget) -> None:
    problem = parse_problem("b=1 hq=8 hkv=8 sq=200 sk=30000 d=128 causal bf16 lse decode")
    case = make_case(problem, device=torch.device("cuda"), seed=0, whole=False)
    for config in (BASE, dataclasses.replace(BASE, queries="registers", num_stages=3, release="named")):
        run = bind_decode(
            problem, config, compiled_kernel(problem.spec, config, target), case.extras, dict(case.tensors)
        )
        run()
        want = case.tensors["out"].clone(), case.tensors["lse"].clone()
        for _ in range(200):
            run()
            assert torch.equal(case.tensors["out"], want[0])
            assert torch.equal(case.tensors["lse"], want[1])


@pytest.mark.parametrize("words", ["", "append rotary=halves page=16"])
def test_graph_replays_with_lengths_that_change(target: GpuTarget, words: str) -> None:
    problem = parse_problem(f"b=3 hq=8 hkv=2 sq=100 sk=3000 d=128 causal bf16 lse {words} decode")
    call = random_decode_call(problem, device="cuda", seed=0)
    run_decode_call(call)
    torch.cuda.synchronize()
    used = call.extras.cache_seqlens
    assert used is not None
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out, lse = run_decode_call(call)
    room = 3000 - 100 * problem.spec.append
    for numbers in ((0, 0, 0), (room, 1, 64), (100, room - 1, 1500)):
        used.copy_(torch.tensor(numbers, dtype=torch.int32))
        oracle, caches = Oracle(call.q, call.k, call.v, spec=problem.spec, extras=call.extras), CacheOracle(call)
        graph.replay()
        report = oracle.judge(out, lse)
        assert report.ok, f"{numbers}: {report.reason}"
        assert not caches.fault()


@pytest.mark.parametrize(
    ("words", "template"),
    [
        ("sq=200", "gluon/hopper_decode"),
        ("sq=70 page=256 lse sinks", "gluon/hopper_decode"),
        ("sq=200 append", "gluon/hopper_decode"),
        ("sq=70 append rotary=pairs batch_idx lse", "gluon/hopper_decode"),
        ("sq=200 append rotary=halves page=256", "gluon/hopper_decode"),
        ("sq=200 append rotary=halves page=16", "gluon/hopper_decode"),
        ("sq=200 append page=24", "triton/decode"),
        ("sq=200 page=16 lse", "gluon/hopper_decode"),
        ("sq=200 leftpad", "triton/decode"),
        ("sq=2", "triton/decode"),
    ],
)
def test_calls_get_the_kernel_that_can_compute_them(target: GpuTarget, words: str, template: str) -> None:
    problem = parse_problem(f"b=3 hq=8 hkv=2 sk=1000 d=128 causal bf16 {words} decode")
    (chosen,) = select_all([problem], target, load_registry(None))
    assert chosen.config.template == template
    call = random_decode_call(problem, device="cuda", seed=1, ragged=True)
    oracle, caches = Oracle(call.q, call.k, call.v, spec=problem.spec, extras=call.extras), CacheOracle(call)
    report = oracle.judge(*run_decode_call(call))
    assert report.ok, report.reason
    assert not caches.fault()
