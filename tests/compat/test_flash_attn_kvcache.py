"""`flash_attn_with_kvcache` over the cases of FlashAttention's own test of it, against what those are defined to give.

The cases are those of `test_flash_attn_kvcache` in flash-attn 2.8: what they vary and over which values. On a GPU each
draw takes one structure of kernel (masks, what is appended, how the cache lies, head dimension) over all lengths.
"""

from __future__ import annotations

import dataclasses
import itertools
import math
import random

import pytest
import torch

import flashgen
from flashgen.compat.flash_attn import flash_attn_with_kvcache
from flashgen.errors import InputError
from flashgen.measure import LSE_TINY, TINY
from flashgen.spec import DType

DRAWS = 24
CASES_PER_LENGTH = 3
LENGTHS = (
    *((1, 128), (1, 339), (3, 1024), (64, 800), (64, 256), (3, 799), (64, 2048)),
    *((16, 20000), (1, 128 * 1024), (16, 128 * 1024), (128, 128)),
)
HEAD_DIMS = (32, 59, 64, 80, 128, 256)
BATCH, NHEADS = 2, 6
NHEADS_K = {"mha": 6, "mqa": 1, "gqa": 3}
# The last one is no value of the original's, only a comment in it.
PLACES = ("rows", "pages", "leftpad", "batch_idx")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Structure:
    """What of a case makes a kernel another one."""

    head_dim: int
    place: str
    rotary: str
    new_kv: bool
    alibi: bool
    local: bool
    causal: bool


@dataclasses.dataclass(frozen=True, kw_only=True)
class Case:
    """One case of the test; `rotary_fraction` is the share of the columns that turn."""

    structure: Structure
    seqlen_q: int
    seqlen_k: int
    mha_type: str
    num_splits: int
    new_as_many_as_q: bool
    rotary_fraction: float
    block_size: int = 256

    @property
    def rotary_dim(self) -> int:
        return int(self.rotary_fraction * self.structure.head_dim) // 16 * 16 if self.structure.rotary else 0


STRUCTURES = tuple(
    Structure(head_dim=head_dim, place=place, rotary=rotary, new_kv=new_kv, alibi=alibi, local=local, causal=causal)
    for head_dim, place, (rotary, new_kv), alibi, local, causal in itertools.product(
        HEAD_DIMS,
        PLACES,
        [("", False), ("", True), ("halves", True), ("pairs", True)],
        *([(False, True)] * 3),
    )
)


def case_of(structure: Structure, lengths: tuple[int, int], draw: random.Random, block_size: int = 256) -> Case:
    return Case(
        structure=structure,
        seqlen_q=lengths[0],
        seqlen_k=lengths[1],
        mha_type=draw.choice(sorted(NHEADS_K)),
        num_splits=draw.choice([1, 0]),
        new_as_many_as_q=draw.random() < 0.5,
        rotary_fraction=draw.choice([0.5, 1.0]),
        block_size=block_size,
    )


@dataclasses.dataclass(frozen=True, kw_only=True)
class Call:
    """The tensors of one case; `places` [batch, seqlen_k, 2] are the entry or page, and the row, of each key."""

    case: Case
    q: torch.Tensor
    k_cache: torch.Tensor
    v_cache: torch.Tensor
    k: torch.Tensor | None
    v: torch.Tensor | None
    cos: torch.Tensor | None
    sin: torch.Tensor | None
    cache_seqlens: torch.Tensor
    batch_idx: torch.Tensor | None
    leftpad: torch.Tensor | None
    block_table: torch.Tensor | None
    window: tuple[int, int]
    slopes: torch.Tensor | None
    places: torch.Tensor

    @property
    def seqlen_new(self) -> int:
        return 0 if self.k is None else self.k.shape[1]

    def run(self) -> tuple[torch.Tensor, torch.Tensor]:
        result = flash_attn_with_kvcache(
            self.q,
            self.k_cache,
            self.v_cache,
            self.k,
            self.v,
            rotary_cos=self.cos,
            rotary_sin=self.sin,
            cache_seqlens=self.cache_seqlens,
            cache_batch_idx=self.batch_idx,
            cache_leftpad=self.leftpad,
            block_table=self.block_table,
            causal=self.case.structure.causal,
            window_size=self.window,
            rotary_interleaved=self.case.structure.rotary == "pairs",
            alibi_slopes=self.slopes,
            num_splits=self.case.num_splits,
            return_softmax_lse=True,
        )
        assert isinstance(result, tuple)
        return result


