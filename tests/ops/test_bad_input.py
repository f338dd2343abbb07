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
from flashgen.spec import causal

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
            "head_dim_qk must be a multiple of 8 from 16 to 256, got 20",
        ),
        (q_of(2, 4, 10, 264), kv_of(2, 2, 12, 264), kv_of(), "head_dim_qk .* from 16 to 256, got 264"),
        (q_of(2, 4, 10, 0), kv_of(2, 2, 12, 0), kv_of(), "head_dim_qk .* from 16 to 256, got 0"),
        (q_of(), kv_of(), kv_of(2, 2, 12, 8), "head_dim_v must be a multiple of 8 from 16 to 256, got 8"),
    ],
)
def test_tensors_that_do_not_fit(
    function: Callable[..., object], q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, message: str
) -> None:
    with pytest.raises(InputError, match=message):
        function(q, k, v)


@pytest.mark.parametrize("dtype", [torch.float64, torch.int32, torch.bool, torch.complex64, torch.float8_e4m3fn])
def test_dtypes_without_a_kernel(dtype: torch.dtype) -> None:
    tensors = (q_of(dtype=dtype), kv_of(dtype=dtype), kv_of(dtype=dtype))
    with pytest.raises(InputError, match=rf"torch\.float16, torch\.bfloat16, torch\.float32, got {dtype}"):
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
@pytest.mark.parametrize("mask", [torch.ones(10, 12, dtype=torch.bool), "causal", lambda b, h, i, j: i >= j, True])
def test_masks_that_are_no_values(function: Callable[..., object], mask: object) -> None:
    with pytest.raises(InputError, match=r"mask must be a value of flashgen\.masks .*got "):
        function(q_of(), kv_of(), kv_of(), mask=mask)


@pytest.mark.parametrize("function", FUNCTIONS, ids=["attention", "explain"])
def test_masks_that_do_not_combine(function: Callable[..., object]) -> None:
    with pytest.raises(UnsupportedError, match="bottom-right"):
        function(q_of(), kv_of(), kv_of(), causal=True, mask=causal("top_left"))


@pytest.mark.parametrize("which", [0, 1, 2])
def test_a_gradient_that_cannot_be_given(which: int) -> None:
    tensors = [q_of(), kv_of(), kv_of()]
    tensors[which].requires_grad_()
    with pytest.raises(UnsupportedError, match="no backward pass"):
        flashgen.attention(*tensors)
    with torch.no_grad():
        assert not flashgen.attention(*tensors).requires_grad
    with torch.inference_mode():
        assert flashgen.attention(*tensors).shape == (2, 4, 10, 64)
    assert flashgen.attention(*(t.detach() for t in tensors)).shape == (2, 4, 10, 64)


def test_function_transforms_that_need_a_derivative() -> None:
    def total(q: torch.Tensor) -> torch.Tensor:
        return flashgen.attention(q, q, q).sum()

    q = torch.randn(1, 2, 5, 16)
    with pytest.raises(UnsupportedError, match="no backward pass"):
        torch.func.grad(total)(q)
    # A tangent of zeros would be a wrong answer, not a missing one.
    with pytest.raises(UnsupportedError, match=r"derivative|forward-mode|no backward pass"):
        torch.func.jvp(total, (q,), (torch.ones_like(q),))


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


def test_explain_takes_what_attention_takes() -> None:
    def parameters(function: Callable[..., typing.Any]) -> list[tuple[str, object, object]]:
        return [(p.name, p.kind, p.default) for p in inspect.signature(function).parameters.values()]

    assert parameters(flashgen.explain) == parameters(flashgen.attention)
