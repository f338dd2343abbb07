"""Calls that cannot be attention: a typed error that says what was got and what is allowed, before anything runs."""

from __future__ import annotations

import dataclasses
import inspect
import typing
from collections.abc import Callable

import pytest
import torch

import flashgen
from flashgen.codegen import TritonForwardConfig
from flashgen.errors import ConfigError, FlashgenError, InputError, UnsupportedError

CONFIG = TritonForwardConfig(block_m=64, block_n=32, num_warps=4, num_stages=1)


def q_of(*sizes: int, dtype: torch.dtype = torch.float16) -> torch.Tensor:
    return torch.zeros(sizes or (2, 4, 10, 64), dtype=dtype)


def kv_of(*sizes: int, dtype: torch.dtype = torch.float16) -> torch.Tensor:
    return torch.zeros(sizes or (2, 2, 12, 64), dtype=dtype)


FUNCTIONS = [flashgen.attention, flashgen.explain]


@pytest.mark.parametrize("function", FUNCTIONS, ids=["attention", "explain"])
@pytest.mark.parametrize(
    ("q", "k", "v", "message"),
    [
        (q_of(4, 10, 64), kv_of(), kv_of(), r"q must have 4 dimensions \[batch, heads, .*got shape \(4, 10, 64\)"),
        (q_of(1, 2, 4, 10, 64), kv_of(), kv_of(), r"q must have 4 dimensions .*got shape \(1, 2, 4, 10, 64\)"),
        (q_of(), kv_of(2, 12, 64), kv_of(), r"k must have 4 dimensions .*got shape \(2, 12, 64\)"),
        (q_of(), kv_of(), kv_of(12, 64), r"v must have 4 dimensions .*got shape \(12, 64\)"),
        (torch.zeros(()), kv_of(), kv_of(), r"q must have 4 dimensions .*got shape \(\)"),
        (q_of(), kv_of(dtype=torch.bfloat16), kv_of(), r"one dtype, got q torch\.float16 and k torch\.bfloat16"),
        (q_of(), kv_of(), kv_of(dtype=torch.float32), r"one dtype, got q torch\.float16 and v torch\.float32"),
        (q_of(), kv_of(3, 2, 12, 64), kv_of(), "one batch size, got 2, 3 and 2"),
        (q_of(), kv_of(), kv_of(1, 2, 12, 64), "one batch size, got 2, 2 and 1"),
        (q_of(), kv_of(2, 1, 12, 64), kv_of(), "k and v must have the same heads and seqlen, got k 1 heads x 12 and"),
        (q_of(), kv_of(2, 2, 13, 64), kv_of(), "k and v must have the same heads and seqlen, got k 2 heads x 13 and"),
        (q_of(), kv_of(2, 2, 12, 72), kv_of(), "q and k must have one head_dim, got 64 and 72"),
        (q_of(2, 5, 10, 64), kv_of(), kv_of(), "nheads_q must be a positive multiple of nheads_kv, got 5 and 2"),
        (q_of(2, 1, 10, 64), kv_of(), kv_of(), "nheads_q must be a positive multiple of nheads_kv, got 1 and 2"),
        (q_of(2, 0, 10, 64), kv_of(), kv_of(), "nheads_q must be a positive multiple of nheads_kv, got 0 and 2"),
        (q_of(), kv_of(2, 0, 12, 64), kv_of(2, 0, 12, 64), "positive multiple of nheads_kv, got 4 and 0"),
        (
            q_of(2, 4, 10, 20),
            kv_of(2, 2, 12, 20),
            kv_of(),
            r"head_dim_qk must be a multiple of 8 from 16 to 512 \(forward phase\), got 20",
        ),
        (
            q_of(2, 4, 10, 520),
            kv_of(2, 2, 12, 520),
            kv_of(),
            r"head_dim_qk .* 512 \(forward phase\), got 520",
        ),
        (q_of(2, 4, 10, 0), kv_of(2, 2, 12, 0), kv_of(), r"head_dim_qk .* from 16 to 512 \(forward phase\), got 0"),
        (
            q_of(),
            kv_of(),
            kv_of(2, 2, 12, 8),
            r"head_dim_v must be .* 512 \(forward phase\), got 8",
        ),
    ],
)
def test_tensors_that_do_not_fit(
    function: Callable[..., object], q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, message: str
) -> None:
    with pytest.raises(InputError, match=message):
        function(q, k, v)


