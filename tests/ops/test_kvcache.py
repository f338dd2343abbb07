"""`attention_with_kvcache` on CPU tensors: in eager PyTorch, in the interpreter, and what it makes of its arguments."""

from __future__ import annotations

import contextlib
import dataclasses
import typing

import pytest
import torch
from torch._subclasses import FakeTensor, FakeTensorMode

import flashgen
from flashgen.codegen import TritonDecodeConfig
from flashgen.measure import CacheOracle, DecodeCall, Oracle, random_decode_call
from flashgen.ops import run_decode_call
from flashgen.ops.call import Layout, encode_config
from flashgen.spec import masks, parse_problem

SIZES = "b=3 hq=6 hkv=2 sq=2 sk=37 d=32 decode"
FEATURES = [
    "full fp32 lse",
    "causal fp16 lse append",
    "causal bf16 lse page=8 append rotary=halves",
    "causal fp16 lse append rotary=pairs rotary_fp32",
    "sliding_window(5,0) fp32 lse append rotary=pairs leftpad batch_idx",
    "causal fp32 alibi sinks softcap leftpad",
    "causal bf16 lse fp8_kv descale page=16",
    "causal fp16 lse page=4 append alibi",
    "full bf16 lse d=48 dv=32 shared_kv",
]
SMALL = TritonDecodeConfig(block_m=16, block_n=16, num_warps=1, num_stages=1, programs=1)


def make_call(words: str, *, layout: Layout = "bshd", seed: int = 0) -> DecodeCall:
    text = f"{SIZES} {words}" if "dv=" not in words else f"b=3 hq=6 hkv=2 sq=2 sk=37 decode {words}"
    return random_decode_call(parse_problem(text), device="cpu", seed=seed, ragged=True, layout=layout)


def judge(call: DecodeCall, layout: Layout, *, config: str = "") -> None:
    oracle = Oracle(call.q, call.k, call.v, spec=call.problem.spec, extras=call.extras)
    caches = CacheOracle(call)
    out, lse = run_decode_call(call, layout=layout, config=config)
    report = oracle.judge(out.transpose(1, 2) if layout == "bshd" else out, lse)
    assert report.ok, report.reason
    assert not caches.fault()


@pytest.mark.parametrize("words", FEATURES)
def test_eager(words: str) -> None:
    layout: Layout = "bshd" if len(words) % 2 else "bhsd"
    judge(make_call(words, layout=layout), layout)


@pytest.mark.parametrize("words", FEATURES)
def test_interpreted(words: str) -> None:
    # Bytes come in tiles of 32 at least; K and V that share memory are cut alike.
    config = dataclasses.replace(SMALL, block_n=32 if "fp8" in words else 16, head_tiles=2 if "shared" in words else 1)
    with flashgen.interpreting():
        judge(make_call(words), "bshd", config=encode_config(config))


@pytest.mark.parametrize("splits", [1, 3, 32])
def test_interpreted_splits(splits: int) -> None:
    call = make_call("causal fp32 lse append")
    call = dataclasses.replace(call, extras=dataclasses.replace(call.extras, num_splits=splits))
    with flashgen.interpreting():
        judge(call, "bshd", config=encode_config(SMALL))


def test_the_choice_of_config_in_the_interpreter_is_flashgen_s() -> None:
    with flashgen.interpreting():
        judge(make_call("causal fp16 lse"), "bshd")


Tensors = tuple[torch.Tensor, torch.Tensor, torch.Tensor]


def tensors(*, seqlen_q: int = 2, rows: int = 24, entries: int = 2, dtype: torch.dtype = torch.float32) -> Tensors:
    generator = torch.Generator().manual_seed(0)
    sizes = ((2, seqlen_q, 6, 32), (entries, rows, 2, 32), (entries, rows, 2, 32))
    q, k, v = (torch.randn(size, generator=generator).to(dtype) for size in sizes)
    return q, k, v


def lengths(*numbers: int) -> torch.Tensor:
    return torch.tensor(numbers, dtype=torch.int32)


def dense(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, used: int, **options: typing.Any) -> torch.Tensor:
    """What attention over the first rows of a cache gives."""
    return flashgen.attention(q, k[:, :used], v[:, :used], layout="bshd", **options)


def test_one_length_for_all_and_none() -> None:
    q, k, v = tensors()
    want = dense(q, k, v, 10)
    torch.testing.assert_close(flashgen.attention_with_kvcache(q, k, v, cache_seqlens=10), want)
    torch.testing.assert_close(flashgen.attention_with_kvcache(q, k, v, cache_seqlens=lengths(10, 10)), want)
    torch.testing.assert_close(flashgen.attention_with_kvcache(q, k, v), dense(q, k, v, 24))


