"""The structure of a rendered decode kernel."""

from __future__ import annotations

import dataclasses

from flashgen.codegen.arguments import element_type, side_pointer_types
from flashgen.codegen.config import TritonDecodeConfig
from flashgen.codegen.decode_names import NEW_KEYS, DecodeNames
from flashgen.codegen.entry import EntryPlan
from flashgen.codegen.head_tiles import HeadTile, name_tiles, tile_widths
from flashgen.codegen.kernel_plan import dot_options
from flashgen.codegen.mask_plan import plan_mask
from flashgen.codegen.mods import division_helpers, mod_arguments, mod_lines
from flashgen.codegen.signature import SCORE_PREFIX, capture_types
from flashgen.spec import AttentionSpec

# Sequences whose lengths a warp looks at together.
_SEQUENCES = 32
# Registers of a thread for what is read at once of a piece of a tile that several programs merge.
_MERGED_REGISTERS = 64
_WARP = 32


@dataclasses.dataclass(frozen=True, kw_only=True)
class DecodePlan(DecodeNames):
    """Structure of `templates/triton/decode.py.jinja`; equal plans of one spec render to the same source.

    Attributes:
        one_loop: every key tile is masked, in one loop.
        dependent: the kernel waits for what ran before it, and lets what comes after it start early.
    """

    one_loop: bool
    dependent: bool

    @property
    def entries(self) -> tuple[EntryPlan, ...]:
        """The one kernel of the module."""
        boxes = tuple(
            (f"{x}{tile.suffix}_desc", ("BLOCK_N", tile.block)) for x, tiles in self._cache_tiles for tile in tiles
        )
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
    def _cache_tiles(self) -> tuple[tuple[str, tuple[HeadTile, ...]], ...]:
        of_k = ("k", self.qk_tiles)
        return (of_k,) if self.spec.shared_kv else (of_k, ("v", self.v_tiles))

    @property
    def cache_pointers(self) -> tuple[str, ...]:
        """The caches that are reached by pointers."""
        by_pointer = not self.descriptor or self.spec.append
        return tuple(x for x, _ in self._cache_tiles) if by_pointer else ()

    @property
    def cached(self) -> str:
        """How many keys of a sequence the cache holds when the kernel starts."""
        return "cached" if self.spec.append else "SEQLEN_K"

    @property
    def arguments(self) -> tuple[str, ...]:
        """Run-time arguments of the kernel, in order."""
        spec = self.spec
        caches = [f"{x}_ptr" for x in self.cache_pointers]
        if self.descriptor:
            caches += [f"{x}{tile.suffix}_desc" for x, tiles in self._cache_tiles for tile in tiles]
        strides = [f"stride_{x}{axis}" for x in self.cache_pointers for axis in "zhn"]
        score = mod_arguments(spec.score_mod, SCORE_PREFIX) if spec.score_mod else ()
        return (
            "q_ptr",
            *caches,
            "out_ptr",
            *(("lse_ptr",) if spec.lse else ()),
            *(f"stride_q{axis}" for axis in "zhm"),
            *strides,
            *(f"stride_o{axis}" for axis in "zhm"),
            *("qk_scale", "batch", *(("nheads_q",) if spec.lse else ()), "nheads_kv", "group", "SEQLEN_Q"),
            *("splits", "lanes", "waits", "min_blocks"),
            *("cache_seqlens_ptr", "partial_ptr", "arrivals_ptr"),
            *(("softcap",) if spec.softcap else ()),
            *(("alibi_ptr", "step_alibi_z") if spec.alibi else ()),
            *(("sinks_ptr",) if spec.sinks else ()),
            *(("k_descale_ptr", "v_descale_ptr") if spec.descale else ()),
            *(("page_table_ptr", "step_pages") if spec.page_size else ()),
            *(("cache_batch_idx_ptr",) if spec.batch_idx else ()),
            *(("cache_leftpad_ptr",) if spec.leftpad else ()),
            *(f"{x}_new_ptr" for x in self.new_tensors),
            *(f"stride_{x}_new_{axis}" for x in self.new_tensors for axis in "zhn"),
            *(("seqlen_new",) if spec.append else ()),
            *(("rotary_cos_ptr", "rotary_sin_ptr", "step_rotary", "rotary_dim") if spec.rotary else ()),
            *score,
            *self.mask.arguments,
        )

    @property
    def constants(self) -> tuple[str, ...]:
        """Compile-time arguments, after them."""
        pages = ("PAGE_SIZE",) if self.spec.page_size else ()
        blocks = [tile.block for tile in (*self.qk_tiles, *self.v_tiles)]
        new = ("BLOCK_NEW",) if self.spec.append else ()
        merged = ("MERGED_PARTS", "MERGED_ROWS", "MERGED_COLUMNS")
        numbers = ("BLOCK_M", "BLOCK_N", *new, "BLOCK_Z", *merged, "NUM_STAGES", *pages)
        return ("HEAD_DIM_QK", "HEAD_DIM_V", *blocks, *numbers)

    @property
    def loop_constants(self) -> tuple[str, ...]:
        """Compile-time arguments of the loop over the keys of the cache."""
        pages = ("PAGE_SIZE",) if self.spec.page_size else ()
        return (*self._columns, "BLOCK_N", *pages)

    @property
    def new_constants(self) -> tuple[str, ...]:
        """Compile-time arguments of the loop over the keys of the call."""
        return (*self._columns, "BLOCK_NEW")

    @property
    def _columns(self) -> tuple[str, ...]:
        return ("HEAD_DIM_QK", "HEAD_DIM_V", *(tile.block for tile in (*self.qk_tiles, *self.v_tiles)))

    @property
    def value_constants(self) -> tuple[str, ...]:
        """Compile-time arguments of what stores partial outputs."""
        return ("HEAD_DIM_V", *(tile.block for tile in self.v_tiles), "BLOCK_M")

    @property
    def loop_arguments(self) -> tuple[tuple[str, str], ...]:
        """What the loop over the keys of the cache takes, by its name there, and what the kernel gives it."""
        spec = self.spec
        if self.descriptor:
            names = [f"{x}{tile.suffix}_desc" for x, tiles in self._cache_tiles for tile in tiles]
            pairs = [(name, name) for name in (*names, *(() if spec.page_size else ("entry",)), "off_hkv")]
        else:
            axes = "zn" if spec.page_size else "n"
            pairs = [(f"{x}_ptr", f"{x}_head") for x in self.cache_pointers]
            pairs += [(f"stride_{x}{axis}",) * 2 for x in self.cache_pointers for axis in axes]
        pairs += [("page_table_ptr", "pages")] if spec.page_size else []
        return (*pairs, *self._score_pairs)

    @property
    def new_arguments(self) -> tuple[tuple[str, str], ...]:
        """The same of the loop over the keys of the call."""
        rotary = ("rotary_cos_ptr", "rotary_sin_ptr", "step_rotary", "rotary_dim") if self.spec.rotary else ()
        return (
            *((f"{x}_new_ptr", f"{x}_new") for x in self.new_tensors),
            *((f"stride_{x}_new_n",) * 2 for x in self.new_tensors),
            *((name, name) for name in rotary),
            *self._score_pairs,
        )

    @property
    def _score_pairs(self) -> tuple[tuple[str, str], ...]:
        spec = self.spec
        names = [*(["cached"] if spec.append else []), *(["pad"] if spec.leftpad else [])]
        return (
            *((name, name) for name in (*names, "off_z")),
            ("off_h", "heads[:, None]"),
            ("q_idx", "offs_m[:, None]"),
            ("SEQLEN_Q", "SEQLEN_Q"),
            ("SEQLEN_K", "SEQLEN_K"),
            ("qk_scale", "scale" if spec.descale else "qk_scale"),
            *((("softcap", "softcap"),) if spec.softcap else ()),
            *((("slope", "slope[:, None]"),) if spec.alibi else ()),
            *((name, name) for name in (*self.score_arguments, *self.mask_arguments)),
        )

    @property
    def descriptor_row(self) -> str:
        """Where a descriptor finds a tile of keys: all indices but the column."""
        return "page, off_hkv, n % PAGE_SIZE" if self.spec.page_size else "entry, off_hkv, n"

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
            ("triton/parts/kv_bounds", True),
            ("triton/parts/sequence_parts", True),
            ("triton/parts/page_of", spec.page_size > 0),
            ("triton/parts/cache_rows", bool(self.cache_pointers)),
            ("triton/parts/load_rows", True),
            ("triton/parts/load_rotated", bool(spec.rotary)),
            ("triton/parts/store_rows", True),
            ("triton/parts/write_out", True),
            ("triton/parts/partial_sums", True),
            ("mods/score_softcap", spec.softcap),
            ("mods/score_function", spec.score_mod is not None),
        ]
        return tuple(f"{name}.py.jinja" for name, wanted in parts if wanted)

    @property
    def _two_edges(self) -> bool:
        return self.mask.left_edge or self.spec.leftpad

    @property
    def adjusts_edges(self) -> bool:
        """Whether the keys that every row sees may end before they begin."""
        return self._two_edges and (self.spec.append or self.spec.leftpad) and not self.one_loop

    @property
    def bounds(self) -> str:
        """What `kv_bounds` returns for a tile of rows."""
        full = "_" if self.one_loop else "full_end"
        if self.mask.left_edge:
            return f"start, {'_' if self.one_loop else 'full_start'}, {full}, end"
        return f"{full}, end"

    @property
    def loops(self) -> tuple[tuple[str, str, str, str], ...]:
        """The loops over the keys: whether masked, from where, to where, in how many stages."""
        end = "tl.minimum(stop, end)"
        if self.one_loop:
            start = "tl.maximum(begin, start)" if self._two_edges else "begin"
            return (("True", start, end, "NUM_STAGES"),)
        tail = ("True", "tl.maximum(begin, full_end)", end, "2")
        if not self._two_edges:
            return (("False", "begin", "tl.minimum(stop, full_end)", "NUM_STAGES"), tail)
        return (
            ("True", "tl.maximum(begin, start)", "tl.minimum(stop, full_start)", "2"),
            ("False", "tl.maximum(begin, full_start)", "tl.minimum(stop, full_end)", "NUM_STAGES"),
            tail,
        )

    @property
    def loop_note(self) -> str:
        """How the key tiles are walked."""
        return (
            "key tiles, all masked" if self.one_loop else "key tiles that every row sees, and those that need the mask"
        )


