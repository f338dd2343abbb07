"""Bugs of backward kernels in Triton."""

from __future__ import annotations

import types
import typing

import pytest
import torch
from mutants import Mutant

from flashgen.codegen import KernelConfig, TritonBackwardConfig
from flashgen.launch import backward

OWN_DQ = TritonBackwardConfig(
    block_m1=16, block_n1=16, num_warps=1, num_stages=1, block_m2=16, block_n2=16, num_warps2=1, num_stages2=1
)
ATOMIC = TritonBackwardConfig(block_m1=16, block_n1=16, num_warps=1, num_stages=1, dq="atomic")
_GROUPED = "b=2 hq=2 hkv=1 s=40 d=16 fp16 backward"
_SIZES = "b=2 hq=1 hkv=1 s=40 d=16 fp16 backward"


def _edited(
    words: str, says: str, *edits: tuple[str, str, str], config: KernelConfig = OWN_DQ, sizes: str = _SIZES
) -> Mutant:
    return Mutant(problem=f"{sizes} {words}", config=config, says=says, edits=edits)


def _sums_not_zeroed(patch: pytest.MonkeyPatch) -> None:
    def dirty(*size: typing.Any, dtype: torch.dtype, device: torch.device) -> torch.Tensor:
        return torch.full(*size, 0.25, dtype=dtype, device=device)

    patch.setattr(backward, "torch", types.SimpleNamespace(**{**vars(torch), "zeros": dirty}))


def _lse_gradient_ignored(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(backward.BackwardCall, "after", lambda self, name, given: None)


BACKWARD_MUTANTS = {
    "dK without the scale": _edited("full", r"dk\[", ("attn_bwd_dkdv", "dk = (dk * softmax_scale)", "dk = dk")),
    "dQ without the scale": _edited("full", r"dq\[", ("attn_bwd_dq", "dq = (dq * softmax_scale)", "dq = dq")),
    "dQ without the last tile of keys": _edited(
        "full", r"dq\[", ("kv_bounds", "end = tl.maximum(hi, 0)", "end = tl.maximum(hi, 0) // BLOCK_N * BLOCK_N")
    ),
    "dV from the transposed probabilities": _edited(
        "full", r"d[kv]\[", ("add_queries", "dv = tl.dot(p.to(do.dtype)", "dv = tl.dot(tl.trans(p).to(do.dtype)")
    ),
    "delta forgotten": _edited("full", r"d[qk]\[", ("add_", "(dp - delta", "(dp - 0.0 * delta")),
    "delta of another head": _edited(
        "full",
        r"d[qk]\[",
        ("attn_bwd_delta", "do_ptr + z * stride_doz + h * stride_doh", "do_ptr + z * stride_doz"),
        sizes=_GROUPED,
    ),
    "lse in base 2": _edited("full", r"d[qkv]\[", ("attn_bwd_delta", "lse * 1.4426950408889634", "lse")),
    "sums of dQ not zeroed": Mutant(problem=f"{_SIZES} full", config=ATOMIC, says=r"dq\[", host=_sums_not_zeroed),
    "dQ added twice": _edited(
        "causal",
        r"dq\[",
        (
            "attn_bwd_dkdv",
            "            full_start,\n            full_end,",
            "            start,\n            full_end,",
        ),
        config=ATOMIC,
    ),
    "gradient of lse ignored": Mutant(
        problem=f"{_SIZES} full", config=OWN_DQ, says=r"d[qk]\[", host=_lse_gradient_ignored
    ),
    "gradient of the bias of the wrong sign": _edited(
        "full bias=input",
        r"with dbias|dbias\[",
        ("attn_bwd_dbias", "total += p", "total -= p"),
        config=ATOMIC,
    ),
    "gradient of the bias of the first batch entry": _edited(
        "full bias=input",
        r"dbias\[",
        ("attn_bwd_dbias", "range(own_z, last_z)", "range(own_z, own_z + 1)"),
        config=ATOMIC,
    ),
    "causal, without the diagonal": _edited("causal", r"d[qkv]\[", ("mask_mod", "kv_idx <= q_idx", "kv_idx < q_idx")),
    "causal, rows of a tile too late": _edited(
        "causal", r"d[kv]\[", ("q_bounds", "start = lo // BLOCK_M * BLOCK_M", "start = tl.cdiv(lo, BLOCK_M) * BLOCK_M")
    ),
    "window, last rows of a tile forgotten": _edited(
        "sliding_window(9,3)",
        r"d[kv]\[",
        ("rows_sliding", "all_last + BLOCK_N - 1", "all_last"),
    ),
    "keys of the last tile not written": _edited(
        "full",
        r"dk\[.* is nan|dq\[.* is nan",
        ("store_tile", "offs[:, None] < length)", "offs[:, None] < length // ROWS * ROWS)"),
    ),
    "a key past the last one written": _edited(
        "full", "memory outside of d[qkv]", ("store_tile", "offs[:, None] < length)", "offs[:, None] <= length)")
    ),
    "last query head of the group forgotten": _edited(
        "full",
        r"d[kv]\[",
        ("attn_bwd_dkdv", "for head in range(group)", "for head in range(group - 1)"),
        sizes=_GROUPED,
    ),
    "dV with the strides of dK": _edited(
        "full",
        r"dv|dk",
        ("attn_bwd_dkdv", "        stride_dvn,\n        start_n", "        stride_dkn,\n        start_n"),
    ),
    "dropout forgotten in dP": _edited(
        "full dropout", r"d[qk]\[", ("add_queries", "dp = tl.where(keep, dp * dropout_scale, 0.0)", "dp = dp")
    ),
    "dropout forgotten in dV": _edited(
        "full dropout", r"dv\[", ("add_queries", "tl.where(keep, p * dropout_scale, 0.0)", "p")
    ),
    "dropout transposed": _edited("full dropout", r"d[kv]\[", ("add_queries", "keep = tl.trans(keep)", "keep = keep")),
    "softcap without its derivative": _edited("full softcap", r"d[qk]\[", ("add_queries", "ds * slope_qk", "ds")),
    "scores rounded to fewer bits": _edited(
        "full", r"dk", ("add_queries", "ds = ds.to(q.dtype)", "ds = ds.to(tl.float8e5).to(q.dtype)")
    ),
    "rows that see nothing count": _edited(
        "causal",
        r"d[qkv]\[",
        ("attn_bwd_delta", 'float("inf"), lse *', "0.0, lse *"),
        ("probabilities", "p = tl.where(visible, p, 0.0)", "p = p"),
    ),
}
