"""Which query tiles a key tile visits under masks with a formula: all that see it, and none that do not."""

from __future__ import annotations

import dataclasses
import itertools
import math

import pytest
import torch

from flashgen.codegen import RenderedKernel, TritonBackwardConfig, render
from flashgen.codegen.backward_plan import BackwardPlan
from flashgen.codegen.kernel_config import Loads, Loops
from flashgen.codegen.mask_plan import mask_numbers, plan_mask
from flashgen.compile import load_kernel
from flashgen.launch import interpret_backward
from flashgen.launch.interpreted import run_interpreted
from flashgen.measure import attention_reference, random_inputs, random_output_gradients
from flashgen.spec import AttentionSpec, DType, Extras, Mask, Positions, Problem, Shape, parse_mask

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
    "prefix_lm(40)&sliding_window(-1,12)",
    "chunked(24)&chunked(36)&causal",
    "dilated_window(30,30,7)",
    "dilated_window(64,0,2)&prefix_lm(5)",
)
ONE_EDGE = (
    "full",
    "causal",
    "causal(align=top_left)",
    *(f"sliding_window(-1,{right})" for right in (-1, 0, 3, 33)),
    *(f"prefix_lm({length})" for length in (0, 1, 16, 37, 200)),
    "prefix_lm(40)&sliding_window(-1,12)",
    "causal&causal(align=top_left)",
)
# More keys, more queries, equal; whole tiles and not; shorter than one.
LENGTHS = ((50, 70), (70, 50), (64, 64), (33, 31), (3, 90), (90, 3), (1, 1))
BLOCKS = ((16, 16), (32, 16), (16, 32))

_RESULTS = ("start", "full_start", "full_end", "end")
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
    """Write what q_bounds says of every key tile."""
    tile = tl.program_id(0)
    {results} = q_bounds(tile * BLOCK_N, SEQLEN_Q, SEQLEN_K, BLOCK_M, BLOCK_N, {arguments})
    {stores}
