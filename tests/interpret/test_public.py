"""`flashgen.attention` on CPU tensors inside `flashgen.interpreting()`, and what is left behind."""

from __future__ import annotations

import dataclasses
import typing
from pathlib import Path

import pytest
import torch
import triton.language as tl
from triton.runtime.jit import JITFunction

import flashgen
from flashgen.codegen import TritonForwardConfig, render
from flashgen.compile import compile_kernel, load_kernel
from flashgen.errors import ConfigError
from flashgen.launch import interpret_forward
from flashgen.launch.interpreted import run_interpreted
from flashgen.measure import accuracy_error
from flashgen.ops import cpu
from flashgen.spec import AttentionSpec, Extras, causal, full, parse_dtype, parse_problem
from flashgen.spec.masks import Mask
from flashgen.target import named_target

CONFIG = TritonForwardConfig(block_m=32, block_n=32, num_warps=2, num_stages=1)


@pytest.fixture(autouse=True)
def _no_registry(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("flashgen.resources.user_registry_dir", lambda: tmp_path / "user")
    monkeypatch.setattr("flashgen.resources.shipped_registry_dir", lambda: tmp_path / "shipped")


@pytest.fixture
def interpreted(monkeypatch: pytest.MonkeyPatch) -> list[TritonForwardConfig]:
    """The config of each call that reaches the interpreter."""
    seen: list[TritonForwardConfig] = []

    def recorded(*tensors: torch.Tensor, **options: typing.Any) -> tuple[torch.Tensor, torch.Tensor | None]:
        seen.append(options["config"])
        return interpret_forward(*tensors, **options)

    monkeypatch.setattr(cpu, "interpret_forward", recorded)
    return seen


def normal(layout: str, batch: int, heads: int, seqlen: int, dim: int, dtype: torch.dtype) -> torch.Tensor:
    rows = (heads, seqlen) if layout == "bhsd" else (seqlen, heads)
    return torch.randn(batch, *rows, dim, generator=torch.Generator().manual_seed(seqlen + dim)).to(dtype)


def inputs(layout: str = "bhsd", dtype: torch.dtype = torch.float16) -> tuple[torch.Tensor, ...]:
    return (
        normal(layout, 2, 6, 45, 40, dtype),
        normal(layout, 2, 2, 77, 40, dtype),
        normal(layout, 2, 2, 77, 24, dtype),
    )


def assert_right(
    out: torch.Tensor,
    lse: torch.Tensor | None,
    tensors: tuple[torch.Tensor, ...],
    mask: Mask,
    scale: float,
    layout: str,
) -> None:
    q, k, v, got = ((t if layout == "bhsd" else t.transpose(1, 2)) for t in (*tensors, out))
    spec = AttentionSpec(
        dtype=parse_dtype(str(q.dtype)), head_dim_qk=q.shape[3], head_dim_v=v.shape[3], mask=mask, lse=lse is not None
    )
    report = accuracy_error(got, lse, q, k, v, spec=spec, extras=Extras(softmax_scale=scale))
    assert report.ok, report.reason


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize("layout", ["bhsd", "bshd"])
@pytest.mark.parametrize("mask", [full(), causal(), causal("top_left")], ids=str)
def test_call(interpreted: list[TritonForwardConfig], mask: Mask, layout: str, dtype: torch.dtype) -> None:
    tensors = inputs(layout, dtype)
    with flashgen.interpreting():
        out, lse = flashgen.attention(*tensors, mask=mask, layout=layout, return_lse=True)
    assert len(interpreted) == 1
    assert_right(out, lse, tensors, mask, 40**-0.5, layout)
    assert out.is_contiguous()


def test_causal_is_bottom_right() -> None:
    tensors = inputs()
    with flashgen.interpreting():
        out = flashgen.attention(*tensors, causal=True, config=CONFIG)
        assert torch.equal(out, flashgen.attention(*tensors, mask=causal(), config=CONFIG))
        assert torch.equal(out, flashgen.attention(*tensors, mask=causal(), causal=True, config=CONFIG))
    assert_right(out, None, tensors, causal(), 40**-0.5, "bhsd")


@pytest.mark.parametrize("scale", [-0.3, 0.0, 0.5])
def test_any_scale(scale: float) -> None:
    tensors = inputs(dtype=torch.float32)
    with flashgen.interpreting():
        out, lse = flashgen.attention(*tensors, softmax_scale=scale, causal=True, return_lse=True)
    assert_right(out, lse, tensors, causal(), scale, "bhsd")


def test_a_given_config_is_what_runs(interpreted: list[TritonForwardConfig]) -> None:
    with flashgen.interpreting():
        flashgen.attention(*inputs(), config=CONFIG)
    assert interpreted == [CONFIG]


def test_an_illegal_config_is_refused() -> None:
    with flashgen.interpreting(), pytest.raises(ConfigError, match="block_m=48"):
        flashgen.attention(*inputs(), config=dataclasses.replace(CONFIG, block_m=48))


def test_only_inside_the_block(interpreted: list[TritonForwardConfig]) -> None:
    flashgen.attention(*inputs())
    assert interpreted == []
    with flashgen.interpreting():
        with flashgen.interpreting():
            flashgen.attention(*inputs(), config=CONFIG)
        flashgen.attention(*inputs(), config=CONFIG)
    assert len(interpreted) == 2
    flashgen.attention(*inputs())
    assert len(interpreted) == 2


@pytest.mark.parametrize(("value", "calls"), [("1", 1), ("0", 0), ("", 0)])
def test_environment(
    interpreted: list[TritonForwardConfig], monkeypatch: pytest.MonkeyPatch, value: str, calls: int
) -> None:
    monkeypatch.setenv("FLASHGEN_INTERPRET", value)
    flashgen.attention(*inputs(), config=CONFIG)
    assert len(interpreted) == calls


@pytest.mark.parametrize("sizes", [(0, 5), (5, 0), (0, 0)], ids=str)
def test_empty_sequences(sizes: tuple[int, int]) -> None:
    q, k, v = (torch.ones(2, 3, n, 16) for n in (sizes[0], sizes[1], sizes[1]))
    with flashgen.interpreting():
        out, lse = flashgen.attention(q, k, v, return_lse=True)
    assert out.shape == q.shape
    assert bool((out == 0).all())
    assert bool((lse == float("-inf")).all())


def test_compiler_works_before_and_after(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    spec = parse_problem("h=1 s=1 d=64 causal fp16").spec

    def registers(**change: int) -> int:
        config = dataclasses.replace(CONFIG, **change)
        return compile_kernel(render(spec, config), spec, config, named_target("sm_80")).resources.registers

    call, functions = JITFunction.__call__, {name: getattr(tl, name) for name in ("load", "dot", "max", "arange")}
    assert registers() >= 24
    with flashgen.interpreting():
        flashgen.attention(*inputs(), causal=True, config=CONFIG)
    assert JITFunction.__call__ is call
    assert {name: getattr(tl, name) for name in functions} == functions
    # Other numbers, so that the disk cache holds no answer.
    assert registers(block_m=64, num_warps=4) >= 24


def test_compiler_works_after_a_kernel_that_failed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    spec = parse_problem("h=1 s=1 d=64 full fp16").spec
    rendered = render(spec, CONFIG)
    call = JITFunction.__call__
    with pytest.raises(TypeError):
        run_interpreted(load_kernel(rendered), (1,), {"q_ptr": torch.zeros(1)})
    assert JITFunction.__call__ is call
    assert compile_kernel(rendered, spec, CONFIG, named_target("sm_80")).resources.registers >= 24
    with flashgen.interpreting():
        tensors = inputs()
        assert_right(flashgen.attention(*tensors, config=CONFIG), None, tensors, full(), 40**-0.5, "bhsd")
