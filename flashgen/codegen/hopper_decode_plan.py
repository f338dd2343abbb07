"""The structure of a rendered decode kernel for Hopper."""

from __future__ import annotations

import dataclasses

from flashgen.codegen.decode_names import DecodeNames
from flashgen.codegen.entry import EntryPlan
from flashgen.codegen.hopper_config import APPEND_ROWS, HopperDecodeConfig
from flashgen.codegen.hopper_plan import HopperForwardPlan, shared_fields
from flashgen.spec import AttentionSpec

# Of a part of a tile, in the order in which they are handed out.
_PART = (
    *("off_z", "off_h", "start_m", "SEQLEN_K", "lo", "hi", "slot", "tile"),
    *("first_slot", "first_program", "last_program", "member", "members", "ends"),
)


@dataclasses.dataclass(frozen=True, kw_only=True)
class HopperDecodePlan(HopperForwardPlan, DecodeNames):
    """Structure of `templates/gluon/hopper_decode.py.jinja`: that of the forward kernel, whose loop it has.

    Rows are not packed: a tile has queries of one head, or of several of a group, with the same keys. What a call
    appends is in the caches by then: another kernel, which is launched first, writes it there and rotates.
    """

    @property
    def rows_of_copy(self) -> dict[str, str]:
        """The constants that say how many rows one copy of a tensor moves."""
        return super().rows_of_copy | (dict.fromkeys("kv", "PAGE_SIZE") if self.gathers else {})

    @property
    def entries(self) -> tuple[EntryPlan, ...]:
        """The kernels of the module, in the order of their launches."""
        return (*([self._append_entry] if self.spec.append else []), *super().entries)

    @property
    def _append_entry(self) -> EntryPlan:
        return EntryPlan(
            name=APPEND_ROWS,
            arguments=self.append_arguments,
            constants=self.append_constants,
            pointer_types=self.pointer_types,
        )

    @property
    def append_arguments(self) -> tuple[str, ...]:
        """Run-time arguments of the kernel that appends, in order."""
        spec, caches = self.spec, self.cache_pointers
        queries = ("q_ptr", "q_turned_ptr", "stride_qz", "stride_qh", "stride_qm", "nheads_q", "SEQLEN_Q")
        return (
            *(f"{x}_ptr" for x in caches),
            *(f"{x}_new_ptr" for x in caches),
            *("cache_seqlens_ptr", "lengths_ptr", "batch", "nheads_kv", "seqlen_new"),
            *(f"stride_{x}{axis}" for x in caches for axis in "zhn"),
            *(f"stride_{x}_new_{axis}" for x in caches for axis in "zhn"),
            *self._page_arguments,
            *((*queries, "rotary_cos_ptr", "rotary_sin_ptr", "step_rotary", "rotary_dim") if spec.rotary else ()),
        )

    @property
    def append_constants(self) -> tuple[str, ...]:
        """Compile-time arguments of the kernel that appends."""
        blocks = tuple(tile.block for tile in (*self.qk_tiles, *self.v_tiles))
        return ("HEAD_DIM_QK", "HEAD_DIM_V", *blocks, "BLOCK_NEW", *(("PAGE_SIZE",) if self.spec.page_size else ()))

    @property
    def cache_pointers(self) -> tuple[str, ...]:
        """The caches that are reached by pointers: those that are written."""
        return self.new_tensors

    @property
    def new_apart(self) -> bool:
        """Never: new keys are in the cache by then."""
        return False

    def is_ragged(self, name: str) -> bool:
        """Whether a descriptor, or the one of a tensor, ends sequences at their own last row: the caches'."""
        return name.startswith(("k", "v"))

    @property
    def out_buffers(self) -> tuple[str, ...]:
        """None: rows are merged in another layout than they are computed in, and written as they are."""
        return ()

    @property
    def heads(self) -> str:
        """How many heads a sequence has, or bundles of heads that one tile has."""
        return "nheads_q" if self.heads_of_tile == 1 else f"(nheads_q // {self.heads_of_tile})"

    @property
    def position(self) -> str:
        """What is handed out of a part."""
        return ", ".join(_PART)

    @property
    def received(self) -> tuple[tuple[int, str], ...]:
        """What a consumer takes of it, with their places."""
        return tuple(enumerate(_PART, start=1))

    @property
    def key_range(self) -> str:
        """What `key_tiles` tells a consumer, which has its own first and last key tile."""
        return f"_, {'' if self.mask.left_edge else '_'}full_lo, full_hi, _"

    @property
    def key_loops(self) -> tuple[tuple[str, str], ...]:
        """The loops over the keys after the first tile: masked ones are few of very many."""
        loops = super().key_loops
        if self.mask.left_edge or len(loops) == 1:
            return loops
        masked, (_, _), _ = loops
        return (masked, ("False", "gl.minimum(hi - 1, full_hi) - lo"))

    @property
    def branches(self) -> bool:
        """Never: there are three loops, or two."""
        return False

    @property
    def own_keys(self) -> bool:
        """Never: consumers walk all keys of a part."""
        return False

    @property
    def _page_arguments(self) -> tuple[str, ...]:
        spec = self.spec
        entry = ("cache_batch_idx_ptr",) if spec.batch_idx else ()
        return ("page_table_ptr", "step_pages") if spec.page_size else entry

    @property
    def producer_arguments(self) -> tuple[str, ...]:
        """What the producer takes beyond the rings."""
        copied = [name for name in self.arguments if name.endswith("_desc")]
        names = (
            *("batch", "nheads_q", "group", "rows_k", "rows_v", "lanes", "waits"),
            *self.part_arguments,
            *self._page_arguments,
        )
        return (*copied, *(name for name in dict.fromkeys(names) if name != "BLOCK_N"))

    @property
    def consumer_arguments(self) -> tuple[str, ...]:
        """What a consumer takes beyond the rings and the way out."""
        copied = {name for name in self.arguments if name.endswith("_desc")}
        unused = {*copied, "batch", "group", "rows_k", "rows_v", "splits", "min_blocks", "cache_seqlens_ptr"}
        return tuple(name for name in self.arguments if name not in unused | {*self._page_arguments})

    @property
    def row_arguments(self) -> tuple[str, ...]:
        """What `write_rows` takes beyond sums and their position."""
        spec = self.spec
        lse = ("lse_ptr", "nheads_q") if spec.lse else ()
        sinks = ("sinks_ptr",) if spec.sinks else ()
        return ("out_ptr", *(f"stride_o{axis}" for axis in "zhm"), "SEQLEN_Q", *lse, *sinks)

    @property
    def constants(self) -> tuple[str, ...]:
        """The compile-time arguments."""
        return ("HEAD_DIM_V", *super().constants, *(("PAGE_SIZE",) if self.spec.page_size else ()))

    @property
    def primitives(self) -> tuple[str, ...]:
        """What the source imports from `flashgen.primitives.hopper`."""
        return tuple(sorted({*super().primitives, "RAGGED"} - {"store_wait", "write_tile"}))

    @property
    def imports(self) -> tuple[tuple[str, tuple[str, ...]], ...]:
        """What the source imports, by modules of `flashgen.primitives`."""
        return (*super().imports, ("hopper_decode", ("add", "meet", "row_layout")))

    @property
    def parts(self) -> tuple[str, ...]:
        """The device functions, as template files in the order of the source."""
        own = {
            "gluon/parts/tile_position": ("triton/parts/sequence_parts", "gluon/parts/find_share"),
            "gluon/parts/producer": ("gluon/parts/producer_of_parts",),
            "gluon/parts/write_out": ("gluon/parts/parts_of_tile",),
        }
        names = (name.removesuffix(".py.jinja") for name in super().parts)
        parts = (part for name in names for part in own.get(name, (name,)))
        return tuple(f"{part}.py.jinja" for part in (*parts, *self._append_parts))

    @property
    def _append_parts(self) -> tuple[str, ...]:
        if not self.spec.append:
            return ()
        rotated = ("load_rotated",) if self.spec.rotary else ()
        return tuple(
            f"triton/parts/{name}" for name in ("cache_rows", "load_rows", *rotated, "store_rows", APPEND_ROWS)
        )


