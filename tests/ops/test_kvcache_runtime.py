"""Repeated calls over a cache: bound once, then found by what their tensors are like; no GPU is needed to tell."""

from __future__ import annotations

import typing

import pytest
import torch

import flashgen
from flashgen.codegen import TritonDecodeConfig
from flashgen.launch import interpret_decode
from flashgen.launch.decode_grid import num_tiles
from flashgen.ops import decode_op, decode_runtime, kvcache_calls
from flashgen.ops.decode_call import DecodeTensors
from flashgen.ops.decode_request import DecodeRequest, decode_arguments
from flashgen.ops.runtime import Outputs
from flashgen.registry import clear_bundles
from flashgen.spec import Extras, Problem
from flashgen.target import named_target

Given = tuple[torch.Tensor, torch.Tensor, torch.Tensor]
MARK = torch.full((1,), 42.0)


class InterpretedLaunch:
    """In place of a launch: the kernel in the interpreter, on tensors as a launch is given them."""

    made: typing.ClassVar[list[Problem]] = []
    partial_size = 7

    def __init__(
        self,
        *,
        plan: object,
        compiled: object,
        problem: Problem,
        config: TritonDecodeConfig,
        operands: object,
        extras: Extras,
        device: torch.device,
    ) -> None:
        assert num_tiles(problem.shape, config) > 0
        self._problem, self._config, self._extras = problem, config, extras
        self.made.append(problem)

    def __call__(
        self,
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        out: torch.Tensor,
        lse: torch.Tensor | None,
        partial: torch.Tensor,
        tensors: DecodeTensors,
    ) -> None:
        assert partial.shape == (7,)
        extras = Extras(
            softmax_scale=self._extras.softmax_scale,
            **{
                name: t.transpose(1, 2) if name in ("k_new", "v_new") and isinstance(t, torch.Tensor) else t
                for name, t in tensors._asdict().items()
            },
        )
        views = {name: t.transpose(1, 2) for name, t in (("q", q), ("k", k), ("v", v), ("out", out))}
        if lse is not None:
            views["lse"] = lse
        interpret_decode(views, problem=self._problem, config=self._config, extras=extras)


@pytest.fixture
def launched(monkeypatch: pytest.MonkeyPatch) -> list[Problem]:
    """The problems that were bound; what is bound runs in the interpreter."""
    InterpretedLaunch.made.clear()
    monkeypatch.setattr(decode_runtime, "DecodeLaunch", InterpretedLaunch)
    monkeypatch.setattr(decode_runtime, "detect_target", lambda device: named_target("sm_90"))
    monkeypatch.setattr(decode_runtime, "compiled_kernel", lambda spec, config, target: None)
    monkeypatch.setattr("flashgen.ops.runtime._compile_refusal", lambda spec, config, target: None)
    monkeypatch.setattr("flashgen.ops.runtime._empty_strided", None)
    monkeypatch.setattr(torch._C, "_cuda_getDevice", lambda: None, raising=False)
    return InterpretedLaunch.made


def given(dtype: torch.dtype = torch.float32) -> Given:
    generator = torch.Generator().manual_seed(0)
    q = torch.randn(2, 2, 4, 32, generator=generator)
    k, v = (torch.randn(2, 20, 2, 32, generator=generator) for _ in range(2))
    return q.to(dtype), k.to(dtype), v.to(dtype)


def lengths(*numbers: int) -> torch.Tensor:
    return torch.tensor(numbers, dtype=torch.int32)


def new(seed: int = 1) -> Given:
    generator = torch.Generator().manual_seed(seed)
    k, v = (torch.randn(2, 3, 2, 32, generator=generator) for _ in range(2))
    return k, v, lengths(4, 17)


def bound_call(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, request: DecodeRequest) -> Outputs:
    """What a call on a GPU does."""
    tensors, options = decode_arguments(q, k, v, request)
    return decode_op.runner_for(q, k, v, tensors, options)(q, k, v, tensors)


