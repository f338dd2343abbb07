"""What runs on a GPU around the launch of backward kernels, on CPU tensors with the interpreter for a GPU."""

from __future__ import annotations

import typing
from collections.abc import Callable, Mapping

import pytest
import torch

from flashgen.launch import interpret_backward
from flashgen.launch.operands import Layout4D
from flashgen.ops import backward_op, backward_runtime
from flashgen.ops.backward_cpu import backward_cpu
from flashgen.ops.backward_op import BackwardInputs
from flashgen.ops.call import NO_TENSORS, Options, Tensors
from flashgen.ops.cpu import INTERPRETED_AS
from flashgen.ops.torch_op import forward
from flashgen.spec import Extras, Problem

OPTIONS = Options(0, 0, "causal", "", None, 0.0, 0.0, "bhsd", True, False, "", "")


class Interpreted:
    """Stands for `BackwardLaunch`: fills the gradients that it is given."""

    def __init__(
        self, *, problem: Problem, config: typing.Any, compiled: object, extras: Extras, layouts: Mapping[str, Layout4D]
    ) -> None:
        self._problem, self._config, self._layouts = problem, config, layouts

    def __call__(self, tensors: Mapping[str, torch.Tensor], extras: Extras) -> None:
        for name, layout in self._layouts.items():
            assert Layout4D.of(tensors[name]) == layout, name
        given = {name: t for name, t in tensors.items() if name not in ("dq", "dk", "dv")}
        found = interpret_backward(given, problem=self._problem, config=self._config, extras=extras)
        for name, gradient in found.items():
            kept = ~gradient.isnan()
            tensors[name][kept] = gradient[kept]


@pytest.fixture
def prepared(monkeypatch: pytest.MonkeyPatch) -> list[Problem]:
    """The problems that were prepared, on tensors that pass for those of a GPU; new memory is full of NaN."""
    seen: list[Problem] = []
    choose = backward_runtime.choose

    def chosen(problem: Problem, target: object, options: Options, layouts: object) -> object:
        seen.append(problem)
        return choose(problem, INTERPRETED_AS, options)

    def poisoned(make: Callable[..., torch.Tensor]) -> Callable[..., torch.Tensor]:
        return lambda *args, **options: make(*args, **options).fill_(float("nan"))

    monkeypatch.setattr(backward_runtime, "choose", chosen)
    monkeypatch.setattr(backward_runtime, "detect_target", lambda device: INTERPRETED_AS)
    monkeypatch.setattr(backward_runtime, "compiled_kernel", lambda *args: None)
    monkeypatch.setattr(backward_runtime, "BackwardLaunch", Interpreted)
    monkeypatch.setattr(torch._C, "_cuda_getDevice", lambda: None, raising=False)
    monkeypatch.setattr(torch, "empty_like", poisoned(torch.empty_like))
    return seen


