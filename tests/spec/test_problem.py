"""What is counted for a problem, and which specs and shapes exist."""

from __future__ import annotations

import dataclasses

import pytest
import torch

from flashgen.errors import InputError
from flashgen.spec import AttentionSpec, DType, Problem, Shape, causal, full, parse_problem
from flashgen.spec.masks import Full, Mask, document, sliding_window
from flashgen.spec.mods import parse_mod

SHAPE = Shape(batch=2, seqlen_q=3, seqlen_k=5, nheads_q=6, nheads_kv=2)


def spec_of(mask: Mask = Full(), dtype: DType = DType.FP16, lse: bool = False) -> AttentionSpec:
    return AttentionSpec(dtype=dtype, head_dim_qk=64, head_dim_v=32, mask=mask, lse=lse)


# Visible pairs counted on paper: all 15; rows of 3 + 4 + 5; rows of 1 + 2 + 3.
@pytest.mark.parametrize(("mask", "pairs"), [(full(), 15), (causal(), 12), (causal("top_left"), 6)])
def test_flops_by_hand(mask: Mask, pairs: int) -> None:
    # A pair costs a multiply and an add in each of 64 + 32 columns, in each of 2 * 6 heads.
    assert Problem(spec=spec_of(mask), shape=SHAPE).flops() == pairs * 2 * 96 * 12


@pytest.mark.parametrize(
    ("dtype", "itemsize", "out_itemsize"),
    [(DType.FP16, 2, 2), (DType.BF16, 2, 2), (DType.FP32, 4, 4), (DType.TF32, 4, 4), (DType.FP8, 1, 2)],
)
def test_min_bytes_by_hand(dtype: DType, itemsize: int, out_itemsize: int) -> None:
    q, k, v, out = 2 * 6 * 3 * 64, 2 * 2 * 5 * 64, 2 * 2 * 5 * 32, 2 * 6 * 3 * 32
    plain = (q + k + v) * itemsize + out * out_itemsize
    assert Problem(spec=spec_of(dtype=dtype), shape=SHAPE).min_bytes() == plain
    with_lse = Problem(spec=spec_of(dtype=dtype, lse=True), shape=SHAPE).min_bytes()
    assert with_lse == plain + 4 * 2 * 6 * 3


def test_packed_sequences_are_counted_one_by_one() -> None:
    packed = Problem(
        spec=dataclasses.replace(spec_of(causal()), varlen=True),
        shape=Shape(batch=2, seqlen_q=4, seqlen_k=8, nheads_q=6, nheads_kv=2),
    )
    assert packed.lengths() == ((4, 8), (3, 6))
    # Rows of 5 + 6 + 7 + 8 keys, and of 4 + 5 + 6.
    assert packed.flops() == (26 + 15) * 2 * 96 * 6
    assert packed.min_bytes() == 2 * (6 * 7 * (64 + 32) + 2 * 14 * (64 + 32))
    dense = dataclasses.replace(packed, spec=spec_of(causal()))
    assert dense.lengths() == ((4, 8),) * 2
    for batch in (1, 7):
        shape = dataclasses.replace(packed.shape, batch=batch, seqlen_q=100, seqlen_k=100)
        lengths = Problem(spec=packed.spec, shape=shape).lengths()
        assert len(lengths) == batch
        assert lengths[0] == (100, 100)
        assert all(50 <= sq == sk <= 100 for sq, sk in lengths)


def test_nothing_to_do_counts_nothing() -> None:
    for empty in ({"batch": 0}, {"seqlen_q": 0}, {"seqlen_k": 0}):
        for varlen in (False, True):
            spec = dataclasses.replace(spec_of(causal()), varlen=varlen)
            problem = Problem(spec=spec, shape=dataclasses.replace(SHAPE, **empty))
            assert problem.flops() == 0
            assert problem.min_bytes() >= 0


@pytest.mark.parametrize("size", [0, 8, 12, 15, 17, 250, 520, -16])
@pytest.mark.parametrize("name", ["head_dim_qk", "head_dim_v"])
def test_head_dimensions_outside_the_rule(name: str, size: int) -> None:
    with pytest.raises(InputError, match=f"{name} must be a multiple of 8 from 16 to 512 .forward phase., got {size}"):
        dataclasses.replace(spec_of(), **{name: size})


def test_head_dimensions_inside_the_rule() -> None:
    for size in range(16, 513, 8):
        spec = AttentionSpec(dtype=DType.BF16, head_dim_qk=size, head_dim_v=528 - size)
        assert (spec.head_dim_qk, spec.head_dim_v) == (size, 528 - size)


def test_fp8_rows_are_whole_16_bytes() -> None:
    assert AttentionSpec(dtype=DType.FP8, head_dim_qk=48, head_dim_v=16, descale=True).dtype.out is DType.BF16
    for dims in ((40, 48), (48, 40)):
        with pytest.raises(InputError, match=f"multiples of 16, got {dims[0]} and {dims[1]}"):
            AttentionSpec(dtype=DType.FP8, head_dim_qk=dims[0], head_dim_v=dims[1])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"bias": "float"}, "bias must be one of none, input, fp32, bool, got 'float'"),
        ({"seqused": "kq"}, "seqused must be '', 'q', 'k' or 'qk', got 'kq'"),
        ({"descale": True}, "descale factors belong to fp8, got fp16"),
    ],
)
def test_features_that_do_not_exist(change: dict[str, object], message: str) -> None:
    with pytest.raises(InputError, match=message):
        dataclasses.replace(spec_of(), **change)


