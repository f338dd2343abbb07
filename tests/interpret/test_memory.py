"""Which memory the kernel reads and writes: strides, and what lies beside the tensors."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable

import pytest
import torch

from flashgen.codegen import TritonForwardConfig
from flashgen.launch import interpret_forward
from flashgen.measure import accuracy_error
from flashgen.spec import Extras, causal, full, parse_problem

Check = Callable[..., None]

CONFIG = TritonForwardConfig(block_m=32, block_n=32, num_warps=2, num_stages=1)
DESCRIPTOR = dataclasses.replace(CONFIG, loads="descriptor")
BATCH, NHEADS_Q, NHEADS_KV, SEQLEN_Q, SEQLEN_K, DIM, DIM_V = 2, 4, 2, 41, 70, 40, 24


def normal(*sizes: int, seed: int) -> torch.Tensor:
    return torch.randn(sizes, generator=torch.Generator().manual_seed(seed), dtype=torch.float32).half()


def dense() -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    return (
        normal(BATCH, NHEADS_Q, SEQLEN_Q, DIM, seed=1),
        normal(BATCH, NHEADS_KV, SEQLEN_K, DIM, seed=2),
        normal(BATCH, NHEADS_KV, SEQLEN_K, DIM_V, seed=3),
    )


def transposed(t: torch.Tensor) -> torch.Tensor:
    """The same values in the order [batch, seqlen, heads, head_dim]."""
    return t.transpose(1, 2).contiguous().transpose(1, 2)


def seqlen_first(t: torch.Tensor) -> torch.Tensor:
    """The same values in the order [seqlen, batch, heads, head_dim]."""
    return t.permute(2, 0, 1, 3).contiguous().permute(1, 2, 0, 3)


def sliced(t: torch.Tensor) -> torch.Tensor:
    """The same values in every second head and row, and the first columns, of a tensor of NaN."""
    big = torch.full((t.shape[0], 2 * t.shape[1], 2 * t.shape[2], t.shape[3] + 24), math.nan, dtype=t.dtype)
    view = big[:, 1::2, ::2, : t.shape[3]]
    view.copy_(t)
    return view


@pytest.mark.parametrize("config", [CONFIG, DESCRIPTOR], ids=["pointer", "descriptor"])
@pytest.mark.parametrize("change", [transposed, seqlen_first, sliced])
@pytest.mark.parametrize("which", ["q", "k", "v", "qkv"])
def test_strided_inputs(
    check: Check, which: str, change: Callable[[torch.Tensor], torch.Tensor], config: TritonForwardConfig
) -> None:
    q, k, v = (change(t) if name in which else t for name, t in zip("qkv", dense(), strict=True))
    for mask in (full(), causal()):
        check(q, k, v, config, mask)


def test_packed_projection(check: Check) -> None:
    packed = normal(BATCH, SEQLEN_K, NHEADS_Q + 2 * NHEADS_KV, DIM, seed=4).transpose(1, 2)
    q, k, v = packed.split([NHEADS_Q, NHEADS_KV, NHEADS_KV], dim=1)
    for config in (CONFIG, DESCRIPTOR):
        check(q, k, v, config, causal())


def test_expanded_inputs(check: Check) -> None:
    q, k, v = dense()
    one_head = (t[:, :1].expand(-1, NHEADS_Q, -1, -1) for t in (k, v))
    check(q, *one_head, CONFIG, causal())
    one_batch = (t[:1].expand(BATCH, -1, -1, -1) for t in (q, k, v))
    check(*one_batch, CONFIG, causal())
    one_row = (t[:, :, :1].expand(-1, -1, SEQLEN_K, -1) for t in (k, v))
    check(q, *one_row, CONFIG, causal())


def test_strides_of_dimensions_of_size_one_are_never_used(check: Check) -> None:
    q, k, v = (t[:1, :1] for t in dense())
    odd = [torch.as_strided(t, t.shape, (3, 5, t.stride(2), 1)) for t in (q, k, v)]
    for config in (CONFIG, DESCRIPTOR):
        check(*odd, config, causal())


@pytest.mark.parametrize("config", [CONFIG, DESCRIPTOR], ids=["pointer", "descriptor"])
@pytest.mark.parametrize("mask", [full(), causal(), causal("top_left")], ids=str)
def test_nothing_beside_the_inputs_is_read_into_the_result(
    check: Check, mask: object, config: TritonForwardConfig
) -> None:
    # The rows after the last of each head, and the columns after the last of each row, hold NaN.
    def guarded(t: torch.Tensor) -> torch.Tensor:
        big = torch.full((t.shape[0], t.shape[1], t.shape[2] + 64, 2 * t.shape[3]), math.nan, dtype=t.dtype)
        view = big[:, :, : t.shape[2], : t.shape[3]]
        view.copy_(t)
        return view

    check(*(guarded(t) for t in dense()), config, mask)


@pytest.mark.parametrize("config", [CONFIG, DESCRIPTOR], ids=["pointer", "descriptor"])
@pytest.mark.parametrize("mask", [full(), causal()], ids=str)
def test_nothing_beside_the_outputs_is_written(
    mask: object, config: TritonForwardConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    guard = 7.0
    buffer = torch.full((BATCH, NHEADS_Q, SEQLEN_Q + 40, DIM_V + 40), guard, dtype=torch.float16)
    out = buffer[:, :, 8 : 8 + SEQLEN_Q, 16 : 16 + DIM_V]
    lse_buffer = torch.full((BATCH * NHEADS_Q * SEQLEN_Q + 200,), guard)
    lse = lse_buffer[100:-100].view(BATCH, NHEADS_Q, SEQLEN_Q)
    for poisoned in (out, lse):
        poisoned.fill_(math.nan)
    monkeypatch.setattr("flashgen.launch.interpreter.allocate_outputs", lambda q, spec: (out, lse))
    q, k, v = dense()
    problem = parse_problem(
        f"b={BATCH} hq={NHEADS_Q} hkv={NHEADS_KV} sq={SEQLEN_Q} sk={SEQLEN_K} d={DIM} dv={DIM_V} {mask} fp16 lse"
    )
    extras = Extras(softmax_scale=0.2)
    interpret_forward(q, k, v, problem=problem, config=config, extras=extras)
    report = accuracy_error(out, lse, q, k, v, spec=problem.spec, extras=extras)
    assert report.ok, report.reason
    for whole, part in ((buffer, out), (lse_buffer, lse)):
        part.fill_(guard)
        assert bool((whole == guard).all()), f"{int((whole != guard).sum())} elements beside the output were written"


def test_inputs_are_left_alone(check: Check) -> None:
    q, k, v = dense()
    copies = [t.clone() for t in (q, k, v)]
    check(q, k, v, CONFIG, causal())
    assert all(torch.equal(t, copy) for t, copy in zip((q, k, v), copies, strict=True))
