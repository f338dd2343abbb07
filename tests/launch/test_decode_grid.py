"""How decoding divides keys among programs, and how its kernels are launched."""

from __future__ import annotations

import dataclasses
import types
import typing

import pytest
import torch

from flashgen.codegen import HopperDecodeConfig, KernelResources, TritonDecodeConfig
from flashgen.errors import InputError
from flashgen.launch import DecodeOperands, decode, poison_scratch
from flashgen.launch.decode_grid import DecodeGrid, decode_grid, num_counters, num_tiles, waits_for_each_other
from flashgen.launch.kernel import LaunchAttributes
from flashgen.launch.operands import Layout4D
from flashgen.spec import Extras, Shape, parse_problem
from flashgen.target import named_target

H200 = named_target("H200")
CONFIG = TritonDecodeConfig(block_m=16, block_n=64, num_warps=4, num_stages=3, programs=1)
HOPPER = HopperDecodeConfig(consumers=2, block_n=128, num_warps=4, num_stages=2)


def shape(sizes: str) -> Shape:
    return parse_problem(f"{sizes} d=64 decode").shape


@pytest.mark.parametrize(
    ("sizes", "programs", "lanes"),
    [
        # 16 teams of 8 heads, whatever the batch.
        ("b=1 hq=32 hkv=8 sq=1 sk=4096", 128, 8),
        ("b=64 hq=32 hkv=8 sq=1 sk=4096", 128, 8),
        ("b=1 hq=16 hkv=2 sq=1 sk=65536", 132, 2),
        # No more programs than key tiles.
        ("b=1 hq=16 hkv=2 sq=1 sk=2048", 64, 2),
        ("b=1 hq=4 hkv=4 sq=1 sk=1", 4, 4),
        # 70 heads side by side would leave 62 multiprocessors idle.
        ("b=3 h=70 sq=1 sk=4096", 105 + 21, 14),
        # More tiles of rows than programs: several after each other.
        ("b=1 hq=32 hkv=8 sq=128 sk=8192", 128, 128),
        ("b=1 hq=64 hkv=8 sq=256 sk=8192", 128, 128),
        ("b=2 h=131 sq=1 sk=8192", 131, 131),
    ],
)
def test_teams_fill_the_gpu(sizes: str, programs: int, lanes: int) -> None:
    assert decode_grid(shape(sizes), CONFIG, 0, 132) == DecodeGrid(programs=programs, splits=0, lanes=lanes)


@pytest.mark.parametrize("nheads_kv", range(1, 160, 3))
@pytest.mark.parametrize("per_sm", [1, 2, 3])
def test_teams_divide_the_tiles_and_leave_few_programs_idle(nheads_kv: int, per_sm: int) -> None:
    config = dataclasses.replace(CONFIG, programs=per_sm)
    grid = decode_grid(shape(f"b=3 h={nheads_kv} sq=1 sk=100000"), config, 0, 132)
    assert nheads_kv % grid.lanes == 0 == grid.programs % grid.lanes
    assert 0.9 * 132 * per_sm <= grid.programs <= 132 * per_sm


def test_splits_that_are_asked_for_are_programs_of_their_own() -> None:
    asked = shape("b=2 hq=8 hkv=2 sq=1 sk=640")
    assert decode_grid(asked, CONFIG, 3, 132) == DecodeGrid(programs=12, splits=3, lanes=1)
    # Ten key tiles.
    assert decode_grid(asked, CONFIG, 32, 132).programs == 40
    with pytest.raises(InputError, match="num_splits=100000 makes"):
        decode_grid(shape("b=4096 h=64 sq=1 sk=10000000"), CONFIG, 100_000, 132)


def test_without_sequences_there_is_nothing_to_launch() -> None:
    assert decode_grid(shape("b=0 h=8 sq=1 sk=64"), CONFIG, 0, 132).programs == 0


@pytest.mark.parametrize(
    ("programs", "smem_bytes", "name", "waits"),
    [
        (132, 200_000, "H200", True),
        (133, 200_000, "H200", False),
        (264, 100_000, "H200", True),
        (1, 1_000_000, "H200", False),
        # Never tried there.
        (4, 1_000, "MI300X", False),
    ],
)
def test_programs_wait_for_each_other_where_all_run_at_once(
    programs: int, smem_bytes: int, name: str, waits: bool
) -> None:
    resources = KernelResources(registers=128, spills=0, smem_bytes=smem_bytes)
    grid = DecodeGrid(programs=programs, splits=0, lanes=1)
    assert waits_for_each_other(grid, CONFIG, resources, named_target(name)) is waits