def normal(*sizes: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(sizes, generator=torch.Generator().manual_seed(seed)).half()


def inputs(layout: str = "bhsd", tensors: Tensors = NO_TENSORS, options: Options = OPTIONS) -> BackwardInputs:
    q, k, v = (normal(2, heads, n, dim, seed=n) for heads, n, dim in ((4, 33, 32), (2, 45, 32), (2, 45, 24)))
    if layout != "bhsd":
        q, k, v = (t.transpose(1, 2).contiguous() for t in (q, k, v))
    if layout == "thd":
        q, k, v = (t[0].contiguous() for t in (q, k, v))
    out, lse = forward(q, k, v, tensors, options)
    assert lse is not None
    return BackwardInputs(q, k, v, out, lse, normal(*out.shape, seed=7), None)


def assert_right(given: BackwardInputs, tensors: Tensors, options: Options, dbias: bool = False) -> None:
    dense = backward_runtime.aligned_inputs(backward_runtime.dense_inputs(given))
    runner = backward_runtime.prepare_backward(dense, tensors, options, dbias)
    for _ in range(2):
        got = runner(dense, tensors)
        wanted = backward_cpu(given, tensors, options, dbias)
        for mine, right in zip(got, wanted, strict=True):
            assert (mine is None) == (right is None)
            if mine is not None and right is not None:
                assert (mine.dtype, mine.stride()) == (right.dtype, right.stride())
                torch.testing.assert_close(mine, right, atol=1e-2, rtol=1e-2)


@pytest.mark.parametrize("deterministic", [False, True])
@pytest.mark.parametrize("layout", ["bhsd", "bshd"])
def test_dense(prepared: list[Problem], layout: str, deterministic: bool) -> None:
    options = OPTIONS._replace(layout=layout, deterministic=deterministic)
    given = inputs(layout, options=options)
    assert_right(given, NO_TENSORS, options)
    assert_right(given._replace(dlse=torch.randn(2, 4, 33)), NO_TENSORS, options)
    assert_right(given._replace(dout=None, dlse=torch.randn(2, 4, 33)), NO_TENSORS, options)
    assert {problem.spec.deterministic for problem in prepared} == {deterministic}
    assert {problem.spec.phase for problem in prepared} == {"backward"}


@pytest.mark.parametrize(
    "change",
    [
        lambda t: torch.ones(1, dtype=t.dtype).expand(t.shape),
        lambda t: t.transpose(2, 3).contiguous().transpose(2, 3),
        lambda t: t.new_empty(t.numel() + 8)[1 : 1 + t.numel()].view(t.shape).copy_(t),
        lambda t: t.transpose(1, 2).contiguous().transpose(1, 2),
        lambda t: t[:1].expand(t.shape),
    ],
    ids=["one number", "last strided", "misaligned", "rows first", "one batch entry"],
)
@pytest.mark.parametrize("name", ["dout", "k", "q"])
def test_strides(prepared: list[Problem], name: str, change: Callable[[torch.Tensor], torch.Tensor]) -> None:
    given = inputs()
    q, k, v = (change(t) if n == name else t for n, t in zip("qkv", given[:3], strict=True))
    out, lse = forward(q, k, v, NO_TENSORS, OPTIONS)
    assert lse is not None
    assert given.dout is not None
    dout = change(given.dout) if name == "dout" else given.dout
    assert_right(BackwardInputs(q, k, v, out, lse, dout, None), NO_TENSORS, OPTIONS)


@pytest.mark.parametrize("size", [(45,), (33, 45), (4, 1, 45), (2, 4, 33, 45)], ids=str)
def test_bias(prepared: list[Problem], size: tuple[int, ...]) -> None:
    tensors = Tensors(bias=normal(*size))
    assert_right(inputs(tensors=tensors), tensors, OPTIONS, dbias=True)
    assert_right(inputs(tensors=tensors), tensors, OPTIONS, dbias=False)
    # Another bias of the same kind comes with its own numbers.
    given, other = inputs(tensors=tensors), Tensors(bias=-3 * normal(*size))
    runner = backward_runtime.prepare_backward(backward_runtime.dense_inputs(given), tensors, OPTIONS, True)
    given = backward_runtime.dense_inputs(inputs(tensors=other))
    got, wanted = runner(given, other)[3], backward_cpu(given, other, OPTIONS, True)[3]
    torch.testing.assert_close(got, wanted, atol=1e-2, rtol=1e-2)


def test_packed_sequences_that_leave_tokens_out(prepared: list[Problem]) -> None:
    starts = {"cu_seqlens_q": [2, 20, 20, 31], "cu_seqlens_k": [0, 11, 30, 45]}
    tensors = Tensors(**{name: torch.tensor(cuts, dtype=torch.int32) for name, cuts in starts.items()})
    options = OPTIONS._replace(layout="thd", max_seqlen_q=18, max_seqlen_k=19)
    assert_right(inputs("thd", tensors, options), tensors, options)


@pytest.mark.parametrize("lengths", [(0, 5), (5, 0)], ids=str)
def test_nothing_to_see(prepared: list[Problem], lengths: tuple[int, int]) -> None:
    q, k = (torch.ones(1, 2, n, 16) for n in lengths)
    given = BackwardInputs(q, k, k, q, torch.zeros(1, 2, lengths[0]), q, None)
    tensors = Tensors(bias=torch.ones(1, lengths[1]))
    gradients = backward_runtime.prepare_backward(given, tensors, OPTIONS, True)(given, tensors)
    assert [None if t is None else t.shape for t in gradients] == [q.shape, k.shape, k.shape, (1, lengths[1])]
    assert not any(t.any() for t in gradients if t is not None)
    assert not prepared


def test_pytorchs_setting_makes_gradients_deterministic(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[bool] = []
    monkeypatch.setattr(
        backward_op, "backward_cpu", lambda given, tensors, options, dbias: seen.append(options.deterministic)
    )
    given = inputs()
    for enabled in (False, True):
        monkeypatch.setattr(torch, "are_deterministic_algorithms_enabled", lambda enabled=enabled: enabled)
        backward_op.backward(given, NO_TENSORS, OPTIONS, False)
    assert seen == [False, True]