def make_hopper_decode_plan(spec: AttentionSpec, config: HopperDecodeConfig) -> HopperDecodePlan:
    """Return the structure of the decode kernel for Hopper that `spec` and `config` ask for."""
    spec = spec.structure()
    fields = shared_fields(spec, config)
    tiles = {"q": fields["qk_tiles"], "k": fields["qk_tiles"], "v": fields["v_tiles"]}
    return HopperDecodePlan(
        **fields,
        out_buffer="own",
        diagonal="whole",
        tiles="parts",
        arguments=(
            *(f"{name}{tile.suffix}_desc" for name, many in tiles.items() for tile in many),
            *("out_ptr", *(("lse_ptr",) if spec.lse else ()), *(f"stride_o{axis}" for axis in "zhm")),
            *("qk_scale", "batch", "nheads_q", "group", "SEQLEN_Q", "rows_k", "rows_v"),
            *("splits", "lanes", "waits", "min_blocks", "cache_seqlens_ptr", "partial_ptr", "arrivals_ptr"),
            *(("softcap",) if spec.softcap else ()),
            *(("alibi_ptr", "step_alibi_z") if spec.alibi else ()),
            *(("sinks_ptr",) if spec.sinks else ()),
            *(("page_table_ptr", "step_pages") if spec.page_size else ()),
            *(("cache_batch_idx_ptr",) if spec.batch_idx else ()),
            *fields["score_arguments"],
            *fields["mask"].arguments,
        ),
    )
