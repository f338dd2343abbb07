"""Gradients of the public functions through the very kernels, in Triton's interpreter, against float64."""

from __future__ import annotations

import typing
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

import flashgen
from flashgen.codegen import KernelConfig, TritonBackwardConfig
from flashgen.launch import interpret_backward
from flashgen.measure import GradientOracle, Gradients
from flashgen.ops import backward_cpu
from flashgen.ops.backward_op import split_backward
from flashgen.ops.backward_runtime import backward_problem, bias_shape
from flashgen.ops.call import heads_first
from flashgen.ops.checks import extras_of
from flashgen.ops.gradients import sink_gradient
from flashgen.spec import masks

BACKWARD = torch.ops.flashgen.attention_backward.default


@pytest.fixture(autouse=True)
def _no_registry(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("flashgen.resources.user_registry_dir", lambda: tmp_path / "user")
    monkeypatch.setattr("flashgen.resources.shipped_registry_dir", lambda: tmp_path / "shipped")


@pytest.fixture
def interpreted(monkeypatch: pytest.MonkeyPatch) -> list[KernelConfig]:
    """The config of each backward pass that reaches the interpreter."""
    seen: list[KernelConfig] = []

    def recorded(tensors: dict[str, torch.Tensor], **options: typing.Any) -> dict[str, torch.Tensor]:
        seen.append(options["config"])
        return interpret_backward(tensors, **options)

    monkeypatch.setattr(backward_cpu, "interpret_backward", recorded)
    return seen


def normal(*sizes: int, seed: int, dtype: torch.dtype = torch.float16) -> torch.Tensor:
    return torch.randn(sizes, generator=torch.Generator().manual_seed(seed)).to(dtype)


def inputs(layout: str = "bhsd", dtype: torch.dtype = torch.float16) -> tuple[torch.Tensor, ...]:
    sizes = ((2, 6, 45, 40), (2, 2, 77, 40), (2, 2, 77, 24))
    made = (normal(*size, seed=seed, dtype=dtype) for seed, size in enumerate(sizes))
    return tuple(t if layout == "bhsd" else t.transpose(1, 2).contiguous() for t in made)


class Passes(TorchDispatchMode):
    """Collects what the backward operator is called with and gives."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[tuple[tuple[typing.Any, ...], tuple[torch.Tensor, ...]]] = []

    def __torch_dispatch__(
        self, func: typing.Any, types: object, args: typing.Any = (), kwargs: typing.Any = None
    ) -> object:
        result = func(*args, **(kwargs or {}))
        if func is BACKWARD:
            self.seen.append((args, result))
        return result


def assert_right(call: Callable[..., tuple[torch.Tensor, torch.Tensor]], *leaves: torch.Tensor) -> None:
    """Hold the gradients of one call, of out alone and of out and lse, to the accuracy rule."""
    for with_lse in (False, True):
        given = [t.detach().clone().requires_grad_() for t in leaves]
        with flashgen.interpreting(), Passes() as passes:
            out, lse = call(*given)
            outputs = [out, lse] if with_lse else [out]
            douts = [normal(*t.shape, seed=20 + i, dtype=t.dtype) for i, t in enumerate(outputs)]
            torch.autograd.grad(outputs, given, douts)
        ((args, gradients),) = passes.seen
        judge(args, gradients)


def judge(args: tuple[typing.Any, ...], gradients: tuple[torch.Tensor, ...]) -> None:
    detached = tuple(t.detach() if isinstance(t, torch.Tensor) else t for t in args)
    given, tensors, options, asked = split_backward(detached)
    problem = backward_problem(given.q, given.k, given.v, tensors, options, asked)
    q, k, v, dout, dq, dk, dv = (
        heads_first(t, options.layout) for t in (given.q, given.k, given.v, given.dout, *gradients[:3])
    )
    oracle = GradientOracle(
        q, k, v, dout, spec=problem.spec, extras=extras_of(problem, tensors, options), dlse=given.dlse
    )
    dbias = gradients[3].view(bias_shape(tensors.bias)) if asked and tensors.bias is not None else None
    dsinks = None if tensors.sinks is None else sink_gradient(given, tensors.sinks, options)
    report = oracle.judge(Gradients(dq=dq, dk=dk, dv=dv, dbias=dbias, dsinks=dsinks))
    assert report.ok, report.reason


TABLE = torch.linspace(0.5, 2.0, 6)
FEATURES: dict[str, dict[str, typing.Any]] = {
    "plain": {},
    "causal": {"causal": True},
    "deterministic": {"causal": True, "deterministic": True},
    "top left": {"mask": masks.causal("top_left")},
    "window": {"window": (20, 5)},
    "masks": {"mask": masks.chunked(16) | masks.prefix_lm(5)},
    "document": {"mask": masks.document(torch.arange(45) // 20, torch.arange(77) // 30)},
    "scale": {"softmax_scale": -0.2},
    "softcap": {"softcap": 2.0, "causal": True},
    "score_mod": {"score_mod": lambda score, b, h, q_idx, kv_idx: score * TABLE[h] + (q_idx - kv_idx) * 0.01},
    "alibi": {"alibi_slopes": TABLE, "causal": True},
    "dropout": {"dropout_p": 0.25, "seed": 7},
    "bool bias": {"bias": torch.arange(45 * 77).view(45, 77) % 3 > 0},
}


@pytest.mark.parametrize("name", FEATURES)
def test_features(interpreted: list[KernelConfig], name: str) -> None:
    layout = "bshd" if name in ("causal", "window", "dropout") else "bhsd"

    def call(*qkv: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        return flashgen.attention(*qkv, layout=layout, return_lse=True, **FEATURES[name])  # type: ignore[arg-type]

    assert_right(call, *inputs(layout))
    assert len(interpreted) == 2
    assert all(isinstance(config, TritonBackwardConfig) for config in interpreted)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_dtypes(dtype: torch.dtype) -> None:
    assert_right(lambda *qkv: flashgen.attention(*qkv, causal=True, return_lse=True), *inputs(dtype=dtype))


@pytest.mark.parametrize("size", [(2, 6, 45, 77), (45, 77), (6, 1, 77), (2, 1, 45, 1), (1,)], ids=str)
def test_bias_and_sinks(size: tuple[int, ...]) -> None:
    def call(
        q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, bias: torch.Tensor, sinks: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        return flashgen.attention(q, k, v, bias=bias, sinks=sinks, causal=True, return_lse=True)

    bias = normal(*size, seed=5, dtype=torch.float32 if len(size) == 2 else torch.float16)
    assert_right(call, *inputs(), bias, normal(6, seed=6, dtype=torch.float32))


@pytest.mark.parametrize("features", ["", "causal", "used", "bias"])
def test_packed_sequences(features: str) -> None:
    # The first and the last tokens belong to no sequence, the second one has no query and the third no key.
    starts_q = torch.tensor([2, 20, 20, 30, 44], dtype=torch.int32)
    starts_k = torch.tensor([1, 31, 40, 40, 75], dtype=torch.int32)
    options: dict[str, typing.Any] = {"causal": features == "causal"}
    if features == "used":
        options |= {
            f"seqused_{s}": torch.tensor(n, dtype=torch.int32) for s, n in (("q", [9, 0, 3, 14]), ("k", [30, 2, 0, 20]))
        }
    leaves = [t[0].transpose(0, 1).contiguous() for t in inputs()]
    leaves += [normal(18, 35, seed=5)] if features == "bias" else []

    def call(
        q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, bias: torch.Tensor | None = None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        return flashgen.attention_varlen(
            q, k, v, starts_q, starts_k, 18, 35, bias=bias, sinks=TABLE, return_lse=True, **options
        )

    assert_right(call, *leaves)
    for tensor in leaves:
        tensor.requires_grad_()
    with flashgen.interpreting():
        dq, dk, dv = torch.autograd.grad(call(*leaves)[0].sum(), leaves)[:3]
    assert not dq[[0, 1, 44]].any()
    assert not torch.cat([dk, dv], -1)[[0, 75, 76]].any()
    assert not torch.cat([dk, dv], -1)[31:40].any()
    assert dq[2:20].any()


def transposed(t: torch.Tensor) -> torch.Tensor:
    return t.transpose(1, 2).contiguous().transpose(1, 2)


def last_strided(t: torch.Tensor) -> torch.Tensor:
    return t.transpose(2, 3).contiguous().transpose(2, 3)


def guarded(t: torch.Tensor) -> torch.Tensor:
    """The same values in every second row and the first columns of a tensor of NaN."""
    big = t.new_full((t.shape[0], t.shape[1], 2 * t.shape[2] + 64, t.shape[3] + 24), float("nan"))
    return big[:, :, : 2 * t.shape[2] : 2, : t.shape[3]].copy_(t)


def misaligned(t: torch.Tensor) -> torch.Tensor:
    return t.new_empty(t.numel() + 8)[1 : 1 + t.numel()].view(t.shape).copy_(t)


@pytest.mark.parametrize("change", [transposed, last_strided, guarded, misaligned])
def test_strides(change: Callable[[torch.Tensor], torch.Tensor]) -> None:
    leaves = [t.requires_grad_() for t in inputs()]
    dout = normal(2, 6, 45, 24, seed=9)
    with flashgen.interpreting():
        wanted = torch.autograd.grad(flashgen.attention(*leaves, causal=True), leaves, dout)
        odd = [change(t.detach()).requires_grad_() for t in leaves]
        got = torch.autograd.grad(flashgen.attention(*odd, causal=True), odd, change(dout))
    for mine, right in zip(got, wanted, strict=True):
        torch.testing.assert_close(mine, right, atol=2e-3, rtol=2e-3)


def test_expanded_tensors() -> None:
    q, k, v = (t.requires_grad_() for t in inputs())
    with flashgen.interpreting():
        out = flashgen.attention(q, k[:, :1].expand(-1, 6, -1, -1), v[:, :1, :1].expand(-1, 6, 77, -1))
        got = torch.autograd.grad(out.sum(), (q, k, v))
    eager = flashgen.attention(q, k[:, :1].expand(-1, 6, -1, -1), v[:, :1, :1].expand(-1, 6, 77, -1))
    for mine, right in zip(got, torch.autograd.grad(eager.sum(), (q, k, v)), strict=True):
        assert mine.shape == right.shape
        torch.testing.assert_close(mine, right, atol=2e-2, rtol=2e-2)


class Sizes(TorchDispatchMode):
    """The number of elements of the largest tensor that is made."""

    largest = 0

    def __torch_dispatch__(
        self, func: typing.Any, types: object, args: typing.Any = (), kwargs: typing.Any = None
    ) -> object:
        result = func(*args, **(kwargs or {}))
        for tensor in result if isinstance(result, (tuple, list)) else (result,):
            if isinstance(tensor, torch.Tensor):
                self.largest = max(self.largest, tensor.numel())
        return result


@pytest.mark.parametrize("deterministic", [False, True])
def test_no_memory_of_two_lengths(
    interpreted: list[KernelConfig], monkeypatch: pytest.MonkeyPatch, deterministic: bool
) -> None:
    # In the body of the operator, which a mode cannot look into from outside.
    sizes = Sizes()

    def watched(tensors: dict[str, torch.Tensor], **options: typing.Any) -> dict[str, torch.Tensor]:
        with sizes:
            return interpret_backward(tensors, **options)

    monkeypatch.setattr(backward_cpu, "interpret_backward", watched)
    q, k, v = (normal(1, 1, 192, 16, seed=seed).requires_grad_() for seed in range(3))
    with flashgen.interpreting():
        flashgen.attention(q, k, v, causal=True, softcap=3.0, deterministic=deterministic).sum().backward()
    assert 192 * 16 <= sizes.largest < 192 * 64


@pytest.mark.filterwarnings("ignore:Input #. requires gradient and is not a double precision")
def test_gradcheck() -> None:
    # In float32 and so with wide steps: it is the formula that is checked, and accuracy elsewhere.
    sizes = ((1, 2, 3, 16), (1, 1, 5, 16), (1, 1, 5, 16), (2, 3, 5), (2,))
    leaves = tuple((normal(*size, seed=i, dtype=torch.float32) / 4).requires_grad_() for i, size in enumerate(sizes))

    def call(*given: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        q, k, v, bias, sinks = given
        return flashgen.attention(q, k, v, bias=bias, sinks=sinks, softcap=3.0, causal=True, return_lse=True)

    with flashgen.interpreting():
        assert torch.autograd.gradcheck(call, leaves, eps=1e-2, atol=2e-3, rtol=1e-2, fast_mode=True)
