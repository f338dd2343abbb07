"""Memory that no kernel may write, around and between what it is to write, and what it only reads."""

from __future__ import annotations

import dataclasses
import typing

import torch
from torch import Tensor

# 128 rows of 256 numbers of 16 bits on either side: a store past the last row falls into it.
_BAND_BYTES = 64 * 1024
# Between rows of a spread tensor; descriptors need strides of whole 16 bytes, whatever the type.
_GAP = 16
_INTEGERS = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
# All bits set: NaN in every floating-point type, and not the NaN that a GPU computes.
_UNTOUCHED = -1


@dataclasses.dataclass(frozen=True, kw_only=True)
class Guarded:
    """A tensor inside memory of a known pattern.

    Attributes:
        tensor: of any content.
        memory: all of it as integers: a band, the tensor with its gaps, a band.
        band: how many elements each band has.
        has_gaps: whether there are any.
    """

    tensor: Tensor
    memory: Tensor
    band: int
    has_gaps: bool

    @classmethod
    def like(cls, tensor: Tensor, *, device: torch.device, gap: int) -> Guarded:
        """Return a guarded tensor of the sizes and the type of `tensor`.

        Args:
            tensor: gives them, and the strides where there are no gaps.
            device: where it is made.
            gap: 0 for none; else `gap` times 16 elements behind each row, and one row behind those of each head: each
                number gives other strides.
        """
        integers, band = _INTEGERS[tensor.itemsize], _BAND_BYTES // tensor.itemsize
        size, stride = list(tensor.shape), list(tensor.stride())
        if gap:
            first, *inner = size
            padded = [first, *(n + 1 for n in inner[:-1]), inner[-1] + gap * _GAP]
            stride = [1]
            for n in reversed(padded[1:]):
                stride.insert(0, stride[0] * n)
            length = padded[0] * stride[0]
        else:
            length = 1 + sum((n - 1) * step for n, step in zip(size, stride, strict=True)) if tensor.numel() else 0
        memory = torch.full((band + length + band,), _UNTOUCHED, dtype=integers, device=device)
        view = memory.view(tensor.dtype).as_strided(size, stride, band)
        return cls(tensor=view, memory=memory, band=band, has_gaps=gap > 0)

    @classmethod
    def copy_of(cls, tensor: Tensor, *, gap: int) -> Guarded:
        """Return a guarded copy, as `like`."""
        made = cls.like(tensor, device=tensor.device, gap=gap)
        made.tensor.copy_(tensor)
        return made

    def is_intact(self) -> bool:
        """Return whether nothing outside of the tensor was written."""
        if self.has_gaps:
            around = self.memory.clone()
            around.as_strided(self.tensor.size(), self.tensor.stride(), self.band).fill_(_UNTOUCHED)
        else:
            around = torch.cat((self.memory[: self.band], self.memory[-self.band :]))
        return bool((around == _UNTOUCHED).all())


def bit_sums(tensors: typing.Iterable[Tensor]) -> list[int]:
    """Return a number of each tensor that changes with nearly any change of its bits."""
    sums = [_stored(t).view(_INTEGERS[t.itemsize]).sum(dtype=torch.int64) for t in tensors]
    return torch.stack(sums).tolist() if sums else []


def _stored(tensor: Tensor) -> Tensor:
    """Return each element once that is in memory, where a stride of 0 repeats them."""
    return tensor[tuple(slice(None if stride else 1) for stride in tensor.stride())]