@pytest.mark.parametrize("dtype", [torch.float64, torch.int32, torch.bool, torch.complex64, torch.float8_e5m2])
def test_dtypes_without_a_kernel(dtype: torch.dtype) -> None:
    tensors = (q_of(dtype=dtype), kv_of(dtype=dtype), kv_of(dtype=dtype))
    with pytest.raises(
        InputError, match=rf"torch\.float16, torch\.bfloat16, torch\.float32, torch\.float8_e4m3fn, got {dtype}"
    ):
        flashgen.attention(*tensors)


@pytest.mark.parametrize("which", [0, 1, 2])
def test_tensors_on_two_devices(which: int) -> None:
    tensors = [q_of(), kv_of(), kv_of()]
    tensors[which] = tensors[which].to("meta")
    with pytest.raises(InputError, match=r"one device, got q on (cpu|meta)"):
        flashgen.explain(*tensors)


@pytest.mark.parametrize("function", FUNCTIONS, ids=["attention", "explain"])
@pytest.mark.parametrize("layout", ["bsdh", "thd", "", None])
def test_unknown_layout(function: Callable[..., object], layout: object) -> None:
    if layout is None and function is flashgen.attention:
        # Refused by the operator's own schema.
        with pytest.raises((InputError, RuntimeError)):
            function(q_of(), kv_of(), kv_of(), layout=layout)
        return
    with pytest.raises(InputError, match=r"layout must be 'bhsd' .* or 'bshd' .*, got"):
        function(q_of(), kv_of(), kv_of(), layout=layout)


def test_layout_decides_which_dimension_is_which() -> None:
    # 12 and 10 heads, read as bshd.
    with pytest.raises(InputError, match=r"got 10 and 12"):
        flashgen.attention(q_of(2, 4, 10, 64), kv_of(2, 4, 12, 64), kv_of(2, 4, 12, 64), layout="bshd")
    with pytest.raises(InputError, match=r"\[batch, seqlen, heads, head_dim\], got shape \(10, 64\)"):
        flashgen.attention(q_of(10, 64), kv_of(), kv_of(), layout="bshd")


@pytest.mark.parametrize("function", FUNCTIONS, ids=["attention", "explain"])
@pytest.mark.parametrize("mask", [torch.ones(10, 12, dtype=torch.bool), "causal", True, flashgen.masks.causal])
def test_masks_that_are_no_values(function: Callable[..., object], mask: object) -> None:
    with pytest.raises(InputError, match=r"mask"):
        function(q_of(), kv_of(), kv_of(), mask=mask)


def test_a_mask_tensor_is_a_bias() -> None:
    with pytest.raises(InputError, match=r"tensor \[10, 12\] of torch.bool; pass it as bias="):
        flashgen.attention(q_of(), kv_of(), kv_of(), mask=torch.ones(10, 12, dtype=torch.bool))  # type: ignore[call-overload]


def test_forward_mode_derivatives() -> None:
    q = torch.randn(1, 2, 5, 16)
    # A tangent of zeros would be a wrong answer, not a missing one.
    with pytest.raises(UnsupportedError, match=r"no forward-mode derivative"):
        torch.func.jvp(lambda q: flashgen.attention(q, q, q).sum(), (q,), (torch.ones_like(q),))


def test_a_config_outside_its_constraints() -> None:
    illegal = dataclasses.replace(CONFIG, block_m=48, num_warps=3)
    with pytest.raises(ConfigError) as caught:
        flashgen.explain(q_of(), kv_of(), kv_of(), config=illegal)
    assert "block_m=48" in str(caught.value)
    assert "num_warps=3" in str(caught.value)


