"""The accuracy rule: a kernel may differ from float64 by twice what plain PyTorch differs by, and a little."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping

import torch
from torch import Tensor

from flashgen.errors import InputError
from flashgen.measure.reference import attention_reference
from flashgen.spec import Mask

TINY: Mapping[torch.dtype, float] = {
    torch.float16: 2.0**-10,
    torch.bfloat16: 2.0**-7,
    # 16 ulp: beside an exact product there is a hardware exp2 (2 ulp) and another order of the sums.
    torch.float32: 2.0**-19,
}
"""Slack of the rule, relative to the largest reference value: one ulp of a 16-bit output. Without it a kernel could not
pass where plain PyTorch happens to be exact (one key)."""

LSE_TINY = 1e-5
"""Slack for lse, which is float32 at every dtype: absolute up to |lse| = 1, relative beyond."""

MAX_FACTOR = 2.0
RMS_FACTOR = 1.5


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


class Oracle:
    """The right answer for one set of inputs, computed once, against which any number of outputs is judged.

    The rule is FlashAttention's, max|out - ref| <= 2 * max|pt - ref| + tiny, where `ref` is float64 and `pt` plain
    PyTorch at the inputs' precision. A mean of squares beside it catches what hides below a largest error, such as a
    wrong factor: rms(out - ref) <= 1.5 * rms(pt - ref), or one `TINY` everywhere. A correct kernel rounds less than
    `pt` does (its scores stay in float32), so both leave it room. NaN never passes, which also finds elements that
    were never written to a poisoned output; -inf in lse must match exactly.
    """

    def __init__(self, q: Tensor, k: Tensor, v: Tensor, *, mask: Mask, softmax_scale: float) -> None:
        """Compute both references.

        Args:
            q: [batch, nheads_q, seqlen_q, head_dim_qk], float16, bfloat16 or float32.
            k: [batch, nheads_kv, seqlen_k, head_dim_qk].
            v: [batch, nheads_kv, seqlen_k, head_dim_v].
            mask: which keys a row sees.
            softmax_scale: factor of the scores.

        Raises:
            InputError: if a shape or dtype does not belong to attention.
        """
        if q.dtype not in TINY:
            raise InputError(f"no accuracy rule for {q.dtype}; known: {', '.join(map(str, TINY))}")
        self._tiny = TINY[q.dtype]
        self._ref, self._ref_lse = attention_reference(
            q, k, v, mask=mask, softmax_scale=softmax_scale, precision="float64"
        )
        self._plain, self._plain_lse = attention_reference(
            q, k, v, mask=mask, softmax_scale=softmax_scale, precision="input"
        )

    def judge(self, out: Tensor, lse: Tensor | None) -> AccuracyReport:
        """Return how far out [batch, nheads_q, seqlen_q, head_dim_v] and lse (None if there is none) are off.

        Raises:
            InputError: if a shape does not belong to the problem.
        """
        ref, ref_lse = self._ref, self._ref_lse
        tiny, rms_tiny = self._tiny * _largest(ref), self._tiny * _rms(ref)
        report = _judge("out", out, ref, self._plain, tiny=tiny, rms_tiny=rms_tiny)
        if not report.ok or lse is None:
            return report
        tiny = LSE_TINY * max(1.0, _largest(ref_lse))
        lse_report = _judge("lse", lse, ref_lse, self._plain_lse, tiny=tiny, rms_tiny=tiny)
        return report if lse_report.ok else lse_report


def accuracy_error(
    out: Tensor, lse: Tensor | None, q: Tensor, k: Tensor, v: Tensor, *, mask: Mask, softmax_scale: float
) -> AccuracyReport:
    """Return how far one output is off; see `Oracle`, which it makes for this one time."""
    return Oracle(q, k, v, mask=mask, softmax_scale=softmax_scale).judge(out, lse)


def _judge(name: str, got: Tensor, ref: Tensor, plain: Tensor, *, tiny: float, rms_tiny: float) -> AccuracyReport:
    if got.shape != ref.shape:
        raise InputError(f"{name} must be {list(ref.shape)}, got {list(got.shape)}")
    plain_error = _finite_difference(plain, ref)
    allowed = MAX_FACTOR * _largest(plain_error) + tiny
    comparable = (got == ref) | (got.isfinite() & ref.isfinite())
    if not comparable.all():
        where = (~comparable).nonzero()
        index = tuple(where[0].tolist())
        reason = (
            f"{name}{list(index)} is {got[index].item():.6g}, the reference is {ref[index].item():.6g}; "
            f"{len(where)} of {got.numel()} elements are NaN or infinite where they must not be, or the reverse"
        )
        return AccuracyReport(max_error=math.inf, allowed_error=allowed, ok=False, reason=reason)
    error = _finite_difference(got, ref)
    largest = _largest(error)
    rms, allowed_rms = _rms(error), max(RMS_FACTOR * _rms(plain_error), rms_tiny)
    reason = ""
    if largest > allowed:
        index = _index_of_largest(error)
        reason = (
            f"{name}{list(index)} is {got[index].item():.6g}, the reference is {ref[index].item():.6g}: off by "
            f"{largest:.3g}, allowed {allowed:.3g}; {int((error > allowed).sum())} of {got.numel()} elements are beyond"
        )
    elif rms > allowed_rms:
        reason = (
            f"{name} is off by {rms:.3g} (root mean square), allowed {allowed_rms:.3g}; no element is beyond "
            f"{allowed:.3g}, most at {list(_index_of_largest(error))}: a wrong factor rather than a wrong element"
        )
    return AccuracyReport(max_error=largest, allowed_error=allowed, ok=not reason, reason=reason)


def _finite_difference(a: Tensor, ref: Tensor) -> Tensor:
    """Return |a - ref| in float64, 0 where either is not finite."""
    difference = (a.double() - ref).abs_()
    return difference.masked_fill_(~difference.isfinite(), 0.0)


def _index_of_largest(values: Tensor) -> tuple[int, ...]:
    return tuple(int(i) for i in torch.unravel_index(values.argmax(), values.shape))


def _largest(values: Tensor) -> float:
    finite = values[values.isfinite()]
    return float(finite.abs().max()) if finite.numel() else 0.0


def _rms(values: Tensor) -> float:
    return float(values.square().mean().sqrt()) if values.numel() else 0.0
