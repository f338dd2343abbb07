"""Tables of tiles: what is in them, when they are kept and when they are built anew."""

from __future__ import annotations

import dataclasses
import typing

import pytest
import torch

from flashgen.codegen import TritonBackwardConfig, TritonForwardConfig, render
from flashgen.errors import FlashgenError
from flashgen.launch import forward_table
from flashgen.launch.tile_table import TableShape, TileTable, tile_table
from flashgen.measure import random_extras
from flashgen.measure.entries import batch_entries
from flashgen.measure.reference import positions, visible
from flashgen.spec import Extras, Mask, Problem, Shape, parse_mask, parse_problem
from flashgen.spec.masks import document

CPU = torch.device("cpu")
CONFIG = TritonForwardConfig(block_m=32, block_n=16, num_warps=1, num_stages=1)


def build(problem: Problem, extras: Extras, config: TritonForwardConfig = CONFIG) -> TileTable:
    table = forward_table(problem, config, extras, CPU)
    assert table is not None
    return table


def expected_rows(problem: Problem, extras: Extras, axes: str) -> list[tuple[list[int], list[int]]]:
    """Return per row of a table the tiles seen whole and those seen in part, pair by pair from the mask."""
    shape, spec = problem.shape, problem.spec
    mask = extras.bound_mask(spec)
    entries = batch_entries(spec, extras, batch=shape.batch, seqlen_q=shape.seqlen_q, seqlen_k=shape.seqlen_k)
    rows = []
    for b in range(shape.batch if "b" in axes else 1):
        entry = entries[b]
        for h in range(shape.nheads_q if "h" in axes else 1):
            seen = visible(mask, positions(entry, torch.tensor([h]), 0, entry.seqlen_q))
            assert seen is not None
            seen = seen.expand(1, entry.seqlen_q, entry.seqlen_k)[0]
            for start in range(0, shape.seqlen_q, CONFIG.block_m):
                tiles = [seen[start : start + CONFIG.block_m, n : n + CONFIG.block_n] for n in _starts(shape.seqlen_k)]
                some = [number for number, tile in enumerate(tiles) if tile.any()]
                # A tile past the last key is never whole: it has columns to mask.
                whole = [n for n in some if tiles[n].all() and tiles[n].shape[1] == CONFIG.block_n]
                rows.append((whole, [n for n in some if n not in whole]))
    return rows


def _starts(seqlen_k: int) -> range:
    return range(0, seqlen_k, CONFIG.block_n)


CASES = {
    "document": ("document", ""),
    "batched document": ("document(batched)", "b"),
    "causal document": ("causal&document", ""),
    "heads": ("mask_mod('return (q_idx + kv_idx) // 24 == h')", "h"),
    "batch and heads": ("mask_mod('return t[b, h] < kv_idx - q_idx', t='int32[b,h]')", "bh"),
    "union": ("global_tokens(4)|sliding_window(8,8)", ""),
    "complement": ("~full", ""),
    "everything": ("full|~causal", ""),
    "varlen": ("document varlen", "b"),
    "seqused": ("document seqused=qk", "b"),
    "varlen seqused": ("~causal varlen seqused=k", "b"),
    "captures": ("mask_mod('return t[b, q_idx] < u[kv_idx]', t='float32[b,q_idx]', u='float32[kv_idx]')", "b"),
}


@pytest.mark.parametrize(("words", "axes"), CASES.values(), ids=CASES.keys())
@pytest.mark.parametrize("lengths", [(70, 90), (90, 33), (64, 64), (1, 1)], ids=str)
def test_rows_are_the_tiles_with_anything_to_see(words: str, axes: str, lengths: tuple[int, int]) -> None:
    problem = parse_problem(f"b=2 hq=3 hkv=1 sq={lengths[0]} sk={lengths[1]} d=16 fp32 {words}")
    extras = random_extras(problem, device="cpu", seed=1)
    table = build(problem, extras)
    want = expected_rows(problem, extras, axes)
    assert {table.start.dtype, table.full.dtype, table.index.dtype} == {torch.int32}
    start, full, index = (t.tolist() for t in (table.start, table.full, table.index))
    assert len(start) == len(full) + 1 == len(want) + 1
    got = [(index[start[row] : full[row]], index[full[row] : start[row + 1]]) for row in range(len(full))]
    assert got == want
    # One entry past the last tile may be read.
    assert index[start[-1] :] == [0]