def test_heads_before_rows() -> None:
    q, k, v = tensors()
    got, lse = flashgen.attention_with_kvcache(
        *(t.transpose(1, 2).contiguous() for t in (q, k, v)),
        cache_seqlens=7,
        causal=True,
        layout="bhsd",
        return_lse=True,
    )
    torch.testing.assert_close(got.transpose(1, 2), dense(q, k, v, 7, causal=True))
    assert lse.shape == (2, 6, 2)


def test_appended_keys_are_attended_to_and_kept() -> None:
    q, k, v = tensors()
    before = k.clone()
    k_new, v_new = torch.randn(2, 3, 2, 32), torch.randn(2, 3, 2, 32)
    got = flashgen.attention_with_kvcache(q, k, v, k=k_new, v=v_new, cache_seqlens=lengths(4, 21), causal=True)
    for b, start in enumerate((4, 21)):
        assert torch.equal(k[b, start : start + 3], k_new[b])
        assert torch.equal(v[b, start : start + 3], v_new[b])
        one = slice(b, b + 1)
        torch.testing.assert_close(got[one], dense(q[one], k[one], v[one], start + 3, causal=True))
    before[0, 4:7], before[1, 21:] = k_new
    assert torch.equal(k, before)


def test_more_entries_than_sequences() -> None:
    q, k, v = tensors(entries=5)
    got = flashgen.attention_with_kvcache(q, k, v, cache_seqlens=9)
    torch.testing.assert_close(got, dense(q, k[:2], v[:2], 9))


def test_one_causal_query_is_one_without_a_mask() -> None:
    q, k, v = tensors(seqlen_q=1)
    causal = flashgen.explain_with_kvcache(q, k, v, cache_seqlens=lengths(3, 5), causal=True)
    assert causal.problem == flashgen.explain_with_kvcache(q, k, v, cache_seqlens=lengths(3, 5)).problem
    top_left = flashgen.explain_with_kvcache(q, k, v, cache_seqlens=lengths(3, 5), mask=masks.causal("top_left"))
    assert str(top_left.problem.spec.mask) == "causal(align=top_left)"


def test_explain_says_what_is_asked() -> None:
    q, k, v = tensors(seqlen_q=3)
    table = torch.zeros(2, 5, dtype=torch.int32)
    new = torch.zeros(2, 1, 2, 32)
    found = flashgen.explain_with_kvcache(q, k, v, k=new, v=new, cache_seqlens=lengths(3, 5), page_table=table)
    assert found.config.template == "triton/decode"
    spec, shape = found.problem.spec, found.problem.shape
    assert (spec.page_size, spec.append, spec.phase) == (24, True, "decode")
    assert (shape.seqlen_q, shape.seqlen_k, shape.group) == (3, 5 * 24, 3)


def test_shared_memory_is_found_out() -> None:
    q, k, _ = (torch.cat([t, t[..., :16]], -1) for t in tensors())
    asked = {"cache_seqlens": lengths(3, 24)}
    assert flashgen.explain_with_kvcache(q, k, k[..., :32], **asked).problem.spec.shared_kv
    assert flashgen.explain_with_kvcache(q, k, k, **asked).problem.spec.shared_kv
    assert not flashgen.explain_with_kvcache(q, k, k[..., 16:], **asked).problem.spec.shared_kv
    assert not flashgen.explain_with_kvcache(q, k, k.clone(), **asked).problem.spec.shared_kv
    # Tiles of K are 32 and 16 columns wide: none of them is V's.
    assert not flashgen.explain_with_kvcache(q, k, k[..., :16], **asked).problem.spec.shared_kv
    for columns in (16, 32, 48):
        with flashgen.interpreting():
            got = flashgen.attention_with_kvcache(q, k, k[..., :columns], **asked)
        want = flashgen.attention_with_kvcache(q, k, k[..., :columns].contiguous(), **asked)
        torch.testing.assert_close(got, want)


