"""Element types of Q, K, V and out."""

from __future__ import annotations

import enum

from flashgen.errors import InputError


class DType(str, enum.Enum):
    """An element type by its short name; softmax statistics and accumulators are float32 for all of them."""

    FP16 = "fp16"
    BF16 = "bf16"
    FP32 = "fp32"

    @property
    def itemsize(self) -> int:
        """Bytes of one element."""
        return 4 if self is DType.FP32 else 2

    @property
    def torch_name(self) -> str:
        """The attribute of `torch` that names this type, for example `bfloat16`."""
        return {DType.FP16: "float16", DType.BF16: "bfloat16", DType.FP32: "float32"}[self]

    def __str__(self) -> str:
        return self.value


def parse_dtype(text: str) -> DType:
    """Return the type named `fp16`, `bf16`, `fp32` or as torch spells it (`float16`, `torch.bfloat16`, ...).

    Raises:
        InputError: for any other name.
    """
    name = text.removeprefix("torch.")
    for dtype in DType:
        if name in (dtype.value, dtype.torch_name):
            return dtype
    raise InputError(f"unknown dtype {text!r}; allowed: {', '.join(d.value for d in DType)}")