'''

# First rows of the query tiles of a key tile: those that are masked, and those that are not.
Visit = tuple[list[int], list[int]]


def spec_of(mask: Mask) -> AttentionSpec:
    return AttentionSpec(dtype=DType.FP32, head_dim_qk=16, head_dim_v=16, mask=mask, phase="backward")


def config_of(blocks: tuple[int, int], loops: Loops = "split", loads: Loads = "pointer") -> TritonBackwardConfig:
    return TritonBackwardConfig(
        block_m1=blocks[0], block_n1=blocks[1], num_warps=1, num_stages=1, dq="atomic", loads=loads, loops=loops
    )


def visits(mask: Mask, lengths: tuple[int, int], blocks: tuple[int, int], loops: Loops = "split") -> list[Visit]:
    """Return what every key tile visits, as the rendered function and the kernel's loops have it."""
    rendered = render(spec_of(mask), config_of(blocks, loops))
    assert isinstance(rendered.plan, BackwardPlan)
    numbers = mask_numbers(mask)
    probe = _PROBE.format(
        arguments="".join(f"{name}, " for name in numbers),
        results=", ".join(_RESULTS),
        stores="\n    ".join(f"tl.store(out_ptr + tile * 4 + {i}, {name})" for i, name in enumerate(_RESULTS)),
    )
    source: RenderedKernel = dataclasses.replace(rendered, source=rendered.source + probe)
    tiles = -(-lengths[1] // blocks[1])
    out = torch.full((tiles, 4), -7, dtype=torch.int32)
    arguments = {"out_ptr": out, "SEQLEN_Q": lengths[0], "SEQLEN_K": lengths[1], **numbers}
    run_interpreted(
        load_kernel(source, "report_bounds"), (tiles,), {**arguments, "BLOCK_M": blocks[0], "BLOCK_N": blocks[1]}
    )
    found = []
    for row in out.tolist():
        at = dict(zip(_RESULTS, row, strict=True))
        visit: Visit = ([], [])
        for masked, first, last in rendered.plan.row_loops:
            visit[masked == "False"].extend(range(at[first], at[last], blocks[0]))
        found.append(visit)
    return found


def seen_pairs(mask: Mask, rows: int, keys: int, lengths: tuple[int, int]) -> torch.Tensor:
    """Return which of the first keys the first rows see, those past the lengths as the formula continues."""
    at = Positions(
        q_idx=torch.arange(rows)[:, None],
        kv_idx=torch.arange(keys)[None, :],
        seqlen_q=lengths[0],
        seqlen_k=lengths[1],
        ops=torch,
    )
    return torch.as_tensor(mask.sees(at)).expand(rows, keys)


def check_visits(mask: Mask, lengths: tuple[int, int], blocks: tuple[int, int], *, exact: bool, loops: Loops) -> None:
    block_m, block_n = blocks
    found = visits(mask, lengths, blocks, loops)
    starts = range(0, lengths[0], block_m)
    seen = seen_pairs(mask, len(starts) * block_m, len(found) * block_n, lengths)
    for tile, (masked, unmasked) in enumerate(found):
        where = f"{mask} {lengths} {blocks} {loops}: tile {tile} visits {masked} with the mask and {unmasked} without"
        visited = sorted(masked + unmasked)
        assert len(set(visited)) == len(visited), where
        assert all(0 <= m < lengths[0] and m % block_m == 0 for m in visited), where
        own = seen[:, tile * block_n : (tile + 1) * block_n]
        real = own[: lengths[0], : lengths[1] - tile * block_n]
        needed = [m for m in starts if real[m : m + block_m].any()]
        assert set(needed) <= set(visited), f"{where}, which leaves out rows that see it"
        # Rows past the last one weigh nothing, keys past the last one do.
        whole = [m for m in starts if real[m : m + block_m].all()] * (real.shape[1] == block_n)
        assert set(unmasked) <= set(whole), f"{where}, of which not all of the unmasked are seen"
        assert loops == "split" or not unmasked, where
        if exact:
            assert visited == [m for m in starts if own[m : m + block_m].any()], where
            assert loops == "single" or sorted(unmasked) == whole, f"{where}, whole are {whole}"


@pytest.mark.parametrize("blocks", BLOCKS, ids=str)
@pytest.mark.parametrize("text", EXACT)
def test_exactly_the_tiles_that_see(text: str, blocks: tuple[int, int]) -> None:
    for lengths in LENGTHS:
        check_visits(parse_mask(text), lengths, blocks, exact=True, loops="split")


@pytest.mark.parametrize("blocks", BLOCKS, ids=str)
@pytest.mark.parametrize("text", LOOSE)
def test_at_least_the_tiles_that_see(text: str, blocks: tuple[int, int]) -> None:
    for lengths in LENGTHS:
        check_visits(parse_mask(text), lengths, blocks, exact=False, loops="split")


@pytest.mark.parametrize("text", ["full", "causal", "sliding_window(5,3)", "chunked(7)", "prefix_lm(20)"])
def test_a_single_loop_visits_the_same(text: str) -> None:
    for lengths, blocks in itertools.product(LENGTHS, BLOCKS):
        check_visits(parse_mask(text), lengths, blocks, exact=True, loops="single")


@pytest.mark.parametrize("loops", ["split", "single"])
@pytest.mark.parametrize("text", ONE_EDGE)
def test_without_a_left_edge_no_key_tile_skips_rows_of_the_next(text: str, loops: Loops) -> None:
    # Key tiles that add to dQ in their order wait for the one before: it must come.
    mask = parse_mask(text)
    assert not plan_mask(mask.structure()).left_edge
    for lengths, blocks in itertools.product(LENGTHS, BLOCKS):
        tiles = [set(masked + unmasked) for masked, unmasked in visits(mask, lengths, blocks, loops)]
        assert all(later <= earlier for earlier, later in itertools.pairwise(tiles)), (lengths, blocks)


@pytest.mark.parametrize(
    ("text", "most"),
    [
        # Rows that 128 keys in a row may be seen by, and two tiles that they may stick out into.
        ("sliding_window(127,0)", 2 * 127 + 1),
        ("sliding_window(64,63)", 2 * 127 + 1),
        ("chunked(128)", 2 * 128),
        ("dilated_window(127,0,1)", 2 * 127 + 1),
        ("sliding_window(127,0)&chunked(4096)", 2 * 127 + 1),
    ],
)
def test_a_long_sequence_visits_as_many_tiles_as_its_window_has(text: str, most: int) -> None:
    seqlen, blocks = 16384, (64, 128)
    for loops in ("split", "single"):
        found = visits(parse_mask(text), (seqlen, seqlen), blocks, loops)
        assert len(found) == 128
        steps = [len(masked) + len(unmasked) for masked, unmasked in found]
        assert max(steps) <= most // blocks[0] + 2
        assert min(steps) >= 1


@pytest.mark.parametrize("loops", ["split", "single"])
@pytest.mark.parametrize("loads", ["pointer", "descriptor"])
@pytest.mark.parametrize(
    "text", ["sliding_window(20,0)", "chunked(40)", "causal", "prefix_lm(20)", "causal&chunked(40)"]
)
def test_the_kernel_reads_nothing_else(text: str, loads: Loads, loops: Loops) -> None:
    # Rows past what a tile visits would make its sums NaN, whatever their probabilities.
    mask, lengths, blocks = parse_mask(text), (75, 52), (16, 16)
    config = config_of(blocks, loops, loads)
    shape = Shape(batch=1, seqlen_q=lengths[0], seqlen_k=lengths[1], nheads_q=1, nheads_kv=1)
    problem = Problem(spec=spec_of(mask), shape=shape)
    q, k, v = random_inputs(problem, device="cpu", seed=0)
    do = random_output_gradients(problem, device="cpu", seed=0)
    extras = Extras(softmax_scale=0.25)
    out, lse = attention_reference(q, k, v, spec=problem.spec.forward(), extras=extras, precision="input")
    assert lse is not None
    given = {"q": q, "k": k, "v": v, "out": out, "lse": lse, "do": do}
    clean = interpret_backward(given, problem=problem, config=config, extras=extras)
    for tile, (masked, unmasked) in enumerate(visits(mask, lengths, blocks, loops)):
        others = torch.ones(lengths[0], dtype=torch.bool)
        for start in masked + unmasked:
            others[start : start + blocks[0]] = False
        poisoned = {name: t.clone() for name, t in given.items()}
        for name in ("q", "do", "out"):
            poisoned[name][:, :, others] = math.nan
        if tile % 2 == 0:
            got = interpret_backward(poisoned, problem=problem, config=config, extras=extras)
            keys = slice(tile * 16, (tile + 1) * 16)
            assert torch.equal(got["dk"][:, :, keys], clean["dk"][:, :, keys])
            assert torch.equal(got["dv"][:, :, keys], clean["dv"][:, :, keys])
