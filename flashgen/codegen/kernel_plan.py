"""What the structures of all templates have in common."""

from __future__ import annotations

import abc
import dataclasses

from flashgen.codegen.entry import EntryPlan
from flashgen.codegen.mask_plan import MaskPlan
from flashgen.spec import AttentionSpec, DType


@dataclasses.dataclass(frozen=True, kw_only=True)
class KernelPlan(abc.ABC):
    """The structure of a rendered module.

    Attributes:
        title: first line of the module's docstring.
        template: template name without its suffixes.
        entry_point: the kernel that the module is known by.
        spec: what is computed, with neutral numbers.
        descriptor: tiles come through tensor descriptors, not pointers.
        single_loop: every tile is masked, in one loop between two edges.
        mask: the mask's device functions.
        score_arguments: what `score_mod` takes beyond the score and its position.
        score_lines: body of `score_mod`, empty if there is none.
        division_helpers: what users' functions call for Python's meaning of // and %.
        pointer_types: element types behind pointers that are not to Q, K or V, in Triton's words.
        dot_options: how products are computed.
    """

    title: str
    template: str
    entry_point: str
    spec: AttentionSpec
    descriptor: bool
    single_loop: bool
    mask: MaskPlan
    score_arguments: tuple[str, ...]
    score_lines: tuple[str, ...]
    division_helpers: frozenset[str]
    pointer_types: tuple[tuple[str, str], ...]
    dot_options: str

    @property
    @abc.abstractmethod
    def entries(self) -> tuple[EntryPlan, ...]:
        """The kernels of the module, in the order of their launches."""

    @property
    def modified(self) -> bool:
        """Whether more happens to a score than scaling and masking."""
        spec = self.spec
        return bool(spec.softcap or spec.score_mod or spec.bias != "none" or spec.alibi)

    @property
    def rows(self) -> str:
        """How many query rows of this batch entry are written."""
        return "rows_q" if "q" in self.spec.seqused else "SEQLEN_Q"

    @property
    def table_axes(self) -> str:
        """Which of batch (`b`) and head (`h`) the table of tiles depends on."""
        own_lengths = {"b"} if self.spec.varlen or self.spec.seqused else set()
        return "".join(sorted(self.mask.table_axes | own_lengths))

    @property
    def length_arguments(self) -> tuple[str, ...]:
        """What the table's kernel needs to know the lengths."""
        spec = self.spec
        packed = ("max_seqlen_q", "cu_seqlens_q_ptr", "cu_seqlens_k_ptr")
        used = tuple(f"seqused_{side}_ptr" for side in spec.seqused)
        return (*(packed if spec.varlen else ("SEQLEN_Q", "SEQLEN_K")), *used)

    @property
    def mask_arguments(self) -> tuple[str, ...]:
        """What the mask takes in the kernel."""
        return self.mask.arguments

    def table_row_among(self, tiles: str) -> str:
        """Return the row of a table of tiles for tile `block` of a head that has so many of them."""
        heads = {"": "", "b": f"off_z * {tiles} + ", "h": f"off_h * {tiles} + ", "bh": f"off_zh * {tiles} + "}
        return f"{heads[self.table_axes]}block"


def dot_options(dtype: DType) -> str:
    """Return the keyword of `tl.dot` that a dtype's products need."""
    if dtype is DType.FP8:
        return "max_num_imprecise_acc=32"
    return f'input_precision="{"tf32" if dtype is DType.TF32 else "ieee"}"'
