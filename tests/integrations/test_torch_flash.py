"""The hook behind PyTorch's flash attention: what is registered when, and which calls go where."""

from __future__ import annotations

import contextlib
import itertools
import subprocess
import sys
import types
import typing
from collections.abc import Callable, Iterator

import pytest
import torch
from torch.nn.functional import scaled_dot_product_attention as torch_sdpa

import flashgen.integrations
from flashgen.dispatch import RUNGS
from flashgen.errors import InputError, UnsupportedError
from flashgen.integrations import torch_flash, torch_flash_gradients

SDPA = "aten::_scaled_dot_product_flash_attention"
KEYSET = torch.DispatchKeySet(torch.DispatchKey.CUDA)


class Original:
    """Stands for PyTorch's kernel: remembers its calls."""

    def __init__(self) -> None:
        self.calls: list[tuple[tuple[typing.Any, ...], dict[str, typing.Any]]] = []

    def call_boxed(self, keyset: torch.DispatchKeySet, *args: typing.Any, **kwargs: typing.Any) -> str:
        assert keyset is KEYSET
        self.calls.append((args, kwargs))
        return "pytorch's"


@pytest.fixture
def original() -> Original:
    return Original()


@pytest.fixture(autouse=True)
def explained(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[str]]:
    """The rung that the dispatcher finds for every call; each look-up adds a word."""
    found = ["exact"]

    def explain(*args: typing.Any, **options: typing.Any) -> types.SimpleNamespace:
        found.append("looked up")
        return types.SimpleNamespace(rung=found[0])

    monkeypatch.setattr(torch_flash, "explain", explain)
    monkeypatch.setattr(torch_flash_gradients, "explain", explain)
    torch_flash._tuned.clear()
    yield found
    torch_flash._tuned.clear()


def qkv(*, packed: bool = False, dtype: torch.dtype = torch.bfloat16) -> tuple[torch.Tensor, ...]:
    torch.manual_seed(0)
    sizes = ((9, 4, 16), (11, 2, 16)) if packed else ((2, 4, 6, 16), (2, 2, 9, 16))
    q, k, v = (torch.randn(sizes[index > 0], dtype=dtype) for index in range(3))
    return q, k, v


def test_importing_registers_nothing_and_registering_activates_nothing() -> None:
    code = (
        "import flashgen.integrations, flashgen.integrations.torch_flash, torch.nn.attention as a\n"
        "assert 'flashgen' not in a.list_flash_attention_impls()\n"
        "flashgen.integrations.register_torch_flash()\n"
        "assert 'flashgen' in a.list_flash_attention_impls()\n"
        "assert a.current_flash_attention_impl() is None\n"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120, check=False)
    assert result.returncode == 0, result.stderr


def test_an_older_pytorch_is_told_what_is_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delattr(torch.nn.attention, "register_flash_attention_impl")
    with pytest.raises(UnsupportedError, match=r"2\.11"):
        flashgen.integrations.register_torch_flash()


def test_without_flash_kernels_activation_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.version, "cuda", None)
    flashgen.integrations.register_torch_flash()
    with pytest.raises(UnsupportedError, match="NVIDIA"):
        torch.nn.attention.activate_flash_attention_impl("flashgen")
    assert torch.nn.attention.current_flash_attention_impl() is None


def test_activation_overrides_and_restoring_undoes_it(monkeypatch: pytest.MonkeyPatch) -> None:
    def has_kernel() -> bool:
        return torch._C._dispatch_has_kernel_for_dispatch_key(SDPA, "CUDA")

    asked: list[str] = []
    monkeypatch.setattr(torch.version, "cuda", "12.8")
    monkeypatch.setattr(torch.library, "get_kernel", lambda name, key: asked.append(name) or Original())
    before = has_kernel()
    flashgen.integrations.register_torch_flash()
    torch.nn.attention.activate_flash_attention_impl("flashgen")
    try:
        assert torch.nn.attention.current_flash_attention_impl() == "flashgen"
        assert asked == [
            SDPA, "aten::_flash_attention_forward", f"{SDPA}_backward", "aten::_flash_attention_backward",
        ]  # fmt: skip
        assert has_kernel()
    finally:
        torch.nn.attention.restore_flash_attention_impl()
    assert torch.nn.attention.current_flash_attention_impl() is None
    assert has_kernel() == before


