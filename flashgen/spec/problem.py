"""What to compute (`AttentionSpec`), how big it is (`Shape`), and both together (`Problem`)."""

from __future__ import annotations

import dataclasses
import math
import typing

from flashgen.errors import InputError
from flashgen.spec.dtypes import DType
from flashgen.spec.masks import Full, Mask

Phase = typing.Literal["forward"]
PHASES: tuple[Phase, ...] = typing.get_args(Phase)

MIN_HEAD_DIM, MAX_HEAD_DIM = 16, 256


@dataclasses.dataclass(frozen=True, kw_only=True)
class AttentionSpec:
    """The meaning of an attention kernel, without any size that changes from call to call.

    Attributes:
        phase: `forward`.
        dtype: element type of Q, K, V and out.
        head_dim_qk: columns of Q and K; a multiple of 8 from 16 to 256.
        head_dim_v: columns of V and out; likewise, need not equal head_dim_qk.
        mask: which keys a query sees.
        lse: whether the natural-log log-sum-exp of each row is written too.
    """

    dtype: DType
    head_dim_qk: int
    head_dim_v: int
    mask: Mask = Full()
    lse: bool = False
    phase: Phase = "forward"

    def __post_init__(self) -> None:
        if self.phase not in PHASES:
            raise InputError(f"phase must be one of {', '.join(PHASES)}, got {self.phase!r}")
        for name, size in (("head_dim_qk", self.head_dim_qk), ("head_dim_v", self.head_dim_v)):
            if not MIN_HEAD_DIM <= size <= MAX_HEAD_DIM or size % 8:
                raise InputError(f"{name} must be a multiple of 8 from {MIN_HEAD_DIM} to {MAX_HEAD_DIM}, got {size}")

    @property
    def default_scale(self) -> float:
        """The factor of the scores where the caller gives none: head_dim_qk ** -0.5."""
        return 1.0 / math.sqrt(self.head_dim_qk)

    def tuning_key(self) -> AttentionSpec:
        """Return the spec that tuned entries are kept under: lse adds one float per row and never moves the winner."""
        return dataclasses.replace(self, lse=False) if self.lse else self

    def __str__(self) -> str:
        dims = f"d={self.head_dim_qk}" + ("" if self.head_dim_v == self.head_dim_qk else f" dv={self.head_dim_v}")
        return f"{self.phase} {dims} {self.mask} {self.dtype}" + (" lse" if self.lse else "")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Shape:
    """The sizes of one call; seqlens and batch may be 0."""

    batch: int
    seqlen_q: int
    seqlen_k: int
    nheads_q: int
    nheads_kv: int

    def __post_init__(self) -> None:
        for field in ("batch", "seqlen_q", "seqlen_k"):
            if getattr(self, field) < 0:
                raise InputError(f"{field} must be at least 0, got {getattr(self, field)}")
        if self.nheads_q < 1 or self.nheads_kv < 1 or self.nheads_q % self.nheads_kv:
            raise InputError(
                f"nheads_q must be a positive multiple of nheads_kv, got {self.nheads_q} and {self.nheads_kv}"
            )

    @property
    def group(self) -> int:
        """How many query heads share one key/value head."""
        return self.nheads_q // self.nheads_kv

    def __str__(self) -> str:
        return f"b={self.batch} hq={self.nheads_q} hkv={self.nheads_kv} sq={self.seqlen_q} sk={self.seqlen_k}"


@dataclasses.dataclass(frozen=True, kw_only=True)
class Problem:
    """A spec at a shape: the unit that is tuned, benchmarked and looked up."""

    spec: AttentionSpec
    shape: Shape

    def flops(self) -> int:
        """Return the multiply-adds, counted twice, of the two products over the visible pairs."""
        pairs = self.spec.mask.visible_pairs(self.shape.seqlen_q, self.shape.seqlen_k)
        return 2 * pairs * (self.spec.head_dim_qk + self.spec.head_dim_v) * self.shape.batch * self.shape.nheads_q

    def min_bytes(self) -> int:
        """Return the fewest bytes that must cross device memory: each input read once, each output written once."""
        s, spec = self.shape, self.spec
        dims = spec.head_dim_qk + spec.head_dim_v
        elements = s.batch * dims * (s.nheads_q * s.seqlen_q + s.nheads_kv * s.seqlen_k)
        return elements * spec.dtype.itemsize + 4 * s.batch * s.nheads_q * s.seqlen_q * spec.lse

    def __str__(self) -> str:
        return f"{self.shape} {self.spec}"
