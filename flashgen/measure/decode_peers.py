"""A decode problem as other implementations are asked for it: their forward pass on the rows of the cache in use."""

from __future__ import annotations

import dataclasses
import warnings
from collections.abc import Callable, Sequence

from torch import Tensor

from flashgen.errors import InputError
from flashgen.measure.autograd_calls import Attend, Run
from flashgen.measure.decode_cases import DecodeCall
from flashgen.measure.peer import Bind, MakeDecode, reasons_of
from flashgen.spec import Causal, Full, Problem

BindDecode = Callable[[DecodeCall], "Attend | str"]
"""From a call to the implementation's function of q and the caches, or why it has none."""

_OF_CACHES = ("append", "rotary", "page_size", "leftpad", "batch_idx", "fp8_kv")


def decode_peer(name: str, bind: BindDecode) -> MakeDecode:
    """Return what runs what `bind` gives on a GPU, and refuses tensors elsewhere; each run gives (out,)."""

    def make(calls: Sequence[DecodeCall]) -> tuple[Run, ...] | str:
        first = calls[0]
        if not first.q.is_cuda:
            return f"{name} needs a GPU, the tensors are on {first.q.device}"
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            try:
                attend = bind(first)
                if isinstance(attend, str):
                    return f"{name}: {attend}"
                attend(first.q, first.k, first.v)
            # A peer is foreign code: whatever it raises is a reason, and the comparison goes on without it.
            except Exception as error:
                return f"{name}: {reasons_of(error, caught)}"
        return tuple(_run(attend, call) for call in calls)

    return make


def through_forward(bind: Bind) -> BindDecode:
    """Return how an implementation whose forward `bind` gives decodes sequences of one length."""

    def bind_decode(call: DecodeCall) -> Attend | str:
        forward = as_forward(call.problem)
        if isinstance(forward, str):
            return forward
        attend = bind(forward, call.extras, call.q.device)
        if isinstance(attend, str):
            return attend
        used = forward.shape.seqlen_k
        return lambda q, k, v: attend(q, k[:, :, :used], v[:, :, :used])

    return bind_decode


def as_forward(problem: Problem) -> Problem | str:
    """Return the forward problem of a decode problem's sequences, or what of its caches it cannot say."""
    spec, shape = problem.spec, problem.shape
    beyond = [name for name in _OF_CACHES if getattr(spec, name)]
    if beyond:
        return f"no adapter for {', '.join(beyond)}"
    # The last query sees every key: without a mask more implementations take it.
    alone = shape.seqlen_q == 1 and spec.mask == Causal()
    try:
        forward = dataclasses.replace(
            spec, phase="forward", mask=Full() if alone else spec.mask, shared_kv=False, lse=False
        )
    except InputError as error:
        return f"no forward pass: {error}"
    return Problem(spec=forward, shape=shape)


def _run(attend: Attend, call: DecodeCall) -> Callable[[], tuple[Tensor, ...]]:
    return lambda: (attend(call.q, call.k, call.v),)