def check_outputs(outputs: typing.Any, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, mask: torch.Tensor) -> None:
    """Check what both operators return first, for [batch, heads, seqlen, head_dim] tensors."""
    out, lse = outputs[:2]
    q, k, v = (t.double() for t in (q, k, v))
    torch.testing.assert_close(out.double(), torch_sdpa(q, k, v, attn_mask=mask, enable_gqa=True), rtol=0, atol=2e-2)
    scores = q @ k.repeat_interleave(2, 1).mT * 16**-0.5
    wanted = scores.masked_fill(~mask, -torch.inf).logsumexp(-1)
    # PyTorch's backward takes exp(score - lse): 0 where nothing is seen.
    torch.testing.assert_close(lse.double(), wanted.masked_fill(wanted == -torch.inf, torch.inf), rtol=0, atol=2e-2)
    assert lse.dtype == torch.float32
    assert lse.is_contiguous()


def check_random_state(outputs: typing.Any, dtype: torch.dtype) -> None:
    rng_state, unused, debug_mask = outputs[-3:]
    assert (rng_state.shape, rng_state.dtype) == ((2,), torch.uint64)
    assert (unused.shape, unused.dtype) == ((), torch.uint64)
    assert (debug_mask.shape, debug_mask.dtype) == ((0,), dtype)


def bottom_right(rows: int, keys: int) -> torch.Tensor:
    return torch.ones(rows, keys, dtype=torch.bool).tril(keys - rows)


@pytest.mark.parametrize("is_causal", [False, True])
@pytest.mark.parametrize("order", ["bhsd", "bshd", "part of qkv"])
def test_a_tuned_call_runs_by_flashgen(original: Original, order: str, is_causal: bool) -> None:
    q, k, v = qkv()
    if order == "bshd":
        q, k, v = (t.transpose(1, 2).contiguous().transpose(1, 2) for t in (q, k, v))
    elif order == "part of qkv":
        q = q.transpose(1, 2)[:, :, None].repeat(1, 1, 3, 1, 1)[:, :, 1].transpose(1, 2)
    outputs = torch_flash.sdpa_forward(original, KEYSET, q, k, v, 0.0, is_causal, scale=None)
    assert not original.calls
    assert outputs[2:6] == (None, None, 6, 9)
    # What PyTorch's shape function promises its compiler.
    assert outputs[0].stride() == torch.empty_like(q).stride()
    check_outputs(outputs, q, k, v, bottom_right(6, 9) if is_causal else torch.ones(6, 9, dtype=torch.bool))
    check_random_state(outputs, q.dtype)


def test_rows_without_keys(original: Original) -> None:
    keys, queries, _ = qkv()
    q, k, v = torch.cat([queries, queries], 1), keys[:, :2].contiguous(), keys[:, 2:].contiguous()
    outputs = torch_flash.sdpa_forward(original, KEYSET, q, k, v, 0.0, True)
    assert not original.calls
    check_outputs(outputs, q, k, v, bottom_right(9, 6))
    assert outputs[1][:, :, :3].isinf().all()


