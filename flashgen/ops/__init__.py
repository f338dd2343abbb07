"""The public torch functions."""

from flashgen.ops import batching as batching
from flashgen.ops import flops as flops
from flashgen.ops.cpu import interpreting
from flashgen.ops.explaining import explain
from flashgen.ops.functional import attention
from flashgen.ops.kvcache import attention_with_kvcache, explain_with_kvcache
from flashgen.ops.varlen import attention_varlen
from flashgen.ops.warming import run_backward, run_decode_call, run_problem, warmup

__all__ = [
    "attention",
    "attention_varlen",
    "attention_with_kvcache",
    "explain",
    "explain_with_kvcache",
    "interpreting",
    "run_backward",
    "run_decode_call",
    "run_problem",
    "warmup",
]
