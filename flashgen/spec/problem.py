"""What to compute (`AttentionSpec`), how big it is (`Shape`), and both together (`Problem`)."""

from __future__ import annotations

import dataclasses
import math
import typing

from flashgen.errors import InputError
from flashgen.spec.dtypes import DType
from flashgen.spec.masks import Full, Mask
from flashgen.spec.mods import ModFunction

Phase = typing.Literal["forward", "backward", "decode"]
PHASES: tuple[Phase, ...] = typing.get_args(Phase)

MIN_HEAD_DIM, MAX_HEAD_DIM = 16, 512
MAX_BACKWARD_HEAD_DIM = 256
# Of decode: the latent and the rotary part of multi-head latent attention, 512 + 64.
_MAX_HEAD_DIM: dict[Phase, int] = {"forward": MAX_HEAD_DIM, "backward": MAX_BACKWARD_HEAD_DIM, "decode": 576}

Bias = typing.Literal["none", "input", "fp32", "bool"]
BIASES: tuple[Bias, ...] = typing.get_args(Bias)

Rotary = typing.Literal["", "halves", "pairs"]
ROTARIES: tuple[Rotary, ...] = typing.get_args(Rotary)

FLAGS = (
    *("softcap", "alibi", "sinks", "dropout", "varlen", "descale", "deterministic", "dbias"),
    *("append", "rotary_fp32", "leftpad", "batch_idx", "fp8_kv", "shared_kv"),
)
"""The features that a spec has or has not, by name."""
MAX_PAGE_SIZE = 2**20

_OF_DECODE = ("page_size", "append", "rotary", "rotary_fp32", "leftpad", "batch_idx", "fp8_kv", "shared_kv")
_NOT_OF_DECODE = ("bias", "dropout", "varlen", "seqused")


