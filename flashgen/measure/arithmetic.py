"""What plain PyTorch rounds where: exact in float64, or at the precision of the inputs."""

from __future__ import annotations

import dataclasses
import typing

import torch
from torch import Tensor

from flashgen.spec import DType

Precision = typing.Literal["float64", "input"]

# float32 keeps 23 bits of mantissa, the matrix unit takes 10 of them.
_TF32_DROPPED = 13


@dataclasses.dataclass(frozen=True, kw_only=True)
class Arithmetic:
    """How the reference computes: nothing rounded, or what plain PyTorch rounds for inputs of `dtype`.

    Scores and probabilities are rounded to the inputs' type and the softmax is float32. For tf32 the operands of each
    product are rounded to 10 bits of mantissa and its sums are float32. For fp8 the scores stay in float32, the
    probabilities are rounded to e4m3 and out to bfloat16.
    """

    dtype: DType
    precision: Precision

    @property
    def exact(self) -> bool:
        """Whether nothing is rounded."""
        return self.precision == "float64"

    @property
    def softmax_type(self) -> torch.dtype:
        """The type of scores once they are scaled, of sums and of lse."""
        return torch.float64 if self.exact else torch.float32

    @property
    def out_type(self) -> torch.dtype:
        """The type of out."""
        return torch.float64 if self.exact else torch_dtype(self.dtype.out)

    @property
    def divides_last(self) -> bool:
        """Whether probabilities are divided by their sum after the product with V, as e4m3 needs.

        A row of a thousand keys has probabilities of 2**-10, which e4m3 rounds to 0: a yardstick that rounds them once
        divided would excuse any error. Relative to the largest of the row they keep their 4 bits down to 2**-6.
        """
        return self.dtype is DType.FP8 and not self.exact

    def operand(self, tensor: Tensor) -> Tensor:
        """Return `tensor` as a matrix product takes it."""
        if self.exact:
            return tensor.double()
        if self.dtype is DType.FP8:
            return tensor.float()
        if self.dtype is DType.TF32:
            return round_to_tf32(tensor.float())
        return tensor.to(torch_dtype(self.dtype))

    def probabilities(self, tensor: Tensor) -> Tensor:
        """Return softmax values as the product with V takes them."""
        return self.operand(tensor.to(torch.float8_e4m3fn) if self.divides_last else tensor)


def torch_dtype(dtype: DType) -> torch.dtype:
    """Return torch's type for elements of `dtype`."""
    found = getattr(torch, dtype.torch_name)
    assert isinstance(found, torch.dtype)
    return found


def round_to_tf32(tensor: Tensor) -> Tensor:
    """Return float32 values rounded to 10 bits of mantissa, to nearest, ties to even."""
    bits = tensor.contiguous().view(torch.int32)
    odd = (bits >> _TF32_DROPPED) & 1
    half = (1 << (_TF32_DROPPED - 1)) - 1
    return ((bits + half + odd) & -(1 << _TF32_DROPPED)).view(torch.float32)
