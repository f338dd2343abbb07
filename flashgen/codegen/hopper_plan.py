"""The structure of a rendered forward kernel for Hopper."""

from __future__ import annotations

import dataclasses

from flashgen.codegen.arguments import side_pointer_types
from flashgen.codegen.config import (
    ROWS_OF_CONSUMER,
    Convert,
    Diagonal,
    HopperForwardConfig,
    OutBuffer,
    Queries,
    Release,
    Tiles,
    Turns,
)
from flashgen.codegen.entry import EntryPlan
from flashgen.codegen.head_tiles import HeadTile, name_tiles, tile_widths
from flashgen.codegen.kernel_plan import KernelPlan
from flashgen.codegen.mask_plan import plan_mask
from flashgen.codegen.mods import division_helpers, mod_arguments, mod_lines
from flashgen.codegen.signature import SCORE_PREFIX, capture_types, side_arguments
from flashgen.spec import AttentionSpec
from flashgen.spec.masks import Causal, PrefixLM

# Head dimensions are cut where two tiles are narrower than one: a wider tile costs shared memory and registers.
HEAD_TILES = 2


@dataclasses.dataclass(frozen=True, kw_only=True)
class HopperForwardPlan(KernelPlan):
    """Structure of `templates/gluon/hopper_forward.py.jinja`; the attributes of its config are described there.

    Attributes:
        consumers: warpgroups that compute.
        heads_of_tile: query heads of a program's tile.
        one_loop: key tiles that need the mask are walked in the same loop as the others.
        qk_tiles: tiles of head_dim_qk.
        v_tiles: tiles of head_dim_v.
        arguments: run-time arguments of the kernel, in order.
    """

    consumers: int
    heads_of_tile: int
    queries: Queries
    turns: Turns
    convert: Convert
    rescales_rarely: bool
    out_buffer: OutBuffer
    diagonal: Diagonal
    tiles: Tiles
    release: Release
    one_loop: bool
    qk_tiles: tuple[HeadTile, ...]
    v_tiles: tuple[HeadTile, ...]
    arguments: tuple[str, ...]

    @property
    def entries(self) -> tuple[EntryPlan, ...]:
        """The kernels of the module."""
        rows = {"q": "ROWS", "k": "BLOCK_N", "v": "BLOCK_N", "out": "ROWS"}
        tiles = {"q": self.qk_tiles, "k": self.qk_tiles, "v": self.v_tiles, "out": self.v_tiles}
        columns = {"out": "OUT_"} if self.out_buffer == "half" else {}
        boxes = tuple(
            (f"{x}{tile.suffix}_desc", (rows[x], f"{columns.get(x, '')}{tile.block}"))
            for x, many in tiles.items()
            for tile in many
        )
        return (
            EntryPlan(
                name=self.entry_point,
                arguments=self.arguments,
                constants=self.constants,
                pointer_types=self.pointer_types,
                boxes=boxes,
                ragged=self.spec.varlen,
            ),
        )

    @property
    def constants(self) -> tuple[str, ...]:
        """The compile-time arguments."""
        blocks = tuple(tile.block for tile in (*self.qk_tiles, *self.v_tiles))
        outs = tuple(f"OUT_{tile.block}" for tile in self.v_tiles) if self.out_buffer == "half" else ()
        rescale = ("RESCALE_AT",) if self.rescales_rarely else ()
        # The first consumer gets what the others leave.
        registers = (*(("CONSUMER_REGISTERS",) if self.consumers > 1 else ()), "PRODUCER_REGISTERS")
        return (*blocks, *outs, "ROWS", "BLOCK_N", "NUM_STAGES", *rescale, *registers)

    @property
    def shapes(self) -> tuple[str, ...]:
        """The compile-time arguments that the roles need."""
        return tuple(name for name in self.constants if not name.endswith("_REGISTERS"))

    @property
    def out_blocks(self) -> tuple[str, ...]:
        """The widths that the output is written in, and before that computed in."""
        blocks = tuple(tile.block for tile in self.v_tiles)
        return (*blocks, *(f"OUT_{block}" for block in blocks)) if self.out_buffer == "half" else blocks

    @property
    def longest_first(self) -> bool:
        """Whether query tiles are walked from the last, which sees most keys."""
        return any(isinstance(leaf, Causal | PrefixLM) for leaf in self.spec.mask.leaves)

    @property
    def box(self) -> str:
        """The sides of a descriptor's tile before its rows."""
        return "1, 1, 1, " if self.spec.varlen else "1, 1, "

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

    @property
    def key_loops(self) -> tuple[tuple[str, str], ...]:
        """The loops over the keys after the first tile, from the last one down: whether masked, and how many tiles."""
        if self.mask.title == "full":
            # Only the last tile of keys, which is the first that is walked, may hold keys past the end.
            return (("False", "hi - 1 - lo"),)
        if self.one_loop:
            return ((self.is_masked, "hi - 1 - lo"),)
        masked = ("True", "hi - 1 - gl.minimum(gl.maximum(full_hi, lo), hi - 1)")
        whole = ("False", "gl.minimum(hi - 1, full_hi) - full_lo")
        left = ("True", "gl.minimum(hi - 1, full_lo) - lo")
        return (masked, whole, left)

    @property
    def branches(self) -> bool:
        """Whether there is a loop without mask code for tiles of which only the first key tile needs the mask."""
        return not self.one_loop and not self.mask.two_edges and self.mask.title != "full"

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
        """How many bytes one use of a ring copies."""
        tiles = self.v_tiles if name == "v" else self.qk_tiles
        return " + ".join(f"{name}{tile.suffix}_desc.block_type.nbytes" for tile in tiles)

    def out_width(self, tile: HeadTile) -> str:
        """The width in which a tile of the output is written."""
        return f"{'OUT_' if self.out_buffer == 'half' else ''}{tile.block}"

    @property
    def threads_of_release(self) -> int:
        """How many threads a named barrier of a buffer counts: the consumers' and the producer's."""
        return 128 * self.consumers + 32

    @property
    def primitives(self) -> tuple[str, ...]:
        """What the source imports from `flashgen.primitives.hopper`."""
        names = {"arrive", "barriers", "expect", "get_numbers", "load_tile", "mma", "mma_first", "mma_wait"}
        names |= {
            "number_of",
            "own_sums",
            "product_layout",
            "put_numbers",
            "row_of",
            "store_wait",
            "wait",
            "write_tile",
        }
        names |= {"rescale_rarely"} if self.rescales_rarely else set()
        names |= {"opaque"} if self.one_loop or self.branches else set()
        names |= {"hold"} if self.convert == "held" else set()
        names |= {"release", "claim", "K_BUFFERS", "V_BUFFERS"} if self.release == "named" else set()
        names |= {"widen"} if self.diagonal == "half" else set()
        names |= {"turn_end", "turn_wait"} if self.turns == "alternate" else set()
        return tuple(sorted(names | ({"RAGGED"} if self.spec.varlen else set())))

    @property
    def own_keys(self) -> bool:
        """Whether each consumer walks the keys that its own rows see, not those that any row of the tile sees.

        A table knows whole tiles only, and consumers that take turns must take equally many.
        """
        same = self.mask.table or self.turns == "alternate" or not (self.mask.left_edge or self.longest_first)
        return self.consumers > self.heads_of_tile and not same

    @property
    def parts(self) -> tuple[str, ...]:
        """The device functions, as template files in the order of the source."""
        parts = [
            ("mods/floor_div", "floor_div" in self.division_helpers),
            ("mods/floor_mod", "floor_mod" in self.division_helpers),
            ("triton/parts/mask", not self.mask.window),
            ("triton/parts/kv_bounds", not self.mask.table),
            ("mods/score_softcap", self.spec.softcap),
            ("mods/score_function", self.spec.score_mod is not None),
            ("gluon/parts/tile_position", True),
            ("gluon/parts/filled_tile", self.spec.varlen),
            ("gluon/parts/key_tiles_by_table" if self.mask.table else "gluon/parts/key_tiles", True),
            ("gluon/parts/producer", True),
            ("gluon/parts/scores", True),
            ("gluon/parts/modify_scores", self.modified),
            ("gluon/parts/mask_scores", True),
            ("gluon/parts/exponentials", True),
            ("gluon/parts/attend", True),
            ("gluon/parts/pass_over", self.own_keys),
            ("gluon/parts/normalise", True),
            ("gluon/parts/write_out", True),
            ("gluon/parts/consumer", True),
        ]
        return tuple(f"{name}.py.jinja" for name, wanted in parts if wanted)

    @property
    def accumulators(self) -> str:
        """The unnormalised outputs, one for each tile of head_dim_v."""
        return ", ".join(f"acc{tile.suffix}" for tile in self.v_tiles)

    @property
    def table_row(self) -> str:
        """The row of the table for a query tile."""
        return self.table_row_among("num_m")