@pytest.mark.parametrize(
    ("sizes", "numbers", "tiles", "counters", "programs", "lanes"),
    [
        # Each consumer's rows are merged by themselves: one counter for each.
        ("b=1 hq=64 hkv=8 sq=256 sk=131072", {}, 128, 256, 128, 128),
        ("b=1 hq=16 hkv=8 sq=256 sk=131072", {}, 32, 64, 128, 32),
        ("b=1 hq=16 hkv=8 sq=256 sk=131072", {"pack": "heads"}, 32, 64, 128, 32),
        ("b=3 hq=8 hkv=2 sq=65 sk=4096", {"consumers": 1, "programs": 2}, 48, 48, 256, 16),
        ("b=1 hq=8 hkv=8 sq=100 sk=128", {}, 8, 16, 8, 8),
    ],
)
def test_tiles_of_hopper_have_rows_of_one_head_or_of_several(
    sizes: str, numbers: dict[str, typing.Any], tiles: int, counters: int, programs: int, lanes: int
) -> None:
    config, asked = dataclasses.replace(HOPPER, **numbers), shape(sizes)
    assert (num_tiles(asked, config), num_counters(asked, config)) == (tiles, counters)
    assert decode_grid(asked, config, 0, 132) == DecodeGrid(programs=programs, splits=0, lanes=lanes)


@pytest.mark.parametrize(("consumers", "registers", "waits"), [(2, 168, True), (3, 128, True), (3, 168, False)])
def test_the_producer_of_hopper_takes_registers_too(consumers: int, registers: int, waits: bool) -> None:
    resources = KernelResources(registers=registers, spills=0, smem_bytes=100_000)
    config = dataclasses.replace(HOPPER, consumers=consumers)
    assert waits_for_each_other(DecodeGrid(programs=132, splits=0, lanes=1), config, resources, H200) is waits


def test_hopper_reads_caches_whose_entries_are_whole_rows() -> None:
    spec = parse_problem("hq=8 hkv=2 sq=64 sk=512 d=64 fp16 decode").spec

    def layout(*stride: int, rows: int = 512) -> Layout4D:
        return Layout4D(size=(3, 2, rows, 64), stride=(*stride, 1))

    q = Layout4D(size=(3, 8, 64, 64), stride=(32768, 64, 512, 1))
    rows, heads = layout(512 * 128, 64, 128), layout(512 * 128, 512 * 64, 64)

    def refusal(config: HopperDecodeConfig = HOPPER, **layouts: Layout4D) -> str:
        operands = DecodeOperands(**{"q": q, "k": rows, "v": heads, "out": q, **layouts})
        return operands.refusal(config, spec) or ""

    assert refusal() == ""
    assert refusal(dataclasses.replace(HOPPER, pack="heads")) == ""
    assert "the group has 4" in refusal(dataclasses.replace(HOPPER, consumers=3, pack="heads"))
    assert "the v cache has 65544 elements an entry, no multiple of the 128" in refusal(v=layout(65544, 64, 128))
    assert "whole 16 bytes, k has" in refusal(k=layout(512 * 128, 64, 132))
    assert "whole 16 bytes, q has" in refusal(q=dataclasses.replace(q, stride=(32768, 60, 512, 1)))
    assert "reach 1073741824 tokens, k has 3221225472" in refusal(k=layout(2**30 * 128, 64, 128, rows=2**30))


def test_rows_of_a_cache_may_be_one_row_where_pointers_read_them() -> None:
    problem = parse_problem("b=3 hq=8 hkv=2 sq=64 sk=512 d=64 fp16 decode")
    q = Layout4D(size=(3, 8, 64, 64), stride=(32768, 64, 512, 1))
    repeated = Layout4D(size=(3, 2, 512, 64), stride=(128, 64, 0, 1))
    operands = DecodeOperands(q=q, k=repeated, v=repeated, out=q)
    grid = decode_grid(problem.shape, CONFIG, 0, 132)
    values = decode.decode_values(problem, CONFIG, operands, Extras(softmax_scale=1.0), grid, waits=False)
    assert (values["stride_kn"], values["stride_kz"]) == (0, 128)
    assert "whole 16 bytes" in (operands.refusal(HOPPER, problem.spec) or "")


class Handle:
    """A compiled kernel of Triton's: its launcher is made when it is first asked for."""

    def __init__(self) -> None:
        self.module: object = None
        self.function: object = None
        self._run: typing.Any = None

    @property
    def run(self) -> typing.Any:
        if self._run is None:
            self.module, self.function = object(), object()
            self._run = types.SimpleNamespace(launch_cooperative_grid=False, launch_pdl=False)
        return self._run


def test_attributes_are_a_launch_s_own() -> None:
    handle = Handle()
    assert LaunchAttributes().of(handle) is handle
    twin = LaunchAttributes(cooperative=True, dependent=True).of(handle)
    assert (twin.run.launch_cooperative_grid, twin.run.launch_pdl) == (True, True)
    # The binary is loaded once.
    assert twin.function is handle.function is not None
    assert (handle.run.launch_cooperative_grid, handle.run.launch_pdl) == (False, False)


def test_scratch_memory_is_nan_whenever_it_is_poisoned() -> None:
    cpu = torch.device("cpu")
    scratch = decode._shared_scratch(cpu, 100)
    assert scratch.isnan().all()
    scratch.zero_()
    assert decode._shared_scratch(cpu, 50) is scratch
    poison_scratch()
    assert scratch.isnan().all()
