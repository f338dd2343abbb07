"""The structure of a rendered backward module."""

from __future__ import annotations

import dataclasses

from flashgen.codegen.arguments import side_pointer_types
from flashgen.codegen.backward_entries import dbias_entry, delta_entry, dkdv_entry, dq_entry
from flashgen.codegen.config import QueryGradient, TritonBackwardConfig
from flashgen.codegen.entry import EntryPlan
from flashgen.codegen.kernel_plan import KernelPlan, dot_options
from flashgen.codegen.mask_plan import plan_mask
from flashgen.codegen.mods import division_helpers, mod_arguments, mod_lines
from flashgen.codegen.signature import SCORE_PREFIX, capture_types
from flashgen.spec import AttentionSpec
from flashgen.spec.masks import Causal, PrefixLM
from flashgen.spec.mods import derivative


@dataclasses.dataclass(frozen=True, kw_only=True)
class BackwardPlan(KernelPlan):
    """Structure of `templates/triton/backward.py.jinja`; equal plans of one spec render to the same source.

    Attributes:
        dq_source: where dQ comes from, as in the config.
        masks_all: every tile is masked, in one loop.
        derivative_lines: body of `score_derivative`, empty if there is no score_mod.
    """

    dq_source: QueryGradient
    masks_all: bool
    derivative_lines: tuple[str, ...]

    @property
    def entries(self) -> tuple[EntryPlan, ...]:
        return (
            self.delta,
            self.dkdv,
            *((self.dq,) if self.own_dq else ()),
            *((self.dbias,) if self.spec.dbias else ()),
        )

    @property
    def own_dq(self) -> bool:
        """Whether dQ has a kernel of its own."""
        return self.dq_source == "kernel"

    @property
    def ordered(self) -> bool:
        """Whether key tiles add to dQ one after the other."""
        return self.dq_source == "ordered"

    @property
    def dq_descriptor(self) -> bool:
        """Whether the adding to dQ is done by bulk copies, which end at no known time."""
        return self.descriptor and self.dq_source == "atomic"

    @property
    def bent(self) -> bool:
        """Whether a score is more than its product scaled and shifted: then its derivative is not a constant."""
        return self.spec.softcap or self.spec.score_mod is not None

    @property
    def longest_first(self) -> bool:
        """Whether query tiles are walked from the last, which sees most keys."""
        return any(isinstance(leaf, Causal | PrefixLM) for leaf in self.spec.mask.leaves)

    @property
    def guards_rows(self) -> bool:
        """Whether statistics of rows past the last one are another sequence's, or of no use."""
        return self.spec.varlen or "q" in self.spec.seqused

    @property
    def moves_batch(self) -> bool:
        """Whether a pointer is moved to the batch entry, as those of packed tensors are not."""
        return not self.spec.varlen or self.spec.bias != "none"

    @property
    def moves_head(self) -> bool:
        """Whether the loop over query heads moves a pointer to each of them."""
        adds_by_pointer = not (self.own_dq or self.dq_descriptor)
        return not self.descriptor or adds_by_pointer or self.spec.varlen or self.spec.bias != "none"

    @property
    def keys(self) -> str:
        """How many keys of this batch entry have a gradient to be written."""
        return "keys_k" if "k" in self.spec.seqused else "SEQLEN_K"

    def first_row(self, name: str) -> str:
        """Where the rows of this batch entry begin in a tensor of queries."""
        return self._first(name, "q_start", "m")

    def first_key(self, name: str) -> str:
        """Where the rows of this batch entry begin in a tensor of keys."""
        return self._first(name, "k_start", "n")

    def _first(self, name: str, start: str, row: str) -> str:
        return f"{start}.to(tl.int64) * stride_{name}{row}" if self.spec.varlen else f"z * stride_{name}z"

    @property
    def parts(self) -> tuple[str, ...]:
        """The device functions that the kernels call, as template files."""
        spec = self.spec
        parts = [
            ("mods/floor_div", "floor_div" in self.division_helpers),
            ("mods/floor_mod", "floor_mod" in self.division_helpers),
            ("triton/parts/mask", True),
            ("triton/parts/tile_table", self.mask.table),
            ("triton/parts/q_bounds", not self.mask.table),
            ("triton/parts/kv_bounds", not self.mask.table and self.own_dq),
            ("triton/parts/load_tile", True),
            ("triton/parts/store_tile", True),
            ("mods/score_softcap", spec.softcap),
            ("mods/score_function", spec.score_mod is not None),
            ("mods/score_derivative", spec.score_mod is not None),
            ("mods/score_bias", spec.bias != "none"),
            ("mods/dropout_keep", spec.dropout),
        ]
        return tuple(f"{name}.py.jinja" for name, wanted in parts if wanted)

    # What the loops take.

    @property
    def score_inputs(self) -> tuple[str, ...]:
        """What `probabilities` takes beyond products, positions and lengths."""
        spec = self.spec
        bias = ("bias_ptr", "step_bm", *(() if spec.bias_aligned else ("step_bn",)))
        return (
            "qk_scale",
            *(("softcap",) if spec.softcap else ()),
            *(bias if spec.bias != "none" else ()),
            *(("slope",) if spec.alibi else ()),
            *self.score_arguments,
            *self.mask_arguments,
        )

    @property
    def score_values(self) -> tuple[str, ...]:
        """The same where the bias of a head has a name of its own."""
        return tuple("bias_head" if name == "bias_ptr" else name for name in self.score_inputs)

    @property
    def _dropout(self) -> tuple[str, ...]:
        names = ("seed", "philox_offset", "dropout_threshold", "dropout_scale")
        return names if self.spec.dropout else ()

    @property
    def row_loop_arguments(self) -> tuple[str, ...]:
        """What the loop over query rows takes beyond tensors, positions and bounds."""
        return (*(("row_index_ptr",) if self.mask.table else ()), *self._dropout, *self.score_inputs)

    @property
    def row_loop_values(self) -> tuple[str, ...]:
        """What it is given for them."""
        return (*(("row_index_ptr",) if self.mask.table else ()), *self._dropout, *self.score_values)

    @property
    def key_loop_arguments(self) -> tuple[str, ...]:
        """What the loop over keys takes beyond tensors, positions and bounds."""
        return (*(("tile_index_ptr",) if self.mask.table else ()), *self._dropout, *self.score_inputs)

    @property
    def kv_arguments(self) -> tuple[str, ...]:
        """What the loop over keys needs to reach K and V."""
        return ("k_desc", "v_desc") if self.descriptor else ("k_ptr", "v_ptr", "stride_kn", "stride_vn")

    @property
    def _query_names(self) -> tuple[tuple[str, str], ...]:
        """What the loop over query rows needs to reach them, and what it is given: names within one head."""
        head = {"q_ptr": "q_head", "do_ptr": "do_head", "dq_ptr": "dq_head", "turn_ptr": "turn_head"}
        rows = {"lse2_ptr": "lse2_ptr + row_head", "delta_ptr": "delta_ptr + row_head"}
        names = ["q_desc", "do_desc"] if self.descriptor else ["q_ptr", "do_ptr", "stride_qm", "stride_dom"]
        names += ["lse2_ptr", "delta_ptr"]
        if not self.own_dq:
            names += ["dq_desc"] if self.dq_descriptor else ["dq_ptr", "stride_dqm"]
        if self.ordered:
            names.append("turn_ptr")
        given = head | rows
        return tuple((name, given.get(name, name)) for name in names)

    @property
    def query_arguments(self) -> tuple[str, ...]:
        """What the loop over query rows needs to reach Q, dO, their statistics and dQ."""
        return tuple(name for name, _ in self._query_names)

    @property
    def query_values(self) -> tuple[str, ...]:
        """What it is given for them."""
        return tuple(value for _, value in self._query_names)

    # Which loops there are: whether masked, from where, to where.

    @property
    def row_loops(self) -> tuple[tuple[str, str, str], ...]:
        """The loops over the query rows of one head."""
        if self.mask.table:
            return (("False", "start", "full_end"), ("True", "full_end", "end"))
        if self.masks_all:
            return (("True", "start", "end"),)
        loops = (("True", "start", "full_start"), ("False", "full_start", "full_end"))
        # Only what has a first key for each row has a last row for each key.
        return (*loops, ("True", "full_end", "end")) if self.mask.left_edge else loops

    @property
    def row_bounds(self) -> str:
        """What `q_bounds` returns; `_` before what the loops have no use for."""
        if self.masks_all:
            return "start, _full_start, _full_end, end"
        return f"start, full_start, full_end, {'end' if self.mask.left_edge else '_end'}"

    @property
    def key_loops(self) -> tuple[tuple[str, str, str], ...]:
        """The loops over the keys of one query tile."""
        if self.mask.table:
            return (("False", "start", "full_end"), ("True", "full_end", "end"))
        if self.masks_all:
            return (("True", "start" if self.single_loop else "0", "end"),)
        if self.mask.left_edge:
            return (
                ("True", "start", "full_start"),
                ("False", "full_start", "full_end"),
                ("True", "full_end", "end"),
            )
        return (("False", "0", "full_end"), ("True", "full_end", "end"))

    @property
    def key_bounds(self) -> str:
        """What `kv_bounds` returns."""
        if self.single_loop:
            return "start, end"
        if self.mask.left_edge:
            return "start, full_start, full_end, end"
        return "_full_end, end" if self.masks_all else "full_end, end"

    @property
    def table_row(self) -> str:
        """The row of the table of key tiles for a query tile."""
        return self.table_row_among("num_m")

    @property
    def row_table_row(self) -> str:
        """The row of the table of query tiles for a key tile."""
        return self.table_row_among("num_n")

    # The kernels.

    @property
    def delta(self) -> EntryPlan:
        """The kernel of delta = rowsum(dO * O)."""
        return delta_entry(self)

    @property
    def dkdv(self) -> EntryPlan:
        """The kernel of dK and dV."""
        return dkdv_entry(self)

    @property
    def dq(self) -> EntryPlan:
        """The kernel of dQ."""
        return dq_entry(self)

    @property
    def dbias(self) -> EntryPlan:
        """The kernel of dbias."""
        return dbias_entry(self)