def test_a_config_outside_its_constraints_on_the_eager_path() -> None:
    with pytest.raises(ConfigError, match="block_m=48"):
        flashgen.attention(q_of(), kv_of(), kv_of(), config=dataclasses.replace(CONFIG, block_m=48))


def test_errors_are_what_python_users_expect_too() -> None:
    assert issubclass(InputError, (FlashgenError, ValueError))
    with pytest.raises(ValueError, match="4 dimensions"):
        flashgen.attention(q_of(10, 64), kv_of(), kv_of())


@pytest.mark.parametrize("device", ["cpu", "meta"])
def test_warmup_is_for_gpus(device: str) -> None:
    with pytest.raises(InputError, match=f"warmup prepares GPU kernels, got device {device}"):
        flashgen.warmup(["h=8 s=128 d=64"], device=device)


def test_explain_takes_what_both_functions_take() -> None:
    def parameters(function: Callable[..., typing.Any]) -> dict[str, object]:
        return {p.name: p.default for p in inspect.signature(function).parameters.values()}

    explained, dense = parameters(flashgen.explain), parameters(flashgen.attention)
    packed = parameters(flashgen.attention_varlen)
    assert explained.keys() == dense.keys() | packed.keys() | {"phase"}
    shared = [name for name in dense if name in packed]
    assert all(explained[name] == dense[name] == packed[name] for name in shared)
    order = list(packed)[:7]
    assert list(explained)[:7] == order


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"window": 5}, r"window must be two whole numbers .*got 5"),
        ({"window": (1, 2, 3)}, r"window must be two whole numbers"),
        ({"window": (1.5, 0)}, r"left must be a whole number"),
        ({"window": (-2, 0)}, r"left must be a whole number from -1"),
        ({"softcap": -1.0}, r"softcap must be a finite number of at least 0 .*got -1"),
        ({"softcap": float("nan")}, r"softcap must be a finite number"),
        ({"softcap": "3"}, r"softcap must be a number, got str"),
        ({"softmax_scale": float("inf")}, r"softmax_scale must be a finite number, got inf"),
        ({"dropout_p": 1.0}, r"dropout_p must be at least 0 and less than 1, got 1"),
        ({"dropout_p": -0.1}, r"dropout_p must be at least 0"),
        ({"dropout_p": 0.1, "seed": 1.5}, r"seed must be a whole number .*got 1.5"),
        ({"dropout_p": 0.1, "seed": torch.zeros(3)}, r"rng_state must be torch.int64 .*got torch.float32 \[3\]"),
        ({"bias": torch.zeros(3, 12).half()}, r"bias must broadcast to .* = \[2, 4, 10, 12\], got \[3, 12\]"),
        ({"bias": torch.zeros(1, 2, 4, 10, 12).half()}, r"bias must broadcast"),
        ({"bias": torch.zeros(10, 12).bfloat16()}, r"bias must be torch.float16 or torch.float32 or torch.bool"),
        ({"bias": torch.zeros(10, 12, device="meta")}, r"bias must be on the device of q, cpu, got meta"),
        ({"bias": 3}, r"bias must be a tensor, got int"),
        ({"alibi_slopes": torch.zeros(5)}, r"alibi_slopes must be .*\[4\] or \[2, 4\]; got torch.float32 \[5\]"),
        ({"alibi_slopes": torch.zeros(4, dtype=torch.int32)}, r"alibi_slopes must be torch.float32"),
        ({"sinks": torch.zeros(2, 4)}, r"sinks must be torch.float32 \[nheads_q\], here \[4\]; got"),
        ({"score_mod": 3}, r"score_mod must be a plain Python function .*got int"),
        ({"score_mod": lambda b, h, i, j: i}, r"score_mod"),
        ({"mask": lambda b, h, i, j: i - j}, r"must return a boolean"),
        ({"mask": flashgen.spec.parse_mask("document")}, r"mask document needs 2 tensors and holds 0"),
        (
            {"q_descale": 2.0},
            r"v_descale belong to torch.float8_e4m3fn, got q of torch.float16",
        ),
    ],
    # By name: a function's text differs from process to process.
    ids=lambda part: part if isinstance(part, str) else " ".join(part),
)
def test_options_that_do_not_fit(options: dict[str, typing.Any], message: str) -> None:
    for function in FUNCTIONS:
        with pytest.raises(InputError, match=message):
            function(q_of(), kv_of(), kv_of(), **options)