@pytest.mark.parametrize(
    ("options", "mask"),
    [
        ({}, torch.ones(6, 9, dtype=torch.bool)),
        ({"window_size_left": -1, "window_size_right": 0}, bottom_right(6, 9)),
        ({"window_size_left": 2, "window_size_right": -1}, ~torch.ones(6, 9, dtype=torch.bool).tril(0)),
    ],
)
def test_the_lower_operator(original: Original, options: dict[str, int], mask: torch.Tensor) -> None:
    q, k, v = qkv()
    rows_first = [t.transpose(1, 2).contiguous() for t in (q, k, v)]
    outputs = torch_flash.flash_forward(
        original, KEYSET, *rows_first, None, None, 6, 9, 0.0, False, False, scale=None, **options
    )
    assert not original.calls
    assert len(outputs) == 5
    assert outputs[0].stride() == rows_first[0].stride()
    check_outputs((outputs[0].transpose(1, 2), outputs[1]), q, k, v, mask)
    check_random_state(outputs, q.dtype)


def starts(*lengths: int) -> torch.Tensor:
    return torch.tensor([0, *itertools.accumulate(lengths)], dtype=torch.int32)


def packed_call(
    original: Original, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, **options: typing.Any
) -> typing.Any:
    ends = (starts(3, 6), starts(5, 6))
    return torch_flash.flash_forward(original, KEYSET, q, k, v, *ends, 6, 6, 0.0, True, False, **options)


def test_packed_sequences(original: Original) -> None:
    q, k, v = qkv(packed=True)
    outputs = packed_call(original, q, k, v, scale=None, seqused_k=torch.tensor([4, 6], dtype=torch.int32))
    assert not original.calls
    assert outputs[0].shape == q.shape
    assert outputs[1].shape == (4, 9)
    for queries, keys in ((slice(0, 3), slice(0, 4)), (slice(3, 9), slice(5, 11))):
        q_b, k_b, v_b = (t.transpose(0, 1)[None] for t in (q[queries], k[keys], v[keys]))
        own = outputs[0][queries].transpose(0, 1)[None], outputs[1][None, :, queries]
        mask = bottom_right(q_b.shape[2], k_b.shape[2])
        check_outputs((own[0], own[1].contiguous()), q_b, k_b, v_b, mask)
    check_random_state(outputs, q.dtype)


@pytest.mark.parametrize("rung", RUNGS)
def test_only_a_tuned_kernel_is_taken(original: Original, explained: list[str], rung: str) -> None:
    explained[0] = rung
    outputs = torch_flash.sdpa_forward(original, KEYSET, *qkv())
    assert (outputs == "pytorch's") == (rung in ("explicit", "predicted", "heuristic", "safe default"))


def test_what_flashgen_refuses_is_pytorchs(original: Original, monkeypatch: pytest.MonkeyPatch) -> None:
    def explain(*args: typing.Any, **options: typing.Any) -> typing.NoReturn:
        raise InputError("no")

    monkeypatch.setattr(torch_flash, "explain", explain)
    assert torch_flash.sdpa_forward(original, KEYSET, *qkv()) == "pytorch's"
    assert packed_call(original, *qkv(packed=True)) == "pytorch's"


Change = Callable[[torch.Tensor], torch.Tensor]
BACK: dict[str, tuple[Change, dict[str, typing.Any]]] = {
    "dropout": (lambda t: t, {"dropout_p": 0.1}),
    "debug mask": (lambda t: t, {"return_debug_mask": True}),
    "float32": (lambda t: t.float(), {}),
    "empty": (lambda t: t[:0], {}),
    "strided columns": (lambda t: t.transpose(2, 3).contiguous().transpose(2, 3), {}),
    "batch inside": (lambda t: t.permute(1, 2, 0, 3).contiguous().permute(2, 0, 1, 3), {}),
}


@pytest.mark.parametrize(("change", "options"), BACK.values(), ids=BACK.keys())
def test_calls_that_stay_pytorchs(original: Original, change: Change, options: dict[str, typing.Any]) -> None:
    q, k, v = map(change, qkv())
    assert torch_flash.sdpa_forward(original, KEYSET, q, k, v, is_causal=True, scale=0.5, **options) == "pytorch's"
    ((args, kwargs),) = original.calls
    assert all(got is sent for got, sent in zip(args, (q, k, v), strict=False))
    assert args[3:] == (options.get("dropout_p", 0.0), True, options.get("return_debug_mask", False))
    assert kwargs == {"scale": 0.5}