def make_backward_plan(spec: AttentionSpec, config: TritonBackwardConfig) -> BackwardPlan:
    """Return the structure that `spec` and `config` ask for; numbers of the mask do not matter."""
    spec = spec.structure()
    mask = plan_mask(spec.mask)
    score = spec.score_mod
    slope = derivative(score) if score else None
    helpers = mask.division_helpers
    for mod in (score, slope):
        helpers = helpers | (division_helpers(mod) if mod else frozenset())
    words = [f"{mask.title} mask", *(["score_mod"] if score else []), *spec.features]
    masks_all = config.loops == "single" and not mask.table
    return BackwardPlan(
        title=f"attn_bwd: {' with '.join(words)}, dQ by {config.dq}, {config.loads} loads.",
        template=config.template,
        entry_point="attn_bwd_dkdv",
        spec=spec,
        descriptor=config.loads == "descriptor",
        single_loop=masks_all and mask.two_edges,
        mask=mask,
        score_arguments=mod_arguments(score, SCORE_PREFIX) if score else (),
        score_lines=mod_lines(score, SCORE_PREFIX) if score else (),
        derivative_lines=mod_lines(slope, SCORE_PREFIX) if slope else (),
        division_helpers=helpers,
        pointer_types=tuple(sorted((side_pointer_types(spec) | capture_types(spec)).items())),
        dot_options=dot_options(spec.dtype),
        dq_source=config.dq,
        masks_all=masks_all,
    )
