"""The structure of a rendered forward kernel."""

from __future__ import annotations

import dataclasses

from flashgen.codegen.arguments import side_pointer_types
from flashgen.codegen.config import TritonForwardConfig
from flashgen.codegen.entry import EntryPlan
from flashgen.codegen.head_tiles import HeadTile, name_tiles, tile_widths
from flashgen.codegen.kernel_plan import KernelPlan, dot_options
from flashgen.codegen.mask_plan import MaskPlan, plan_mask
from flashgen.codegen.mods import division_helpers, mod_arguments, mod_lines
from flashgen.codegen.signature import SCORE_PREFIX, capture_types, constant_names, kernel_arguments
from flashgen.spec import AttentionSpec
from flashgen.spec.masks import Causal, PrefixLM


@dataclasses.dataclass(frozen=True, kw_only=True)
class ForwardPlan(KernelPlan):
    """Structure of `templates/triton/forward.py.jinja`; equal plans of one spec render to the same source.

    Attributes:
        qk_tiles: tiles of head_dim_qk.
        v_tiles: tiles of head_dim_v.
        arguments: run-time arguments of the kernel, in order.
        constants: compile-time arguments, after them.
    """

    qk_tiles: tuple[HeadTile, ...]
    v_tiles: tuple[HeadTile, ...]
    arguments: tuple[str, ...]
    constants: tuple[str, ...]

    @property
    def entries(self) -> tuple[EntryPlan, ...]:
        """The kernels of the module."""
        rows = {"q": "BLOCK_M", "k": "BLOCK_N", "v": "BLOCK_N", "out": "BLOCK_M"}
        tiles = {"q": self.qk_tiles, "k": self.qk_tiles, "v": self.v_tiles, "out": self.v_tiles}
        boxes = tuple((f"{x}{tile.suffix}_desc", (rows[x], tile.block)) for x, many in tiles.items() for tile in many)
        return (
            EntryPlan(
                name=self.entry_point,
                arguments=self.arguments,
                constants=self.constants,
                pointer_types=self.pointer_types,
                boxes=boxes if self.descriptor else (),
            ),
        )

    @property
    def lse(self) -> bool:
        """Whether the log-sum-exp of each row is written."""
        return self.spec.lse

    @property
    def longest_first(self) -> bool:
        """Whether query tiles are walked from the last, which sees most keys."""
        return any(isinstance(leaf, Causal | PrefixLM) for leaf in self.spec.mask.leaves)

    @property
    def out_descriptor(self) -> bool:
        """Whether out is written through a descriptor: packed sequences end inside a tile."""
        return self.descriptor and not self.spec.varlen

    @property
    def cleans_values(self) -> bool:
        """Whether rows of V past the sequence's end can be loaded: 0 times what lies there may be NaN."""
        return self.descriptor and (self.spec.varlen or "k" in self.spec.seqused)

    @property
    def first_row(self) -> str:
        """What is added to a query row to find it in memory."""
        return "q_start + " if self.spec.varlen else ""

    @property
    def first_key(self) -> str:
        """What is added to a key to find it in memory."""
        return "k_start + " if self.spec.varlen else ""

    @property
    def batch_index(self) -> str:
        """Index of a descriptor's outermost dimension."""
        return "0" if self.spec.varlen else "off_z"

    @property
    def accumulators(self) -> str:
        """The unnormalised outputs, one for each tile of head_dim_v."""
        return ", ".join(f"acc{tile.suffix}" for tile in self.v_tiles)

    @property
    def parts(self) -> tuple[str, ...]:
        """The device functions that the kernel calls besides its softmax, as template files."""
        spec = self.spec
        parts = [
            ("mods/floor_div", "floor_div" in self.division_helpers),
            ("mods/floor_mod", "floor_mod" in self.division_helpers),
            ("triton/parts/mask", True),
            ("triton/parts/tile_table", self.mask.table),
            ("triton/parts/kv_bounds", not self.mask.table),
            ("triton/parts/load_tile", not self.descriptor),
            ("triton/parts/store_tile", not self.out_descriptor),
            ("mods/score_softcap", spec.softcap),
            ("mods/score_function", spec.score_mod is not None),
            ("mods/score_bias", spec.bias != "none"),
            ("mods/dropout_keep", spec.dropout),
        ]
        return tuple(f"{name}.py.jinja" for name, wanted in parts if wanted)

    @property
    def loops(self) -> tuple[tuple[str, str, str], ...]:
        """The loops over the keys: whether masked, from where, to where."""
        if self.single_loop:
            return (("True", "start", "end"),)
        if self.mask.two_edges:
            return (
                ("True", "start", "full_start"),
                ("False", "full_start", "full_end"),
                ("True", "full_end", "end"),
            )
        return (("False", "start" if self.mask.table else "0", "full_end"), ("True", "full_end", "end"))

    @property
    def bounds(self) -> str:
        """What `kv_bounds` returns."""
        if self.single_loop:
            return "start, end"
        return "start, full_start, full_end, end" if self.mask.left_edge else "full_end, end"

    @property
    def loop_note(self) -> str:
        """How the key tiles are walked."""
        if self.single_loop:
            return "key tiles within the window, all masked"
        return "key tiles that every row sees, and those that need the mask"

    @property
    def table_row(self) -> str:
        """The row of the table for a query tile."""
        return self.table_row_among("num_m")

    @property
    def kv_arguments(self) -> tuple[str, ...]:
        """What the loop over the keys needs to reach K and V."""
        if self.descriptor:
            tiles = (("k", self.qk_tiles), ("v", self.v_tiles))
            return tuple(f"{name}{tile.suffix}_desc" for name, many in tiles for tile in many)
        return ("k_ptr", "v_ptr", "stride_kn", "stride_vn")

    @property
    def loop_arguments(self) -> tuple[str, ...]:
        """What the loop over the keys takes beyond accumulators, queries, K and V, positions and bounds."""
        spec = self.spec
        names = [
            *(("k_start",) if spec.varlen and self.descriptor else ()),
            *(("tile_index_ptr",) if self.mask.table else ()),
            "qk_scale",
            *(("softcap",) if spec.softcap else ()),
            *(("bias_ptr", "step_bm", *(() if spec.bias_aligned else ("step_bn",))) if spec.bias != "none" else ()),
            *(("slope",) if spec.alibi else ()),
            *(("seed", "philox_offset", "off_zh", "dropout_threshold") if spec.dropout else ()),
            *self.score_arguments,
            *self.mask_arguments,
        ]
        return tuple(names)

    @property
    def order_note(self) -> str:
        """The end of the comment on tile order."""
        return ",\n    # longest tiles first" if self.longest_first else ""


