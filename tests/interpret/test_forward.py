"""The forward kernel in Triton's interpreter: lengths, dimensions, groups, masks, dtypes, tile orders."""

from __future__ import annotations

import dataclasses
import random
from collections.abc import Callable

import pytest
import torch

from flashgen.codegen import TritonForwardConfig
from flashgen.measure import API_LENGTHS, random_inputs
from flashgen.spec import AttentionSpec, DType, Problem, Shape, causal, full, parse_mask
from flashgen.spec.masks import Mask

Check = Callable[..., None]

MASKS = (full(), causal(), causal("top_left"))
LOADS = ("pointer", "descriptor")
# About a millisecond a tile: small lengths only, and one past the list of the API: more queries than keys.
LENGTHS = [pair for pair in API_LENGTHS if max(pair) <= 256] + [(203, 113)]
# Wide tiles, tall tiles, and tiles larger than most lengths.
WIDE = TritonForwardConfig(block_m=32, block_n=64, num_warps=2, num_stages=1)
TALL = TritonForwardConfig(block_m=64, block_n=32, num_warps=4, num_stages=2)
LARGE = TritonForwardConfig(block_m=128, block_n=128, num_warps=8, num_stages=1)


def inputs(
    *,
    lengths: tuple[int, int] = (45, 77),
    dims: tuple[int, int] = (32, 32),
    heads: tuple[int, int] = (4, 2),
    batch: int = 2,
    dtype: DType = DType.FP16,
    layout: str = "bhsd",
    seed: int = 0,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    spec = AttentionSpec(dtype=dtype, head_dim_qk=dims[0], head_dim_v=dims[1])
    shape = Shape(batch=batch, seqlen_q=lengths[0], seqlen_k=lengths[1], nheads_q=heads[0], nheads_kv=heads[1])
    return random_inputs(Problem(spec=spec, shape=shape), device="cpu", seed=seed, layout=layout)  # type: ignore[arg-type]


def test_the_list_holds_what_it_should() -> None:
    assert {(1, 1), (3, 3), (64, 128), (239, 1), (113, 203), (128, 217), (113, 211), (108, 256)} < set(LENGTHS)


@pytest.mark.parametrize("loads", LOADS)
@pytest.mark.parametrize("mask", MASKS, ids=str)
@pytest.mark.parametrize("lengths", LENGTHS, ids=lambda pair: f"{pair[0]}x{pair[1]}")
def test_lengths(check: Check, lengths: tuple[int, int], mask: Mask, loads: str) -> None:
    q, k, v = inputs(lengths=lengths, heads=(2, 1), batch=1)
    for config in (WIDE, TALL):
        check(q, k, v, dataclasses.replace(config, loads=loads), mask)


@pytest.mark.parametrize("offset", [-33, -32, -31, -17, -16, -15, -2, -1, 0, 1, 2, 15, 16, 17, 31, 32, 33])
def test_lengths_at_the_edges_of_tiles(check: Check, offset: int) -> None:
    # Where the diagonal, or the last key, is one element into a key tile or short of it decides which loop has the
    # tile, or none.
    q, k, v = inputs(lengths=(48, 48 + offset), dims=(16, 16), heads=(1, 1), batch=1)
    for block_m, block_n in ((16, 16), (32, 16), (16, 32)):
        config = TritonForwardConfig(block_m=block_m, block_n=block_n, num_warps=1, num_stages=1)
        for mask in MASKS:
            check(q, k, v, config, mask)


@pytest.mark.parametrize("loads", LOADS)
@pytest.mark.parametrize("mask", MASKS, ids=str)
def test_tiles_beyond_every_length(check: Check, mask: Mask, loads: str) -> None:
    for lengths in ((1, 1), (113, 97), (97, 150)):
        check(*inputs(lengths=lengths), dataclasses.replace(LARGE, loads=loads), mask)


@pytest.mark.parametrize("dtype", list(DType), ids=str)
@pytest.mark.parametrize("mask", MASKS, ids=str)
def test_dtypes(check: Check, mask: Mask, dtype: DType) -> None:
    for loads in LOADS:
        check(*inputs(dtype=dtype), dataclasses.replace(WIDE, loads=loads), mask)


@pytest.mark.parametrize("loads", LOADS)
@pytest.mark.parametrize("dims", [(72, 40), (16, 64), (80, 96), (192, 128), (24, 256)], ids=str)
def test_head_dimensions(check: Check, dims: tuple[int, int], loads: str) -> None:
    for mask in MASKS:
        check(*inputs(lengths=(35, 67), dims=dims, heads=(2, 1), batch=1), dataclasses.replace(WIDE, loads=loads), mask)


@pytest.mark.parametrize("loads", LOADS)
@pytest.mark.parametrize("heads", [(2, 2), (6, 2), (6, 1), (12, 2), (7, 7)], ids=str)
def test_groups(check: Check, heads: tuple[int, int], loads: str) -> None:
    check(*inputs(lengths=(33, 65), heads=heads), dataclasses.replace(WIDE, loads=loads), causal())


@pytest.mark.parametrize("head_group", [1, 2, 3, 4, 5, 8, 100])
def test_tile_order_changes_nothing(check: Check, head_group: int) -> None:
    # 2 * 6 heads: 5, 8 and 100 leave a last group that is not full.
    q, k, v = inputs(lengths=(40, 35), heads=(6, 2))
    for mask in (full(), causal()):
        check(q, k, v, dataclasses.replace(WIDE, head_group=head_group), mask)


@pytest.mark.parametrize("loads", LOADS)
@pytest.mark.parametrize("mask", MASKS, ids=str)
def test_without_lse(check: Check, mask: Mask, loads: str) -> None:
    check(*inputs(), dataclasses.replace(WIDE, loads=loads), mask, lse=False)


@pytest.mark.parametrize("softmax_scale", [0.0, 1e-3, 1.0, 20.0])
@pytest.mark.parametrize("mask", MASKS, ids=str)
def test_scales(check: Check, mask: Mask, softmax_scale: float) -> None:
    check(*inputs(lengths=(45, 131), dtype=DType.FP32), WIDE, mask, softmax_scale=softmax_scale)


@pytest.mark.parametrize("mask", MASKS, ids=str)
def test_scores_that_overflow_a_careless_softmax(check: Check, mask: Mask) -> None:
    # Scores of a few hundred: e to that power is no float32.
    q, k, v = inputs(lengths=(45, 131))
    check(8 * q, 8 * k, v, WIDE, mask)


def test_rows_that_see_nothing(check: Check) -> None:
    # 203 queries, 30 keys, bottom right: the first 173 rows see no key, whole tiles of them and a part of one.
    check(*inputs(lengths=(203, 30)), WIDE, causal())


@pytest.mark.parametrize("loads", LOADS)
def test_no_query(check: Check, loads: str) -> None:
    config = dataclasses.replace(WIDE, loads=loads)
    check(*inputs(lengths=(0, 5)), config, causal())
    check(*inputs(lengths=(0, 0)), config, full())
    check(*inputs(batch=0), config, full())


def test_no_key(check: Check) -> None:
    # Descriptors of no key do not exist: callers launch nothing then.
    for mask in (*MASKS, parse_mask("sliding_window(3,0)"), parse_mask("mask_mod('return q_idx != kv_idx')")):
        check(*inputs(lengths=(5, 0)), WIDE, mask)


@pytest.mark.parametrize("seed", range(12))
def test_random_calls(check: Check, seed: int) -> None:
    rng = random.Random(seed)
    nheads_kv = rng.choice((1, 2))
    dtype = rng.choice(list(DType))
    step = 16 if dtype is DType.FP8 else 8
    q, k, v = inputs(
        lengths=(rng.randint(1, 100), rng.randint(1, 160)),
        dims=(rng.randrange(16, 129, step), rng.randrange(16, 129, step)),
        heads=(nheads_kv * rng.choice((1, 2, 3)), nheads_kv),
        batch=rng.choice((1, 2)),
        dtype=dtype,
        layout=rng.choice(("bhsd", "bshd")),
        seed=seed,
    )
    config = TritonForwardConfig(
        block_m=rng.choice((32, 64, 128)),
        block_n=rng.choice((32, 64, 128)),
        num_warps=4,
        num_stages=rng.choice((1, 2, 3)),
        loads=rng.choice(LOADS),
        head_group=rng.choice((1, 2, 3, 8)),
    )
    check(q, k, v, config, rng.choice(MASKS), softmax_scale=rng.choice((None, 0.05, 1.0)), lse=rng.random() < 0.5)
