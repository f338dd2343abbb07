"""Outputs are allocated around PyTorch's dispatcher, and just as it would."""

from __future__ import annotations

import pytest
import torch

from flashgen.ops import runtime


@pytest.fixture(autouse=True)
def _on_the_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    assert callable(runtime._empty_strided)
    monkeypatch.setattr(runtime, "_empty_strided", torch._C._dynamo.guards._empty_strided_cpu)


@pytest.mark.parametrize("size", [(2, 3, 5, 8), (4, 1, 16), (3, 7), (2, 0, 4)])
@pytest.mark.parametrize("dtype", [torch.float16, torch.float32])
def test_contiguous_and_of_the_size(size: tuple[int, ...], dtype: torch.dtype) -> None:
    like = torch.zeros(1, dtype=torch.bfloat16)
    # As a shape of a tensor: what PyTorch calls a size, and does not take.
    make = runtime.NewTensor(torch.Size(size), dtype)
    made, want = make(like), like.new_empty(size, dtype=dtype)
    assert (made.shape, made.stride(), made.dtype, made.device) == (want.shape, want.stride(), dtype, want.device)
    assert made.data_ptr() != make(like).data_ptr() or not made.numel()
    with torch.inference_mode():
        assert make(like).is_inference()


def test_memory_is_filled_where_pytorch_fills_it() -> None:
    make = runtime.NewTensor((64, 64), torch.float16)
    like = torch.zeros(1)
    before = torch.are_deterministic_algorithms_enabled()
    torch.use_deterministic_algorithms(True)
    try:
        assert bool(make(like).isnan().all())
    finally:
        torch.use_deterministic_algorithms(before)
