"""Which calls have gradients, what is kept for them, and how they are made of it."""

from __future__ import annotations

import typing
from collections.abc import Callable, Sequence

import torch
from torch.autograd import forward_ad

from flashgen.errors import UnsupportedError
from flashgen.ops.backward_runtime import BackwardInputs, Gradients
from flashgen.ops.call import NO_TENSORS, Options, Tensors
from flashgen.ops.torch_op import arguments
from flashgen.spec.problem import MAX_BACKWARD_HEAD_DIM

FIELDS = Tensors._fields[:-1]
Gradient = torch.Tensor | None
BackwardPass = Callable[[BackwardInputs, Tensors, Options, bool], Gradients]
_DIFFERENTIABLE = ("q", "k", "v", "bias", "sinks")
_BIAS, _SINKS = 3 + FIELDS.index("bias"), 3 + FIELDS.index("sinks")


def check_gradients(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, tensors: Tensors = NO_TENSORS) -> None:
    """Refuse what has no derivative.

    Raises:
        UnsupportedError: if a gradient is asked for of a tensor, a dtype or a head dimension that has none, or a tensor
            carries a tangent.
    """
    named = {"q": q, "k": k, "v": v}
    if tensors is not NO_TENSORS:
        named |= {name: t for name, t in zip(tensors._fields[:-1], tensors[:-1], strict=True) if t is not None}
        named |= {f"captured tensor {index} of mask and score_mod": t for index, t in enumerate(tensors.captures)}
    if torch.is_grad_enabled():
        asked = [name for name, t in named.items() if t.requires_grad]
        if asked:
            _check_asked(asked, q, v)
    if forward_ad._current_level >= 0 and any(forward_ad.unpack_dual(t).tangent is not None for t in named.values()):
        raise UnsupportedError("flashgen has no forward-mode derivative (torch.func.jvp); detach the inputs")


def _check_asked(asked: list[str], q: torch.Tensor, v: torch.Tensor) -> None:
    names = ", ".join(asked)
    refused = [name for name in asked if name not in _DIFFERENTIABLE]
    if refused:
        raise UnsupportedError(
            f"{', '.join(refused)} requires a gradient and has none; gradients are those of "
            f"{', '.join(_DIFFERENTIABLE)}: detach it, or let what depends on it be a bias"
        )
    if q.dtype.itemsize == 1:
        raise UnsupportedError(
            f"{names} requires a gradient and q is {q.dtype}, which has no backward pass; use torch.float16 or "
            "torch.bfloat16, or call under torch.no_grad()"
        )
    if any(t.dim() > 0 and t.shape[-1] > MAX_BACKWARD_HEAD_DIM for t in (q, v)):
        raise UnsupportedError(
            f"{names} requires a gradient and the head dimensions are {q.shape[-1]} and {v.shape[-1]}: the backward "
            f"pass takes up to {MAX_BACKWARD_HEAD_DIM}; call under torch.no_grad()"
        )


def save(ctx: typing.Any, given: tuple[torch.Tensor, ...], tensors: Tensors, options: Options) -> None:
    """Keep q, k, v, out, lse and the other tensors of a call: nothing of size seqlen_q x seqlen_k that it has not."""
    ctx.save_for_backward(*given, *tensors[:-1], *tensors.captures)
    ctx.options = options
    ctx.set_materialize_grads(False)


def side_tensors(flat: Sequence[typing.Any]) -> Tensors:
    """Return the tensors of a call that were saved, or given, one after the other."""
    named: dict[str, typing.Any] = dict(zip(FIELDS, flat, strict=False))
    return Tensors(**named, captures=tuple(flat[len(FIELDS) :]))


def gradients(
    ctx: typing.Any, dout: Gradient, dlse: Gradient, needed: Sequence[bool], backward_pass: BackwardPass
) -> list[Gradient]:
    """Return the gradients of q, k, v, the fields of `Tensors` and the captured tensors; None where there is none.

    Args:
        ctx: what `save` kept.
        dout, dlse: gradients of out and lse, None for 0.
        needed: for each of the gradients whether it is.
        backward_pass: gives dq, dk, dv and dbias.
    """
    q, k, v, out, lse, *side = ctx.saved_tensors
    found: list[Gradient] = [None] * (3 + len(side))
    if dout is None and dlse is None:
        return found
    tensors, options = side_tensors(side), ctx.options
    if not options.return_lse:
        # Whoever called the operator itself did not know that a gradient starts from lse.
        options = options._replace(return_lse=True)
        out, lse = torch.ops.flashgen.attention_forward(q, k, v, *arguments(tensors, options))
    given = BackwardInputs(q, k, v, out, lse, dout, dlse)
    if any(needed[: _BIAS + 1]):
        # The caller's config is one of the forward phase.
        *found[:3], found[_BIAS] = backward_pass(given, tensors, options._replace(config=""), needed[_BIAS])
    if needed[_SINKS] and tensors.sinks is not None:
        found[_SINKS] = sink_gradient(given, tensors.sinks, options)
    return [gradient if wanted else None for gradient, wanted in zip(found, needed, strict=False)]


def sink_gradient(given: BackwardInputs, sinks: torch.Tensor, options: Options) -> torch.Tensor:
    """Return the gradient of the sinks, float32 [nheads_q]: -exp(sink - lse) * delta, summed over all rows.

    A sink is one more logit, of a key whose value is 0, so that its dP is 0.
    """
    lse = given.lse
    delta = torch.zeros_like(lse)
    if given.dout is not None:
        rows = (given.dout.float() * given.out.float()).sum(-1)
        # To the order of lse, heads before rows.
        delta = rows if options.layout == "bhsd" else rows.transpose(-1, -2)
    if given.dlse is not None:
        delta = delta - given.dlse
    terms = torch.where(lse == float("-inf"), 0.0, (sinks[:, None] - lse).exp() * delta)
    return -terms.transpose(0, -2).flatten(1).sum(1)


def refuse_second_derivative(ctx: typing.Any, *given: Gradient) -> typing.NoReturn:
    """Refuse the derivative of gradients.

    Raises:
        UnsupportedError: always.
    """
    raise UnsupportedError(
        "flashgen.attention has first derivatives alone; for a derivative of its gradients (double backward, "
        "torch.func.hessian) use torch.nn.functional.scaled_dot_product_attention under "
        "torch.nn.attention.sdpa_kernel(SDPBackend.MATH)"
    )
