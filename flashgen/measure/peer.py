"""What a peer is: another implementation that is asked for one call of a problem, and gives it or says why not."""

from __future__ import annotations

import dataclasses
import warnings
from collections.abc import Callable, Collection, Sequence

import torch
from torch import Tensor

from flashgen.measure.autograd_calls import Attend, Run, bind_attend
from flashgen.measure.decode_cases import DecodeCall
from flashgen.spec import AttentionSpec, Causal, DType, Extras, Full, Problem
from flashgen.spec.masks import SlidingWindow

Make = Callable[[Tensor, Tensor, Tensor, Problem, Extras], "Run | str"]

MakeDecode = Callable[[Sequence[DecodeCall]], "tuple[Run, ...] | str"]
"""From copies of one decode call to a run of each, or why there are none."""

Bind = Callable[[Problem, Extras, torch.device], "Attend | str"]
"""From a problem, what else its call gives and a device to the implementation's function, or why it has none."""

HALF = frozenset({DType.FP16, DType.BF16})


@dataclasses.dataclass(frozen=True, kw_only=True)
class Peer:
    """One implementation.

    Attributes:
        name: short name, as on the command line.
        make: takes q, k, v [batch, heads, seqlen, head_dim] or packed [tokens, heads, head_dim], their problem and what
            else the call gives, tries one call, and returns a call without arguments that gives (out,), like q with
            head_dim_v, or of a backward problem (dq, dk, dv), like q, k and v; or the reason why this peer cannot run
            the problem. Its other device work (a block mask, the forward before a backward pass) is done in `make`. A
            deterministic problem is run twice, and refused where the bits differ.
        make_decode: takes a call of a decode problem and copies of it, and returns a run of each, which gives (out,),
            or the reason.
    """

    name: str
    make: Make
    make_decode: MakeDecode = lambda calls: f"no adapter for {calls[0].problem.spec.phase}"


def gpu_peer(name: str, bind: Bind) -> Peer:
    """Return the peer that runs what `bind` gives on a GPU, and refuses tensors elsewhere."""

    def make(q: Tensor, k: Tensor, v: Tensor, problem: Problem, extras: Extras) -> Run | str:
        if not q.is_cuda:
            return f"{name} needs a GPU, the tensors are on {q.device}"
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            try:
                attend = bind(problem, extras, q.device)
                if isinstance(attend, str):
                    return f"{name}: {attend}"
                run = bind_attend(attend, q, k, v, problem)
                first = run()
                if problem.spec.deterministic and not all(map(torch.equal, first, run())):
                    return f"{name} is not deterministic: two runs differ in their bits"
                torch.cuda.synchronize()
            # A peer is foreign code: whatever it raises is a reason, and the comparison goes on without it.
            except Exception as error:
                return f"{name}: {reasons_of(error, caught)}"
        return run

    return Peer(name=name, make=make)


def reasons_of(error: BaseException, caught: Sequence[warnings.WarningMessage]) -> str:
    """Return what an exception says, and what was warned about before it."""
    return " ".join([first_line(error), *_causes([str(warning.message) for warning in caught])])


def first_line(error: BaseException) -> str:
    """Return the first line of what an exception says."""
    return next((line for line in str(error).splitlines() if line.strip()), repr(error))


def _causes(messages: list[str]) -> list[str]:
    """Return what SDPA warned about, without its headings and the backends that were not asked for."""
    texts = dict.fromkeys(message.split(" (Triggered")[0] for message in messages)
    return [text for text in texts if not text.endswith("because:") and "runtime disabled" not in text]


def unsupported(spec: AttentionSpec, *, dtypes: Collection[DType], features: Collection[str]) -> str | None:
    """Return what of a spec is beyond these element types and features, head dimensions and a mask; None if nothing.

    `deterministic` is no question of support: two runs answer it.
    """
    beyond = [word for word in spec.features if word not in features and word != "deterministic"]
    beyond += ["score_mod"] * (spec.score_mod is not None)
    if beyond:
        return f"no adapter for {', '.join(beyond)}"
    return None if spec.dtype in dtypes else f"no adapter for {spec.dtype}"


def flash_mask(problem: Problem) -> tuple[bool, int, int] | str:
    """Return FlashAttention's (causal, window left, window right) of the problem's mask; -1 is no bound.

    Both are aligned to the bottom right.
    """
    mask, shape = problem.spec.mask, problem.shape
    match mask:
        case Full():
            return False, -1, -1
        case Causal(align="top_left") if shape.seqlen_q != shape.seqlen_k:
            return "cannot align causal to the top left"
        case Causal():
            return True, -1, -1
        case SlidingWindow(left=left, right=right):
            return False, left, right
    return f"has no mask {mask}"
