"""The structure of a rendered forward kernel for Hopper."""

from __future__ import annotations

import dataclasses
import typing

from flashgen.codegen.arguments import side_pointer_types
from flashgen.codegen.decode_names import NEW_KEYS
from flashgen.codegen.entry import EntryPlan
from flashgen.codegen.head_tiles import name_tiles, tile_widths
from flashgen.codegen.hopper_config import (
    ROWS_OF_CONSUMER,
    Convert,
    HopperConfig,
    HopperForwardConfig,
    Queries,
    Turns,
    Walk,
)
from flashgen.codegen.hopper_names import HopperNames
from flashgen.codegen.mask_plan import plan_mask
from flashgen.codegen.mods import division_helpers, mod_arguments, mod_lines
from flashgen.codegen.signature import SCORE_PREFIX, capture_types, side_arguments
from flashgen.spec import AttentionSpec
from flashgen.spec.masks import Causal, PrefixLM

# Head dimensions are cut where two tiles are narrower than one: a wider tile costs shared memory and registers.
HEAD_TILES = 2

_ENTRY_POINTS = {"forward": "attn_fwd", "decode": "attn_decode"}


@dataclasses.dataclass(frozen=True, kw_only=True)
class HopperForwardPlan(HopperNames):
    """Structure of `templates/gluon/hopper_forward.py.jinja`; the attributes of its config are described there.

    Attributes:
        rescales_rarely: an output is rescaled only when a maximum has grown enough.
        tiles: as the config says, or `parts` of tiles where programs share the keys of one.
        one_loop: key tiles that need the mask are walked in the same loop as the others.
        gathers: a tile of keys lies in several pages of a cache, and is copied from one after the other.
    """

    queries: Queries
    turns: Turns
    convert: Convert
    rescales_rarely: bool
    tiles: Walk
    one_loop: bool
    gathers: bool

    @property
    def rows_of_copy(self) -> dict[str, str]:
        """The constants that say how many rows one copy of a tensor moves."""
        return {"q": "ROWS", "k": "BLOCK_N", "v": "BLOCK_N", "out": "ROWS"}

    @property
    def entries(self) -> tuple[EntryPlan, ...]:
        """The kernels of the module."""
        rows = self.rows_of_copy
        tiles = {"q": self.qk_tiles, "k": self.qk_tiles, "v": self.v_tiles, "out": self.v_tiles}
        columns = {"out": "OUT_"} if self.out_buffer == "half" else {}
        boxes = tuple(
            (f"{x}{tile.suffix}_desc", (rows[x], f"{columns.get(x, '')}{tile.block}"))
            for x, many in tiles.items()
            for tile in many
            if f"{x}{tile.suffix}_desc" in self.arguments
        )
        return (
            EntryPlan(
                name=self.entry_point,
                arguments=self.arguments,
                constants=self.constants,
                pointer_types=self.pointer_types,
                boxes=boxes,
                ragged=frozenset(name for name, _ in boxes if self.is_ragged(name)),
                language="gluon",
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
    def imports(self) -> tuple[tuple[str, tuple[str, ...]], ...]:
        """What the source imports, by modules of `flashgen.primitives`."""
        return (("hopper", self.primitives),)

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


def shared_fields(spec: AttentionSpec, config: HopperConfig) -> dict[str, typing.Any]:
    """Return what the plans of both phases have in common, by field; `spec` is a structure."""
    mask = plan_mask(spec.mask)
    widths_qk, widths_v = tile_widths(spec, HEAD_TILES)
    score = spec.score_mod
    entry_point = _ENTRY_POINTS[config.phase]
    words = [f"{mask.title} mask"]
    words += ["with lse"] * spec.lse
    words += [f"with {feature}" for feature in (*(("score_mod",) if score else ()), *spec.features)]
    return {
        "title": f"{entry_point}: {' '.join(words)}, {config.consumers} consumer{'s' if config.consumers > 1 else ''}.",
        "template": config.template,
        "entry_point": entry_point,
        "spec": spec,
        "descriptor": True,
        # `kv_bounds` gives the tiles that need no mask, whatever the loops.
        "single_loop": False,
        "mask": mask,
        "score_arguments": mod_arguments(score, SCORE_PREFIX) if score else (),
        "score_lines": mod_lines(score, SCORE_PREFIX) if score else (),
        "division_helpers": mask.division_helpers | (division_helpers(score) if score else frozenset()),
        "pointer_types": tuple(sorted((side_pointer_types(spec) | capture_types(spec)).items())),
        "dot_options": "",
        "consumers": config.consumers,
        "heads_of_tile": config.heads_of_tile,
        "queries": config.queries,
        "turns": config.turns,
        "convert": config.convert,
        "rescales_rarely": config.rescale > 0,
        "release": config.release,
        "one_loop": config.loops == "single" and mask.title != "full",
        "gathers": spec.page_size % config.block_n > 0,
        "qk_tiles": name_tiles("BLOCK_DQK", "HEAD_DIM_QK", widths_qk),
        "v_tiles": name_tiles("BLOCK_DV", "HEAD_DIM_V", widths_v),
    }


def make_hopper_plan(spec: AttentionSpec, config: HopperForwardConfig) -> HopperForwardPlan:
    """Return the structure of the forward kernel for Hopper that `spec` and `config` ask for."""
    spec = spec.structure()
    fields = shared_fields(spec, config)
    mask, qk_tiles, v_tiles = fields["mask"], fields["qk_tiles"], fields["v_tiles"]
    tiles = {"q": qk_tiles, "k": qk_tiles, "v": v_tiles, "out": v_tiles}
    return HopperForwardPlan(
        **fields,
        out_buffer=config.out_buffer,
        diagonal=config.diagonal,
        tiles=config.tiles,
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
            *fields["score_arguments"],
            *mask.arguments,
        ),
    )


def hopper_constants(spec: AttentionSpec, config: HopperConfig, plan: HopperForwardPlan) -> dict[str, int]:
    """Return the value of every compile-time argument of a plan of the family, by name."""
    consumer, producer = config.role_registers
    values = {
        "HEAD_DIM_QK": spec.head_dim_qk,
        "HEAD_DIM_V": spec.head_dim_v,
        "ROWS": ROWS_OF_CONSUMER,
        "BLOCK_N": config.block_n,
        "NUM_STAGES": config.num_stages,
        "RESCALE_AT": config.rescale,
        "CONSUMER_REGISTERS": consumer,
        "PRODUCER_REGISTERS": producer,
        "PAGE_SIZE": spec.page_size,
        "BLOCK_NEW": NEW_KEYS,
    }
    for block, widths in zip(("BLOCK_DQK", "BLOCK_DV"), tile_widths(spec, HEAD_TILES), strict=True):
        for suffix, width in zip(("", "_1"), widths, strict=False):
            values[f"{block}{suffix}"] = width
            values[f"OUT_{block}{suffix}"] = width // 2
    return {name: values[name] for entry in plan.entries for name in entry.constants}
