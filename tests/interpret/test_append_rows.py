"""What appends for the decode kernel of Hopper, in the interpreter: caches, lengths and turned queries."""

from __future__ import annotations

import pytest
import torch

from flashgen.codegen import HopperDecodeConfig, constant_values, render
from flashgen.compile import load_kernel
from flashgen.launch import DecodeOperands, SideTensors
from flashgen.launch.append_rows import append_programs
from flashgen.launch.arguments import entry_arguments
from flashgen.launch.decode import decode_values
from flashgen.launch.decode_grid import DecodeGrid
from flashgen.launch.interpreted import run_interpreted
from flashgen.measure import CacheOracle, random_decode_call
from flashgen.measure.decode_reference import rotated, turns_each_query
from flashgen.spec import parse_problem

CONFIG = HopperDecodeConfig(consumers=2, block_n=64, num_warps=4, num_stages=2)
GRID = DecodeGrid(programs=1, splits=0, lanes=1)


@pytest.mark.parametrize(
    "words",
    [
        *("d=64 causal append", "d=40 full append batch_idx", "d=96 dv=24 causal append page=5"),
        *("d=64 causal append rotary=halves page=64", "d=96 full append rotary=halves batch_idx"),
        *("d=48 dv=80 sliding_window(20,0) append rotary=pairs", "d=64 full append rotary=pairs rotary_fp32 page=16"),
    ],
)
@pytest.mark.parametrize(("seed", "layout"), [(0, "bhsd"), (1, "bshd")])
def test_appends_and_turns(words: str, seed: int, layout: str) -> None:
    problem = parse_problem(f"b=3 hq=6 hkv=2 sq=19 sk=130 fp16 {words} decode")
    call = random_decode_call(problem, device="cpu", seed=seed, ragged=bool(seed), layout=layout)
    spec, extras = problem.spec, call.extras
    assert extras.cache_seqlens is not None
    plan = render(spec, CONFIG).plan
    entry, _ = plan.entries
    caches = CacheOracle(call)
    side = SideTensors(plan)
    tensors = {
        **{"q": call.q, "k": call.k, "v": call.v},
        **dict(zip(side.names, side(extras, None), strict=True)),
        "lengths": torch.full((3,), -1, dtype=torch.int32),
        "q_turned": torch.full((3, 6, 19, spec.head_dim_qk), torch.nan, dtype=torch.float16),
    }
    operands = DecodeOperands.of({**tensors, "out": call.q}, extras)
    arguments = entry_arguments(
        entry,
        plan,
        values=decode_values(problem, CONFIG, operands, extras, GRID, waits=False),
        tensors=tensors,
        layouts={},
        constants=constant_values(spec, CONFIG),
    )
    seqlen_new = operands.k_new.size[2]
    run_interpreted(load_kernel(render(spec, CONFIG), entry.name), (append_programs(problem, seqlen_new),), arguments)
    assert not caches.fault()
    assert torch.equal(tensors["lengths"], extras.cache_seqlens + seqlen_new)
    for b in range(3) if spec.rotary else ():
        positions = extras.cache_seqlens[b] + torch.arange(19) * turns_each_query(spec.mask)
        want = rotated(call.q[b], positions, spec, extras, torch.float64)
        assert torch.allclose(tensors["q_turned"][b].double(), want, rtol=2**-10, atol=2**-10), b
    if not spec.rotary:
        assert tensors["q_turned"].isnan().all()