def make_forward_plan(spec: AttentionSpec, config: TritonForwardConfig) -> ForwardPlan:
    """Return the structure of the forward kernel that `spec` and `config` ask for."""
    spec = spec.structure()
    mask = plan_mask(spec.mask)
    widths_qk, widths_v = tile_widths(spec, config.head_tiles)
    qk_tiles = name_tiles("BLOCK_DQK", "HEAD_DIM_QK", widths_qk)
    v_tiles = name_tiles("BLOCK_DV", "HEAD_DIM_V", widths_v)
    score = spec.score_mod
    descriptor = config.loads == "descriptor"
    return ForwardPlan(
        title=f"attn_fwd: {_structure(spec, mask)}, {config.loads} loads.",
        template=config.template,
        entry_point="attn_fwd",
        spec=spec,
        descriptor=descriptor,
        qk_tiles=qk_tiles,
        v_tiles=v_tiles,
        single_loop=config.loops == "single" and mask.two_edges,
        mask=mask,
        score_arguments=mod_arguments(score, SCORE_PREFIX) if score else (),
        score_lines=mod_lines(score, SCORE_PREFIX) if score else (),
        division_helpers=mask.division_helpers | (division_helpers(score) if score else frozenset()),
        arguments=kernel_arguments(spec, mask, descriptor, qk_tiles, v_tiles),
        constants=constant_names(qk_tiles, v_tiles),
        pointer_types=tuple(sorted((side_pointer_types(spec) | capture_types(spec)).items())),
        dot_options=dot_options(spec.dtype),
    )


def _structure(spec: AttentionSpec, mask: MaskPlan) -> str:
    words = [f"{mask.title} mask"]
    words += ["with lse"] * spec.lse
    words += [f"with {feature}" for feature in (*(("score_mod",) if spec.score_mod else ()), *spec.features)]
    return " ".join(words)


def forward_constants(spec: AttentionSpec, config: TritonForwardConfig) -> dict[str, int]:
    """Return the value of every compile-time argument, by name."""
    values = {"HEAD_DIM_QK": spec.head_dim_qk, "HEAD_DIM_V": spec.head_dim_v}
    for block, widths in zip(("BLOCK_DQK", "BLOCK_DV"), tile_widths(spec, config.head_tiles), strict=True):
        for suffix, width in zip(("", "_1"), widths, strict=False):
            values[f"{block}{suffix}"] = width
    return values | {"BLOCK_M": config.block_m, "BLOCK_N": config.block_n}
