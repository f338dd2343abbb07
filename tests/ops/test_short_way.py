"""Calls like earlier ones go straight to their kernel, unless somebody else has a part in them."""

from __future__ import annotations

import contextlib
import typing
from collections.abc import Callable

import pytest
import torch
from torch.autograd import forward_ad
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

import flashgen
from flashgen.ops import functional
from flashgen.ops.runtime import Outputs
from flashgen.registry import clear_bundles

Given = tuple[torch.Tensor, torch.Tensor, torch.Tensor]
MARK = torch.full((1,), 42.0)
CAUSAL = ("causal", None, "bhsd", False, False, None, None)


def given(dtype: torch.dtype = torch.float16) -> Given:
    q, k, v = (torch.zeros(1, 2, 16, 32, dtype=dtype) for _ in range(3))
    return q, k, v


def marked(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, tensors: object, addresses: tuple[int, ...] | None = None
) -> Outputs:
    """In place of the runner of a kernel."""
    assert addresses == (q.data_ptr(), k.data_ptr(), v.data_ptr())
    return MARK, None


@pytest.fixture
def kept() -> None:
    """The runner of a causal call of float16 tensors."""
    with torch.no_grad():
        functional._recent.keep(given(), CAUSAL, marked)


class SeesOperators(TorchDispatchMode):
    def __torch_dispatch__(
        self, func: typing.Any, types: object, args: tuple[typing.Any, ...] = (), kwargs: typing.Any = None
    ) -> typing.Any:
        return func(*args, **(kwargs or {}))


class SeesFunctions(TorchFunctionMode):
    def __torch_function__(
        self, func: typing.Any, types: object, args: tuple[typing.Any, ...] = (), kwargs: typing.Any = None
    ) -> typing.Any:
        return func(*args, **(kwargs or {}))


def goes_short(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, **options: typing.Any) -> bool:
    return flashgen.attention(q, k, v, causal=True, **options) is MARK


@pytest.mark.usefixtures("kept")
def test_a_call_like_an_earlier_one() -> None:
    assert goes_short(*given())
    with torch.no_grad():
        assert goes_short(*given())
    assert flashgen.attention(*given(), window=(-1, 0)) is MARK
    assert flashgen.attention(*given(), mask=flashgen.masks.causal()) is MARK


@pytest.mark.usefixtures("kept")
@pytest.mark.parametrize(
    "context",
    [
        lambda: torch.autocast("cpu", torch.bfloat16),
        SeesOperators,
        SeesFunctions,
        lambda: torch.device("cpu"),
        forward_ad.dual_level,
        torch.profiler.profile,
        torch.inference_mode,
    ],
    ids=["autocast", "dispatch", "function", "device", "forward_ad", "profiler", "inference"],
)
def test_who_else_has_a_part_is_asked(context: Callable[[], contextlib.AbstractContextManager[object]]) -> None:
    with context():
        assert not goes_short(*given())
    assert goes_short(*given())


@pytest.mark.usefixtures("kept")
def test_transforms_and_gradients() -> None:
    q, k, v = given()
    seen: list[bool] = []

    def loss(q: torch.Tensor) -> torch.Tensor:
        out = flashgen.attention(q, k, v, causal=True)
        # Also of tensors that the transform knows nothing of.
        seen.extend([out is MARK, goes_short(k, k.clone(), v)])
        return out.sum()

    torch.func.grad(loss)(q)
    torch.func.vmap(loss)(q[None])
    assert seen == [False] * 4
    assert not goes_short(q.clone().requires_grad_(), k, v)
    assert not goes_short(torch.nn.Parameter(q, requires_grad=False), k, v)


@pytest.mark.usefixtures("kept")
def test_other_tensors_and_options() -> None:
    q, k, v = given()
    others: list[Given] = [
        given(torch.bfloat16),
        (q, k[:, :1], v[:, :1]),
        (torch.zeros(1, 16, 2, 32, dtype=q.dtype).transpose(1, 2), k, v),
        (torch.zeros(q.numel() + 1, dtype=q.dtype)[1:].view(q.shape), k, v),
    ]
    assert [goes_short(*tensors) for tensors in others] == [False] * 4
    for options in ({"softmax_scale": 0.5}, {"return_lse": True}, {"layout": "bshd"}, {"deterministic": True}):
        assert not goes_short(q, k, v, **options)
    assert flashgen.attention(q, k, v) is not MARK
    clear_bundles()
    assert not goes_short(q, k, v)


@pytest.mark.usefixtures("kept")
def test_a_compiled_function_holds_the_operator() -> None:
    compiled = torch.compile(
        lambda *tensors: flashgen.attention(*tensors, causal=True), backend="eager", fullgraph=True
    )
    assert compiled(*given()).shape == (1, 2, 16, 32)


@pytest.mark.usefixtures("kept")
def test_what_is_no_option_is_refused_as_ever() -> None:
    with pytest.raises(flashgen.FlashgenError, match="layout must be"):
        flashgen.attention(*given(), causal=True, layout=["bhsd"])  # type: ignore[call-overload]


@pytest.fixture
def known(monkeypatch: pytest.MonkeyPatch) -> None:
    """The operator knows every call."""
    monkeypatch.setattr(functional, "known_runner", lambda *call: marked)


@pytest.mark.usefixtures("known")
def test_what_the_operator_knows_is_kept() -> None:
    assert [goes_short(*given()) for _ in range(3)] == [False, True, True]


@pytest.mark.usefixtures("known")
@pytest.mark.parametrize(
    "context", [lambda: torch.autocast("cpu", torch.bfloat16), SeesOperators, SeesFunctions, torch.profiler.profile]
)
def test_calls_that_others_have_a_part_in_are_not_kept(
    context: Callable[[], contextlib.AbstractContextManager[object]],
) -> None:
    with context():
        for _ in range(2):
            assert not goes_short(*given())
    q, k, v = given()
    with torch.no_grad():
        assert not goes_short(q.requires_grad_(), k, v)
    assert not goes_short(q, k, v)
    assert not goes_short(q.detach(), k, v, softmax_scale=torch.tensor(0.5))
    assert not functional._recent._kinds
