"""Bugs of forward kernels in Triton. Small tiles, so that the interpreter takes a fraction of a second for each."""

from __future__ import annotations

from collections.abc import Callable

import torch
from mutants import Mutant

from flashgen.codegen import TritonForwardConfig

CONFIG = TritonForwardConfig(block_m=16, block_n=16, num_warps=1, num_stages=1)
_SIZES = "b=2 hq=1 hkv=1 s=40 d=16 fp16"
_GROUPED = "b=2 hq=4 hkv=2 s=40 d=16 fp16"
_LONG = "b=2 hq=1 hkv=1 s=128 d=16 fp16"
_HEADS = "b=2 hq=8 hkv=8 s=16 d=16 fp16"
_OFF = r"out\["
_NAN = r"out\[.* is nan"
_FINITE_PART = 'tl.where(m_new == float("-inf"), 0.0, m_new)'


def _edited(words: str, says: str, *edits: tuple[str, str, str], sizes: str = _SIZES) -> Mutant:
    return Mutant(problem=f"{sizes} {words}", config=CONFIG, says=says, edits=edits)


def _numbers(words: str, change: Callable[[dict[str, int | float]], None], says: str = _OFF) -> Mutant:
    return Mutant(problem=f"{_SIZES} {words}", config=CONFIG, says=says, numbers=change)


def _second_launch_does_nothing(number: int, run: Callable[[], None], tensors: dict[str, torch.Tensor]) -> None:
    if number != 1:
        run()


def _third_launch_on_is_wrong(number: int, run: Callable[[], None], tensors: dict[str, torch.Tensor]) -> None:
    run()
    # After as many as the checks take, and from then on: the next launch would hide what one alone did.
    if number >= 2:
        tensors["out"][0, 0, 0, 0] += 1.0


def _bits_differ(number: int, run: Callable[[], None], tensors: dict[str, torch.Tensor]) -> None:
    run()
    if number % 2:
        tensors["out"][-1, -1, -1] *= 1.0 + 2.0**-10


def _old_results(number: int, run: Callable[[], None], tensors: dict[str, torch.Tensor]) -> None:
    if number == 0:
        run()


