"""The oracle of decoding against attention written out key by key, and what it appends to a cache."""

from __future__ import annotations

import dataclasses
import math

import pytest
import torch
from torch import Tensor

from flashgen.errors import InputError
from flashgen.measure import append_to_cache, decode_reference
from flashgen.spec import AttentionSpec, Extras, parse_problem
from flashgen.spec.masks import Positions

BATCH, GROUP, NHEADS_KV, CAPACITY, SEQLEN_NEW = 3, 3, 2, 40, 2
LENGTHS = (0, 21, 38)
FEATURES = [
    "causal",
    "causal page=8",
    "causal append page=8",
    "sliding_window(5,0) append rotary=halves",
    "causal append rotary=pairs leftpad batch_idx",
    "append rotary=halves",
    "leftpad alibi",
    "causal leftpad sinks softcap batch_idx",
    "prefix_lm(6) leftpad append",
    "chunked(8) leftpad",
    "causal fp8_kv descale page=16",
]


def make_spec(words: str, dtype: str = "fp32") -> AttentionSpec:
    return parse_problem(f"b=3 hq=6 hkv=2 sq=3 sk=40 d=32 dv=16 decode {words} {dtype}").spec


def make_call(spec: AttentionSpec, seqlen_q: int = 3) -> tuple[Tensor, Tensor, Tensor, Extras]:
    """Return a call whose unused rows are NaN."""
    torch.manual_seed(0)
    dtype = getattr(torch, spec.dtype.torch_name)
    lengths = torch.tensor(LENGTHS, dtype=torch.int32)
    pages = CAPACITY // spec.page_size + 1 if spec.page_size else 0
    entries, rows = (BATCH * pages + 2, spec.page_size) if pages else (5, CAPACITY)
    table = torch.randperm(entries)[: BATCH * pages].view(BATCH, pages).int() if pages else None
    index = torch.tensor([4, 0, 2], dtype=torch.int32) if spec.batch_idx else None
    k, v = (torch.full((entries, NHEADS_KV, rows, d), math.nan, dtype=dtype) for d in (32, 16))
    padding = torch.tensor([0, 4, 11], dtype=torch.int32) if spec.leftpad else None
    for b, length in enumerate(LENGTHS):
        for n in range(int(padding[b]) if padding is not None else 0, length):
            entry, row = place(b, n, spec, table, index)
            k[entry, :, row], v[entry, :, row] = torch.randn(NHEADS_KV, 32), torch.randn(NHEADS_KV, 16)
    if spec.fp8_kv:
        k, v = k.to(torch.float8_e4m3fn), v.to(torch.float8_e4m3fn)
    angles = torch.rand(CAPACITY + SEQLEN_NEW, 8) * 6
    extras = Extras(
        softmax_scale=0.3,
        softcap=2.0 if spec.softcap else 0.0,
        alibi_slopes=torch.rand(BATCH, GROUP * NHEADS_KV) if spec.alibi else None,
        sinks=torch.randn(GROUP * NHEADS_KV) if spec.sinks else None,
        k_descale=torch.rand(BATCH, NHEADS_KV) + 0.5 if spec.descale else None,
        v_descale=torch.rand(BATCH, NHEADS_KV) + 0.5 if spec.descale else None,
        cache_seqlens=lengths,
        page_table=table,
        cache_batch_idx=index,
        cache_leftpad=padding,
        rotary_cos=angles.cos() if spec.rotary else None,
        rotary_sin=angles.sin() if spec.rotary else None,
        k_new=torch.randn(BATCH, NHEADS_KV, SEQLEN_NEW, 32, dtype=dtype) if spec.append else None,
        v_new=torch.randn(BATCH, NHEADS_KV, SEQLEN_NEW, 16, dtype=dtype) if spec.append else None,
    )
    return torch.randn(BATCH, GROUP * NHEADS_KV, seqlen_q, 32, dtype=dtype), k, v, extras


