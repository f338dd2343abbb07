"""Problems as one line of text."""

from __future__ import annotations

import dataclasses
import itertools

import pytest

from flashgen.errors import InputError
from flashgen.spec import AttentionSpec, DType, Problem, Shape, causal, parse_dtype, parse_mask, parse_problem
from flashgen.spec.mods import parse_mod
from flashgen.spec.text import split_words, with_features

SHAPES = (
    Shape(batch=4, seqlen_q=4096, seqlen_k=4096, nheads_q=32, nheads_kv=8),
    Shape(batch=1, seqlen_q=1, seqlen_k=8192, nheads_q=7, nheads_kv=1),
    Shape(batch=0, seqlen_q=0, seqlen_k=0, nheads_q=1, nheads_kv=1),
)
# A function with what a careless reader of words would trip over: blanks, commas, brackets, quotes, operators.
MASK_MOD = "mask_mod('x = (q_idx * 2, kv_idx); return ids[b, q_idx] == ids[b, kv_idx]', ids='int32[b,any]')"
MASKS = tuple(
    map(
        parse_mask,
        (
            *(
                "full",
                "causal",
                "causal(align=top_left)",
                "sliding_window(127,0)",
                "sliding_window(-1,3)",
                "~chunked(64)",
            ),
            *("causal&document", "(causal|document(batched))&prefix_lm(10)", "dilated_window(8,0,2)&chunked(16)"),
            *("global_tokens(4)|sliding_window(64,64)", MASK_MOD.replace("x = (q_idx * 2, kv_idx); ", "")),
            "mask_mod('return (kv_idx <= q_idx) | (q_idx < 3)')&document",
        ),
    )
)
SCORE_MODS = (
    None,
    parse_mod("score_mod('return score + bias[h] * (q_idx - kv_idx)', bias='float32[h]')"),
    parse_mod("score_mod('return score * 0.5')"),
)
FEATURES: tuple[dict[str, object], ...] = (
    {},
    {"softcap": True},
    {"alibi": True, "sinks": True},
    {"dropout": True, "varlen": True, "seqused": "qk"},
    {"bias": "input"},
    {"bias": "fp32", "bias_aligned": False, "seqused": "q"},
    {"bias": "bool", "softcap": True, "seqused": "k"},
)


def test_every_problem_reads_back_as_it_was() -> None:
    for mask, score_mod, features in itertools.product(MASKS, SCORE_MODS, FEATURES):
        spec = AttentionSpec(dtype=DType.BF16, head_dim_qk=64, head_dim_v=64, mask=mask, score_mod=score_mod)
        problem = Problem(spec=dataclasses.replace(spec, **features), shape=SHAPES[0])
        assert parse_problem(str(problem)) == problem
    for shape, dtype, lse, (d, dv) in itertools.product(
        SHAPES, DType, (False, True), ((128, 128), (192, 128), (16, 512))
    ):
        spec = AttentionSpec(dtype=dtype, head_dim_qk=d, head_dim_v=dv, lse=lse, descale=dtype is DType.FP8)
        problem = Problem(spec=spec, shape=shape)
        assert parse_problem(str(problem)) == problem


DECODE_FIELDS = ("page_size", "append", "rotary", "rotary_fp32", "leftpad", "batch_idx", "fp8_kv", "shared_kv")


@pytest.mark.parametrize("field", dataclasses.fields(AttentionSpec), ids=lambda field: field.name)
def test_no_field_of_a_spec_is_lost(field: dataclasses.Field[object]) -> None:
    plain = AttentionSpec(dtype=DType.FP8, head_dim_qk=64, head_dim_v=64, bias="input")
    other: dict[str, object] = {
        **{"dtype": DType.BF16, "head_dim_qk": 96, "head_dim_v": 96, "mask": MASKS[-1], "score_mod": SCORE_MODS[-1]},
        **{"bias": "bool", "bias_aligned": False, "seqused": "q", "page_size": 16, "rotary": "pairs"},
    }
    if field.name == "phase":
        assert parse_problem("h=1 s=1 d=16 forward").spec.phase == "forward"
        assert parse_problem("h=1 s=1 d=16 backward").spec.phase == "backward"
        return
    if field.name in ("deterministic", "dbias"):
        plain = dataclasses.replace(plain, dtype=DType.BF16, phase="backward")
    if field.name in DECODE_FIELDS:
        plain = AttentionSpec(dtype=DType.BF16, head_dim_qk=64, head_dim_v=64, phase="decode")
        if field.name.startswith("rotary"):
            plain = dataclasses.replace(plain, append=True, rotary="halves")
    spec = dataclasses.replace(plain, **{field.name: other.get(field.name, True)})
    assert spec != plain
    assert parse_problem(str(Problem(spec=spec, shape=SHAPES[0]))).spec == spec