@pytest.mark.parametrize("change", ["nothing", "strides of q", "strides of k", "scale", "unaligned"])
def test_bound_calls(launched: list[Problem], change: str) -> None:
    for seed in (1, 2):
        q, k, v = given()
        k_new, v_new, used = new(seed)
        scale = -0.3 if change == "scale" else None
        want_k, want_v = k.clone(), v.clone()
        options = {"causal": True, "softmax_scale": scale, "return_lse": True}
        want = flashgen.attention_with_kvcache(q, want_k, want_v, k=k_new, v=v_new, cache_seqlens=used, **options)
        if change == "strides of q":
            q = q.mT.contiguous().mT
        if change == "strides of k":
            k_new = k_new.mT.contiguous().mT
        if change == "unaligned":
            v_new = torch.empty(v_new.numel() + 1)[1:].view(v_new.shape).copy_(v_new)
        out, lse = bound_call(q, k, v, DecodeRequest(k=k_new, v=v_new, cache_seqlens=used, **options))
        torch.testing.assert_close(out, want[0])
        torch.testing.assert_close(lse, want[1])
        assert torch.equal(k, want_k)
        assert torch.equal(v, want_v)
    assert len(launched) == 1


def test_what_makes_another_kind_of_call(launched: list[Problem]) -> None:
    q, k, v = given()
    plain = {"cache_seqlens": lengths(3, 5)}
    changes: tuple[dict[str, typing.Any], ...] = (
        {},
        {"return_lse": True},
        {"num_splits": 3},
        {"softmax_scale": 0.5},
        {"page_table": lengths(0, 1).view(2, 1)},
        {"cache_leftpad": lengths(0, 1)},
        {"window": (3, 0)},
    )
    for _ in range(2):
        for change in changes:
            bound_call(q, k, v, DecodeRequest(**plain, **change))
        # In the same memory: read once.
        bound_call(q, k, k, DecodeRequest(**plain))
        bound_call(q, k[:, :7], v[:, :7], DecodeRequest(**plain))
    assert len(launched) == len(changes) + 2
    assert [problem.spec.shared_kv for problem in launched].count(True) == 1


def test_nothing_is_launched_where_nothing_is_to_see(launched: list[Problem]) -> None:
    q, k, v = given()
    out, lse = bound_call(q, k[:, :0], v[:, :0], DecodeRequest(cache_seqlens=lengths(0, 0), return_lse=True))
    assert not out.any()
    assert lse is not None
    assert lse.isneginf().all()
    assert not launched


def marked(q: torch.Tensor, k_cache: torch.Tensor, v_cache: torch.Tensor, tensors: DecodeTensors) -> Outputs:
    """In place of the runner of a kernel."""
    return MARK, None


@pytest.fixture
def half() -> Given:
    """Tensors of a call whose runner is `marked`."""
    q, k, v = given(torch.float16)
    request = DecodeRequest(cache_seqlens=lengths(3, 5), num_splits="auto")
    with torch.no_grad():
        everything = (q, k, v, request.cache_seqlens)
        kvcache_calls._recent.keep(everything, kvcache_calls._asked(request), (False, marked))
    return q, k, v


def goes_short(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, **options: typing.Any) -> bool:
    with torch.no_grad():
        return flashgen.attention_with_kvcache(q, k, v, **{"cache_seqlens": lengths(9, 1), **options}) is MARK


def test_the_short_way(half: Given) -> None:
    assert goes_short(*half)
    assert goes_short(*(t.clone() for t in half))


@pytest.mark.parametrize(
    "options",
    [
        {"cache_seqlens": 4},
        {"cache_seqlens": lengths(1, 2, 3)[:2].repeat_interleave(2)[::2]},
        {"causal": True},
        {"window": (4, 4)},
        {"softmax_scale": 0.3},
        {"return_lse": True},
        {"check": True},
        {"num_splits": 2},
        {"cache_leftpad": lengths(0, 0)},
        {"sinks": torch.zeros(4)},
        {"score_mod": lambda score, b, h, q_idx, kv_idx: score + 1},
    ],
    ids=lambda options: next(iter(options)),
)
def test_other_options_go_the_long_way(half: Given, options: dict[str, typing.Any]) -> None:
    assert not goes_short(*half, **options)


def test_other_tensors_go_the_long_way(half: Given) -> None:
    q, k, v = half
    assert not goes_short(q[:, :1], k, v)
    assert not goes_short(q, k, k)
    assert not goes_short(*given(torch.bfloat16))
    shifted = torch.empty(q.numel() + 1, dtype=q.dtype)[1:].view(q.shape).copy_(q)
    assert not goes_short(shifted, k, v)
    with torch.autocast("cpu"):
        assert not goes_short(q, k, v)
    clear_bundles()
    assert not goes_short(q, k, v)


def test_who_asks_for_a_gradient_is_told_on_the_short_way_too(half: Given) -> None:
    q, k, v = half
    with pytest.raises(flashgen.FlashgenError, match="requires a gradient"):
        flashgen.attention_with_kvcache(q.requires_grad_(), k, v, cache_seqlens=lengths(9, 1))
