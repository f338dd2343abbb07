"""Random calls from the whole product of features, on a GPU; `--draws N --draw-seed S` draws others."""

from __future__ import annotations

import concurrent.futures
import multiprocessing
import os
import typing
from pathlib import Path

import pytest
import torch

from flashgen.codegen import TritonForwardConfig, render
from flashgen.codegen.constraints import check_config
from flashgen.compile import compile_kernel
from flashgen.launch import bind_forward, detect_target
from flashgen.measure import accuracy_error, poisoned_outputs, random_extras, random_inputs
from flashgen.spec import parse_problem

# A kernel that hangs blocks the process inside the driver: only another thread can end it.
pytestmark = [pytest.mark.gpu, pytest.mark.timeout(240, method="thread")]

DRAWS = 150


@pytest.fixture(scope="module")
def refused(product: typing.Any, request: pytest.FixtureRequest) -> dict[int, str]:
    """Compile the kernels of all collected draws side by side; return what went wrong, by seed."""
    seeds = {item.callspec.params["draw_seed"] for item in request.session.items if _draws_here(item, request)}
    legal = [seed for seed in sorted(seeds) if not _illegal(product.draw(seed, "cuda"))]
    # Not forked: this process holds a CUDA context and threads. The others are told where `product` is.
    context = multiprocessing.get_context("spawn")
    workers = max(2, min(16, len(os.sched_getaffinity(0)) - 2))
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(Path(product.__file__).parent))
        with concurrent.futures.ProcessPoolExecutor(workers, mp_context=context) as pool:
            failures = list(pool.map(product.prepare, legal))
    return {seed: failure for seed, failure in zip(legal, failures, strict=True) if failure}


def _illegal(drawn: typing.Any) -> str:
    target = detect_target(torch.device("cuda", torch.cuda.current_device()))
    return "; ".join(check_config(drawn.config, drawn.spec, target))


def _draws_here(item: pytest.Item, request: pytest.FixtureRequest) -> bool:
    return item.path == request.path and "draw_seed" in getattr(getattr(item, "callspec", None), "params", {})


def test_a_drawn_call(product: typing.Any, refused: dict[int, str], draw_seed: int) -> None:
    drawn = product.draw(draw_seed, "cuda")
    if _illegal(drawn):
        pytest.skip(f"its config is illegal on this GPU: {_illegal(drawn)}")
    assert draw_seed not in refused, f"{refused[draw_seed]}\n{drawn.told(drawn.problems[0])}"
    for problem in drawn.problems:
        try:
            reason = product.run_on_gpu(drawn, problem)
        except Exception as error:
            raise AssertionError(drawn.told(problem)) from error
        assert not reason, f"{reason}\n{drawn.told(problem)}"


@pytest.mark.parametrize("loads", ["pointer", "descriptor"])
@pytest.mark.parametrize("mask", ["full", "causal", "sliding_window(60,10)", "document"])
def test_a_packed_sequence_does_not_reach_its_neighbours(mask: str, loads: str) -> None:
    target = detect_target(torch.device("cuda", torch.cuda.current_device()))
    config = TritonForwardConfig(
        block_m=64,
        block_n=64,
        num_warps=4,
        num_stages=2,
        loads=loads,  # type: ignore[arg-type]
    )
    problem = parse_problem(f"b=3 hq=4 hkv=2 sq=300 sk=333 d=64 dv=80 bf16 varlen lse {mask}")
    spec = problem.spec
    illegal = check_config(config, spec, target)
    if illegal:
        pytest.skip(f"illegal on {target.arch}: {illegal[0]}")
    compiled = compile_kernel(render(spec, config), spec.structure(), config, target)
    inputs = random_inputs(problem, device="cuda", seed=0)
    extras = random_extras(problem, device="cuda", seed=0)
    assert extras.cu_seqlens_q is not None
    assert extras.cu_seqlens_k is not None
    starts_q, starts_k = extras.cu_seqlens_q.tolist(), extras.cu_seqlens_k.tolist()

    def run(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        out, lse = poisoned_outputs(problem, device="cuda")
        assert lse is not None
        bind_forward(problem, config, compiled, extras, {"q": q, "k": k, "v": v, "out": out, "lse": lse})()
        return out, lse

    clean, clean_lse = run(*inputs)
    report = accuracy_error(clean, clean_lse, *inputs, spec=spec, extras=extras)
    assert report.ok, report.reason
    for broken in range(3):
        bad = [t.clone() for t in inputs]
        for t, starts in zip(bad, (starts_q, starts_k, starts_k), strict=True):
            t[starts[broken] : starts[broken + 1]] = float("nan")
        out, lse = run(*bad)
        others = torch.ones(len(out), dtype=torch.bool, device="cuda")
        others[starts_q[broken] : starts_q[broken + 1]] = False
        assert torch.equal(out[others], clean[others])
        assert torch.equal(lse[:, others], clean_lse[:, others])
        assert out[~others].isnan().any()
