"""What the sources of all decode kernels call the same."""

from __future__ import annotations

import dataclasses

from flashgen.codegen.head_tiles import HeadTile
from flashgen.codegen.kernel_plan import KernelPlan
from flashgen.spec import Causal
from flashgen.spec.masks import SlidingWindow

NEW_KEYS = 16
"""Rows that come with a call in one step: few, as there are few."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class DecodeNames(KernelPlan):
    """How keys are divided among programs, and what is appended.

    Attributes:
        qk_tiles: tiles of head_dim_qk.
        v_tiles: tiles of head_dim_v.
    """

    qk_tiles: tuple[HeadTile, ...]
    v_tiles: tuple[HeadTile, ...]

    @property
    def new_tensors(self) -> tuple[str, ...]:
        """What is appended to."""
        return ("k", "v") if self.spec.append else ()

    @property
    def appended(self) -> tuple[tuple[str, tuple[HeadTile, ...]], ...]:
        """What is appended to, in tiles of columns."""
        return (("k", self.qk_tiles), ("v", self.v_tiles))

    @property
    def new_apart(self) -> bool:
        """Whether keys that come with the call are attended to beside those of the cache, not in it."""
        return self.spec.append

    @property
    def queries_advance(self) -> bool:
        """Whether each query is turned by its own position, as FlashAttention does where order matters."""
        return any(isinstance(leaf, Causal | SlidingWindow) for leaf in self.spec.mask.leaves)

    @property
    def part_arguments(self) -> tuple[str, ...]:
        """What `sequence_parts` takes beyond the sequences that it is asked about."""
        spec = self.spec
        return (
            *("SEQLEN_Q", "splits", "min_blocks", "BLOCK_N", "cache_seqlens_ptr"),
            *(("seqlen_new",) if self.new_apart else ()),
            *(("cache_leftpad_ptr",) if spec.leftpad else ()),
            *self.mask.bounds_arguments,
        )

    @property
    def sequence_bounds(self) -> str:
        """What `kv_bounds` returns there, for all rows of a sequence."""
        return "start, _, _, end" if self.mask.left_edge else "_, end"