@pytest.mark.parametrize("name", ["block_table", "alibi_slopes", "num_splits", "something_newer"])
def test_options_that_stay_pytorchs(original: Original, name: str) -> None:
    options = {"scale": 0.5, name: 1}
    assert packed_call(original, *qkv(packed=True), **options) == "pytorch's"
    # All that was given, and nothing else: older operators do not know newer arguments.
    assert original.calls[0][1] == options


def test_other_autocast_types_stay_pytorchs(original: Original) -> None:
    with torch.autocast("cpu", torch.float16):
        assert torch_flash.sdpa_forward(original, KEYSET, *qkv()) == "pytorch's"


def test_a_kind_of_call_is_looked_up_once(original: Original, explained: list[str]) -> None:
    q, k, v = qkv()
    for _ in range(3):
        torch_flash.sdpa_forward(original, KEYSET, q, k, v)
    assert explained.count("looked up") == 1
    torch_flash.sdpa_forward(original, KEYSET, q, k, v, 0.0, True)
    torch_flash.sdpa_forward(original, KEYSET, q[:1], k[:1], v[:1])
    assert explained.count("looked up") == 3


def test_inputs_of_training_are_taken(original: Original) -> None:
    q, k, v = (t.requires_grad_() for t in qkv())
    out = torch_flash.sdpa_forward(original, KEYSET, q, k, v)[0]
    assert not original.calls
    assert not out.requires_grad


def backward_call(
    original: Original, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, dout: torch.Tensor, **options: typing.Any
) -> typing.Any:
    """The backward operator after the forward one, both with PyTorch's arguments."""
    is_causal, dropout_p, scale = (options.get(name) for name in ("is_causal", "dropout_p", "scale"))
    out, lse = torch_flash.sdpa_forward(original, KEYSET, q, k, v, 0.0, bool(is_causal), scale=scale)[:2]
    rest = (None, None, q.shape[2], k.shape[2], dropout_p or 0.0, bool(is_causal), None, None)
    return torch_flash_gradients.sdpa_backward(
        original, torch_flash._is_tuned, KEYSET, dout, q, k, v, out, lse, *rest, scale=scale
    )


def exact_gradients(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, dout: torch.Tensor, mask: torch.Tensor
) -> tuple[torch.Tensor, ...]:
    leaves = [t.detach().double().requires_grad_() for t in (q, k, v)]
    out = torch_sdpa(*leaves, attn_mask=mask, enable_gqa=True)
    return torch.autograd.grad(out, leaves, dout.double())


@pytest.mark.parametrize("is_causal", [False, True])
@pytest.mark.parametrize("order", ["bhsd", "bshd", "part of qkv"])
def test_a_tuned_backward_pass_runs_by_flashgen(original: Original, order: str, is_causal: bool) -> None:
    q, k, v = qkv()
    dout = torch.randn(2, 4, 6, 16).bfloat16()
    if order == "bshd":
        q, k, v = (t.transpose(1, 2).contiguous().transpose(1, 2) for t in (q, k, v))
    elif order == "part of qkv":
        q = q.transpose(1, 2)[:, :, None].repeat(1, 1, 3, 1, 1)[:, :, 1].transpose(1, 2)
    gradients = backward_call(original, q, k, v, dout, is_causal=is_causal)
    assert not original.calls
    mask = bottom_right(6, 9) if is_causal else torch.ones(6, 9, dtype=torch.bool)
    wanted = exact_gradients(q, k, v, dout, mask)
    for gradient, tensor, right in zip(gradients, (q, k, v), wanted, strict=True):
        # What PyTorch's shape function promises its compiler.
        assert gradient.stride() == torch.empty_like(tensor).stride()
        torch.testing.assert_close(gradient.double(), right, rtol=0, atol=5e-2)


