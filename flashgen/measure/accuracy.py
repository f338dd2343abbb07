"""The accuracy rule: a kernel may differ from float64 by twice what plain PyTorch differs by, and a little."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor

from flashgen.errors import InputError
from flashgen.measure.arithmetic import torch_dtype
from flashgen.measure.decode_reference import decode_entries, decode_reference
from flashgen.measure.entries import pick_heads
from flashgen.measure.reference import attention_reference, entries_of
from flashgen.spec import AttentionSpec, DType, Extras

TINY: Mapping[DType, float] = {
    DType.FP16: 2.0**-10,
    DType.BF16: 2.0**-7,
    # 16 ulp: beside an exact product there is a hardware exp2 (2 ulp) and another order of the sums.
    DType.FP32: 2.0**-19,
    # The matrix unit cuts what plain PyTorch rounds (seen on an H200): up to one ulp of 10 bits off each of the four
    # operands of the two products, always towards 0, so that it does not average out as rounding does.
    DType.TF32: 2.0**-8,
    # One ulp of bfloat16, the type of out. Nothing for the 4 bits of e4m3 probabilities: plain PyTorch rounds the same
    # ones, relative to the largest of the row as a kernel does, and the factor of 4 leaves room for another maximum.
    DType.FP8: 2.0**-7,
}
"""Slack of the rule, relative to the largest reference value: one ulp of a 16-bit output. Without it a kernel could not
pass where plain PyTorch happens to be exact (one key)."""

LSE_TINY: Mapping[DType, float] = {
    **dict.fromkeys((DType.FP16, DType.BF16, DType.FP32), 1e-5),
    DType.TF32: 2.0**-9,
    # Plain PyTorch adds products of e4m3 up exactly, the matrix unit of Hopper with 13 bits of fraction: scores of
    # standard deviation 1 and head_dim_qk 256 are off by up to 3e-3 on an H200.
    DType.FP8: 2.0**-9,
}
"""Slack for lse, which is float32 at every dtype: absolute up to |lse| = 1, relative beyond."""

MAX_FACTOR = 2.0
SOFTCAP_FACTOR = 3.0
FP8_FACTOR = 4.0
# What a mean of squares may be, of what the largest error may be: 1.5 beside 2.
RMS_SHARE = 0.75


@dataclasses.dataclass(frozen=True, kw_only=True)
class AccuracyReport:
    """How far an output is from the reference.

    Attributes:
        max_error: largest absolute error of out, or of lse where lse is what failed; infinite where a value is NaN or
            infinite and the reference is not, or the reverse.
        allowed_error: what the rule allows for it.
        ok: whether the rule holds.
        reason: empty if ok; else what failed, where and by how much.
    """

    max_error: float
    allowed_error: float
    ok: bool
    reason: str


def error_factor(spec: AttentionSpec) -> float:
    """Return how many times the error of plain PyTorch a kernel's largest error may be."""
    fp8 = spec.dtype is DType.FP8 or spec.fp8_kv
    return max(MAX_FACTOR, SOFTCAP_FACTOR if spec.softcap else 0.0, FP8_FACTOR if fp8 else 0.0)


