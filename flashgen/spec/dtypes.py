"""Element types of Q, K and V, and how their products are computed."""

from __future__ import annotations

import enum

from flashgen.errors import InputError

_TORCH_NAMES = {
    "fp16": "float16",
    "bf16": "bfloat16",
    "fp32": "float32",
    "tf32": "float32",
    "fp8": "float8_e4m3fn",
}


class DType(str, enum.Enum):
    """An element type by its short name; softmax statistics and accumulators are float32 for all of them.

    `tf32` is float32 in memory whose products the matrix unit takes with 10 bits of mantissa; `fp8` is e4m3.
    """

    FP16 = "fp16"
    BF16 = "bf16"
    FP32 = "fp32"
    TF32 = "tf32"
    FP8 = "fp8"

    @property
    def itemsize(self) -> int:
        """Bytes of one element of Q, K and V."""
        return {DType.FP8: 1, DType.FP32: 4, DType.TF32: 4}.get(self, 2)

    @property
    def torch_name(self) -> str:
        """The attribute of `torch` that names the type of Q, K and V, for example `bfloat16`."""
        return _TORCH_NAMES[self.value]

    @property
    def out(self) -> DType:
        """The type of out: that of Q, and bf16 for fp8, which is too coarse for a result."""
        return DType.BF16 if self is DType.FP8 else self

    def __str__(self) -> str:
        return self.value


def parse_dtype(text: str) -> DType:
    """Return the type with that short name, or as torch spells it (`float16`, `torch.bfloat16`, ...).

    `float32` is `fp32`, with ieee products; `tf32` has only its short name.

    Raises:
        InputError: for any other name.
    """
    name = text.removeprefix("torch.")
    for dtype in DType:
        if name in (dtype.value, dtype.torch_name):
            return dtype
    raise InputError(f"unknown dtype {text!r}; allowed: {', '.join(d.value for d in DType)}")