def make(case: Case, device: str, seed: int = 0) -> Call:
    torch.manual_seed(seed)
    draw, structure = random.Random(seed), case.structure
    heads, dim, new = NHEADS_K[case.mha_type], structure.head_dim, 0

    def normal(*sizes: int) -> torch.Tensor:
        return torch.randn(sizes, device=device, dtype=torch.float16)

    if structure.new_kv:
        new = case.seqlen_q if case.new_as_many_as_q else draw.randint(1, case.seqlen_q)
    turns_by_row = (structure.causal or structure.local) and case.rotary_dim > 0
    room = case.seqlen_k - (case.seqlen_q if turns_by_row else new)
    lengths = [draw.randint(0 if structure.new_kv else 1, room) for _ in range(BATCH)]
    rows = torch.arange(case.seqlen_k, device=device)
    entry, table, batch_idx = torch.arange(BATCH, device=device)[:, None].expand(BATCH, len(rows)), None, None
    sizes = (BATCH, case.seqlen_k)
    if structure.place == "pages":
        pages = -(-case.seqlen_k // case.block_size)
        table = torch.randperm(3 * BATCH * pages, device=device, dtype=torch.int32)[: BATCH * pages].view(BATCH, pages)
        entry, rows = table.long()[:, rows // case.block_size], rows % case.block_size
        sizes = (3 * BATCH * pages, case.block_size)
    elif structure.place == "batch_idx":
        batch_idx = torch.randperm(2 * BATCH, device=device, dtype=torch.int32)[:BATCH]
        entry, sizes = batch_idx.long()[:, None].expand(BATCH, len(rows)), (2 * BATCH, case.seqlen_k)
    pads = [draw.randrange(length) if length else 0 for length in lengths] if structure.place == "leftpad" else None
    angle = torch.rand(case.seqlen_k, case.rotary_dim // 2, device=device) * 2 * math.pi
    return Call(
        case=case,
        q=normal(BATCH, case.seqlen_q, NHEADS, dim),
        k_cache=normal(*sizes, heads, dim),
        v_cache=normal(*sizes, heads, dim),
        k=normal(BATCH, new, heads, dim) if new else None,
        v=normal(BATCH, new, heads, dim) if new else None,
        cos=angle.cos().half() if case.rotary_dim else None,
        sin=angle.sin().half() if case.rotary_dim else None,
        cache_seqlens=torch.tensor(lengths, dtype=torch.int32, device=device),
        batch_idx=batch_idx,
        leftpad=None if pads is None else torch.tensor(pads, dtype=torch.int32, device=device),
        block_table=table,
        window=(draw.randrange(case.seqlen_k), draw.randrange(case.seqlen_k)) if structure.local else (-1, -1),
        slopes=torch.rand(BATCH, NHEADS, device=device) * 0.3 if structure.alibi else None,
        places=torch.stack([entry, rows.expand(BATCH, -1)], -1),
    )


def turned(x: torch.Tensor, call: Call, positions: torch.Tensor) -> torch.Tensor:
    """Return x [rows, heads, head_dim] turned by the angles of its rows' positions, rounded to its type."""
    if call.cos is None or call.sin is None:
        return x
    cos, sin = (table.double()[positions][:, None] for table in (call.cos, call.sin))
    turning, rest = x[..., : call.case.rotary_dim].double(), x[..., call.case.rotary_dim :]
    pairs = call.case.structure.rotary == "pairs"
    a, b = (turning[..., 0::2], turning[..., 1::2]) if pairs else turning.chunk(2, -1)
    found = a * cos - b * sin, a * sin + b * cos
    both = torch.stack(found, -1).flatten(-2) if pairs else torch.cat(found, -1)
    return torch.cat([both.to(x.dtype), rest], -1)


def rows_of(call: Call, b: int, used: int) -> tuple[torch.Tensor, torch.Tensor]:
    entry, row = call.places[b, :used].unbind(-1)
    return entry, row


def expected_caches(call: Call) -> tuple[torch.Tensor, torch.Tensor]:
    """Return what the caches must hold after the call; asked before it."""
    k_cache, v_cache = call.k_cache.clone(), call.v_cache.clone()
    for b, length in enumerate(call.cache_seqlens.tolist()):
        if call.k is None or call.v is None:
            break
        entry, row = (index[length:] for index in rows_of(call, b, length + call.seqlen_new))
        positions = torch.arange(length, length + call.seqlen_new, device=call.q.device)
        k_cache[entry, row], v_cache[entry, row] = turned(call.k[b], call, positions), call.v[b]
    return k_cache, v_cache


def attend(
    call: Call, caches: tuple[torch.Tensor, torch.Tensor], dtype: torch.dtype
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return out and lse, computed in `dtype` by plain PyTorch."""
    structure, outs, lses = call.case.structure, [], []
    left, right = call.window
    for b, length in enumerate(call.cache_seqlens.tolist()):
        used = length + call.seqlen_new
        keys = torch.arange(used, device=call.q.device)
        queries = torch.arange(call.case.seqlen_q, device=call.q.device)
        steps = queries if structure.causal or structure.local else torch.zeros_like(queries)
        entry, row = rows_of(call, b, used)
        k, v = (t[entry, row].repeat_interleave(NHEADS // t.shape[2], 1).transpose(0, 1).to(dtype) for t in caches)
        q = turned(call.q[b], call, length + steps).transpose(0, 1).to(dtype)
        scores = (q * structure.head_dim**-0.5) @ k.mT
        # How far ahead of the query's own position the key lies.
        ahead = keys - (queries[:, None] + used - len(queries))
        if call.slopes is not None:
            scores = scores - call.slopes[b, :, None, None].to(torch.promote_types(dtype, torch.float32)) * ahead.abs()
        hidden = torch.zeros_like(ahead, dtype=torch.bool)
        if structure.causal:
            hidden |= ahead > 0
        if structure.local:
            hidden |= (ahead < -left) | (ahead > right)
        if call.leftpad is not None:
            hidden |= keys < call.leftpad[b]
        scores = scores.masked_fill(hidden, -math.inf)
        outs.append((torch.softmax(scores, -1).nan_to_num(0.0).to(dtype) @ v).transpose(0, 1))
        lses.append(torch.logsumexp(scores.to(torch.promote_types(dtype, torch.float32)), -1))
    return torch.stack(outs), torch.stack(lses)


def fault(call: Call) -> str:
    """Run the case, and return what is wrong with what it gives or leaves in the caches; empty if nothing is."""
    wanted = expected_caches(call)
    exact, plain = (attend(call, wanted, dtype) for dtype in (torch.float64, torch.float16))
    got = call.run()
    for name, tensor, ref, pt in zip(("out", "lse"), got, exact, plain, strict=True):
        scale = float(ref[ref.isfinite()].abs().max()) if ref.isfinite().any() else 0.0
        tiny = TINY[DType.FP16] * scale if name == "out" else LSE_TINY[DType.FP16] * max(1.0, scale)
        error, allowed = (torch.where(x.double() == ref, 0.0, (x.double() - ref).abs()).max() for x in (tensor, pt))
        # Not `>`: NaN is never within it.
        if not error <= 2 * allowed + tiny:
            return f"{name} is off by {error:.3e}, plain PyTorch by {allowed:.3e}: {call.case}"
    if not torch.equal(call.v_cache, wanted[1]):
        return f"v_cache is not what it was and v: {call.case}"
    if not torch.allclose(call.k_cache, wanted[0], rtol=1e-3, atol=1e-3):
        return f"k_cache is not what it was and k: {call.case}"
    return ""


def small_case(number: int) -> Case:
    """A case with few keys, one of many structures."""
    draw = random.Random(number)
    structure = dataclasses.replace(draw.choice(STRUCTURES), head_dim=(32, 59, 64)[number % 3])
    return case_of(structure, draw.choice([(1, 40), (3, 37), (5, 64)]), draw, block_size=16)


@pytest.mark.parametrize("number", range(40))
def test_cases_in_eager_pytorch(number: int) -> None:
    assert not fault(make(small_case(number), "cpu", number))


@pytest.mark.parametrize("number", range(12))
def test_cases_in_the_interpreter(number: int) -> None:
    with flashgen.interpreting():
        assert not fault(make(small_case(number), "cpu", number))


@pytest.mark.gpu
def test_cases_on_a_gpu(draw_seed: int) -> None:
    draw = random.Random(draw_seed)
    # Every draw takes another structure, until all of them were had.
    structure = random.Random(0).sample(STRUCTURES, len(STRUCTURES))[draw_seed % len(STRUCTURES)]
    cases = [case_of(structure, lengths, draw) for lengths in LENGTHS for _ in range(CASES_PER_LENGTH)]
    faults = [fault(make(case, "cuda", seed)) for seed, case in enumerate(cases)]
    wrong = [text for text in faults if text]
    print(f"{len(cases) - len(wrong)} of {len(cases)} cases pass: {structure}")
    assert not wrong, "\n".join(wrong)


def test_one_length_scale_softcap_and_defaults() -> None:
    torch.manual_seed(0)
    q, k, v = torch.randn(2, 1, 4, 20), torch.randn(2, 12, 2, 20), torch.randn(2, 12, 2, 20)
    out = flash_attn_with_kvcache(q, k, v, cache_seqlens=7)
    assert isinstance(out, torch.Tensor)
    weights = torch.softmax(torch.einsum("bqhd,bkhd->bhqk", q, k[:, :7].repeat_interleave(2, 2)) / math.sqrt(20), -1)
    wanted = torch.einsum("bhqk,bkhd->bqhd", weights, v[:, :7].repeat_interleave(2, 2))
    torch.testing.assert_close(out, wanted)
    whole = flash_attn_with_kvcache(q, k[:, :7].contiguous(), v[:, :7].contiguous(), softcap=-1.0)
    assert isinstance(whole, torch.Tensor)
    torch.testing.assert_close(whole, wanted)
    capped = flash_attn_with_kvcache(q, k, v, cache_seqlens=7, softcap=1.0, softmax_scale=0.5)
    padded = (torch.nn.functional.pad(t, (0, 4)) for t in (q, k[:, :7], v[:, :7]))
    wanted = flashgen.attention(*padded, softcap=1.0, softmax_scale=0.5, layout="bshd")[..., :20]
    torch.testing.assert_close(capped, wanted)


def test_no_gradient_and_no_refusal_either() -> None:
    # As there: whoever decodes without torch.no_grad() gets numbers.
    q, k, v = torch.randn(1, 1, 2, 16, requires_grad=True), torch.randn(1, 8, 2, 16), torch.randn(1, 8, 2, 16)
    out = flash_attn_with_kvcache(q, k, v, cache_seqlens=5)
    assert isinstance(out, torch.Tensor)
    assert not out.requires_grad


def test_what_does_not_fit_is_refused() -> None:
    q, k, v = torch.randn(1, 1, 2, 16), torch.randn(1, 8, 2, 16), torch.randn(1, 8, 2, 16)
    with pytest.raises(InputError, match="cache_seqlens"):
        flash_attn_with_kvcache(q, k, v, k=k[:, :1], v=v[:, :1])
    with pytest.raises(InputError, match="window_size"):
        flash_attn_with_kvcache(q, k, v, window_size=(1,))
    with pytest.raises(InputError, match="page_table must be"):
        flash_attn_with_kvcache(q, k, v, block_table=torch.zeros(1, 1))
