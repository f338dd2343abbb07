"""What a launch of the Gluon family is made of: descriptors, the grid, the counter, tables, refusals."""

from __future__ import annotations

import dataclasses
import functools
import random
import typing
from collections.abc import Callable

import pytest
import torch
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

from flashgen.codegen import HopperForwardConfig, KernelConfig
from flashgen.compile import shared_layout
from flashgen.errors import ConfigError, UnsupportedError
from flashgen.launch import Operands, forward_table, grid_size, interpret_forward
from flashgen.launch.forward import num_programs
from flashgen.launch.operands import Layout4D
from flashgen.launch.ragged import RAGGED, ragged_view
from flashgen.launch.tile_counter import tile_counter
from flashgen.measure import random_extras, random_inputs
from flashgen.primitives import hopper
from flashgen.spec import Extras, Problem, parse_problem
from flashgen.spec.masks import document
from flashgen.target import named_target

CPU = torch.device("cpu")
CONFIG = HopperForwardConfig(
    num_warps=4, num_stages=2, consumers=2, block_n=128, head_group=3, tail_heads=5, queries="registers"
)
Bound = Callable[[Problem, KernelConfig], tuple[int, dict[str, typing.Any]]]


@pytest.fixture(autouse=True)
def _h200(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("flashgen.launch.forward.detect_target", lambda device: named_target("H200"))
    zeros = functools.partial(torch.zeros, dtype=torch.int32)
    monkeypatch.setattr("flashgen.launch.tile_counter._zeros", lambda device, count: zeros(count))
    monkeypatch.setattr("flashgen.launch.tile_counter.outside_pools", lambda make, device: make())
    monkeypatch.setattr("torch.cuda.is_current_stream_capturing", lambda: False)


@pytest.mark.parametrize("lse", ["", "lse"])
@pytest.mark.parametrize(
    "words",
    [
        "causal",
        "sliding_window(9,3)&chunked(40) softcap",
        "document(batched)",
        "full alibi sinks",
        "causal d=96 dv=80",
        "causal varlen",
        "document varlen d=96",
        "mask_mod('return t[b,q_idx]<u[kv_idx]',t='float32[b,q_idx]',u='int64[kv_idx]')",
        "causal score_mod('return score*w[h]',w='bfloat16[h]')",
    ],
)
def test_bound_arguments_are_those_of_the_kernel(words: str, lse: str, bound_arguments: Bound) -> None:
    sizes = "" if " d=" in words else "d=64 dv=128"
    problem = parse_problem(f"b=2 hq=6 hkv=2 sq=300 sk=333 bf16 {sizes} {lse} {words}")
    grid, arguments = bound_arguments(problem, CONFIG)
    assert grid == 3 * 12
    assert (arguments["head_group"], arguments["tail_heads"]) == (3, 5)
    assert arguments["num_heads_total"] == 12
    assert arguments["tile_counter_ptr"].tolist() == [0, 0]
    assert not any(name.startswith(("stride_", "out_ptr")) for name in arguments)


def descriptors(problem: Problem, config: HopperForwardConfig, bound_arguments: Bound) -> dict[str, TensorDescriptor]:
    _, arguments = bound_arguments(problem, config)
    return {name: value for name, value in arguments.items() if name.endswith("_desc")}


def test_descriptors_of_dense_tensors(bound_arguments: Bound) -> None:
    problem = parse_problem("b=2 hq=6 hkv=2 sq=300 sk=333 d=96 dv=128 bf16")
    found = descriptors(problem, CONFIG, bound_arguments)
    boxes = {"q_desc": (64, 64), "q_1_desc": (64, 32), "k_desc": (128, 64), "k_1_desc": (128, 32)}
    boxes |= {"v_desc": (128, 128), "out_desc": (64, 128)}
    assert {name: tuple(value.block_shape) for name, value in found.items()} == {
        name: (1, 1, *box) for name, box in boxes.items()
    }
    for name, value in found.items():
        assert type(value) is TensorDescriptor
        assert value.shape == list(value.base.shape), name
        assert value.strides == list(value.base.stride()), name
        assert value.layout == shared_layout(value.block_shape, problem.spec.dtype), name
    halves = descriptors(problem, dataclasses.replace(CONFIG, out_buffer="half"), bound_arguments)
    assert tuple(halves["out_desc"].block_shape) == (1, 1, 64, 64)


def test_descriptors_of_packed_tensors(bound_arguments: Bound) -> None:
    problem = parse_problem("b=2 hq=6 hkv=2 sq=300 sk=333 d=64 bf16 varlen")
    for name, value in descriptors(problem, CONFIG, bound_arguments).items():
        heads = 2 if name[0] in "kv" else 6
        rows = 64 if name in ("q_desc", "out_desc") else 128
        assert value.base.dim() == 3
        assert value.shape == [0x7FFF0000, 0x7FFF0000, heads, RAGGED, 64], name
        assert value.strides == [2**34 - 64 * heads, 64 * heads, 64, 64 * heads, 1], name
        assert value.block_shape == [1, 1, 1, rows, 64], name
        assert value.layout == shared_layout(value.block_shape, problem.spec.dtype), name


def test_ragged_addresses_wrap_to_the_elements_of_a_sequence() -> None:
    assert hopper.RAGGED.value == RAGGED
    rng = random.Random(0)
    for _ in range(500):
        heads, head_dim, itemsize = rng.randint(1, 64), 8 * rng.randint(2, 32), rng.choice((1, 2, 4))
        # Of a slice of a larger tensor, and with heads before or after the tokens.
        row_stride = head_dim * rng.choice((heads, 1, 3 * heads, 2**20))
        head_stride = head_dim * rng.choice((1, 5, 2**22))
        tokens = rng.choice((1, 300, 2**20, RAGGED))
        size, stride = ragged_view((1, heads, tokens, head_dim), (head_dim, head_stride, row_stride, 1))
        start = rng.randint(0, tokens)
        length = rng.choice((0, tokens - start, rng.randint(0, tokens - start)))
        head, column, row = rng.randrange(heads), rng.randrange(head_dim), rng.randint(0, length + 256)
        index = (RAGGED, start + length, head, RAGGED - length + row, column)
        # What the hardware takes: coordinates of 32 bits with a sign, byte strides of 40 bits in whole 16 bytes.
        assert all(0 <= i < 2**31 for i in index)
        assert all(0 < s * itemsize < 2**40 for s in stride)
        assert all(0 < n <= 2**31 for n in size)
        in_bounds = all(0 <= i < n for i, n in zip(index, size, strict=True))
        assert in_bounds == (row < length)
        base = rng.randrange(2**47)
        address = (base + itemsize * sum(i * s for i, s in zip(index, stride, strict=True))) % 2**64
        assert address == base + itemsize * ((start + row) * row_stride + head * head_stride + column)


@pytest.mark.parametrize(
    ("text", "consumers", "programs", "tiles", "grid"),
    [
        ("b=1 hq=6 hkv=2 sq=130 sk=77 d=64", 2, 1, 2 * 6, 12),
        ("b=4 hq=16 hkv=2 sq=1024 sk=77 d=64", 2, 1, 8 * 64, 132),
        ("b=4 hq=16 hkv=2 sq=1024 sk=77 d=64", 3, 1, 6 * 64, 132),
        ("b=4 hq=16 hkv=2 sq=1024 sk=77 d=64", 1, 2, 16 * 64, 264),
        ("b=1 hq=11 hkv=1 sq=1024 sk=77 d=64 varlen", 1, 2, 16 * 11, 176),
        ("b=1 hq=2 hkv=1 sq=0 sk=77 d=64", 1, 2, 0, 0),
    ],
)
def test_programs_stay(text: str, consumers: int, programs: int, tiles: int, grid: int) -> None:
    config = dataclasses.replace(CONFIG, consumers=consumers, programs=programs)
    shape = parse_problem(text).shape
    assert grid_size(shape, config) == tiles
    assert num_programs(shape, config, CPU) == grid


@pytest.mark.parametrize(
    ("text", "consumers", "tiles", "grid"),
    [
        # 64 rows of as many heads as there are consumers.
        ("b=1 hq=8 hkv=2 sq=130 sk=77 d=64", 2, 3 * 4, 12),
        ("b=4 hq=16 hkv=2 sq=1024 sk=77 d=64", 2, 16 * 32, 132),
        ("b=1 hq=6 hkv=2 sq=65 sk=77 d=64 varlen", 3, 2 * 2, 4),
    ],
)
def test_tiles_of_packed_heads(text: str, consumers: int, tiles: int, grid: int) -> None:
    config = dataclasses.replace(CONFIG, consumers=consumers, pack="heads")
    shape = parse_problem(text).shape
    assert grid_size(shape, config) == tiles
    assert num_programs(shape, config, CPU) == grid


@pytest.mark.parametrize(("consumers", "refused"), [(2, True), (3, False)])
def test_the_heads_of_a_tile_are_of_one_group(consumers: int, refused: bool) -> None:
    for spec in ("", "varlen"):
        problem = parse_problem(f"b=2 hq=6 hkv=2 sq=300 sk=333 d=64 bf16 {spec}")
        q, k, v = random_inputs(problem, device="cpu", seed=0)
        operands = Operands.of({"q": q, "k": k, "v": v, "out": q})
        reason = operands.refusal(dataclasses.replace(CONFIG, consumers=consumers, pack="heads"), problem.spec)
        expected = f"a tile has {consumers} query heads of one group, the group has 3"
        assert reason == (expected if refused else None)


def test_refusals() -> None:
    def operands(spec: str, **odd: Layout4D) -> tuple[Operands, str]:
        problem = parse_problem(f"b=2 hq=6 hkv=2 sq=300 sk=333 d=64 bf16 {spec}")
        q, k, v = random_inputs(problem, device="cpu", seed=0)
        found = dataclasses.replace(Operands.of({"q": q, "k": k, "v": v, "out": q}), **odd)
        return found, found.refusal(CONFIG, problem.spec) or ""

    for spec in ("", "varlen"):
        assert operands(spec)[1] == ""
        for name in ("q", "k", "v", "out"):
            for strides in ((64, 0, 128, 1), (64, 64, 68, 1), (64, -64, 128, 1)):
                odd = Layout4D(size=(1, 6, 300, 64), stride=strides)
                assert f"{name} has {list(strides)}" in operands(spec, **{name: odd})[1]
    most, more = (Layout4D(size=(1, 6, tokens, 64), stride=(64, 64, 384, 1)) for tokens in (RAGGED, RAGGED + 1))
    assert operands("varlen", k=most)[1] == ""
    assert operands("varlen", k=more)[1] == f"descriptors of packed sequences reach {RAGGED} tokens, k has {RAGGED + 1}"
    assert operands("", k=more)[1] == ""
    far = Layout4D(size=(1, 6, 2, 64), stride=(64, 64, 2**34, 1))
    assert "row stride below" in operands("varlen", out=far)[1]


@pytest.mark.parametrize("consumers", [1, 2])
def test_the_table_has_the_tiles_of_the_config(consumers: int) -> None:
    config = dataclasses.replace(CONFIG, consumers=consumers, block_n=64)
    ids = torch.randint(0, 5, (300,), generator=torch.Generator().manual_seed(0)).sort().values.int()
    # One query tile that sees nothing.
    q_ids = ids.clone()
    q_ids[128:256] = 9
    mask = document(q_ids, ids)
    problem = parse_problem("b=1 h=2 s=300 d=64 bf16 document")
    table = forward_table(problem, config, Extras(softmax_scale=1.0, captures=tuple(mask.tensors)), CPU)
    assert table is not None
    seen = q_ids[:, None] == ids
    start, full, index = (t.tolist() for t in (table.start, table.full, table.index))
    rows = -(-300 // config.block_m)
    assert (len(start), len(full)) == (rows + 1, rows)
    for row in range(rows):
        tiles = seen[row * config.block_m :][: config.block_m].split(64, 1)
        whole = [n for n, tile in enumerate(tiles) if tile.all() and tile.shape[1] == 64]
        some = [n for n, tile in enumerate(tiles) if tile.any() and n not in whole]
        assert index[start[row] : full[row]] == whole
        assert index[full[row] : start[row + 1]] == some
    # The kernel reads one entry past an empty row, also past the last.
    assert index[start[-1] :] == [0]


def test_no_interpreter_and_no_other_phase() -> None:
    problem = parse_problem("b=1 h=2 s=30 d=64 fp16 causal")
    q, k, v = random_inputs(problem, device="cpu", seed=0)
    extras = random_extras(problem, device="cpu", seed=0)
    with pytest.raises(UnsupportedError, match=r"gluon/hopper_forward run on their GPU alone; .* triton/forward"):
        interpret_forward(q, k, v, problem=problem, config=CONFIG, extras=extras)
    from_backward = typing.cast("KernelConfig", type("Backward", (), {"template": "x", "phase": "backward"})())
    with pytest.raises(ConfigError, match="'x' has no forward kernel"):
        grid_size(problem.shape, from_backward)


def test_a_counter_for_each_stream(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("flashgen.launch.tile_counter._counters", {})
    first = tile_counter(0, 100)
    assert first.tolist() == [0, 0]
    assert tile_counter(0, 100) is first
    others = [tile_counter(0, 101), tile_counter(1, 100)]
    assert len({id(first), *map(id, others)}) == 3
    # One handle, but a stream in each thread.
    assert tile_counter(0, 2) is not tile_counter(0, 2)


def test_a_counter_for_each_launch_of_a_capture(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("flashgen.launch.tile_counter._counters", {})
    outside = tile_counter(0, 100)
    with monkeypatch.context() as capture:
        capture.setattr("torch.cuda.is_current_stream_capturing", lambda: True)
        inside = [tile_counter(0, 100), tile_counter(0, 100), tile_counter(0, 101)]
        assert len({id(outside), *map(id, inside)}) == 4
    # Memory of the graph is never used outside of it.
    assert tile_counter(0, 100) is outside
    assert all(tile_counter(0, 101) is not counter for counter in inside)
