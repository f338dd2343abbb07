"""Which key tiles a query tile visits under masks with a formula: all that it sees, and none that it does not."""

from __future__ import annotations

import dataclasses
import itertools
import math
from collections.abc import Callable

import pytest
import torch

from flashgen.codegen import RenderedKernel, TritonForwardConfig, render
from flashgen.codegen.mask_plan import mask_numbers
from flashgen.compile import load_kernel
from flashgen.launch import interpret_forward
from flashgen.launch.interpreted import run_interpreted
from flashgen.measure import random_inputs
from flashgen.spec import AttentionSpec, DType, Extras, Mask, Positions, Problem, Shape, parse_mask

CheckProblem = Callable[..., tuple[torch.Tensor, torch.Tensor | None]]

# Numbers on both sides of the tiles' sides.
EXACT = (
    "full",
    "causal",
    "causal(align=top_left)",
    *(f"sliding_window({left},{right})" for left, right in itertools.product((-1, 0, 5, 40), (-1, 0, 3, 33))),
    *(f"prefix_lm({length})" for length in (0, 1, 16, 37, 200)),
    *(f"chunked({size})" for size in (1, 7, 16, 32, 50, 300)),
    "dilated_window(9,4,1)",
    "dilated_window(40,0,1)",
)
# Bounds of an intersection are those of its parts, and of a dilated window those of the window.
LOOSE = (
    "causal&chunked(10)",
    "sliding_window(20,3)&chunked(24)",
    "sliding_window(20,3)&causal(align=top_left)",
    "prefix_lm(20)&sliding_window(9,30)",
    "chunked(24)&chunked(36)&causal",
    "dilated_window(30,30,7)",
    "dilated_window(64,0,2)&prefix_lm(5)",
)
# More keys, more queries, equal; whole tiles and not; shorter than one.
LENGTHS = ((50, 70), (70, 50), (64, 64), (33, 31), (3, 90), (90, 3), (1, 1))
BLOCKS = ((16, 16), (32, 16), (16, 32))

_PROBE = '''

@triton.jit
def report_bounds(
    out_ptr,
    SEQLEN_Q,
    SEQLEN_K,
    {arguments}
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """Write what kv_bounds says of every query tile."""
    tile = tl.program_id(0)
    {results} = kv_bounds(tile * BLOCK_M, SEQLEN_Q, SEQLEN_K, BLOCK_M, BLOCK_N, {arguments})
    {stores}
'''