@dataclasses.dataclass(frozen=True, kw_only=True)
class AttentionSpec:
    """The meaning of an attention kernel, without any size that changes from call to call.

    The order of what happens to a score: scale, softcap, score_mod, bias and ALiBi, then the mask.

    Attributes:
        phase: `forward`; `backward`: the gradients, from Q, K, V, out, lse and the gradient of out; or `decode`: a few
            queries of each sequence over its cache of K and V, whose used length is known on the device alone.
        dtype: element type of Q, K, V and out, and how products are computed.
        head_dim_qk: columns of Q and K; a multiple of 8 from 16 to 512 (backward 256, decode 576).
        head_dim_v: columns of V and out; likewise, need not equal head_dim_qk.
        mask: which keys a query sees.
        score_mod: a function of (score, b, h, q_idx, kv_idx), or None.
        softcap: scores s become c * tanh(s / c); the number c is given at the call.
        bias: what is added to the scores: `none`, a tensor of Q's dtype (`input`), of float32, or `bool`, whose False
            hides a key.
        bias_aligned: rows of the bias start at whole 16 bytes and are contiguous.
        alibi: slope * |distance| is taken off, one slope a head.
        sinks: one extra logit a head in the denominator of every row.
        dropout: probabilities are dropped at random; the share is given at the call.
        varlen: Q, K and V are packed [tokens, heads, head_dim], cut by cu_seqlens.
        seqused: each batch entry uses only the first seqused_q / seqused_k of its rows: `""`, `q`, `k` or `qk`.
        descale: Q, K and V are multiplied by factors per (batch, key/value head); fp8 only, in decode
            K and V of any type.
        lse: whether the natural-log log-sum-exp of each row is written too; forward only.
        deterministic: gradients must be equal bit for bit from run to run; backward only.
        dbias: whether the gradient of the bias is asked for, too; backward only.
        page_size: keys of one page of the cache, which a table says the places of; 0: each sequence lies in one piece.
            As all that follow, decode only.
        append: keys and values of the newest positions come with the call, and are written into the cache.
        rotary: Q and the appended keys are rotated by their positions, column i together with i + rotary_dim / 2
            (`halves`) or 2 i with 2 i + 1 (`pairs`).
        rotary_fp32: the tables of their cosines and sines are float32, whatever dtype Q is of.
        leftpad: sequences start at a row of the cache of their own.
        batch_idx: sequences say which entry of the cache is theirs.
        fp8_kv: the cache holds e4m3, whatever dtype Q and out are of.
        shared_kv: V is the first head_dim_v columns of K, in the same memory: read once.
    """

    dtype: DType
    head_dim_qk: int
    head_dim_v: int
    mask: Mask = Full()
    score_mod: ModFunction | None = None
    softcap: bool = False
    bias: Bias = "none"
    bias_aligned: bool = True
    alibi: bool = False
    sinks: bool = False
    dropout: bool = False
    varlen: bool = False
    seqused: str = ""
    descale: bool = False
    lse: bool = False
    deterministic: bool = False
    dbias: bool = False
    page_size: int = 0
    append: bool = False
    rotary: Rotary = ""
    rotary_fp32: bool = False
    leftpad: bool = False
    batch_idx: bool = False
    fp8_kv: bool = False
    shared_kv: bool = False
    phase: Phase = "forward"

    def __post_init__(self) -> None:
        if self.phase not in PHASES:
            raise InputError(f"phase must be one of {', '.join(PHASES)}, got {self.phase!r}")
        for name, size in (("head_dim_qk", self.head_dim_qk), ("head_dim_v", self.head_dim_v)):
            most = _MAX_HEAD_DIM[self.phase]
            if not MIN_HEAD_DIM <= size <= most or size % 8:
                raise InputError(
                    f"{name} must be a multiple of 8 from {MIN_HEAD_DIM} to {most} ({self.phase} phase), got {size}"
                )
        if self.dtype is DType.FP8 and (self.head_dim_qk % 16 or self.head_dim_v % 16):
            raise InputError(
                f"fp8 rows are whole 16 bytes: head dimensions must be multiples of 16, got {self.head_dim_qk} and "
                f"{self.head_dim_v}"
            )
        if self.bias not in BIASES:
            raise InputError(f"bias must be one of {', '.join(BIASES)}, got {self.bias!r}")
        if self.seqused not in ("", "q", "k", "qk"):
            raise InputError(f"seqused must be '', 'q', 'k' or 'qk', got {self.seqused!r}")
        if self.descale and self.dtype is not DType.FP8 and self.phase != "decode":
            raise InputError(f"descale factors belong to fp8, got {self.dtype}")
        self._check_phase()

    def _check_phase(self) -> None:
        if self.phase != "backward" and (self.deterministic or self.dbias):
            raise InputError(f"deterministic and dbias belong to the backward phase; {self.phase} always is")
        if self.phase == "decode":
            self._check_decode()
            return
        given = [name for name in _OF_DECODE if getattr(self, name)]
        if given:
            raise InputError(f"{', '.join(given)}: of the decode phase alone, got {self.phase}")
        if self.phase == "forward":
            return
        if self.lse:
            raise InputError("lse is an output of the forward phase; the backward phase always reads it")
        if self.dtype is DType.FP8:
            raise InputError("fp8 has no backward phase: use fp16 or bf16 in training")
        if self.dbias and self.bias in ("none", "bool"):
            raise InputError(f"dbias needs a bias of numbers, got bias={self.bias}")

    def _check_decode(self) -> None:
        given = [name for name in _NOT_OF_DECODE if getattr(self, name) not in (False, "", "none")]
        if given:
            raise InputError(f"the decode phase has no {', '.join(given)}")
        if not self.mask.by_formula:
            raise InputError(
                f"the decode phase takes masks that a formula bounds (causal, windows, ...), got {self.mask}"
            )
        if self.page_size < 0 or self.page_size > MAX_PAGE_SIZE:
            raise InputError(f"page_size must be from 1 to {MAX_PAGE_SIZE}, or 0 for none, got {self.page_size}")
        if self.rotary not in ROTARIES:
            raise InputError(f"rotary must be one of {', '.join(map(repr, ROTARIES))}, got {self.rotary!r}")
        if self.rotary and not self.append:
            raise InputError("rotary turns Q and the keys that are appended: it needs append")
        if self.rotary_fp32 and not self.rotary:
            raise InputError("rotary_fp32 says of what type the tables of rotary are: it needs rotary")
        if self.dtype is DType.FP8:
            raise InputError("decode takes Q in fp16, bf16 or fp32; of the cache alone say fp8_kv")
        if self.fp8_kv and (self.append or self.head_dim_qk % 16 or self.head_dim_v % 16):
            raise InputError(
                "fp8_kv takes head dimensions of whole 16 columns, and no append: scale and write new keys first"
            )
        if self.shared_kv and (self.append or self.head_dim_v > self.head_dim_qk):
            raise InputError("shared_kv: V is the first columns of K, and nothing is appended")

    @property
    def default_scale(self) -> float:
        """The factor of the scores where the caller gives none: head_dim_qk ** -0.5."""
        return 1.0 / math.sqrt(self.head_dim_qk)

    @property
    def features(self) -> tuple[str, ...]:
        """What the spec has beyond dtype, head dimensions, mask and score_mod, in the words of `parse_problem`."""
        words = [name for name in FLAGS if getattr(self, name)]
        if self.bias != "none":
            words.append(f"bias={self.bias}" + ("" if self.bias_aligned else ":unaligned"))
        if self.seqused:
            words.append(f"seqused={self.seqused}")
        if self.page_size:
            words.append(f"page={self.page_size}")
        if self.rotary:
            words.append(f"rotary={self.rotary}")
        return tuple(words)

    def tuning_key(self) -> AttentionSpec:
        """Return the spec that tuned entries are kept under: without what never moves the winner.

        lse, sinks, seqused and descale cost a few numbers per row or tile, as do pages, padding and what is appended;
        dbias is a kernel of its own, and tensors are no part of a key.
        """
        return dataclasses.replace(
            self.without_tensors(),
            lse=False,
            sinks=False,
            seqused="",
            descale=False,
            bias_aligned=True,
            dbias=False,
            page_size=0,
            append=False,
            rotary="",
            rotary_fp32=False,
            leftpad=False,
            batch_idx=False,
        )

    def backward(self, *, deterministic: bool = False, dbias: bool = False) -> AttentionSpec:
        """Return the spec of the gradients of this forward one.

        Raises:
            InputError: if it has none (fp8, head dimensions above 256).
        """
        return dataclasses.replace(self, phase="backward", lse=False, deterministic=deterministic, dbias=dbias)

    def forward(self) -> AttentionSpec:
        """Return the spec of the forward pass, with lse, whose gradients this backward one computes."""
        return dataclasses.replace(self, phase="forward", lse=True, deterministic=False, dbias=False)

    @property
    def kv_dtype(self) -> DType:
        """The type of K and V in memory."""
        return DType.FP8 if self.fp8_kv else self.dtype

    def without_tensors(self) -> AttentionSpec:
        """Return the spec without the tensors that its mask and score_mod hold."""
        score_mod = self.score_mod and self.score_mod.without_tensors()
        return dataclasses.replace(self, mask=self.mask.structure(keep_numbers=True), score_mod=score_mod)

    def structure(self) -> AttentionSpec:
        """Return the spec with neutral numbers in its mask: equal ones share their source and their binary."""
        return dataclasses.replace(self.without_tensors(), mask=self.mask.structure())

    def __str__(self) -> str:
        dims = f"d={self.head_dim_qk}" + ("" if self.head_dim_v == self.head_dim_qk else f" dv={self.head_dim_v}")
        words = [self.phase, dims, str(self.mask), *([str(self.score_mod)] if self.score_mod else []), *self.features]
        return " ".join([*words, str(self.dtype), *(["lse"] if self.lse else [])])


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
        """Return the multiply-adds, counted twice, of the products over the visible pairs: two, or five backward."""
        pairs = sum(self.spec.mask.visible_pairs(seqlen_q, seqlen_k) for seqlen_q, seqlen_k in self.lengths())
        return self.flops_of(pairs * self.shape.nheads_q)

    def flops_of(self, pairs: int) -> int:
        """Return the same for so many visible pairs over all heads."""
        spec = self.spec
        # Backward: the scores again, dQ and dK over head_dim_qk; dP and dV over head_dim_v.
        times_qk, times_v = (3, 2) if spec.phase == "backward" else (1, 1)
        return 2 * pairs * (times_qk * spec.head_dim_qk + times_v * spec.head_dim_v)

    def lengths(self) -> tuple[tuple[int, int], ...]:
        """Return (seqlen_q, seqlen_k) of each batch entry.

        Packed sequences have the shape's lengths as their longest. What they are tuned on, and what is counted here,
        are lengths spread evenly from the longest to half of it.
        """
        batch, seqlen_q, seqlen_k = self.shape.batch, self.shape.seqlen_q, self.shape.seqlen_k
        if not self.spec.varlen:
            return ((seqlen_q, seqlen_k),) * batch
        shares = [1 - z / (2 * batch) for z in range(batch)]
        return tuple((math.ceil(seqlen_q * share), math.ceil(seqlen_k * share)) for share in shares)

    def min_bytes(self) -> int:
        """Return the fewest bytes that must cross device memory: each input read once, each output written once."""
        s, spec = self.shape, self.spec
        dims = spec.head_dim_qk + spec.head_dim_v
        rows_q, rows_k = (sum(lengths) for lengths in zip(*self.lengths(), strict=True)) if s.batch else (0, 0)
        if spec.phase == "decode":
            rows = s.nheads_q * rows_q
            cache = s.batch * s.nheads_kv * self._keys_seen() * (spec.head_dim_qk if spec.shared_kv else dims)
            return dims * rows * spec.dtype.itemsize + 4 * rows * spec.lse + cache * spec.kv_dtype.itemsize
        inputs = s.nheads_q * rows_q * spec.head_dim_qk + s.nheads_kv * rows_k * dims
        if spec.phase == "backward":
            # Each input has a gradient of its size; out and its gradient are read, and lse.
            rows = 2 * s.nheads_q * rows_q * spec.head_dim_v
            return (2 * inputs + rows) * spec.dtype.itemsize + 4 * s.nheads_q * rows_q
        outputs = s.nheads_q * rows_q * spec.head_dim_v * spec.dtype.out.itemsize + 4 * s.nheads_q * rows_q * spec.lse
        return inputs * spec.dtype.itemsize + outputs

    def _keys_seen(self) -> int:
        """Return how many keys of a sequence lie between the first and the last that any of its queries sees."""
        seqlen_q, seqlen_k = self.shape.seqlen_q, self.shape.seqlen_k
        rows = (self.spec.mask.row_interval(row, seqlen_q, seqlen_k) for row in {0, max(0, seqlen_q - 1)})
        ends = [interval or (0, seqlen_k) for interval in rows]
        return max(0, min(max(hi for _, hi in ends), seqlen_k) - max(min(lo for lo, _ in ends), 0))

    def __str__(self) -> str:
        return f"{self.shape} {self.spec}"
