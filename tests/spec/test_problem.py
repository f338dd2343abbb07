"""What is counted for a problem, and which specs and shapes exist."""

from __future__ import annotations

import dataclasses

import pytest

from flashgen.errors import InputError
from flashgen.spec import AttentionSpec, DType, Problem, Shape, causal, full
from flashgen.spec.masks import Full, Mask

SHAPE = Shape(batch=2, seqlen_q=3, seqlen_k=5, nheads_q=6, nheads_kv=2)


def spec_of(mask: Mask = Full(), dtype: DType = DType.FP16, lse: bool = False) -> AttentionSpec:
    return AttentionSpec(dtype=dtype, head_dim_qk=64, head_dim_v=32, mask=mask, lse=lse)


# Visible pairs counted on paper: all 15; rows of 3 + 4 + 5; rows of 1 + 2 + 3.
@pytest.mark.parametrize(("mask", "pairs"), [(full(), 15), (causal(), 12), (causal("top_left"), 6)])
def test_flops_by_hand(mask: Mask, pairs: int) -> None:
    # A pair costs a multiply and an add in each of 64 + 32 columns, in each of 2 * 6 heads.
    assert Problem(spec=spec_of(mask), shape=SHAPE).flops() == pairs * 2 * 96 * 12


@pytest.mark.parametrize(("dtype", "itemsize"), [(DType.FP16, 2), (DType.BF16, 2), (DType.FP32, 4)])
def test_min_bytes_by_hand(dtype: DType, itemsize: int) -> None:
    q, k, v, out = 2 * 6 * 3 * 64, 2 * 2 * 5 * 64, 2 * 2 * 5 * 32, 2 * 6 * 3 * 32
    assert Problem(spec=spec_of(dtype=dtype), shape=SHAPE).min_bytes() == (q + k + v + out) * itemsize
    with_lse = Problem(spec=spec_of(dtype=dtype, lse=True), shape=SHAPE).min_bytes()
    assert with_lse == (q + k + v + out) * itemsize + 4 * 2 * 6 * 3


def test_nothing_to_do_counts_nothing() -> None:
    for empty in ({"batch": 0}, {"seqlen_q": 0}, {"seqlen_k": 0}):
        assert Problem(spec=spec_of(causal()), shape=dataclasses.replace(SHAPE, **empty)).flops() == 0


@pytest.mark.parametrize("size", [0, 8, 12, 15, 17, 250, 264, -16])
@pytest.mark.parametrize("name", ["head_dim_qk", "head_dim_v"])
def test_head_dimensions_outside_the_rule(name: str, size: int) -> None:
    with pytest.raises(InputError, match=f"{name} must be a multiple of 8 from 16 to 256, got {size}"):
        dataclasses.replace(spec_of(), **{name: size})


def test_head_dimensions_inside_the_rule() -> None:
    for size in range(16, 257, 8):
        spec = AttentionSpec(dtype=DType.BF16, head_dim_qk=size, head_dim_v=272 - size)
        assert (spec.head_dim_qk, spec.head_dim_v) == (size, 272 - size)


def test_unknown_phase() -> None:
    with pytest.raises(InputError, match="phase must be one of forward, got 'backward'"):
        AttentionSpec(dtype=DType.BF16, head_dim_qk=64, head_dim_v=64, phase="backward")  # type: ignore[arg-type]


@pytest.mark.parametrize("field", ["batch", "seqlen_q", "seqlen_k"])
def test_negative_sizes(field: str) -> None:
    with pytest.raises(InputError, match=f"{field} must be at least 0, got -1"):
        dataclasses.replace(SHAPE, **{field: -1})


@pytest.mark.parametrize(("nheads_q", "nheads_kv"), [(6, 4), (2, 4), (0, 1), (4, 0), (-4, -2)])
def test_head_counts_that_do_not_divide(nheads_q: int, nheads_kv: int) -> None:
    with pytest.raises(InputError, match=f"positive multiple of nheads_kv, got {nheads_q} and {nheads_kv}"):
        dataclasses.replace(SHAPE, nheads_q=nheads_q, nheads_kv=nheads_kv)


def test_tuning_key_drops_lse_and_nothing_else() -> None:
    spec = spec_of(causal("top_left"), DType.FP32, lse=True)
    assert spec.tuning_key() == dataclasses.replace(spec, lse=False)
    assert spec.tuning_key().tuning_key() == spec.tuning_key()


def test_group() -> None:
    assert SHAPE.group == 3
