"""Problems as one line of text."""

from __future__ import annotations

import itertools

import pytest

from flashgen.errors import InputError
from flashgen.spec import AttentionSpec, DType, Problem, Shape, causal, full, parse_dtype, parse_mask, parse_problem

SHAPES = (
    Shape(batch=4, seqlen_q=4096, seqlen_k=4096, nheads_q=32, nheads_kv=8),
    Shape(batch=1, seqlen_q=1, seqlen_k=8192, nheads_q=7, nheads_kv=1),
    Shape(batch=0, seqlen_q=0, seqlen_k=0, nheads_q=1, nheads_kv=1),
)
MASKS = (full(), causal(), causal("top_left"))


def test_every_problem_reads_back_as_it_was() -> None:
    for shape, mask, dtype, lse, (d, dv) in itertools.product(
        SHAPES, MASKS, DType, (False, True), ((128, 128), (192, 128), (16, 256))
    ):
        spec = AttentionSpec(dtype=dtype, head_dim_qk=d, head_dim_v=dv, mask=mask, lse=lse)
        problem = Problem(spec=spec, shape=shape)
        assert parse_problem(str(problem)) == problem


def test_documented_example() -> None:
    problem = parse_problem("b=4 hq=32 hkv=8 sq=4096 sk=2048 d=128 causal bf16")
    assert problem.shape == Shape(batch=4, seqlen_q=4096, seqlen_k=2048, nheads_q=32, nheads_kv=8)
    assert problem.spec == AttentionSpec(dtype=DType.BF16, head_dim_qk=128, head_dim_v=128, mask=causal())


@pytest.mark.parametrize(
    ("short", "long"),
    [
        ("h=8 s=256 d=64", "b=1 hq=8 hkv=8 sq=256 sk=256 d=64 dv=64 full bf16 forward"),
        ("hq=8 sq=256 d=64", "b=1 hq=8 hkv=8 sq=256 sk=256 d=64"),
        ("h=8 hkv=2 s=256 sk=512 d=64", "hq=8 hkv=2 sq=256 sk=512 d=64"),
        ("b=2,h=8,s=256,d=64,fp16", "fp16 d=64 s=256 h=8 b=2"),
        ("h=1 s=1 d=16 float16 lse", "h=1 s=1 d=16 fp16 lse"),
    ],
)
def test_short_forms(short: str, long: str) -> None:
    assert parse_problem(short) == parse_problem(long)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "must give hq="),
        ("hq=8 s=128", "must give hq="),
        ("s=128 d=64", "must give hq="),
        ("hq=8 d=64", "must give hq="),
        ("h=8 s=128 d=64 sliding", "'sliding' is no part of a shape"),
        ("h=8 s=128 d=64 x=3", "'x=3' is no part of a shape"),
        ("h=8 s=128 d=64 fp64", "'fp64' is no part of a shape"),
        ("h=8 s=128 d=64 d=128", "d= is given twice"),
        ("h=8 s=12.5 d=64", "s= takes a whole number"),
        ("h=8 s=-1 d=64", "s= takes a whole number"),
        ("h=8 s= d=64", "s= takes a whole number"),
        ("h=8 s=128 d=64 causal(align=left)", r"unknown mask 'causal\(align=left\)'"),
        ("h=8 s=128 d=68", "head_dim_qk must be a multiple of 8 from 16 to 256, got 68"),
        ("h=8 s=128 d=64 dv=264", "head_dim_v must be a multiple of 8 from 16 to 256, got 264"),
        ("hq=6 hkv=4 s=128 d=64", "nheads_q must be a positive multiple of nheads_kv, got 6 and 4"),
        ("h=0 s=128 d=64", "nheads_q must be a positive multiple"),
    ],
)
def test_bad_text_says_what_is_wrong(text: str, message: str) -> None:
    with pytest.raises(InputError, match=message):
        parse_problem(text)


@pytest.mark.parametrize("words", ["bf16 fp16", "fp16 fp16", "full causal", "causal causal(align=top_left)"])
def test_a_mask_or_dtype_given_twice_is_refused(words: str) -> None:
    with pytest.raises(InputError, match="twice"):
        parse_problem(f"h=8 s=128 d=64 {words}")


def test_masks_and_dtypes_read_back() -> None:
    assert all(parse_mask(str(mask)) == mask for mask in MASKS)
    for dtype in DType:
        assert all(parse_dtype(t) is dtype for t in (str(dtype), dtype.torch_name, f"torch.{dtype.torch_name}"))


def test_unknown_mask_and_dtype_list_what_is_known() -> None:
    with pytest.raises(InputError, match=r"unknown mask 'window'; known: full, causal, causal\(align=top_left\)"):
        parse_mask("window")
    with pytest.raises(InputError, match="unknown dtype 'int8'; allowed: fp16, bf16, fp32"):
        parse_dtype("int8")