def test_features_read_back() -> None:
    for dtype, features in itertools.product((DType.FP16, DType.FP8), FEATURES):
        plain = AttentionSpec(dtype=dtype, head_dim_qk=64, head_dim_v=64)
        spec = dataclasses.replace(plain, descale=dtype is DType.FP8, **features)
        assert with_features(plain, spec.features) == spec
        assert with_features(plain, reversed(spec.features)) == spec


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
        ("b=2,h=8,s=256,d=64,sliding_window(127,0),fp16", "b=2 h=8 s=256 d=64 sliding_window( 127 , 0 ) fp16"),
        ("h=8 s=256 d=64 document & causal", "h=8 s=256 d=64 causal&document"),
        ("h=8 s=256 d=64 causal &document softcap", "h=8 s=256 d=64 softcap causal& document"),
        ("h=8 s=256 d=64 ~ ( causal | document )", "h=8 s=256 d=64 ~(causal|document)"),
        ("h=8 s=256 d=64 sliding_window(left=3, right=0)", "h=8 s=256 d=64 sliding_window(3,0)"),
        ("alibi h=8 tf32 s=256 causal&sliding_window(4,4) d=64", "h=8 s=256 d=64 sliding_window(4,0) alibi tf32"),
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
        ("h=8 s=128 d=64 sliding", "'sliding' is no part of a problem; allowed: b= .*sliding_window.*softcap.*tf32"),
        ("h=8 s=128 d=64 x=3", "'x=3' is no part of a problem"),
        ("h=8 s=128 d=64 fp64", "'fp64' is no part of a problem"),
        ("h=8 s=128 d=64 window=127,0", "'window=127' is no part of a problem"),
        ("h=8 s=128 d=64 softcap=30", "'softcap=30' is no part of a problem"),
        ("h=8 s=128 d=64 softcap alibi softcap", "softcap is given twice"),
        ("h=8 s=128 d=64 bias=input bias=bool", "bias is given twice"),
        ("h=8 s=128 d=64 bias=float", "bias='float': allowed are input, fp32, bool, and :unaligned after it"),
        ("h=8 s=128 d=64 bias=none", "bias='none': allowed are input"),
        ("h=8 s=128 d=64 bias=fp32:bent", "bias='fp32:bent': allowed are input"),
        ("h=8 s=128 d=64 seqused=kq", "seqused must be '', 'q', 'k' or 'qk', got 'kq'"),
        ("h=8 s=128 d=64 seqused=", "seqused= takes q, k or qk"),
        ("h=8 s=128 d=64 descale", "descale factors belong to fp8, got bf16"),
        ("h=8 s=128 d=40 fp8", "head dimensions must be multiples of 16"),
        ("h=8 s=128 d=64 sliding_window(127,0", "a bracket has no partner"),
        ("h=8 s=128 d=64 causal) (", "a bracket has no partner"),
        ("h=8 s=128 d=64 score_mod('return score)", "a quote is not closed"),
        ("h=8 s=128 d=64 score_mod('return')", "score_mod"),
        ("h=8 s=128 d=64 score_mod", "'score_mod' is no part of a problem"),
        ("h=8 s=128 d=64 sliding_window(127)", r"unknown mask 'sliding_window\(127\)'"),
        ("h=8 s=128 d=64 causal&softcap", "unknown mask 'causal&softcap'"),
        ("h=8 s=128 d=64 causal &", "unknown mask 'causal&'"),
        ("h=8 s=128 d=64 forward forward", "a phase is given twice"),
        ("h=8 s=\u0661 d=64", "s= takes a whole number"),
        ("h=8 s=" + "9" * 5000 + " d=64", "s= takes a whole number"),
        ("h=8 s=128 d=64 d=128", "d= is given twice"),
        ("h=8 s=12.5 d=64", "s= takes a whole number"),
        ("h=8 s=-1 d=64", "s= takes a whole number"),
        ("h=8 s= d=64", "s= takes a whole number"),
        ("h=8 s=128 d=64 causal(align=left)", "align must be 'bottom_right' or 'top_left', got 'left'"),
        ("h=8 s=128 d=68", r"head_dim_qk must be a multiple of 8 from 16 to 512 \(forward phase\), got 68"),
        ("h=8 s=128 d=64 dv=520", r"head_dim_v must be a multiple of 8 from 16 to 512 \(forward phase\), got 520"),
        ("hq=6 hkv=4 s=128 d=64", "nheads_q must be a positive multiple of nheads_kv, got 6 and 4"),
        ("h=0 s=128 d=64", "nheads_q must be a positive multiple"),
    ],
)
def test_bad_text_says_what_is_wrong(text: str, message: str) -> None:
    with pytest.raises(InputError, match=message) as caught:
        parse_problem(text)
    assert len(str(caught.value)) < 2_000


@pytest.mark.parametrize(
    "words",
    [
        "bf16 fp16",
        "fp16 fp16",
        "full causal",
        "causal causal(align=top_left)",
        "score_mod('return score') score_mod('return score')",
    ],
)
def test_a_mask_or_dtype_given_twice_is_refused(words: str) -> None:
    with pytest.raises(InputError, match="twice"):
        parse_problem(f"h=8 s=128 d=64 {words}")


def test_masks_and_dtypes_read_back() -> None:
    assert all(parse_mask(str(mask)) == mask for mask in MASKS)
    for dtype in DType:
        # What torch calls float32 is ieee.
        named = DType.FP32 if dtype is DType.TF32 else dtype
        assert parse_dtype(str(dtype)) is dtype
        assert all(parse_dtype(t) is named for t in (dtype.torch_name, f"torch.{dtype.torch_name}"))


def test_unknown_dtype_lists_what_is_known() -> None:
    with pytest.raises(InputError, match="unknown dtype 'int8'; allowed: fp16, bf16, fp32, tf32, fp8"):
        parse_dtype("int8")


def test_words_keep_what_stands_in_brackets_and_quotes() -> None:
    assert split_words(f" a, b\t{MASK_MOD} , c(1, (2, 3)) ") == ["a", "b", MASK_MOD, "c(1, (2, 3))"]
    quoted = r"""x('it\'s, \\', "a ' b, ) c")"""
    assert split_words(f"{quoted} y") == [quoted, "y"]
    assert split_words("") == []


@pytest.mark.parametrize("words", [["softcap", "softcap"], ["softcap2"], ["causal"], ["bias"], [""], ["bf16"]])
def test_words_that_are_no_features(words: list[str]) -> None:
    spec = AttentionSpec(dtype=DType.BF16, head_dim_qk=64, head_dim_v=64)
    with pytest.raises(InputError, match=r"given twice|unknown feature"):
        with_features(spec, words)