def make_hopper_plan(spec: AttentionSpec, config: HopperForwardConfig) -> HopperForwardPlan:
    """Return the structure of the forward kernel for Hopper that `spec` and `config` ask for."""
    spec = spec.structure()
    mask = plan_mask(spec.mask)
    widths_qk, widths_v = tile_widths(spec, HEAD_TILES)
    qk_tiles = name_tiles("BLOCK_DQK", "HEAD_DIM_QK", widths_qk)
    v_tiles = name_tiles("BLOCK_DV", "HEAD_DIM_V", widths_v)
    score = spec.score_mod
    score_arguments = mod_arguments(score, SCORE_PREFIX) if score else ()
    tiles = {"q": qk_tiles, "k": qk_tiles, "v": v_tiles, "out": v_tiles}
    words = [f"{mask.title} mask"]
    words += ["with lse"] * spec.lse
    words += [f"with {feature}" for feature in (*(("score_mod",) if score else ()), *spec.features)]
    return HopperForwardPlan(
        title=f"attn_fwd: {' '.join(words)}, {config.consumers} consumer{'s' if config.consumers > 1 else ''}.",
        template=config.template,
        entry_point="attn_fwd",
        spec=spec,
        descriptor=True,
        # `kv_bounds` gives the tiles that need no mask, whatever the loops.
        single_loop=False,
        mask=mask,
        score_arguments=score_arguments,
        score_lines=mod_lines(score, SCORE_PREFIX) if score else (),
        division_helpers=mask.division_helpers | (division_helpers(score) if score else frozenset()),
        pointer_types=tuple(sorted((side_pointer_types(spec) | capture_types(spec)).items())),
        dot_options="",
        consumers=config.consumers,
        heads_of_tile=config.heads_of_tile,
        queries=config.queries,
        turns=config.turns,
        convert=config.convert,
        rescales_rarely=config.rescale > 0,
        out_buffer=config.out_buffer,
        diagonal=config.diagonal,
        tiles=config.tiles,
        release=config.release,
        one_loop=config.loops == "single" and mask.title != "full",
        qk_tiles=qk_tiles,
        v_tiles=v_tiles,
        arguments=(
            *(f"{name}{tile.suffix}_desc" for name, many in tiles.items() for tile in many),
            *(("lse_ptr",) if spec.lse else ()),
            "tile_counter_ptr",
            "qk_scale",
            "num_heads_total",
            "nheads_q",
            "group",
            *(("max_seqlen_q",) if spec.varlen else ("SEQLEN_Q", "SEQLEN_K")),
            "head_group",
            "tail_heads",
            *side_arguments(spec),
            *(("tile_start_ptr", "tile_full_ptr", "tile_index_ptr") if mask.table else ()),
            *score_arguments,
            *mask.arguments,
        ),
    )


def hopper_constants(spec: AttentionSpec, config: HopperForwardConfig) -> dict[str, int]:
    """Return the value of every compile-time argument, by name."""
    consumer, producer = config.role_registers
    values = {
        "ROWS": ROWS_OF_CONSUMER,
        "BLOCK_N": config.block_n,
        "NUM_STAGES": config.num_stages,
        "RESCALE_AT": config.rescale,
        "CONSUMER_REGISTERS": consumer,
        "PRODUCER_REGISTERS": producer,
    }
    for block, widths in zip(("BLOCK_DQK", "BLOCK_DV"), tile_widths(spec, HEAD_TILES), strict=True):
        for suffix, width in zip(("", "_1"), widths, strict=False):
            values[f"{block}{suffix}"] = width
            values[f"OUT_{block}{suffix}"] = width // 2
    names = make_hopper_plan(spec, config).constants
    return {name: values[name] for name in names}