def place(b: int, n: int, spec: AttentionSpec, table: Tensor | None, index: Tensor | None) -> tuple[int, int]:
    if table is not None:
        return int(table[b, n // spec.page_size]), n % spec.page_size
    return (b if index is None else int(index[b])), n


def turned(x: Tensor, position: int, spec: AttentionSpec, extras: Extras) -> Tensor:
    """Rotate one row [head_dim] number by number."""
    assert extras.rotary_cos is not None
    assert extras.rotary_sin is not None
    cos, sin = extras.rotary_cos[position].double(), extras.rotary_sin[position].double()
    result = x.double().clone()
    for i in range(len(cos)):
        a, b = (2 * i, 2 * i + 1) if spec.rotary == "pairs" else (i, i + len(cos))
        result[a], result[b] = x[a] * cos[i] - x[b] * sin[i], x[a] * sin[i] + x[b] * cos[i]
    return result.to(x.dtype)


def by_hand(q: Tensor, k: Tensor, v: Tensor, spec: AttentionSpec, extras: Extras) -> tuple[Tensor, Tensor]:
    """Return attention of each row over a list of its keys."""
    out = torch.zeros(*q.shape[:3], v.shape[3], dtype=torch.float64)
    lse = torch.full(q.shape[:3], -math.inf, dtype=torch.float64)
    for b, h, i in torch.cartesian_prod(*(torch.arange(n) for n in q.shape[:3])).tolist():
        cached, g = LENGTHS[b], h // GROUP
        total = cached + (SEQLEN_NEW if spec.append else 0)
        row = q[b, h, i]
        if spec.rotary:
            row = turned(row, cached + (i if str(spec.mask) != "full" else 0), spec, extras)
        scores, values = [], []
        for n in range(int(extras.cache_leftpad[b]) if extras.cache_leftpad is not None else 0, total):
            if not spec.mask.sees(Positions(b=b, h=h, q_idx=i, kv_idx=n, seqlen_q=q.shape[2], seqlen_k=total)):
                continue
            if n >= cached:
                assert extras.k_new is not None
                assert extras.v_new is not None
                key, value = extras.k_new[b, g, n - cached], extras.v_new[b, g, n - cached].double()
                key = turned(key, n, spec, extras) if spec.rotary else key
            else:
                entry, r = place(b, n, spec, extras.page_table, extras.cache_batch_idx)
                key, value = k[entry, g, r], v[entry, g, r].double()
            score = row.double() @ key.double() * extras.softmax_scale
            if extras.k_descale is not None and extras.v_descale is not None:
                score, value = score * extras.k_descale[b, g].double(), value * extras.v_descale[b, g].double()
            if spec.softcap:
                score = extras.softcap * torch.tanh(score / extras.softcap)
            if extras.alibi_slopes is not None:
                score = score - extras.alibi_slopes[b, h].double() * abs(i + total - q.shape[2] - n)
            scores.append(score)
            values.append(value)
        if extras.sinks is not None:
            scores.append(extras.sinks[h].double())
            values.append(torch.zeros(v.shape[3], dtype=torch.float64))
        if scores:
            out[b, h, i] = torch.stack(scores).softmax(0) @ torch.stack(values)
            lse[b, h, i] = torch.stack(scores).logsumexp(0)
    return out, lse


@pytest.mark.parametrize("words", FEATURES)
def test_is_attention_over_the_rows_of_each_sequence(words: str) -> None:
    spec = make_spec(words)
    q, k, v, extras = make_call(spec)
    before = k.view(torch.uint8).clone(), v.view(torch.uint8).clone()
    got = decode_reference(q, k, v, spec=spec, extras=extras, precision="float64")
    torch.testing.assert_close(got, by_hand(q, k, v, spec, extras), rtol=1e-6, atol=1e-6)
    assert torch.equal(before[0], k.view(torch.uint8))
    assert torch.equal(before[1], v.view(torch.uint8))
    heads = [(2, 5), (0, 0), (1, 4)]
    some = decode_reference(q, k, v, spec=spec, extras=extras, precision="float64", heads=heads)
    torch.testing.assert_close(some, tuple(torch.stack([t[b, h] for b, h in heads]) for t in got))


@pytest.mark.parametrize("words", FEATURES)
@pytest.mark.parametrize("dtype", ["bf16", "fp16"])
def test_rounds_at_the_precision_of_the_queries(words: str, dtype: str) -> None:
    spec = make_spec(words, dtype)
    q, k, v, extras = make_call(spec)
    exact = decode_reference(q, k, v, spec=spec, extras=extras, precision="float64")
    out, lse = decode_reference(q, k, v, spec=spec, extras=extras, precision="input")
    assert out.dtype == q.dtype
    assert lse.dtype == torch.float32
    torch.testing.assert_close(out.double(), exact[0], rtol=0.05, atol=0.05)
    torch.testing.assert_close(lse.double(), exact[1], rtol=0.05, atol=0.05)
    assert not torch.equal(out.double(), exact[0])


@pytest.mark.parametrize("words", ["append", "append page=8", "append batch_idx rotary=pairs", "append rotary=halves"])
def test_a_call_after_the_append_sees_the_same_keys(words: str) -> None:
    spec = make_spec(f"{words} causal", "bf16")
    q, k, v, extras = make_call(spec)
    got = decode_reference(q, k, v, spec=spec, extras=extras, precision="input")
    append_to_cache(k, v, spec=spec, extras=extras)
    assert extras.cache_seqlens is not None
    appended = dataclasses.replace(extras, cache_seqlens=extras.cache_seqlens + SEQLEN_NEW)
    later = dataclasses.replace(spec, append=False, rotary="")
    if spec.rotary:
        rows = [
            [turned(q[b, h, i], LENGTHS[b] + i, spec, extras) for i in range(3)] for b in range(3) for h in range(6)
        ]
        q = torch.stack([torch.stack(row) for row in rows]).view(3, 6, 3, 32)
    again = decode_reference(q, k, v, spec=later, extras=appended, precision="input")
    torch.testing.assert_close(again, got, rtol=0.01, atol=0.01)
    if not spec.rotary:
        assert torch.equal(again[0], got[0])


@pytest.mark.parametrize("words", ["append", "append page=8 rotary=pairs"])
def test_append_writes_its_rows_and_no_other(words: str) -> None:
    spec = make_spec(words, "fp16")
    _, k, v, extras = make_call(spec)
    before = k.clone(), v.clone()
    append_to_cache(k, v, spec=spec, extras=extras)
    for b, length in enumerate(LENGTHS):
        for i in range(SEQLEN_NEW):
            entry, row = place(b, length + i, spec, extras.page_table, extras.cache_batch_idx)
            assert extras.k_new is not None
            assert extras.v_new is not None
            rows = extras.k_new[b, :, i]
            if spec.rotary:
                rows = torch.stack([turned(row_of_head, length + i, spec, extras) for row_of_head in rows])
            torch.testing.assert_close(k[entry, :, row], rows, rtol=1e-3, atol=0)
            assert torch.equal(v[entry, :, row], extras.v_new[b, :, i])
            k[entry, :, row], v[entry, :, row] = before[0][entry, :, row], before[1][entry, :, row]
    assert torch.equal(k.view(torch.int16), before[0].view(torch.int16))
    assert torch.equal(v.view(torch.int16), before[1].view(torch.int16))


def test_absorbed_mla_reads_the_values_from_the_keys() -> None:
    spec = parse_problem("b=1 hq=4 hkv=1 sq=1 sk=5 d=576 dv=512 decode shared_kv bf16").spec
    torch.manual_seed(0)
    q, k = torch.randn(1, 4, 1, 576, dtype=torch.bfloat16), torch.randn(1, 1, 5, 576, dtype=torch.bfloat16)
    extras = Extras(softmax_scale=0.05, cache_seqlens=torch.tensor([4], dtype=torch.int32))
    out, _ = decode_reference(q, k, k[..., :512], spec=spec, extras=extras, precision="float64")
    rows = k[0, 0, :4].double()
    expected = (q[0, :, 0].double() @ rows.T * 0.05).softmax(-1) @ rows[:, :512]
    torch.testing.assert_close(out[0, :, 0], expected)


def test_refuses_what_does_not_belong_together() -> None:
    spec = make_spec("append page=8")
    q, k, v, extras = make_call(spec)
    with pytest.raises(InputError, match="needs k_new"):
        decode_reference(q, k, v, spec=spec, extras=dataclasses.replace(extras, k_new=None), precision="float64")
    assert extras.page_table is not None
    far = dataclasses.replace(extras, page_table=extras.page_table + 100)
    with pytest.raises(InputError, match="pages 1"):
        decode_reference(q, k, v, spec=spec, extras=far, precision="float64")
    full = dataclasses.replace(extras, cache_seqlens=torch.full((BATCH,), CAPACITY + 8, dtype=torch.int32))
    with pytest.raises(InputError, match="room for 48"):
        append_to_cache(k, v, spec=spec, extras=full)
    with pytest.raises(InputError, match="cache of fp8"):
        decode_reference(q, k, v, spec=make_spec("fp8_kv"), extras=extras, precision="float64")