class Oracle:
    """The right answer for one set of inputs, computed once, against which any number of outputs is judged.

    The rule is FlashAttention's, max|out - ref| <= 2 * max|pt - ref| + tiny, where `ref` is float64 and `pt` plain
    PyTorch at the inputs' precision; 3 times with a softcap, 4 times for fp8. A mean of squares beside it catches what
    hides below a largest error, such as a wrong factor: rms(out - ref) <= 1.5 * rms(pt - ref) (2.25, 3), or one `TINY`
    everywhere. A correct kernel rounds less than `pt` does (its scores stay in float32), so both leave it room. NaN
    never passes, which also finds elements never written to a poisoned output; -inf in lse must match exactly.
    """

    def __init__(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        *,
        spec: AttentionSpec,
        extras: Extras,
        heads: Sequence[tuple[int, int]] | None = None,
    ) -> None:
        """Compute both references.

        Args:
            q: [batch, nheads_q, seqlen_q, head_dim_qk], or packed [tokens_q, nheads_q, head_dim_qk]; of the spec's
                dtype.
            k: [batch, nheads_kv, seqlen_k, head_dim_qk] or [tokens_k, nheads_kv, head_dim_qk]; of decoding the cache,
                as of `decode_reference`, before anything is appended.
            v: likewise, with head_dim_v.
            spec: what is computed, of the forward or the decode phase.
            extras: its numbers and tensors.
            heads: (batch entry, query head) pairs to judge by; None is all. Outputs are handed to `judge` whole.

        Raises:
            InputError: if a shape or dtype does not belong to attention, or `extras` lacks what the spec asks for.
        """
        if q.dtype != torch_dtype(spec.dtype):
            raise InputError(f"no accuracy rule for {q.dtype} inputs of a {spec.dtype} kernel")
        self._dtype = spec.dtype
        self._factor = error_factor(spec)
        self._heads = None if heads is None else tuple(heads)
        decode = spec.phase == "decode"
        reference = decode_reference if decode else attention_reference
        rows = (q.shape[1], q.shape[0]) if spec.varlen else tuple(q.shape[:3])
        self._out_shape, self._lse_shape = (*q.shape[:-1], v.shape[-1]), rows
        self._ref, self._ref_lse = reference(q, k, v, spec=spec, extras=extras, precision="float64", heads=heads)
        self._plain, self._plain_lse = reference(q, k, v, spec=spec, extras=extras, precision="input", heads=heads)
        self._entries = decode_entries(q, spec, extras) if decode else entries_of(q, k, spec, extras)

    def judge(self, out: Tensor, lse: Tensor | None) -> AccuracyReport:
        """Return how far a kernel's outputs are off.

        Args:
            out: [batch, nheads_q, seqlen_q, head_dim_v], or packed [tokens_q, nheads_q, head_dim_v].
            lse: [batch, nheads_q, seqlen_q], or packed [nheads_q, tokens_q]; None if there is none.

        Raises:
            InputError: if a shape does not belong to the problem.
        """
        check_shape("out", out, self._out_shape)
        if lse is not None:
            check_shape("lse", lse, self._lse_shape)
        if self._heads is not None:
            out, lse = pick_heads(out, lse, self._heads, self._entries)
        ref, ref_lse = self._ref, self._ref_lse
        tiny, rms_tiny = TINY[self._dtype] * largest_of(ref), TINY[self._dtype] * rms_of(ref)
        report = judge_values(
            "out", out, ref, self._plain, factor=self._factor, tiny=tiny, rms_tiny=rms_tiny, locate=self._locate
        )
        if not report.ok or lse is None:
            return report
        tiny = LSE_TINY[self._dtype] * max(1.0, largest_of(ref_lse))
        lse_report = judge_values(
            "lse", lse, ref_lse, self._plain_lse, factor=self._factor, tiny=tiny, rms_tiny=tiny, locate=self._locate
        )
        return report if lse_report.ok else lse_report

    def _locate(self, index: tuple[int, ...]) -> str:
        """Return where an element of what is judged lies, as an index of the whole output or of one of its heads."""
        if self._heads is None:
            return str(list(index))
        packed = any(entry.varlen for entry in self._entries)
        return place_in_heads(index, self._heads, [self._entries[b].rows for b, _ in self._heads] if packed else None)


def accuracy_error(
    out: Tensor, lse: Tensor | None, q: Tensor, k: Tensor, v: Tensor, *, spec: AttentionSpec, extras: Extras
) -> AccuracyReport:
    """Return how far one output is off; see `Oracle`, which it makes for this one time."""
    return Oracle(q, k, v, spec=spec, extras=extras).judge(out, lse)