def test_factors_of_float8_caches() -> None:
    q, k, v = tensors(dtype=torch.bfloat16)
    k8, v8 = k.to(torch.float8_e4m3fn), v.to(torch.float8_e4m3fn)
    factors = torch.tensor([[0.5, 2.0], [1.5, 1.0]])
    got = flashgen.attention_with_kvcache(q, k8, v8, cache_seqlens=11, k_descale=factors, v_descale=3.0)
    wide = k8.bfloat16() * factors[:, None, :, None].bfloat16(), v8.bfloat16() * 3
    torch.testing.assert_close(got, dense(q, *wide, 11), rtol=0.03, atol=0.03)
    plain = flashgen.attention_with_kvcache(q, k8, v8, cache_seqlens=11)
    torch.testing.assert_close(plain, dense(q, k8.bfloat16(), v8.bfloat16(), 11), rtol=0.03, atol=0.03)


@pytest.mark.parametrize("interpreted", [False, True])
def test_a_negative_scale(interpreted: bool) -> None:
    q, k, v = tensors()
    with flashgen.interpreting() if interpreted else contextlib.nullcontext():
        got = flashgen.attention_with_kvcache(q, k, v, cache_seqlens=9, softmax_scale=-0.3)
    torch.testing.assert_close(got, dense(q, k, v, 9, softmax_scale=-0.3))


def test_nothing_to_see() -> None:
    q, k, v = tensors()
    sinks = torch.randn(6)
    out, lse = flashgen.attention_with_kvcache(q, k[:, :0], v[:, :0], cache_seqlens=0, sinks=sinks, return_lse=True)
    assert not out.any()
    torch.testing.assert_close(lse, sinks[None, :, None].expand(2, 6, 2))
    empty = flashgen.attention_with_kvcache(q[:0], k[:0], v[:0])
    assert empty.shape == (0, 2, 6, 32)
    none = flashgen.attention_with_kvcache(q[:, :0], k, v)
    assert none.shape == (2, 0, 6, 32)


def test_strides_of_q_and_tables_do_not_matter() -> None:
    q, k, v = tensors()
    used = lengths(7, 24)
    want = flashgen.attention_with_kvcache(q, k, v, cache_seqlens=used)
    turned = q.transpose(-1, -2).contiguous().transpose(-1, -2)
    every_other = torch.stack([used, used], 1)[:, 0]
    for interpreted in (False, True):
        with flashgen.interpreting() if interpreted else contextlib.nullcontext():
            got = flashgen.attention_with_kvcache(turned, k, v, cache_seqlens=every_other)
        torch.testing.assert_close(got, want)


def test_a_score_mod_and_a_plain_function() -> None:
    q, k, v = tensors()
    tilt = torch.tensor([0.1, -0.2, 0.3, 0.0, 0.5, -0.5])
    got = flashgen.attention_with_kvcache(
        q, k, v, cache_seqlens=9, causal=True, score_mod=lambda score, b, h, q_idx, kv_idx: score + tilt[h] * kv_idx
    )
    want = dense(q, k, v, 9, causal=True, score_mod=lambda score, b, h, q_idx, kv_idx: score + tilt[h] * kv_idx)
    torch.testing.assert_close(got, want)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_autocast_takes_the_type_of_the_cache(dtype: torch.dtype) -> None:
    q, k, v = tensors(dtype=dtype)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        got = flashgen.attention_with_kvcache(q.float(), k, v, cache_seqlens=9)
        eighths = flashgen.attention_with_kvcache(q, *(t.to(torch.float8_e4m3fn) for t in (k, v)), cache_seqlens=9)
    assert torch.equal(got, flashgen.attention_with_kvcache(q, k, v, cache_seqlens=9))
    assert eighths.dtype == torch.bfloat16


def test_fake_tensors() -> None:
    with FakeTensorMode():
        out, lse = flashgen.attention_with_kvcache(*tensors(), cache_seqlens=lengths(3, 5), return_lse=True)
    assert isinstance(out, FakeTensor)
    assert (out.shape, lse.shape) == ((2, 2, 6, 32), (2, 6, 2))


def test_whoever_saved_the_cache_for_a_backward_pass_is_told() -> None:
    q, k, v = tensors()
    weight = torch.ones((), requires_grad=True)
    loss = (weight * k).sum()
    new = torch.randn(2, 1, 2, 32)
    flashgen.attention_with_kvcache(q, k, v, k=new, v=new, cache_seqlens=3)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


def test_caches_of_inference_mode() -> None:
    with torch.inference_mode():
        q, k, v = tensors()
        new = torch.randn(2, 1, 2, 32)
        out = flashgen.attention_with_kvcache(q, k, v, k=new, v=new, cache_seqlens=3)
    assert out.is_inference()
    assert torch.equal(k[:, 3:4], new)
