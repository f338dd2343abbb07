"""What the functions of a rendered forward kernel for Hopper hand each other, and what its source calls things."""

from __future__ import annotations

import dataclasses

from flashgen.codegen.head_tiles import HeadTile
from flashgen.codegen.hopper_config import THREADS_OF_WARPGROUP, Diagonal, OutBuffer, Release
from flashgen.codegen.kernel_plan import KernelPlan

_THREADS_OF_PRODUCER = 32


@dataclasses.dataclass(frozen=True, kw_only=True)
class HopperNames(KernelPlan):
    """Names in `templates/gluon/hopper_forward.py.jinja`; what its config says is described there.

    Attributes:
        consumers: warpgroups that compute.
        heads_of_tile: query heads of a program's tile.
        qk_tiles: tiles of head_dim_qk.
        v_tiles: tiles of head_dim_v.
        arguments: run-time arguments of the kernel, in order.
    """

    consumers: int
    heads_of_tile: int
    out_buffer: OutBuffer
    diagonal: Diagonal
    release: Release
    qk_tiles: tuple[HeadTile, ...]
    v_tiles: tuple[HeadTile, ...]
    arguments: tuple[str, ...]

    def is_ragged(self, name: str) -> bool:
        """Whether a descriptor, or the one of a tensor, ends sequences at their own last row."""
        return self.spec.varlen

    def box(self, name: str) -> str:
        """The sides of the tile of a tensor's descriptor before its rows."""
        return "1, 1, 1, " if self.is_ragged(name) else "1, 1, "

    @property
    def block_m(self) -> str:
        """Query rows of a program's tile."""
        rows = self.consumers // self.heads_of_tile
        return "ROWS" if rows == 1 else f"{rows} * ROWS"

    @property
    def heads(self) -> str:
        """How many heads there are in all, or bundles of heads that one tile has."""
        return "num_heads_total" if self.heads_of_tile == 1 else f"(num_heads_total // {self.heads_of_tile})"

    @property
    def consumer_row(self) -> str:
        """The first row of consumer `c`."""
        return "start_m + c * ROWS" if self.heads_of_tile == 1 else "start_m"

    @property
    def consumer_head(self) -> str:
        """The head of consumer `c`."""
        return "off_h" if self.heads_of_tile == 1 else "off_h + c"

    @property
    def length(self) -> str:
        """The argument that says how many query rows a head has, at most."""
        return "max_seqlen_q" if self.spec.varlen else "SEQLEN_Q"

    @property
    def position(self) -> str:
        """What `tile_position` returns."""
        own = ", q_start, k_start, SEQLEN_Q, SEQLEN_K" if self.spec.varlen else ""
        return f"off_z, off_h, start_m{own}"

    @property
    def numbers(self) -> int:
        """How many numbers say whether there is a tile, and where."""
        return 1 + len(self.position.split(", "))

    @property
    def handed(self) -> int:
        """How many numbers the buffer holds in which they are handed out: a power of two."""
        return 1 << (self.numbers - 1).bit_length()

    @property
    def received(self) -> tuple[tuple[int, str], ...]:
        """What a consumer takes of them, with their places."""
        # Only copies need to know where keys start.
        return tuple((i, name) for i, name in enumerate(self.position.split(", "), start=1) if name != "k_start")

    @property
    def position_arguments(self) -> tuple[str, ...]:
        """What `tile_position` takes beyond the tile."""
        cuts = ("cu_seqlens_q_ptr", "cu_seqlens_k_ptr") if self.spec.varlen else ()
        return ("num_heads_total", "nheads_q", self.length, "head_group", "tail_heads", *cuts)

    @property
    def key_tile_arguments(self) -> tuple[str, ...]:
        """What `key_tiles` takes beyond the first row."""
        if not self.mask.table:
            return ("SEQLEN_Q", "SEQLEN_K", *self.mask.bounds_arguments)
        axes = {"": (), "b": ("off_z",), "h": ("off_h",), "bh": ("off_z", "off_h", "nheads_q")}[self.table_axes]
        return (*axes, self.length, "tile_start_ptr", "tile_full_ptr")

    @property
    def bounds(self) -> str:
        """What `kv_bounds` returns."""
        return "start, full_start, full_end, end" if self.mask.left_edge else "full_end, end"

    @property
    def producer_arguments(self) -> tuple[str, ...]:
        """What the producer takes beyond the rings."""
        copied = [name for name in self.arguments if name.endswith("_desc") and not name.startswith("out")]
        lengths = () if self.spec.varlen else ("SEQLEN_Q", "SEQLEN_K")
        tables = ("tile_index_ptr",) if self.mask.table else ()
        names = (
            "tile_counter_ptr", "group", *lengths, *self.position_arguments, *self.key_tile_arguments, *tables
        )  # fmt: skip
        located = ("SEQLEN_Q", "SEQLEN_K", "q_start", "k_start") if self.spec.varlen else ()
        return (*copied, *(name for name in dict.fromkeys(names) if name not in (*located, "off_z", "off_h")))

    @property
    def consumer_arguments(self) -> tuple[str, ...]:
        """What a consumer takes beyond the rings and the way out."""
        copied = {name for name in self.arguments if name.endswith("_desc")}
        unused = {*copied, "tile_counter_ptr", "group", "num_heads_total", "head_group", "tail_heads"}
        unused |= {"cu_seqlens_q_ptr", "cu_seqlens_k_ptr"}
        return tuple(name for name in self.arguments if name not in unused)

    @property
    def written_position(self) -> tuple[str, ...]:
        """What `write_out` takes of a tile's position."""
        return ("off_z", "off_h", "start_m", *(("q_start", "SEQLEN_Q") if self.spec.varlen else ()))

    @property
    def output_arguments(self) -> tuple[str, ...]:
        """What `write_out` takes beyond sums, buffers and the position."""
        spec = self.spec
        if not spec.lse:
            return ()
        return ("lse_ptr", *(("step_lh",) if spec.varlen else ("nheads_q", "SEQLEN_Q")))

    @property
    def results(self) -> tuple[str, ...]:
        """What `normalise` returns."""
        return (*(f"out{tile.suffix}" for tile in self.v_tiles), *(("lse",) if self.spec.lse else ()))

    @property
    def score_inputs(self) -> tuple[str, ...]:
        """What scores are modified with, beyond their position."""
        spec = self.spec
        names = (
            "qk_scale",
            *(("softcap",) if spec.softcap else ()),
            *(("slope", "SEQLEN_Q", "SEQLEN_K") if spec.alibi else ()),
            *self.score_arguments,
        )
        return tuple(dict.fromkeys(names))

    @property
    def step_arguments(self) -> tuple[str, ...]:
        """What a step over the keys takes beyond sums, rings and positions."""
        names = ("qk_scale", "SEQLEN_Q", "SEQLEN_K", *self.score_inputs, *self.mask_arguments)
        return tuple(dict.fromkeys(names))

    @property
    def end_key(self) -> str:
        """What `key_tiles` returns last, where half a tile may do."""
        return ", end" if self.diagonal == "half" else ""

    @property
    def key_range(self) -> str:
        """What `key_tiles` tells a consumer; `_` before what it has no use for."""
        return f"lo, {'' if self.mask.left_edge else '_'}full_lo, full_hi, hi{self.end_key}"

    def first_key(self, tile: str) -> str:
        """The first key of the tile with that number."""
        return f"{f'gl.load(tile_index_ptr + {tile})' if self.mask.table else tile} * BLOCK_N"

    @property
    def is_masked(self) -> str:
        """Whether the key tile numbered j needs the mask."""
        return "(j < full_lo) | (j >= full_hi)" if self.mask.left_edge else "j >= full_hi"

    def ring(self, name: str) -> str:
        """The buffers of a ring, and their barriers."""
        tiles = self.v_tiles if name == "v" else self.qk_tiles
        buffers = ", ".join(f"{name}{tile.suffix}_smem" for tile in tiles)
        named = self.release == "named" and name != "q"
        return f"{buffers}, {name}_full{'' if named else f', {name}_empty'}"

    def barriers(self, name: str) -> str:
        """A ring of which only the barriers are used."""
        return self.ring(name).replace(f"{name}_smem", f"_{name}_smem").replace(f"{name}_1_smem", f"_{name}_1_smem")

    def bytes(self, name: str) -> str:
        """How many bytes one copy into a buffer of a ring moves."""
        tiles = self.v_tiles if name == "v" else self.qk_tiles
        return " + ".join(f"{name}{tile.suffix}_desc.block_type.nbytes" for tile in tiles)

    def out_width(self, tile: HeadTile) -> str:
        """The width in which a tile of the output is written."""
        return f"{'OUT_' if self.out_buffer == 'half' else ''}{tile.block}"

    @property
    def threads_of_release(self) -> int:
        """How many threads a named barrier of a buffer counts: the consumers' and the producer's."""
        return THREADS_OF_WARPGROUP * self.consumers + _THREADS_OF_PRODUCER

    @property
    def out_buffers(self) -> tuple[str, ...]:
        """What a consumer takes to copy its output through shared memory, if it does."""
        return tuple(f"out{tile.suffix}_{what}" for tile in self.v_tiles for what in ("smem", "desc"))

    @property
    def accumulators(self) -> str:
        """The unnormalised outputs, one for each tile of head_dim_v."""
        return ", ".join(f"acc{tile.suffix}" for tile in self.v_tiles)

    @property
    def table_row(self) -> str:
        """The row of the table for a query tile."""
        return self.table_row_among("num_m")