FORWARD_MUTANTS = {
    # What is seen.
    "causal, without the diagonal": _edited("causal", _OFF, ("mask_mod", "kv_idx <= q_idx", "kv_idx < q_idx")),
    "causal, one key too many": _edited("causal", _OFF, ("mask_mod", "<= q_idx +", "<= q_idx + 1 +")),
    "causal, aligned at the first key": _edited(
        "causal", _OFF, ("mask_mod", " + (SEQLEN_K - SEQLEN_Q)", ""), ("bounds_causal", " + (SEQLEN_K - SEQLEN_Q)", "")
    ),
    "causal, the diagonal's tile without the mask": _edited(
        "causal",
        _OFF,
        ("kv_bounds", "tl.maximum(full_hi, 0) // BLOCK_N", "tl.cdiv(tl.maximum(full_hi, 0), BLOCK_N)"),
    ),
    "last tile of keys forgotten": _edited(
        "full", _OFF, ("kv_bounds", "end = tl.maximum(hi, 0)", "end = tl.maximum(hi, 0) // BLOCK_N * BLOCK_N")
    ),
    "keys past the last one not masked": _edited("full", _OFF, ("mask_mod", "kv_idx < SEQLEN_K", "kv_idx >= 0")),
    "keys past the last one not masked, in a window": _edited(
        "sliding_window(9,9)", _OFF, ("attend", "visible = visible & (kv_idx < SEQLEN_K)", "visible = visible")
    ),
    "window, left edge off by one": _edited(
        "sliding_window(9,3)", _OFF, ("mask_mod", "behind <= window_left", "behind < window_left")
    ),
    "window, right edge off by one": _edited(
        "sliding_window(9,3)", _OFF, ("mask_mod", "behind >= -window_right", "behind > -window_right")
    ),
    "window, its first tile skipped now and then": _edited(
        "sliding_window(9,3)", _OFF, ("bounds_sliding", "first = own - window_left", "first = own - window_left + 1")
    ),
    "used keys ignored": _edited(
        "full seqused=k", _OFF, ("attn_fwd", "SEQLEN_K = tl.minimum(tl.load(seqused_k_ptr + off_z), SEQLEN_K)", "")
    ),
    # What is written.
    "rows of the last tile not written": _edited(
        "full", _NAN, ("store_tile", "offs[:, None] < length)", "offs[:, None] < length // ROWS * ROWS)")
    ),
    "a row past the last one written": _edited(
        "full", "memory outside of out", ("store_tile", "offs[:, None] < length)", "offs[:, None] <= length)")
    ),
    "columns past the last one written": _edited(
        "full",
        "memory outside of out",
        ("store_tile", "(offs_d[None, :] < HEAD_DIM)", "(offs_d[None, :] < BLOCK_D)"),
        sizes="b=2 hq=1 hkv=1 s=40 d=24 fp16",
    ),
    "an input written": _edited(
        "full", "an input was written", ("attn_fwd", "    store_tile(", "    tl.store(q_ptr, 1.0)\n    store_tile(")
    ),
    "added to what was there": _edited(
        "full", _NAN, ("store_tile", "tl.store(ptrs, tile,", "tl.store(ptrs, tile + tl.load(ptrs, mask=inside),")
    ),
    "a head in the middle forgotten": _edited(
        "full",
        r"at b=2 hq=8 .* of out are not written",
        ("attn_fwd", "    start_m = block", "    if off_zh == 9:\n        return\n    start_m = block"),
        sizes=_HEADS,
    ),
    # lse, which is written when the winner is confirmed.
    "lse off by a constant": _edited(
        "full", "lse", ("attn_fwd", "* 0.6931471805599453", "* 0.6931471805599453 + 0.001")
    ),
    "lse in base 2": _edited("full", r"lse\[", ("attn_fwd", ") * 0.6931471805599453", ")")),
    "lse of rows that see nothing": _edited(
        "causal",
        r"lse\[.* is 0",
        ("attn_fwd", "    lse_ptrs =", "    lse = tl.where(l_i == 0.0, 0.0, lse)\n    lse_ptrs ="),
    ),
    "lse of a row past the last one": _edited(
        "full",
        "memory outside of lse|lse",
        ("attn_fwd", "mask=offs_m < SEQLEN_Q", "mask=offs_m <= SEQLEN_Q"),
    ),
    # The online softmax.
    "output not rescaled": _edited("full", _OFF, ("attend", "acc = acc * alpha[:, None]", "acc = acc")),
    "sums not rescaled": _edited("full", _OFF, ("softmax_step", "l_i = l_i * alpha", "l_i = l_i")),
    "maximum not carried": _edited("full", _OFF, ("softmax_step", "l_i, m_new", "l_i, m_i")),
    "rows that see nothing divide 0 by 0": _edited(
        "causal", _NAN, ("attn_fwd", "tl.where(l_i == 0.0, 1.0, l_i)", "l_i")
    ),
    "rows that see nothing yet subtract infinities": _edited("causal", _NAN, ("softmax_step", _FINITE_PART, "m_new")),
    "probabilities rounded to fewer bits": _edited(
        "full", r"out", ("attend", "p.to(v.dtype)", "p.to(tl.float8e5).to(v.dtype)")
    ),
    "scale forgotten": _numbers("full", lambda values: values.update(qk_scale=1.4426950408889634)),
    "scale applied twice": _numbers("full", lambda values: values.update(qk_scale=values["qk_scale"] / 4)),
    "scale a little off": _numbers("full", lambda values: values.update(qk_scale=values["qk_scale"] * 1.01)),
    # Which numbers.
    "values of another head": _edited(
        "full",
        _OFF,
        ("attn_fwd", "hkv * stride_vh", "(off_h % (nheads_q // group)).to(tl.int64) * stride_vh"),
        sizes=_GROUPED,
    ),
    "keys of the first batch entry": _edited("full", _OFF, ("attn_fwd", "k_ptr += z * stride_kz + ", "k_ptr += ")),
    "values with the strides of keys": _edited(
        "full", _OFF, ("attend", "            stride_vn,\n", "            stride_kn,\n")
    ),
    "output with the strides of queries": _numbers(
        "full", lambda values: values.update(stride_om=values["stride_qm"]), "memory outside of out"
    ),
    "keys of the first sequence": _edited(
        "full varlen", _OFF, ("attn_fwd", "k_ptr += k_start.to(tl.int64) * stride_kn + ", "k_ptr += ")
    ),
    # Features.
    "softcap forgotten": _edited("full softcap", _OFF, ("attend", "softcap_score(qk, softcap)", "qk")),
    "sinks forgotten": _edited(
        "full sinks",
        _OFF,
        ("attn_fwd", "sink = tl.load(sinks_ptr + off_h)", "sink = -100.0 + 0.0 * tl.load(sinks_ptr + off_h)"),
    ),
    "sink of another head": _edited(
        "full sinks", _OFF, ("attn_fwd", "tl.load(sinks_ptr + off_h)", "tl.load(sinks_ptr + off_hkv)"), sizes=_GROUPED
    ),
    "alibi from the first key": _edited(
        "full alibi", _OFF, ("attend", " + (SEQLEN_K - SEQLEN_Q) - kv_idx", " - kv_idx")
    ),
    "bias transposed": _edited(
        "full bias=input",
        _OFF,
        (
            "add_bias",
            "q_idx.to(tl.int64) * step_bm + kv_idx",
            "tl.minimum(kv_idx, rows - 1) * step_bm + tl.minimum(q_idx, keys - 1)",
        ),
    ),
    "bias of the first batch entry": _edited(
        "full bias=input", _OFF, ("attn_fwd", "bias_ptr += off_z.to(tl.int64) * step_bz + ", "bias_ptr += ")
    ),
    "bias in base 2": _edited("full bias=input", _OFF, ("add_bias", " * 1.4426950408889634", "")),
    "dropout of another head": _edited("full dropout", _OFF, ("dropout_keep", "+ off_zh", "+ off_zh + 1")),
    "dropout of another call": _edited("full dropout", _OFF, ("dropout_keep", "philox_offset.to(tl.int32)", "0")),
    "dropout without its factor": _numbers("full dropout", lambda values: values.update(dropout_scale=1.0)),
    # Wrong now and then.
    "wrong at large lengths alone": _edited(
        "full",
        r"at b=2 hq=1 .*sq?=128",
        ("attend", "        p, alpha", "        qk = tl.where(n >= 96, 0.0, qk)\n        p, alpha"),
        sizes=_LONG,
    ),
    "the second launch writes nothing": Mutant(
        problem=f"{_SIZES} full", config=CONFIG, says=_NAN, launch=_second_launch_does_nothing
    ),
    "wrong after some launches": Mutant(
        problem=f"{_SIZES} full", config=CONFIG, says="after the timing", launch=_third_launch_on_is_wrong
    ),
    "other bits in another run": Mutant(
        problem=f"{_SIZES} full", config=CONFIG, says="two runs differ in their bits", launch=_bits_differ
    ),
    "results of an earlier run": Mutant(problem=f"{_SIZES} full", config=CONFIG, says=_NAN, launch=_old_results),
}