def test_unknown_phase() -> None:
    with pytest.raises(InputError, match="phase must be one of forward, backward, decode, got 'prefill'"):
        AttentionSpec(dtype=DType.BF16, head_dim_qk=64, head_dim_v=64, phase="prefill")  # type: ignore[arg-type]


@pytest.mark.parametrize("field", ["batch", "seqlen_q", "seqlen_k"])
def test_negative_sizes(field: str) -> None:
    with pytest.raises(InputError, match=f"{field} must be at least 0, got -1"):
        dataclasses.replace(SHAPE, **{field: -1})


@pytest.mark.parametrize(("nheads_q", "nheads_kv"), [(6, 4), (2, 4), (0, 1), (4, 0), (-4, -2)])
def test_head_counts_that_do_not_divide(nheads_q: int, nheads_kv: int) -> None:
    with pytest.raises(InputError, match=f"positive multiple of nheads_kv, got {nheads_q} and {nheads_kv}"):
        dataclasses.replace(SHAPE, nheads_q=nheads_q, nheads_kv=nheads_kv)


WINNER_MOVERS: tuple[dict[str, object], ...] = (
    *(
        {"dtype": DType.BF16},
        {"head_dim_qk": 96},
        {"head_dim_v": 96},
        {"mask": sliding_window(3, 0)},
        {"softcap": True},
    ),
    *({"alibi": True}, {"dropout": True}, {"varlen": True}, {"bias": "bool"}),
    {"score_mod": parse_mod("score_mod('return score * 0.5')")},
)


def test_tuning_key_keeps_what_moves_the_winner() -> None:
    spec = spec_of(causal("top_left"), DType.FP8)
    keys = [dataclasses.replace(spec, **change).tuning_key() for change in ({}, *WINNER_MOVERS)]
    assert len(set(keys)) == len(keys)
    # What belongs to one of the other phases alone has a test of its own.
    of_others = {"deterministic", "dbias", *DECODE_FIELDS}
    named = {name for change in WINNER_MOVERS for name in change} | {"phase"} | of_others
    dropped = {"lse": True, "sinks": True, "seqused": "qk", "descale": True, "bias_aligned": False}
    assert named | dropped.keys() == {field.name for field in dataclasses.fields(AttentionSpec)}
    for name, value in dropped.items():
        assert dataclasses.replace(spec, **{name: value}).tuning_key() == spec.tuning_key(), name
    assert all(key.tuning_key() == key for key in keys)


DECODE_FIELDS = {
    "page_size": 16,
    "append": True,
    "rotary": "pairs",
    "rotary_fp32": True,
    "leftpad": True,
    "batch_idx": True,
    "fp8_kv": True,
    "shared_kv": True,
}


def test_the_decode_phase() -> None:
    spec = AttentionSpec(dtype=DType.BF16, head_dim_qk=576, head_dim_v=512, mask=causal(), phase="decode")
    assert spec.kv_dtype is DType.BF16
    moves = {"fp8_kv", "shared_kv"}
    for name in moves:
        assert dataclasses.replace(spec, **{name: True}).tuning_key() != spec.tuning_key()
    free = {name: value for name, value in DECODE_FIELDS.items() if name not in moves}
    full = dataclasses.replace(spec, **free, lse=True, sinks=True)
    assert full.tuning_key() == spec.tuning_key()
    for one in (full, dataclasses.replace(spec, fp8_kv=True, descale=True, page_size=256), spec):
        problem = Problem(spec=one, shape=SHAPE)
        assert parse_problem(str(problem)) == problem


def test_a_step_of_decoding_has_one_query() -> None:
    problem = parse_problem("b=2 hq=8 hkv=2 sk=100 d=64 decode")
    assert (problem.shape.seqlen_q, problem.shape.seqlen_k) == (1, 100)
    with pytest.raises(InputError, match="must give"):
        parse_problem("b=2 hq=8 hkv=2 sk=100 d=64 forward")


