"""The accuracy rule for gradients: that of out, for each of dq, dk, dv, dbias and dsinks."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Mapping, Sequence

from torch import Tensor

from flashgen.errors import InputError
from flashgen.measure.accuracy import (
    TINY,
    AccuracyReport,
    check_shape,
    error_factor,
    judge_values,
    largest_of,
    place_in_heads,
    rms_of,
)
from flashgen.measure.arithmetic import torch_dtype
from flashgen.measure.entries import Entry, join_heads
from flashgen.measure.gradients import Gradients, differentiate, gradient_reference, key_rows
from flashgen.measure.reference import entries_of
from flashgen.spec import AttentionSpec, DType, Extras

DELTA_TINY: Mapping[DType, float] = {
    # Half of what rounding takes off one element of out at most: a row adds up 16 or more, of either sign.
    DType.FP16: 2.0**-12,
    DType.BF16: 2.0**-9,
    # Not out's rounding but two sums, of dout * out and of dout * v, each in an order of its own: 4 ulp.
    DType.FP32: 2.0**-21,
    # The matrix unit cuts up to one ulp of 10 bits off dout, which delta takes whole.
    DType.TF32: 2.0**-10,
}
"""What a kernel's delta may be off by, relative to rowsum(|dout * out|)."""

GRADIENT_TINY: Mapping[DType, float] = {
    **TINY,
    # A forward pass divides by the sum of what it rounded; here exp(score - lse) keeps the rounding of float32 scores
    # and of lse, which is that of numbers of up to 100 where ALiBi or a bias is large.
    DType.FP32: 2.0**-18,
}
"""Slack of the rule for gradients, as `TINY` for out."""