def visits(mask: Mask, lengths: tuple[int, int], blocks: tuple[int, int], loops: str = "split") -> list[list[int]]:
    """Return [start, full_start, full_end, end] of every query tile, as the rendered function computes them."""
    config = TritonForwardConfig(
        block_m=blocks[0],
        block_n=blocks[1],
        num_warps=1,
        num_stages=1,
        loops=loops,  # type: ignore[arg-type]
    )
    rendered = render(AttentionSpec(dtype=DType.FP32, head_dim_qk=16, head_dim_v=16, mask=mask), config)
    numbers = mask_numbers(mask)
    results = rendered.plan.bounds.split(", ")
    probe = _PROBE.format(
        arguments="".join(f"{name}, " for name in numbers),
        results=", ".join(results),
        stores="\n    ".join(f"tl.store(out_ptr + tile * {len(results)} + {i}, {n})" for i, n in enumerate(results)),
    )
    source: RenderedKernel = dataclasses.replace(rendered, source=rendered.source + probe)
    tiles = -(-lengths[0] // blocks[0])
    out = torch.full((tiles, len(results)), -7, dtype=torch.int32)
    arguments = {"out_ptr": out, "SEQLEN_Q": lengths[0], "SEQLEN_K": lengths[1], **numbers}
    run_interpreted(
        load_kernel(source, "report_bounds"), (tiles,), {**arguments, "BLOCK_M": blocks[0], "BLOCK_N": blocks[1]}
    )
    rows = [dict(zip(results, row, strict=True)) for row in out.tolist()]
    # Without a left edge the first loop starts at key 0; a single loop has no whole tiles.
    found = []
    for row in rows:
        start = row.get("start", 0)
        found.append([start, row.get("full_start", start), row.get("full_end", start), row["end"]])
    return found


def seen_pairs(mask: Mask, rows: int, lengths: tuple[int, int]) -> torch.Tensor:
    """Return which keys the first rows see, those past seqlen_q as the formula continues."""
    at = Positions(
        q_idx=torch.arange(rows)[:, None],
        kv_idx=torch.arange(lengths[1])[None, :],
        seqlen_q=lengths[0],
        seqlen_k=lengths[1],
        ops=torch,
    )
    return torch.as_tensor(mask.sees(at)).expand(rows, lengths[1])


def check_visits(mask: Mask, lengths: tuple[int, int], blocks: tuple[int, int], *, exact: bool, loops: str) -> None:
    block_m, block_n = blocks
    found = visits(mask, lengths, blocks, loops)
    seen = seen_pairs(mask, len(found) * block_m, lengths)
    for tile, (start, full_start, full_end, end) in enumerate(found):
        where = f"{mask} {lengths} {blocks} {loops}: tile {tile} visits {start, full_start, full_end, end}"
        assert start % block_n == full_start % block_n == full_end % block_n == 0, where
        assert start >= 0, where
        assert end <= lengths[1], where
        assert start <= full_start <= full_end, where
        assert full_end <= max(end, start), where
        own = seen[tile * block_m : (tile + 1) * block_m]
        real = own[: lengths[0] - tile * block_m]
        visited = range(start, end, block_n)
        covered = torch.zeros(lengths[1], dtype=torch.bool)
        covered[start : max(end, start)] = True
        assert not (real & ~covered).any(), f"{where}, which leaves out keys that it sees"
        assert real[:, full_start:full_end].all(), f"{where}, of which not all of the unmasked are seen"
        if exact:
            empty = [n for n in visited if not own[:, n : n + block_n].any()]
            assert not empty, f"{where}, of which {empty} are empty"
            if loops == "split":
                whole = [n for n in visited if n + block_n <= lengths[1] and own[:, n : n + block_n].all()]
                assert whole == list(range(full_start, full_end, block_n)), f"{where}, whole are {whole}"


@pytest.mark.parametrize("blocks", BLOCKS, ids=str)
@pytest.mark.parametrize("text", EXACT)
def test_exactly_the_tiles_that_are_seen(text: str, blocks: tuple[int, int]) -> None:
    for lengths in LENGTHS:
        check_visits(parse_mask(text), lengths, blocks, exact=True, loops="split")


@pytest.mark.parametrize("blocks", BLOCKS, ids=str)
@pytest.mark.parametrize("text", LOOSE)
def test_at_least_the_tiles_that_are_seen(text: str, blocks: tuple[int, int]) -> None:
    for lengths in LENGTHS:
        check_visits(parse_mask(text), lengths, blocks, exact=False, loops="split")


@pytest.mark.parametrize(
    "text", ["sliding_window(5,3)", "sliding_window(40,-1)", "chunked(7)", "dilated_window(9,4,1)"]
)
def test_a_single_loop_visits_the_same(text: str) -> None:
    for lengths, blocks in itertools.product(LENGTHS, BLOCKS):
        check_visits(parse_mask(text), lengths, blocks, exact=True, loops="single")


@pytest.mark.parametrize(
    ("text", "most"),
    [
        # Keys that 128 rows in a row may see, and two tiles that they may stick out into.
        ("sliding_window(127,0)", 2 * 127 + 1),
        ("sliding_window(64,63)", 2 * 127 + 1),
        ("chunked(128)", 2 * 128),
        ("dilated_window(127,0,1)", 2 * 127 + 1),
        ("sliding_window(127,0)&chunked(4096)", 2 * 127 + 1),
    ],
)
def test_a_long_sequence_visits_as_many_tiles_as_its_window_has(text: str, most: int) -> None:
    seqlen, blocks = 16384, (128, 64)
    for loops in ("split", "single"):
        found = visits(parse_mask(text), (seqlen, seqlen), blocks, loops)
        assert len(found) == 128
        steps = [math.ceil((end - start) / blocks[1]) for start, _, _, end in found]
        assert max(steps) <= most // blocks[1] + 2
        assert min(steps) >= 1


@pytest.mark.parametrize("loops", ["split", "single"])
@pytest.mark.parametrize("loads", ["pointer", "descriptor"])
@pytest.mark.parametrize(
    "text", ["sliding_window(20,0)", "chunked(40)", "causal", "prefix_lm(20)", "causal&chunked(40)"]
)
def test_the_kernel_reads_nothing_else(text: str, loads: str, loops: str, check_problem: CheckProblem) -> None:
    # Values past what a tile visits would make its rows NaN, whatever their probabilities.
    blocks, lengths = (16, 16), (52, 75)
    mask = parse_mask(text)
    config = TritonForwardConfig(
        block_m=16,
        block_n=16,
        num_warps=1,
        num_stages=1,
        loads=loads,
        loops=loops,  # type: ignore[arg-type]
    )
    spec = AttentionSpec(dtype=DType.FP32, head_dim_qk=16, head_dim_v=16, mask=mask, lse=True)
    shape = Shape(batch=1, seqlen_q=lengths[0], seqlen_k=lengths[1], nheads_q=1, nheads_kv=1)
    problem = Problem(spec=spec, shape=shape)
    q, k, v = random_inputs(problem, device="cpu", seed=0)
    extras = Extras(softmax_scale=0.25)
    clean, clean_lse = check_problem(q, k, v, problem, config, extras)
    assert clean_lse is not None
    for tile, (start, _, _, end) in enumerate(visits(mask, lengths, blocks)):
        rows = slice(tile * 16, (tile + 1) * 16)
        last = -(-end // 16) * 16
        poisoned = [t.clone() for t in (k, v)]
        for t in poisoned:
            t[:, :, :start] = math.nan
            t[:, :, last:] = math.nan
        if tile % 2 == 0:
            out, lse = interpret_forward(q, *poisoned, problem=problem, config=config, extras=extras)
            assert lse is not None
            assert torch.equal(out[:, :, rows], clean[:, :, rows])
            assert torch.equal(lse[:, :, rows], clean_lse[:, :, rows])
