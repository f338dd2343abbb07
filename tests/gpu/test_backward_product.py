"""Random calls of the backward kernels on a GPU; `--draws N --draw-seed S` draws others."""

from __future__ import annotations

import concurrent.futures
import multiprocessing
import os
import typing
from pathlib import Path

import pytest
import torch

from flashgen.codegen import TritonBackwardConfig, render
from flashgen.codegen.config import QueryGradient
from flashgen.codegen.constraints import check_config
from flashgen.codegen.kernel_config import Loads
from flashgen.compile import compile_kernel
from flashgen.launch import bind_backward, detect_target
from flashgen.spec import parse_problem

# A kernel that hangs blocks the process inside the driver: only another thread can end it.
pytestmark = [pytest.mark.gpu, pytest.mark.timeout(240, method="thread")]

DRAWS = 120


@pytest.fixture(scope="module")
def refused(backward_product: typing.Any, request: pytest.FixtureRequest) -> dict[int, str]:
    """Compile the kernels of all collected draws side by side; return what went wrong, by seed."""
    seeds = {item.callspec.params["draw_seed"] for item in request.session.items if _draws_here(item, request)}
    legal = [seed for seed in sorted(seeds) if not _illegal(backward_product.draw(seed, "cuda"))]
    # Not forked: this process holds a CUDA context and threads. The others are told where the module is.
    context = multiprocessing.get_context("spawn")
    workers = max(2, min(16, len(os.sched_getaffinity(0)) - 2))
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(Path(backward_product.__file__).parent))
        with concurrent.futures.ProcessPoolExecutor(workers, mp_context=context) as pool:
            failures = list(pool.map(backward_product.prepare, legal))
    return {seed: failure for seed, failure in zip(legal, failures, strict=True) if failure}


def _illegal(drawn: typing.Any) -> str:
    target = detect_target(torch.device("cuda", torch.cuda.current_device()))
    return "; ".join(check_config(drawn.config, drawn.spec, target))


def _draws_here(item: pytest.Item, request: pytest.FixtureRequest) -> bool:
    return item.path == request.path and "draw_seed" in getattr(getattr(item, "callspec", None), "params", {})


def test_a_drawn_call(backward_product: typing.Any, refused: dict[int, str], draw_seed: int) -> None:
    drawn = backward_product.draw(draw_seed, "cuda")
    if _illegal(drawn):
        pytest.skip(f"its config is illegal on this GPU: {_illegal(drawn)}")
    assert draw_seed not in refused, f"{refused[draw_seed]}\n{drawn.told(drawn.problems[0])}"
    for problem in drawn.problems:
        try:
            reason = backward_product.run_on_gpu(drawn, problem)
        except Exception as error:
            raise AssertionError(drawn.told(problem)) from error
        assert not reason, f"{reason}\n{drawn.told(problem)}"


def config_of(dq: QueryGradient, loads: Loads = "pointer") -> TritonBackwardConfig:
    own = {"block_m2": 64, "block_n2": 64, "num_warps2": 4, "num_stages2": 2} if dq == "kernel" else {}
    return TritonBackwardConfig(block_m1=64, block_n1=64, num_warps=4, num_stages=2, dq=dq, loads=loads, **own)


@pytest.mark.parametrize("loads", ["pointer", "descriptor"])
@pytest.mark.parametrize("dq", ["kernel", "ordered"])
@pytest.mark.parametrize("words", ["causal", "full dropout", "causal bias=fp32 dbias"])
def test_the_same_bits_every_time(backward_product: typing.Any, words: str, dq: QueryGradient, loads: Loads) -> None:
    # Many more programs than a GPU has room for at once, so that they come in another order each time.
    target = detect_target(torch.device("cuda", torch.cuda.current_device()))
    problem = parse_problem(f"b=2 hq=16 hkv=8 s=1500 d=64 bf16 {words} backward deterministic")
    spec, config = problem.spec, config_of(dq, loads)
    illegal = check_config(config, spec, target)
    if illegal:
        pytest.skip(f"illegal on {target.arch}: {illegal[0]}")
    compiled = compile_kernel(render(spec, config), spec.structure(), config, target)
    given, extras = backward_product.call_of(problem, ("dense",) * 3, "cuda", 0)
    given |= {f"d{name}": torch.empty_like(given[name]) for name in "qkv"}
    call = bind_backward(problem, config, compiled, extras, given)
    names = ("dq", "dk", "dv", *(("dbias",) if spec.dbias else ()))
    call()
    first = {name: given[name].clone() for name in names}
    assert not backward_product.judge(problem, given, extras, first)
    for _ in range(20):
        call()
        assert all(torch.equal(first[name], given[name]) for name in names)


@pytest.mark.parametrize("dq", ["kernel", "atomic", "ordered"])
@pytest.mark.parametrize("mask", ["full", "causal", "sliding_window(60,10)", "document"])
def test_a_packed_sequence_does_not_reach_its_neighbours(
    backward_product: typing.Any, mask: str, dq: QueryGradient
) -> None:
    target = detect_target(torch.device("cuda", torch.cuda.current_device()))
    problem = parse_problem(f"b=3 hq=4 hkv=2 sq=300 sk=333 d=64 dv=80 bf16 varlen {mask} backward")
    spec, config = problem.spec, config_of(dq)
    illegal = check_config(config, spec, target)
    if illegal:
        pytest.skip(f"illegal: {illegal[0]}")
    compiled = compile_kernel(render(spec, config), spec.structure(), config, target)
    given, extras = backward_product.call_of(problem, ("dense",) * 3, "cuda", 0)
    starts = {"q": extras.cu_seqlens_q.tolist(), "k": extras.cu_seqlens_k.tolist()}
    sides = {"q": "q", "do": "q", "out": "q", "k": "k", "v": "k"}

    def run(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        made = {f"d{name}": torch.full_like(tensors[name], float("nan")) for name in "qkv"}
        bind_backward(problem, config, compiled, extras, tensors | made)()
        return made

    clean = run(given)
    assert not backward_product.judge(problem, given, extras, clean)
    for broken in range(3):
        bad = {name: t.clone() for name, t in given.items()}
        for name, side in sides.items():
            bad[name][starts[side][broken] : starts[side][broken + 1]] = float("nan")
        for name, got in run(bad).items():
            cuts = starts["q" if name == "dq" else "k"]
            others = torch.ones(len(got), dtype=torch.bool, device="cuda")
            others[cuts[broken] : cuts[broken + 1]] = False
            if dq == "atomic" and name == "dq":
                torch.testing.assert_close(got[others], clean[name][others])
            else:
                assert torch.equal(got[others], clean[name][others]), name
            assert got[~others].isnan().any()