class GradientOracle:
    """The right gradients for one set of inputs, computed once, against which any number of them is judged.

    The rule is that of `Oracle`, for dq, dk, dv, dbias and dsinks in turn, with the largest error of each. What is
    added to `tiny` beside: a kernel takes delta from the rounded out, and where the true gradient is almost 0 (one
    key: exactly) that is all there is to see of it, while plain PyTorch may happen to round nothing there. To first
    order an error of delta does what a gradient of lse does: its effect is the gradient for dlse = rowsum(|dout * out|)
    and dout = 0, times `DELTA_TINY`.
    """

    def __init__(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        dout: Tensor,
        *,
        spec: AttentionSpec,
        extras: Extras,
        dlse: Tensor | None = None,
        heads: Sequence[tuple[int, int]] | None = None,
    ) -> None:
        """Compute both references and the effect of rounding out.

        Args:
            q: [batch, nheads_q, seqlen_q, head_dim_qk], or packed [tokens_q, nheads_q, head_dim_qk]; of the spec's
                dtype.
            k: [batch, nheads_kv, seqlen_k, head_dim_qk] or [tokens_k, nheads_kv, head_dim_qk].
            v: likewise, with head_dim_v.
            dout: the gradient of out, of its shape.
            spec: what is computed, of the backward phase.
            extras: its numbers and tensors.
            dlse: the gradient of lse, [batch, nheads_q, seqlen_q] or packed [nheads_q, tokens_q]; None is 0.
            heads: (batch entry, key/value head) pairs to judge by, with all query heads of their groups; None is all.
                Gradients are handed to `judge` whole. Of dbias and dsinks those elements are judged whose sums run
                over these heads alone.

        Raises:
            InputError: if a shape, dtype or phase does not belong, or `extras` lacks what the spec asks for.
        """
        if q.dtype != torch_dtype(spec.dtype):
            raise InputError(f"no accuracy rule for {q.dtype} inputs of a {spec.dtype} kernel")
        self._spec, self._factor = spec, error_factor(spec)
        self._shapes = {"dq": tuple(q.shape), "dk": tuple(k.shape), "dv": tuple(v.shape)}
        self._entries = entries_of(q, k, spec, extras)
        self._heads = None if heads is None else tuple(heads)
        self._nheads_q, self._nheads_kv = q.shape[1], k.shape[1]
        ref, magnitude = differentiate(
            q, k, v, dout, spec=spec, extras=extras, precision="float64", dlse=dlse, heads=heads
        )
        effect, _ = differentiate(
            q, k, v, None, spec=spec, extras=extras, precision="float64", dlse=magnitude, heads=heads
        )
        plain = gradient_reference(q, k, v, dout, spec=spec, extras=extras, precision="input", dlse=dlse, heads=heads)
        if ref.dbias is not None:
            self._shapes["dbias"] = tuple(ref.dbias.shape)
        if ref.dsinks is not None:
            self._shapes["dsinks"] = tuple(ref.dsinks.shape)
        self._ref, self._plain, self._effect = (self._judged(_named(found)) for found in (ref, plain, effect))

    def judge(self, gradients: Gradients) -> AccuracyReport:
        """Return how far a kernel's gradients are off: the first that fails, or the nearest to its limit.

        Args:
            gradients: whole tensors: dq, dk and dv of the shapes of q, k and v; dbias, in float32 or the bias's dtype,
                where the spec asks for it; dsinks may be left out.

        Raises:
            InputError: if a shape does not belong to the problem, or dbias is missing or not asked for.
        """
        got = _named(gradients)
        if ("dbias" in got) != self._spec.dbias:
            raise InputError(f"dbias is {'given' if 'dbias' in got else 'missing'}, the spec is {self._spec}")
        for name, tensor in got.items():
            if name not in self._shapes:
                raise InputError(f"{name} is given, the spec is {self._spec}")
            check_shape(name, tensor, self._shapes[name])
        if self._heads is not None:
            dq, dk, dv = pick_gradients(gradients, self._heads, self._entries)
            got = {**got, "dq": dq, "dk": dk, "dv": dv}
        nearest = AccuracyReport(max_error=0.0, allowed_error=0.0, ok=True, reason="")
        for name, tensor in self._judged(got).items():
            report = self._judge(name, tensor)
            if not report.ok:
                return report
            if report.max_error * nearest.allowed_error >= nearest.max_error * report.allowed_error:
                nearest = report
        return nearest

    def _judge(self, name: str, got: Tensor) -> AccuracyReport:
        ref, effect = self._ref[name], self._effect[name]
        tiny, delta_tiny = GRADIENT_TINY[self._spec.dtype], DELTA_TINY[self._spec.dtype]
        return judge_values(
            name,
            got,
            ref,
            self._plain[name],
            factor=self._factor,
            tiny=tiny * largest_of(ref) + delta_tiny * largest_of(effect),
            rms_tiny=tiny * rms_of(ref) + delta_tiny * rms_of(effect),
            locate=self._locator(name),
        )

    def _judged(self, gradients: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Return what is judged: of dbias and dsinks the heads whose sums are complete."""
        if self._heads is None:
            return dict(gradients)
        judged = dict(gradients)
        if "dbias" in judged:
            whole = [judged["dbias"][b, h] for b, h in self._whole_bias_heads()]
            judged.pop("dbias")
            if whole:
                judged["dbias"] = join_heads(whole, ())
        if "dsinks" in judged:
            judged["dsinks"] = judged["dsinks"][self._whole_sinks()]
        return judged

    def _whole_bias_heads(self) -> list[tuple[int, int]]:
        """Return the (batch entry, head) of dbias, 0 where it is broadcast, that no other head adds to."""
        batch, heads = self._shapes["dbias"][:2]
        entries, nheads = range(len(self._entries)), range(self._nheads_q)
        return [
            (b, h)
            for b, h in itertools.product(range(batch), range(heads))
            if self._sampled(entries if batch == 1 else (b,), nheads if heads == 1 else (h,))
        ]

    def _whole_sinks(self) -> list[int]:
        """Return the query heads of which every batch entry is sampled."""
        return [h for h in range(self._nheads_q) if self._sampled(range(len(self._entries)), (h,))]

    def _sampled(self, batch: Sequence[int], heads: Sequence[int]) -> bool:
        group = self._nheads_q // self._nheads_kv
        return self._heads is None or {(b, h // group) for b in batch for h in heads} <= set(self._heads)

    def _locator(self, name: str) -> Callable[[tuple[int, ...]], str]:
        """Return what says where an element of what is judged lies."""
        heads = self._heads
        if heads is None:
            return lambda index: str(list(index))
        if name == "dsinks":
            return lambda index: str([self._whole_sinks()[index[0]]])
        if name == "dbias":
            return lambda index: place_in_heads(index, self._whole_bias_heads(), None)
        if name == "dq":
            heads = query_heads(heads, self._nheads_q // self._nheads_kv)
        rows = [self._entries[b].rows_q if name == "dq" else self._entries[b].rows_k for b, _ in heads]
        lengths = [int(part.stop) - int(part.start) for part in rows] if self._spec.varlen else None
        return lambda index: place_in_heads(index, heads, lengths)


def gradient_error(
    gradients: Gradients,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    dout: Tensor,
    *,
    spec: AttentionSpec,
    extras: Extras,
    dlse: Tensor | None = None,
) -> AccuracyReport:
    """Return how far one set of gradients is off; see `GradientOracle`, which it makes for this one time."""
    return GradientOracle(q, k, v, dout, spec=spec, extras=extras, dlse=dlse).judge(gradients)


def pick_gradients(
    gradients: Gradients, heads: Sequence[tuple[int, int]], entries: Sequence[Entry]
) -> tuple[Tensor, Tensor, Tensor]:
    """Return copies of the rows of dq, dk and dv of some (batch entry, key/value head) pairs.

    Returns:
        dq [pairs * group, seqlen_q, head_dim_qk], all query heads of each pair one after the other, dk [pairs,
        seqlen_k, head_dim_qk] and dv; for packed sequences, whose lengths differ, their rows one after the other.
    """
    group = gradients.dq.shape[1] // gradients.dk.shape[1]
    queries = [entries[b].queries(gradients.dq)[h] for b, h in query_heads(heads, group)]
    keys, values = ([key_rows(entries[b], t)[h] for b, h in heads] for t in (gradients.dk, gradients.dv))
    return join_heads(queries, entries), join_heads(keys, entries), join_heads(values, entries)


def query_heads(heads: Sequence[tuple[int, int]], group: int) -> tuple[tuple[int, int], ...]:
    """Return the (batch entry, query head) pairs of (batch entry, key/value head) pairs."""
    return tuple((b, h * group + i) for b, h in heads for i in range(group))


def _named(gradients: Gradients) -> dict[str, Tensor]:
    """Return the gradients that there are, in the order in which they are judged."""
    tensors = {name: getattr(gradients, name) for name in ("dq", "dk", "dv", "dbias", "dsinks")}
    return {name: tensor for name, tensor in tensors.items() if tensor is not None}