def make_decode_plan(spec: AttentionSpec, config: TritonDecodeConfig) -> DecodePlan:
    """Return the structure of the decode kernel that `spec` and `config` ask for."""
    spec = spec.structure()
    mask = plan_mask(spec.mask)
    widths_qk, widths_v = tile_widths(spec, config.head_tiles)
    score = spec.score_mod
    types = side_pointer_types(spec) | capture_types(spec)
    if spec.fp8_kv:
        types |= dict.fromkeys(("k_ptr", "v_ptr"), element_type(spec.kv_dtype))
    words = [f"{mask.title} mask", *["with lse"] * spec.lse]
    words += [f"with {feature}" for feature in (*(("score_mod",) if score else ()), *spec.features)]
    return DecodePlan(
        title=f"attn_decode: {' '.join(words)}, {config.loads} loads.",
        template=config.template,
        entry_point="attn_decode",
        spec=spec,
        descriptor=config.loads == "descriptor",
        qk_tiles=name_tiles("BLOCK_DQK", "HEAD_DIM_QK", widths_qk),
        v_tiles=name_tiles("BLOCK_DV", "HEAD_DIM_V", widths_v),
        single_loop=False,
        one_loop=config.loops == "single",
        dependent=config.launch == "dependent",
        mask=mask,
        score_arguments=mod_arguments(score, SCORE_PREFIX) if score else (),
        score_lines=mod_lines(score, SCORE_PREFIX) if score else (),
        division_helpers=mask.division_helpers | (division_helpers(score) if score else frozenset()),
        pointer_types=tuple(sorted(types.items())),
        dot_options=dot_options(spec.dtype),
    )


