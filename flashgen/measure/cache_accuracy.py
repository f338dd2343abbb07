"""Whether a call left its caches right: what it appends is there, and nothing else has changed."""

from __future__ import annotations

import torch
from torch import Tensor

from flashgen.measure.decode_cases import DecodeCall
from flashgen.measure.decode_reference import append_to_cache, cache_places

# A rotated column is the sum of two products, rounded to float32 one by one or at once: a few ulp of the larger.
_ROTATION_SLACK = 2.0**-22


class CacheOracle:
    """What the caches of one call are to hold after it; made before it, and takes their memory once more.

    Appended values, and keys that are not rotated, must be equal, as must be all that is not appended: NaN stays NaN.
    A rotated key may be another rounding of the exact one to the cache's type.
    """

    def __init__(self, call: DecodeCall) -> None:
        """Copy the caches and append to the copies."""
        self._call = call
        _, self._expected = call.copies(2)
        append_to_cache(self._expected.k, self._expected.v, spec=call.problem.spec, extras=call.extras)

    def fault(self) -> str:
        """Return what of the caches is wrong by now; empty if nothing is."""
        return self._fault_of("k", self._call.k, self._expected.k) or self._fault_of(
            "v", self._call.v, self._expected.v
        )

    def _fault_of(self, name: str, got: Tensor, expected: Tensor) -> str:
        wrong = _differs(got, expected)
        if name == "k" and self._call.problem.spec.rotary:
            self._judge_rotated(wrong)
        if not wrong.any():
            return ""
        where = wrong.nonzero()
        index = tuple(where[0].tolist())
        return (
            f"{name} cache{list(index)} is {got[index].float().item():.6g} after the call and should be "
            f"{expected[index].float().item():.6g}; {len(where)} of {got.numel()} elements are wrong"
        )

    def _judge_rotated(self, wrong: Tensor) -> None:
        """Set where the rotated keys are wrong."""
        call, extras = self._call, self._call.extras
        assert extras.cache_seqlens is not None
        assert extras.k_new is not None
        ulp = torch.finfo(call.k.dtype).eps
        for b, seqlen in enumerate(extras.cache_seqlens.tolist()):
            places = cache_places(b, seqlen, seqlen + extras.k_new.shape[2], call.k, call.problem.spec, extras)
            got, expected = (k[places.entry, :, places.row].double() for k in (call.k, self._expected.k))
            allowed = ulp * expected.abs() + _ROTATION_SLACK * expected.abs().amax(dim=-1, keepdim=True)
            # NaN is never within what is allowed.
            wrong[places.entry, :, places.row] = ~((got - expected).abs() <= allowed)


def _differs(got: Tensor, expected: Tensor) -> Tensor:
    """Return where elements differ; NaN equals NaN."""
    if got.element_size() == 1:
        return got.view(torch.uint8) != expected.view(torch.uint8)
    return (got != expected) & ~(got.isnan() & expected.isnan())