def test_a_cache_is_read_once_in_its_own_type() -> None:
    spec = AttentionSpec(dtype=DType.BF16, head_dim_qk=128, head_dim_v=64, phase="decode")
    shape = Shape(batch=2, seqlen_q=1, seqlen_k=1000, nheads_q=4, nheads_kv=2)
    ends = 2 * 4 * (128 + 64) * 2
    for change, columns in (({}, 192 * 2), ({"fp8_kv": True}, 192), ({"shared_kv": True}, 128 * 2)):
        found = Problem(spec=dataclasses.replace(spec, **change), shape=shape).min_bytes()
        assert found == ends + 2 * 1000 * 2 * columns


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"phase": "forward", "page_size": 16}, "page_size: of the decode phase alone, got forward"),
        ({"bias": "fp32", "dropout": True}, "the decode phase has no bias, dropout"),
        ({"mask": document(torch.zeros(4, dtype=torch.int32))}, "masks that a formula bounds"),
        ({"page_size": -1}, "page_size must be from 1 to 1048576"),
        ({"rotary": "pairs"}, "it needs append"),
        ({"append": True, "rotary_fp32": True}, "it needs rotary"),
        ({"append": True, "rotary": "thirds"}, "rotary must be one of '', 'halves', 'pairs', got 'thirds'"),
        ({"dtype": DType.FP8}, "decode takes Q in fp16, bf16 or fp32"),
        ({"fp8_kv": True, "append": True}, "no append"),
        ({"shared_kv": True, "head_dim_v": 128}, "V is the first columns of K"),
        ({"deterministic": True}, "decode always is"),
        ({"head_dim_qk": 584}, r"from 16 to 576 \(decode phase\)"),
    ],
)
def test_what_the_decode_phase_refuses(change: dict[str, object], message: str) -> None:
    spec = AttentionSpec(dtype=DType.BF16, head_dim_qk=64, head_dim_v=64, phase="decode")
    with pytest.raises(InputError, match=message):
        dataclasses.replace(spec, **change)


def test_the_backward_phase_and_back() -> None:
    spec = dataclasses.replace(spec_of(causal()), bias="fp32", sinks=True)
    backward = spec.backward(deterministic=True, dbias=True)
    assert (backward.phase, backward.lse, backward.deterministic, backward.dbias) == ("backward", False, True, True)
    assert backward.forward() == dataclasses.replace(spec, lse=True)
    # Another kernel wins where sums must not change; dbias is a kernel of its own.
    assert backward.tuning_key() == spec.backward(deterministic=True).tuning_key()
    assert backward.tuning_key() != spec.backward().tuning_key()
    text = str(Problem(spec=backward, shape=SHAPE))
    assert parse_problem(text) == Problem(spec=backward, shape=SHAPE)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"phase": "forward", "deterministic": True}, "belong to the backward phase"),
        ({"phase": "forward", "dbias": True}, "belong to the backward phase"),
        ({"lse": True}, "lse is an output of the forward phase"),
        ({"dtype": DType.FP8}, "fp8 has no backward phase: use fp16 or bf16"),
        ({"head_dim_v": 264}, r"from 16 to 256 \(backward phase\), got 264"),
        ({"dbias": True}, "dbias needs a bias of numbers, got bias=none"),
        ({"dbias": True, "bias": "bool"}, "dbias needs a bias of numbers, got bias=bool"),
    ],
)
def test_what_the_phases_refuse(change: dict[str, object], message: str) -> None:
    spec = AttentionSpec(dtype=DType.BF16, head_dim_qk=64, head_dim_v=64, phase="backward")
    with pytest.raises(InputError, match=message):
        dataclasses.replace(spec, **change)


def test_the_backward_phase_multiplies_five_times_and_moves_gradients() -> None:
    forward = Problem(spec=spec_of(), shape=SHAPE)
    backward = Problem(spec=spec_of().backward(), shape=SHAPE)
    pairs = SHAPE.batch * SHAPE.nheads_q * SHAPE.seqlen_q * SHAPE.seqlen_k
    spec = backward.spec
    assert backward.flops() == 2 * pairs * (3 * spec.head_dim_qk + 2 * spec.head_dim_v)
    assert backward.min_bytes() > 2 * forward.min_bytes()


def test_a_key_holds_no_tensor_and_keeps_the_numbers() -> None:
    ids = torch.tensor([0, 0, 1])
    scores = dataclasses.replace(
        parse_mod("score_mod('return score + t[q_idx]', t='float32[q_idx]')"), tensors=(torch.zeros(3),)
    )
    spec = dataclasses.replace(spec_of(document(ids) & sliding_window(2, 1)), score_mod=scores)
    for bare in (spec.tuning_key(), spec.without_tensors()):
        assert bare.mask.tensors == ()
        assert bare.score_mod is not None
        assert bare.score_mod.tensors == ()
        assert bare == spec
        assert str(bare) == str(spec)
    assert "sliding_window(2,1)" in str(spec)
    wider = dataclasses.replace(spec, mask=document(ids) & sliding_window(20, 10))
    assert wider != spec
    assert wider.structure() == spec.structure()


def test_group() -> None:
    assert SHAPE.group == 3


@pytest.mark.parametrize(
    ("words", "keys"),
    [
        ("sq=1 causal", 1000),
        ("sq=4", 1000),
        ("sq=1 sliding_window(127,0)", 128),
        ("sq=4 sliding_window(127,0)", 131),
        ("sq=1 chunked(300)", 100),
    ],
)
def test_decoding_reads_the_keys_that_any_query_sees(words: str, keys: int) -> None:
    problem = parse_problem(f"b=3 hq=8 hkv=2 sk=1000 d=64 {words} decode bf16")
    rows = 3 * 8 * problem.shape.seqlen_q * 128 * 2
    assert problem.min_bytes() == rows + 3 * 2 * keys * 128 * 2