@pytest.mark.parametrize(("words", "axes"), CASES.values(), ids=CASES.keys())
@pytest.mark.parametrize("lengths", [(70, 90), (90, 33), (64, 64), (1, 1)], ids=str)
def test_turned_rows_are_the_query_tiles_of_a_key_tile(words: str, axes: str, lengths: tuple[int, int]) -> None:
    problem = parse_problem(f"b=2 hq=3 hkv=1 sq={lengths[0]} sk={lengths[1]} d=16 fp32 {words} backward")
    extras = random_extras(problem, device="cpu", seed=1)
    table = build_turned(problem, extras)
    rows = expected_rows(problem, extras, axes)
    num_m, num_n = -(-lengths[0] // CONFIG.block_m), len(_starts(lengths[1]))
    want = []
    for first in range(0, len(rows), num_m):
        own = rows[first : first + num_m]
        for n in range(num_n):
            whole, partly = ([m for m, row in enumerate(own) if n in row[part]] for part in (0, 1))
            want.append((whole, partly))
    start, full, index = (t.tolist() for t in (table.start, table.full, table.index))
    assert len(start) == len(full) + 1 == len(want) + 1
    got = [(index[start[row] : full[row]], index[full[row] : start[row + 1]]) for row in range(len(full))]
    assert got == want


def build_turned(problem: Problem, extras: Extras, block_m: int = CONFIG.block_m) -> TileTable:
    config = TritonBackwardConfig(block_m1=block_m, block_n1=CONFIG.block_n, num_warps=1, num_stages=1, dq="atomic")
    tiles = TableShape(block_m=block_m, block_n=CONFIG.block_n, turned=True)
    table = tile_table(problem, render(problem.spec, config), tiles, extras, CPU)
    assert table is not None
    return table


def test_a_turned_table_is_not_taken_for_the_other() -> None:
    # As many query tiles as key tiles, of one size.
    problem, extras, _ = documents(96, 30)
    config = dataclasses.replace(CONFIG, block_m=16)
    backward = dataclasses.replace(problem, spec=problem.spec.backward())
    causal = parse_mask("causal") & backward.spec.mask
    problem, backward = (
        dataclasses.replace(p, spec=dataclasses.replace(p.spec, mask=causal)) for p in (problem, backward)
    )
    table, turned = build(problem, extras, config), build_turned(backward, extras, 16)
    assert len(table.index) == len(turned.index)
    assert not torch.equal(table.start, turned.start)
    assert build_turned(backward, extras, 16) is turned


@pytest.mark.parametrize("words", ["full", "causal", "sliding_window(3,4)&chunked(9)", "prefix_lm(3)", "causal varlen"])
def test_where_a_formula_does_there_is_no_table(words: str) -> None:
    problem = parse_problem(f"b=2 h=2 s=40 d=16 fp32 {words}")
    assert forward_table(problem, CONFIG, random_extras(problem, device="cpu", seed=0), CPU) is None


def documents(seqlen: int, length: int) -> tuple[Problem, Extras, Mask]:
    mask = document(torch.arange(seqlen) // length)
    problem = parse_problem(f"b=1 h=1 s={seqlen} d=16 fp32 document")
    return problem, Extras(softmax_scale=1.0, captures=tuple(mask.tensors)), mask


def test_size_grows_with_the_visible_tiles_alone() -> None:
    config = dataclasses.replace(CONFIG, block_m=64, block_n=64)
    sizes = {}
    for seqlen in (256, 512, 1024):
        problem, extras, _ = documents(seqlen, 128)
        table = build(problem, extras, config)
        # Two query tiles a document, each with the two key tiles of it.
        assert len(table.index) - 1 == 2 * (seqlen // 64)
        assert torch.equal(table.full, table.start[1:])
        sizes[seqlen] = sum(t.numel() for t in (table.start, table.full, table.index))
    assert sizes[1024] < 2 * sizes[512] < 4 * sizes[256]


def test_kept_for_the_same_tensors() -> None:
    problem, extras, mask = documents(100, 30)
    table = build(problem, extras)
    assert build(problem, extras) is table
    # Another call's problem and tensors, equal in what matters.
    again = Problem(spec=dataclasses.replace(problem.spec, lse=True), shape=problem.shape)
    same = Extras(softmax_scale=2.0, captures=tuple(mask.tensors))
    assert build(again, same) is table
    other_loads = dataclasses.replace(CONFIG, loads="descriptor", num_warps=4, num_stages=3)
    assert build(problem, extras, other_loads) is table


def test_built_anew_where_anything_differs() -> None:
    problem, extras, mask = documents(100, 30)
    table = build(problem, extras)
    copies = dataclasses.replace(extras, captures=tuple(t.clone() for t in mask.tensors))
    assert build(problem, copies) is not table
    for change in ({"block_m": 16}, {"block_n": 32}):
        assert build(problem, extras, dataclasses.replace(CONFIG, **change)) is not table
    shorter = dataclasses.replace(problem, shape=Shape(batch=1, seqlen_q=90, seqlen_k=100, nheads_q=1, nheads_kv=1))
    assert build(shorter, extras) is not table
    causal = dataclasses.replace(problem.spec, mask=parse_mask("causal") & problem.spec.mask)
    assert build(dataclasses.replace(problem, spec=causal), extras) is not table


def test_numbers_of_a_mask_have_tables_of_their_own() -> None:
    first, second = (parse_problem(f"b=1 h=1 s=200 d=16 fp32 global_tokens({n})|sliding_window(8,8)") for n in (4, 60))
    extras = Extras(softmax_scale=1.0)
    assert len(build(first, extras).index) < len(build(second, extras).index)


def test_built_anew_after_a_change_in_place() -> None:
    problem, extras, _ = documents(100, 30)
    before = build(problem, extras)
    for capture in extras.captures:
        capture.fill_(0)
    after = build(problem, extras)
    assert after is not before
    assert len(after.index) - 1 == 4 * 7 > len(before.index) - 1
    assert build(problem, extras) is after


def test_lengths_are_sources_too() -> None:
    problem = parse_problem("b=2 h=1 s=64 d=16 fp32 document varlen seqused=k")
    extras = random_extras(problem, device="cpu", seed=0)
    table = build(problem, extras)
    assert build(problem, extras) is table
    for name in ("cu_seqlens_q", "cu_seqlens_k", "seqused_k"):
        source = typing.cast("torch.Tensor", getattr(extras, name))
        source.add_(0)
        again = build(problem, extras)
        assert again is not table, name
        table = again


def test_not_kept_for_tensors_without_a_version() -> None:
    with torch.inference_mode():
        problem, extras, _ = documents(100, 30)
        assert extras.captures[0].is_inference()
        first, second = build(problem, extras), build(problem, extras)
    assert first is not second
    assert torch.equal(first.index, second.index)


def test_an_address_that_is_used_again_is_not_taken_for_the_old_tensor() -> None:
    problem = parse_problem("b=1 h=1 s=100 d=16 fp32 document")
    for length in range(3, 40, 3):
        ids = (torch.arange(100) // length).int()
        extras = Extras(softmax_scale=1.0, captures=(ids, ids))
        index = build(problem, extras).index
        assert len(index) - 1 == sum(map(len, sum(expected_rows(problem, extras, ""), ())))


def test_no_more_than_so_many_are_kept() -> None:
    kept = [documents(20, 10) for _ in range(70)]
    tables = [build(problem, extras) for problem, extras, _ in kept]
    assert build(*kept[-1][:2]) is tables[-1]
    # The oldest was let go.
    assert build(*kept[0][:2]) is not tables[0]


@pytest.mark.gpu
def test_refused_inside_a_capture_and_found_there_once_built() -> None:
    device = torch.device("cuda", torch.cuda.current_device())
    ids = (torch.arange(300, device=device) // 70).int()
    problem = parse_problem("b=1 h=1 s=300 d=64 fp16 document")
    config = TritonForwardConfig(block_m=64, block_n=64, num_warps=4, num_stages=2)
    extras = Extras(softmax_scale=1.0, captures=(ids, ids))
    with torch.cuda.graph(torch.cuda.CUDAGraph()), pytest.raises(FlashgenError, match="inside a CUDA graph capture"):
        forward_table(problem, config, extras, device)
    table = forward_table(problem, config, extras, device)
    assert table is not None
    with torch.cuda.graph(torch.cuda.CUDAGraph()):
        assert forward_table(problem, config, extras, device) is table


@pytest.mark.gpu
@pytest.mark.parametrize(("words", "axes"), CASES.values(), ids=CASES.keys())
def test_the_same_table_on_a_gpu(words: str, axes: str) -> None:
    problem = parse_problem(f"b=2 hq=3 hkv=1 sq=300 sk=333 d=16 fp32 {words}")
    extras = random_extras(problem, device="cpu", seed=1)
    moved = {field.name: _to_gpu(getattr(extras, field.name)) for field in dataclasses.fields(extras)}
    there = forward_table(problem, CONFIG, Extras(**moved), torch.device("cuda", torch.cuda.current_device()))
    assert there is not None
    here = build(problem, extras)
    used = int(here.start[-1])
    for name, count in (("start", None), ("full", None), ("index", used)):
        assert torch.equal(getattr(there, name)[:count].cpu(), getattr(here, name)[:count]), name


def _to_gpu(value: typing.Any) -> typing.Any:
    if isinstance(value, tuple):
        return tuple(map(_to_gpu, value))
    return value.cuda() if isinstance(value, torch.Tensor) else value