def place_in_heads(index: tuple[int, ...], heads: Sequence[tuple[int, int]], lengths: Sequence[int] | None) -> str:
    """Return which row of which head an element of rows taken by `join_heads` is; lengths are those of packed heads."""
    pair, *rest = index
    if lengths is not None:
        row, pair = pair, 0
        while row >= lengths[pair]:
            row, pair = row - lengths[pair], pair + 1
        rest = [row, *rest]
    b, h = heads[pair]
    return f"[b={b}, h={h}, {', '.join(map(str, rest))}]"


def check_shape(name: str, got: Tensor, shape: tuple[int, ...]) -> None:
    """Raise InputError if an output has another shape."""
    if tuple(got.shape) != shape:
        raise InputError(f"{name} must be {list(shape)}, got {list(got.shape)}")


def judge_values(
    name: str,
    got: Tensor,
    ref: Tensor,
    plain: Tensor,
    *,
    factor: float,
    tiny: float,
    rms_tiny: float,
    locate: Callable[[tuple[int, ...]], str],
) -> AccuracyReport:
    """Return whether the rule holds for one tensor.

    Args:
        name: what to call it.
        got: what a kernel wrote.
        ref: the right values, float64.
        plain: those of plain PyTorch.
        factor: how many times the error of plain PyTorch is allowed.
        tiny: what the largest error may be beyond it.
        rms_tiny: the root mean square of the errors that always is allowed.
        locate: says where an index is.
    """
    plain_error = _finite_difference(plain, ref)
    allowed = factor * largest_of(plain_error) + tiny
    comparable = (got == ref) | (got.isfinite() & ref.isfinite())
    if not comparable.all():
        where = (~comparable).nonzero()
        index = tuple(where[0].tolist())
        reason = (
            f"{name}{locate(index)} is {got[index].item():.6g}, the reference is {ref[index].item():.6g}; "
            f"{len(where)} of {got.numel()} elements are NaN or infinite where they must not be, or the reverse"
        )
        return AccuracyReport(max_error=math.inf, allowed_error=allowed, ok=False, reason=reason)
    error = _finite_difference(got, ref)
    largest = largest_of(error)
    rms, allowed_rms = rms_of(error), max(RMS_SHARE * factor * rms_of(plain_error), rms_tiny)
    reason = ""
    if largest > allowed:
        index = _index_of_largest(error)
        reason = (
            f"{name}{locate(index)} is {got[index].item():.6g}, the reference is {ref[index].item():.6g}: off by "
            f"{largest:.3g}, allowed {allowed:.3g}; {int((error > allowed).sum())} of {got.numel()} elements are beyond"
        )
    elif rms > allowed_rms:
        reason = (
            f"{name} is off by {rms:.3g} (root mean square), allowed {allowed_rms:.3g}; no element is beyond "
            f"{allowed:.3g}, most at {locate(_index_of_largest(error))}: a wrong factor rather than a wrong element"
        )
    return AccuracyReport(max_error=largest, allowed_error=allowed, ok=not reason, reason=reason)


def _finite_difference(a: Tensor, ref: Tensor) -> Tensor:
    """Return |a - ref| in float64, 0 where either is not finite."""
    difference = (a.double() - ref).abs_()
    return difference.masked_fill_(~difference.isfinite(), 0.0)


def _index_of_largest(values: Tensor) -> tuple[int, ...]:
    return tuple(int(i) for i in torch.unravel_index(values.argmax(), values.shape))


def largest_of(values: Tensor) -> float:
    """Return the largest absolute value that is finite, 0 if there is none."""
    finite = values[values.isfinite()]
    return float(finite.abs().max()) if finite.numel() else 0.0


def rms_of(values: Tensor) -> float:
    """Return the root mean square, 0 of nothing."""
    return float(values.square().mean().sqrt()) if values.numel() else 0.0