def test_descales_that_do_not_fit() -> None:
    q, kv = (torch.zeros(2, heads, 10, 32).to(torch.float8_e4m3fn) for heads in (4, 2))
    with pytest.raises(InputError, match=r"k_descale must be .* = \[2, 2\], got torch.float32 \[3\]"):
        flashgen.attention(q, kv, kv, k_descale=torch.ones(3))


STARTS = torch.tensor([0, 4, 10], dtype=torch.int32)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"cu_seqlens_q": STARTS.long()}, r"cu_seqlens_q must be an int32 tensor .*got torch.int64 \[3\]"),
        ({"cu_seqlens_k": STARTS[None]}, r"cu_seqlens_k must be an int32 tensor"),
        ({"cu_seqlens_k": STARTS[:0]}, r"cu_seqlens_k must be an int32 tensor .*\[0\]"),
        ({"cu_seqlens_k": STARTS[:2]}, r"must cut one batch, got 2 and 1 sequences"),
        ({"cu_seqlens_q": STARTS.to("meta")}, r"cu_seqlens_q must be on the device of q, cpu, got meta"),
        ({"cu_seqlens_q": torch.tensor([0, 6, 4], dtype=torch.int32)}, r"must not decrease, got 6 and then 4 at \[1\]"),
        ({"cu_seqlens_q": STARTS - 1}, r"cu_seqlens_q must start at 0, got -1"),
        ({"cu_seqlens_k": STARTS + 1}, r"cu_seqlens_k ends at 11, but k has 10 tokens"),
        ({"max_seqlen_q": 5}, r"max_seqlen_q is 5, but cu_seqlens_q has a sequence of 6"),
        ({"max_seqlen_k": 3}, r"max_seqlen_k is 3, but cu_seqlens_k has a sequence of 6"),
        ({"max_seqlen_q": -1}, r"max_seqlen_q must be a whole number of at least 0, got -1"),
        ({"max_seqlen_q": 6.0}, r"max_seqlen_q must be a whole number"),
        ({"seqused_k": STARTS}, r"seqused_k must be torch.int32 \[batch\], here \[2\]; got torch.int32 \[3\]"),
        ({"q": torch.zeros(1, 10, 4, 64).half()}, r"q must have 3 dimensions \[tokens, heads, head_dim\]"),
        ({"v": torch.zeros(9, 2, 64).half()}, r"k and v must have the same tokens and heads"),
    ],
    ids=str,
)
def test_packed_calls_that_do_not_fit(change: dict[str, typing.Any], message: str) -> None:
    call: dict[str, typing.Any] = {
        "q": torch.zeros(10, 4, 64).half(), "k": torch.zeros(10, 2, 64).half(), "v": torch.zeros(10, 2, 64).half(),
        "cu_seqlens_q": STARTS, "cu_seqlens_k": STARTS, "max_seqlen_q": 6, "max_seqlen_k": 6,
    }  # fmt: skip
    flashgen.attention_varlen(**call)
    with pytest.raises(InputError, match=message):
        flashgen.attention_varlen(**(call | change))


def test_boundaries_are_looked_at_again_after_a_change() -> None:
    starts = STARTS.clone()
    q = torch.zeros(10, 2, 64)
    flashgen.attention_varlen(q, q, q, starts, starts, 10, 10)
    starts[1] = 12
    with pytest.raises(InputError, match="must not decrease"):
        flashgen.attention_varlen(q, q, q, starts, starts, 10, 10)
