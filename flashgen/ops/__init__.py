"""The public torch functions."""

from flashgen.ops.functional import attention, explain, warmup
from flashgen.ops.torch_op import interpreting

__all__ = ["attention", "explain", "interpreting", "warmup"]