def decode_constants(spec: AttentionSpec, config: TritonDecodeConfig) -> dict[str, int]:
    """Return the value of every compile-time argument, by name."""
    values = {"HEAD_DIM_QK": spec.head_dim_qk, "HEAD_DIM_V": spec.head_dim_v}
    for block, widths in zip(("BLOCK_DQK", "BLOCK_DV"), tile_widths(spec, config.head_tiles), strict=True):
        for suffix, width in zip(("", "_1"), widths, strict=False):
            values[f"{block}{suffix}"] = width
    elements = max(1, _MERGED_REGISTERS * _WARP * config.num_warps // config.merge_parts)
    # A row for each warp: nothing is exchanged between them.
    columns = min(max(1, elements // config.num_warps), *tile_widths(spec, config.head_tiles)[1])
    return {
        **values,
        "BLOCK_M": config.block_m,
        "BLOCK_N": config.block_n,
        "BLOCK_NEW": min(config.block_n, NEW_KEYS),
        "BLOCK_Z": _SEQUENCES,
        "MERGED_PARTS": config.merge_parts,
        "MERGED_ROWS": min(config.block_m, elements // columns),
        "MERGED_COLUMNS": columns,
        "NUM_STAGES": config.num_stages,
        "PAGE_SIZE": spec.page_size,
    }
