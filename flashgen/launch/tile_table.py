"""Which key tiles a mask leaves to each query tile, where only its data can tell: built once, then kept.

FlexAttention's block mask (Dong et al. 2024, arXiv:2412.05496, section 3.2) as compressed rows: as many numbers as
there are tiles with anything to see.
"""

from __future__ import annotations

import collections
import dataclasses
import functools
import typing

import torch

from flashgen.codegen import RenderedKernel
from flashgen.codegen.mask_plan import mask_numbers
from flashgen.codegen.signature import capture_pointers
from flashgen.compile import load_kernel
from flashgen.errors import FlashgenError
from flashgen.launch.interpreted import run_interpreted
from flashgen.launch.operands import as_read
from flashgen.launch.own_memory import outside_pools
from flashgen.spec import Extras, Problem

_KEPT = 64


@dataclasses.dataclass(frozen=True, kw_only=True)
class TileTable:
    """Compressed rows of tiles: those seen whole first, then those that need the mask.

    A row holds the key tiles of a query tile or, turned, the query tiles of a key tile.

    Attributes:
        start: int32 [rows + 1], where each row begins.
        full: int32 [rows], where its second part begins.
        index: int32 [tiles + 1], numbers of tiles and a 0: a kernel may read the entry past an empty row.
    """

    start: torch.Tensor
    full: torch.Tensor
    index: torch.Tensor


@dataclasses.dataclass(frozen=True, kw_only=True)
class TableShape:
    """The tiles of a table.

    Attributes:
        block_m: query rows of one.
        block_n: keys of one.
        turned: whether a row holds the query tiles of a key tile.
    """

    block_m: int
    block_n: int
    turned: bool = False


# By what it was built from; holding those tensors keeps their addresses from being given to others.
_tables: collections.OrderedDict[tuple[object, ...], tuple[TileTable, tuple[torch.Tensor, ...]]]
_tables = collections.OrderedDict()


def tile_table(
    problem: Problem, rendered: RenderedKernel, tiles: TableShape, extras: Extras, device: torch.device
) -> TileTable | None:
    """Return the table of tiles for a call, or None where a formula does; from memory where nothing changed.

    Building takes a kernel over all tiles and one synchronisation. Tensors are told apart by address and version, so a
    table is built anew after an in-place change; those made in inference mode have no version and are never kept.

    Args:
        problem: its mask decides.
        rendered: any module of the problem's spec, which holds the kernel that asks the mask.
        tiles: their sizes.
        extras: of the call.
        device: where the table is needed.

    Raises:
        FlashgenError: inside a CUDA graph capture, where no table can be built.
    """
    if problem.spec.mask.by_formula:
        return None
    lengths = (extras.cu_seqlens_q, extras.cu_seqlens_k, extras.seqused_q, extras.seqused_k)
    sources = (*extras.captures[: problem.spec.mask.capture_count], *(t for t in lengths if t is not None))
    if any(source.is_inference() for source in sources):
        return _build(problem, rendered, tiles, extras, device)
    spec, shape = problem.spec, problem.shape
    key = (
        str(spec.mask), spec.varlen, spec.seqused, shape.seqlen_q, shape.seqlen_k, shape.batch, shape.nheads_q,
        tiles, device, *((s.data_ptr(), s._version, s.shape) for s in sources),
    )  # fmt: skip
    found = _tables.get(key)
    if found is None:
        build = functools.partial(_build, problem, rendered, tiles, extras, device)
        # Kept, and so of no pool that others may empty.
        found = build() if device.type == "cpu" else outside_pools(build, device), sources
        _tables[key] = found
        if len(_tables) > _KEPT:
            _tables.popitem(last=False)
    else:
        _tables.move_to_end(key)
    return found[0]


def _build(
    problem: Problem, rendered: RenderedKernel, tiles: TableShape, extras: Extras, device: torch.device
) -> TileTable:
    if device.type == "cuda" and torch.cuda.is_current_stream_capturing():
        raise FlashgenError(
            f"the tiles that the mask {problem.spec.mask} leaves are not known yet, and no table of them can be built "
            "inside a CUDA graph capture; call flashgen.attention once on these tensors before the capture"
        )
    kinds = _tile_kinds(rendered, problem, tiles, extras, device)
    if tiles.turned:
        # Heads of rows of query tiles, seen from the key tiles.
        num_m = -(-problem.shape.seqlen_q // tiles.block_m)
        kinds = kinds.unflatten(0, (-1, num_m)).transpose(1, 2).flatten(0, 1)
    some, whole = kinds > 0, kinds == 2
    start = torch.zeros(len(kinds) + 1, dtype=torch.int64, device=device)
    start[1:] = some.sum(1).cumsum(0)
    full = start[:-1] + whole.sum(1)
    index = torch.zeros(int(start[-1]) + 1, dtype=torch.int32, device=device)
    for chosen, first in ((whole, start[:-1]), (some & ~whole, full)):
        row, tile = chosen.nonzero(as_tuple=True)
        before = chosen.sum(1).cumsum(0) - chosen.sum(1)
        index[first[row] + torch.arange(len(row), device=device) - before[row]] = tile.int()
    return TileTable(start=start.int(), full=full.int(), index=index)


def _tile_kinds(
    rendered: RenderedKernel, problem: Problem, tiles: TableShape, extras: Extras, device: torch.device
) -> torch.Tensor:
    """Return int8 [rows, key tiles]: 0 nothing visible, 1 something, 2 everything."""
    plan, shape = rendered.plan, problem.shape
    num_m, num_n = -(-shape.seqlen_q // tiles.block_m), -(-shape.seqlen_k // tiles.block_n)
    heads = {"": 1, "b": shape.batch, "h": shape.nheads_q, "bh": shape.batch * shape.nheads_q}[plan.table_axes]
    kinds = torch.empty((heads * num_m, num_n), dtype=torch.int8, device=device)
    given: dict[str, typing.Any] = {
        "SEQLEN_Q": shape.seqlen_q,
        "SEQLEN_K": shape.seqlen_k,
        "max_seqlen_q": shape.seqlen_q,
        **{f"{name}_ptr": getattr(extras, name) for name in ("cu_seqlens_q", "cu_seqlens_k", "seqused_q", "seqused_k")},
        **mask_numbers(problem.spec.mask),
    }
    for pointer, capture in zip(capture_pointers(problem.spec), extras.captures, strict=True):
        given[pointer] = as_read(capture)
        given |= {f"{pointer.removesuffix('_ptr')}_size{axis}": size for axis, size in enumerate(capture.shape)}
    names = (*plan.length_arguments, *plan.mask_arguments)
    arguments = {
        "kinds_ptr": kinds,
        "nheads_q": shape.nheads_q,
        **{name: given[name] for name in names},
        "BLOCK_M": tiles.block_m,
        "BLOCK_N": tiles.block_n,
    }
    kernel = load_kernel(rendered, "attn_tiles")
    if device.type == "cpu":
        run_interpreted(kernel, (*kinds.shape,), arguments)
    elif kinds.numel():
        with torch.cuda.device(device):
            kernel[(*kinds.shape,)](**arguments)
    return kinds