def test_gradients_of_rows_without_keys(original: Original) -> None:
    keys, queries, _ = qkv()
    q, k, v = torch.cat([queries, queries], 1), keys[:, :2].contiguous(), keys[:, 2:].contiguous()
    dout = torch.randn(q.shape).bfloat16()
    for context in (contextlib.nullcontext(), flashgen.interpreting()):
        with context:
            gradients = backward_call(original, q, k, v, dout, is_causal=True)
        assert not original.calls
        for gradient, right in zip(gradients, exact_gradients(q, k, v, dout, bottom_right(9, 6)), strict=True):
            torch.testing.assert_close(gradient.double(), right.nan_to_num(), rtol=0, atol=5e-2)


def lower_backward(
    original: Original, dout: torch.Tensor, tensors: tuple[torch.Tensor, ...], *cuts: typing.Any, **options: typing.Any
) -> typing.Any:
    outputs = torch_flash.flash_forward(original, KEYSET, *tensors, *cuts, 0.0, True, False, **options)
    return torch_flash_gradients.flash_backward(
        original, torch_flash._is_tuned, KEYSET, dout, *tensors, *outputs[:2], *cuts, 0.0, True, None, None, **options
    )


def test_the_lower_backward_operator(original: Original) -> None:
    q, k, v = qkv()
    dout = torch.randn(2, 4, 6, 16).bfloat16()
    turned = [t.transpose(1, 2).contiguous() for t in (q, k, v, dout)]
    gradients = lower_backward(original, turned[3], tuple(turned[:3]), None, None, 6, 9, scale=None)
    assert not original.calls
    for gradient, right in zip(gradients, exact_gradients(q, k, v, dout, bottom_right(6, 9)), strict=True):
        assert gradient.is_contiguous()
        torch.testing.assert_close(gradient.transpose(1, 2).double(), right, rtol=0, atol=5e-2)


def test_gradients_of_packed_sequences(original: Original) -> None:
    q, k, v = qkv(packed=True)
    dout = torch.randn(9, 4, 16).bfloat16()
    gradients = lower_backward(original, dout, (q, k, v), starts(3, 6), starts(5, 6), 6, 6, scale=None)
    assert not original.calls
    for rows, keys in ((slice(0, 3), slice(0, 5)), (slice(3, 9), slice(5, 11))):
        one = [t.transpose(0, 1)[None] for t in (q[rows], k[keys], v[keys], dout[rows])]
        wanted = exact_gradients(one[0], one[1], one[2], one[3], bottom_right(one[0].shape[2], one[1].shape[2]))
        for gradient, part, right in zip(gradients, (rows, keys, keys), wanted, strict=True):
            torch.testing.assert_close(gradient[part].transpose(0, 1)[None].double(), right, rtol=0, atol=5e-2)


def test_backward_passes_that_stay_pytorchs(original: Original, explained: list[str]) -> None:
    q, k, v = qkv()
    dout = torch.randn(2, 4, 6, 16).bfloat16()
    assert backward_call(original, q, k, v, dout, dropout_p=0.1, scale=0.5) == "pytorch's"
    ((args, kwargs),) = original.calls
    assert all(got is sent for got, sent in zip(args, (dout, q, k, v), strict=False))
    assert args[6:] == (None, None, 6, 9, 0.1, False, None, None)
    assert kwargs == {"scale": 0.5}
    out, lse = torch_flash.sdpa_forward(original, KEYSET, q, k, v)[:2]
    # Nothing tuned, and a log-sum-exp of other rows than flashgen's.
    for rung, rows in (("heuristic", lse), ("exact", lse[:, :, :3])):
        explained[0] = rung
        torch_flash._tuned.clear()
        rest = (rows, None, None, 6, 9, 0.0, False, None, None)
        found = torch_flash_gradients.sdpa_backward(original, torch_flash._is_tuned, KEYSET, dout, q, k, v, out, *rest)
        assert found == "pytorch's"
