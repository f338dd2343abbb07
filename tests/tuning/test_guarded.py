"""Memory around outputs: what is written there shows, whatever is written inside."""

from __future__ import annotations

import pytest
import torch

from flashgen.tuning.guarded import Guarded, bit_sums

CPU = torch.device("cpu")
TYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float8_e4m3fn)


def guarded(dtype: torch.dtype, gap: int, *size: int) -> Guarded:
    return Guarded.like(torch.empty(size, dtype=dtype, device="meta"), device=CPU, gap=gap)


@pytest.mark.parametrize("size", [(2, 3, 5, 8), (7, 3, 8), (2, 3, 5), (2, 0, 5, 8)], ids=str)
@pytest.mark.parametrize("gap", [0, 1, 4])
@pytest.mark.parametrize("dtype", TYPES, ids=str)
def test_the_tensor_may_be_written_and_nothing_else(dtype: torch.dtype, gap: int, size: tuple[int, ...]) -> None:
    guard = guarded(dtype, gap, *size)
    assert (guard.tensor.shape, guard.tensor.dtype, guard.is_intact()) == (size, dtype, True)
    guard.tensor.fill_(1.0)
    assert guard.is_intact()
    inside = set(
        (torch.arange(guard.memory.numel()).as_strided(size, guard.tensor.stride(), guard.band)).flatten().tolist()
    )
    assert len(inside) == guard.tensor.numel()
    ends = (0, guard.band - 1, guard.memory.numel() - guard.band, guard.memory.numel() - 1)
    gaps = [place for place in range(guard.band, guard.memory.numel() - guard.band) if place not in inside][
        :: 1 + 40 * gap
    ]
    for place in (*ends, *gaps):
        kept = guard.memory[place].item()
        guard.memory[place] = 0
        assert not guard.is_intact(), place
        guard.memory[place] = kept
    assert guard.is_intact()


def test_gaps_give_each_tensor_strides_of_its_own_that_descriptors_can_take() -> None:
    strides = [guarded(torch.float16, gap, 2, 3, 5, 8).tensor.stride() for gap in range(6)]
    for axis in range(3):
        assert len({stride[axis] for stride in strides}) == 6
    assert all(step % 8 == 0 for stride in strides for step in stride[:-1])


def test_what_lies_between_rows_is_not_a_number() -> None:
    guard = Guarded.copy_of(torch.ones(2, 3, 5, 8), gap=1)
    whole = guard.memory.view(torch.float32)
    assert int((whole == 1).sum()) == 240
    assert int(whole.isnan().sum()) == whole.numel() - 240


def test_any_change_of_what_is_read_shows() -> None:
    tensors = [torch.randn(4, 5).to(dtype) for dtype in TYPES] + [torch.tensor([True, False]), torch.arange(1, 4)]
    tensors.append(torch.randn(4).expand(3, 4))
    before = bit_sums(tensors)
    assert bit_sums(tensors) == before
    for index, tensor in enumerate(tensors):
        tensor[0] = 0
        after = bit_sums(tensors)
        assert [a != b for a, b in zip(after, before, strict=True)] == [i == index for i in range(len(tensors))]
        before = after
