"""Gradients of the public functions on CPU tensors, against PyTorch's autograd of the written-out formula."""

from __future__ import annotations

import dataclasses
import itertools
import typing
from collections.abc import Callable

import pytest
import torch
from torch.utils.checkpoint import checkpoint

import flashgen
from flashgen.codegen import TritonBackwardConfig
from flashgen.errors import ConfigError, InputError, UnsupportedError
from flashgen.measure import attention_reference, gradient_reference
from flashgen.ops import run_backward, run_problem
from flashgen.spec import Extras, masks, parse_problem

Tensors = tuple[torch.Tensor, ...]


def normal(*sizes: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.randn(sizes, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def inputs(layout: str = "bhsd", dtype: torch.dtype = torch.float32) -> Tensors:
    """q [2, 6, 10, 40], k [2, 2, 13, 40] and v [2, 2, 13, 24]: leaves."""
    sizes = ((2, 6, 10, 40), (2, 2, 13, 40), (2, 2, 13, 24))
    made = (normal(*size, seed=seed, dtype=dtype) for seed, size in enumerate(sizes))
    return tuple((t if layout == "bhsd" else t.transpose(1, 2).contiguous()).requires_grad_() for t in made)


def written_out(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    *,
    seen: torch.Tensor | None = None,
    bias: torch.Tensor | None = None,
    sinks: torch.Tensor | None = None,
    softcap: float = 0.0,
    scale: float | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Out and lse of [..., heads, seqlen, head_dim] tensors, every row of which sees a key or a sink."""
    group = q.shape[-3] // k.shape[-3]
    k, v = k.repeat_interleave(group, -3), v.repeat_interleave(group, -3)
    scores = q @ k.mT * (q.shape[-1] ** -0.5 if scale is None else scale)
    if softcap:
        scores = softcap * torch.tanh(scores / softcap)
    if bias is not None:
        scores = scores + bias
    if seen is not None:
        scores = scores.masked_fill(~seen, -torch.inf)
    logits = scores
    if sinks is not None:
        column = sinks[:, None, None].expand(*scores.shape[:-1], 1)
        logits = torch.cat([scores, column], -1)
    lse = logits.logsumexp(-1)
    return torch.exp(scores - lse[..., None]) @ v, lse


ROWS, KEYS = torch.arange(10)[:, None], torch.arange(13)[None, :]
CAUSAL = KEYS <= ROWS + 3


def assert_gradients(
    call: Callable[..., Tensors], formula: Callable[..., Tensors], leaves: Tensors, tolerance: float = 2e-5
) -> None:
    """Compare the gradients of all outputs together, and of each alone."""
    outputs = call(*leaves)
    leaves64 = tuple(leaf.detach().double().requires_grad_() for leaf in leaves)
    wanted = formula(*leaves64)
    douts = [normal(*t.shape, seed=9 + i) for i, t in enumerate(outputs)]
    for chosen in ([0, 1], [0], [1])[: 2 * len(outputs) - 1]:
        chosen = chosen[: len(outputs)]
        got = torch.autograd.grad(
            [outputs[i] for i in chosen],
            leaves,
            [douts[i].to(outputs[i].dtype) for i in chosen],
            retain_graph=True,
            allow_unused=True,
        )
        exact = torch.autograd.grad(
            [wanted[i] for i in chosen],
            leaves64,
            [douts[i].double() for i in chosen],
            retain_graph=True,
            allow_unused=True,
        )
        for leaf, mine, right in zip(leaves, got, exact, strict=True):
            right = torch.zeros_like(leaf, dtype=torch.float64) if right is None else right
            assert mine is not None
            assert mine.dtype == leaf.dtype
            torch.testing.assert_close(mine.double(), right, atol=tolerance, rtol=tolerance)


OPTIONS: dict[str, tuple[dict[str, typing.Any], dict[str, typing.Any]]] = {
    "plain": ({}, {}),
    "causal": ({"causal": True}, {"seen": CAUSAL}),
    "window": ({"window": (4, 2)}, {"seen": (KEYS >= ROWS - 1) & (KEYS <= ROWS + 5)}),
    "scale": ({"softmax_scale": -0.3}, {"scale": -0.3}),
    "softcap": ({"softcap": 2.0, "causal": True}, {"softcap": 2.0, "seen": CAUSAL}),
    "mask": ({"mask": masks.prefix_lm(3)}, {"seen": (KEYS < 3) | CAUSAL}),
}


@pytest.mark.parametrize("name", OPTIONS)
@pytest.mark.parametrize("layout", ["bhsd", "bshd"])
def test_gradients(layout: typing.Literal["bhsd", "bshd"], name: str) -> None:
    options, same = OPTIONS[name]

    def call(*qkv: torch.Tensor) -> Tensors:
        return flashgen.attention(*qkv, layout=layout, return_lse=True, **options)

    def formula(*qkv: torch.Tensor) -> Tensors:
        out, lse = written_out(*(t if layout == "bhsd" else t.transpose(1, 2) for t in qkv), **same)
        return out if layout == "bhsd" else out.transpose(1, 2), lse

    assert_gradients(call, formula, inputs(layout))


BIASES = [
    (2, 6, 10, 13),
    (6, 10, 13),
    (10, 13),
    (1, 13),
    (10, 1),
    (13,),
    (2, 1, 1, 13),
    (2, 1, 10, 13),
    (1, 6, 1, 1),
    (),
]


@pytest.mark.parametrize("size", BIASES, ids=str)
def test_gradient_of_a_bias(size: tuple[int, ...]) -> None:
    bias = normal(*size, seed=5).requires_grad_()
    assert_gradients(
        lambda q, k, v, bias: flashgen.attention(q, k, v, bias=bias, causal=True, return_lse=True),
        lambda q, k, v, bias: written_out(q, k, v, bias=bias, seen=CAUSAL),
        (*inputs(), bias),
    )


def test_a_gradient_has_the_size_that_the_caller_gave() -> None:
    # Broadcast by the caller's own hand: a gradient for each, which expand's own backward adds up.
    whole = normal(10, 13, seed=5).requires_grad_()
    own = whole.expand(6, 10, 13)
    out = flashgen.attention(*inputs(), bias=own)
    (full,) = torch.autograd.grad(out.sum(), own, retain_graph=True)
    (summed,) = torch.autograd.grad(out.sum(), whole)
    assert full.shape == (6, 10, 13)
    assert not torch.equal(full[0], full[1])
    torch.testing.assert_close(full.sum(0), summed)


def test_a_16_bit_bias_gets_a_16_bit_gradient() -> None:
    bias = normal(6, 10, 13).bfloat16().requires_grad_()
    q, k, v = (t.detach().bfloat16() for t in inputs())
    flashgen.attention(q, k, v, bias=bias).sum().backward()
    assert bias.grad is not None
    assert bias.grad.dtype == torch.bfloat16


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_gradient_of_sinks(dtype: torch.dtype) -> None:
    sinks = normal(6, seed=3).to(dtype).requires_grad_()
    assert_gradients(
        lambda q, k, v, sinks: flashgen.attention(q, k, v, sinks=sinks, causal=True, return_lse=True),
        lambda q, k, v, sinks: written_out(q, k, v, sinks=sinks, seen=CAUSAL),
        (*inputs(), sinks),
        tolerance=2e-5 if dtype == torch.float32 else 5e-3,
    )


CUTS_Q, CUTS_K = [1, 5, 5, 9], [2, 5, 9, 12]


def packed_call(*tensors: torch.Tensor, **options: typing.Any) -> Tensors:
    """Two sequences and one without queries, that leave out the first and the last tokens."""
    cuts = (torch.tensor(starts, dtype=torch.int32) for starts in (CUTS_Q, CUTS_K))
    return flashgen.attention_varlen(*tensors, *cuts, 4, 4, return_lse=True, **options)


def packed_formula(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, sinks: torch.Tensor | None = None) -> Tensors:
    out = q.new_zeros(q.shape[0], q.shape[1], v.shape[2])
    lse = q.new_zeros(q.shape[1], q.shape[0])
    cuts = zip(itertools.pairwise(CUTS_Q), itertools.pairwise(CUTS_K), strict=True)
    for (start_q, end_q), (start_k, end_k) in cuts:
        rows, keys = slice(start_q, end_q), slice(start_k, end_k)
        part = written_out(*(t.transpose(0, 1) for t in (q[rows], k[keys], v[keys])), sinks=sinks)
        out[rows], lse[:, rows] = part[0].transpose(0, 1), part[1]
    return out, lse


def packed_inputs() -> Tensors:
    return tuple(t.detach()[0].transpose(0, 1).contiguous().requires_grad_() for t in inputs())


def test_gradients_of_packed_sequences() -> None:
    leaves = packed_inputs()
    assert_gradients(packed_call, packed_formula, leaves)
    dq, dk, _ = torch.autograd.grad(packed_call(*leaves)[0].sum(), leaves)
    assert not dq[[0, 9]].any()
    assert not dk[[0, 1, 12]].any()
    # The sequence that has keys and no queries.
    assert not dk[5:9].any()


def test_gradient_of_sinks_of_packed_sequences() -> None:
    sinks = normal(6, seed=3).requires_grad_()
    assert_gradients(
        lambda q, k, v, sinks: packed_call(q, k, v, sinks=sinks), packed_formula, (*packed_inputs(), sinks)
    )


def test_unused_rows_have_no_gradient() -> None:
    leaves = packed_inputs()
    used_q, used_k = (torch.tensor(n, dtype=torch.int32) for n in ([2, 0, 4], [3, 1, 0]))
    out, lse = packed_call(*leaves, seqused_q=used_q, seqused_k=used_k)
    dq, dk, dv = torch.autograd.grad(out.sum() + lse.masked_fill(lse == -torch.inf, 0).sum(), leaves)
    # Of the last sequence no key is used, so its queries see nothing.
    assert dq[1:3].any(-1).all()
    assert not dq[3:].any()
    assert dv[2:5].any(-1).all()
    assert not torch.cat([dk[5:], dv[5:]], -1).any()


@pytest.mark.parametrize("lengths", [(0, 5), (5, 0), (0, 0)], ids=str)
def test_empty_sequences(lengths: tuple[int, int]) -> None:
    q, k, v = (normal(2, 4, n, 16).requires_grad_() for n in (lengths[0], lengths[1], lengths[1]))
    sinks = normal(4).requires_grad_()
    bias = normal(lengths[1]).requires_grad_()
    out, lse = flashgen.attention(q, k, v, sinks=sinks, bias=bias, return_lse=True)
    dlse = normal(*lse.shape, seed=1)
    grads = torch.autograd.grad([out, lse], [q, k, v, bias, sinks], [torch.ones_like(out), dlse])
    for tensor, gradient in zip((q, k, v, bias), grads, strict=False):
        assert gradient.shape == tensor.shape
        assert not gradient.any()
    # A row that sees no key has the sink for its lse.
    torch.testing.assert_close(grads[4], dlse.sum((0, 2)))


def test_rows_that_see_nothing() -> None:
    q, k, v = inputs()
    out, lse = flashgen.attention(q, k, v, mask=masks.function(lambda b, h, i, j: i > 4), return_lse=True)
    # The gradient of exp(lse) * 0 where lse is -inf is NaN.
    dlse = torch.where(lse == -torch.inf, torch.nan, 1.0)
    for gradient in torch.autograd.grad([out, lse], [q, k, v], [torch.ones_like(out), dlse]):
        assert not gradient.isnan().any()
    with flashgen.interpreting():
        grads = torch.autograd.grad(*_outputs_and_gradients(dlse, q, k, v))
    assert not any(gradient.isnan().any() for gradient in grads)
    assert not grads[0][:, :, :5].any()


def _outputs_and_gradients(dlse: torch.Tensor, *qkv: torch.Tensor) -> tuple[typing.Any, ...]:
    out, lse = flashgen.attention(*qkv, mask=masks.function(lambda b, h, i, j: i > 4), return_lse=True)
    return [out, lse], qkv, [torch.ones_like(out), dlse]


@pytest.mark.parametrize("which", range(3))
def test_gradients_of_some_inputs_alone(which: int) -> None:
    leaves = inputs()
    every = torch.autograd.grad(flashgen.attention(*leaves, causal=True).square().sum(), leaves)
    alone = [t.detach() for t in leaves]
    alone[which].requires_grad_()
    flashgen.attention(*alone, causal=True).square().sum().backward()
    assert [t.grad is None for t in alone] == [index != which for index in range(3)]
    assert torch.equal(typing.cast(torch.Tensor, alone[which].grad), every[which])


def test_gradients_of_a_bias_and_of_sinks_alone() -> None:
    q, k, v = (t.detach() for t in inputs())
    for name, size in (("bias", (10, 13)), ("sinks", (6,))):
        given = normal(*size).requires_grad_()
        flashgen.attention(q, k, v, **{name: given}).square().sum().backward()
        assert given.grad is not None
        assert given.grad.any()


def test_strided_and_expanded_tensors() -> None:
    q, k, v = inputs()
    one = k[:, :1].expand(2, 6, 13, 40)
    rows = v.transpose(2, 3).contiguous().transpose(2, 3)[:, :1].expand(2, 6, 13, 24)
    got = torch.autograd.grad(flashgen.attention(q, one, rows).sum(), (q, k, v))
    wanted = torch.autograd.grad(written_out(q, k[:, :1], v[:, :1])[0].sum(), (q, k, v))
    for mine, right in zip(got, wanted, strict=True):
        torch.testing.assert_close(mine, right, atol=2e-5, rtol=2e-5)


def test_a_graph_that_is_kept_gives_the_same_again() -> None:
    leaves = inputs()
    loss = flashgen.attention(*leaves, dropout_p=0.3, causal=True).square().sum()
    first = torch.autograd.grad(loss, leaves, retain_graph=True)
    for once, again in zip(first, torch.autograd.grad(loss, leaves), strict=True):
        assert torch.equal(once, again)


def test_dropout_drops_the_same_in_both_phases() -> None:
    q, k, _ = inputs()
    # With the identity for V, out is the dropped matrix, and dV its transpose.
    identity = torch.eye(13, 16).repeat(2, 6, 1, 1).requires_grad_()
    keys = k.detach().repeat_interleave(3, 1)
    out = flashgen.attention(q, keys, identity, dropout_p=0.5, seed=4)
    (dv,) = torch.autograd.grad(out[..., 0].sum(), identity)
    torch.testing.assert_close(dv[..., 0], out.sum(2)[..., :13], atol=1e-5, rtol=1e-5)
    assert 0.2 < (out[..., :13] == 0).float().mean() < 0.8


def test_autocast_gives_gradients_to_the_original_leaves() -> None:
    leaves = inputs()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        out = flashgen.attention(*leaves, causal=True)
    assert out.dtype == torch.bfloat16
    got = torch.autograd.grad(out.float().sum(), leaves)
    wanted = torch.autograd.grad(written_out(*leaves, seen=CAUSAL)[0].sum(), leaves)
    for mine, right in zip(got, wanted, strict=True):
        assert mine.dtype == torch.float32
        torch.testing.assert_close(mine, right, atol=0.1, rtol=0.1)


@pytest.mark.parametrize("use_reentrant", [False, True])
def test_activation_checkpointing(use_reentrant: bool) -> None:
    leaves = inputs()

    def layer(*qkv: torch.Tensor) -> torch.Tensor:
        return flashgen.attention(*qkv, causal=True, dropout_p=0.2).square()

    results = []
    for run in (lambda *qkv: checkpoint(layer, *qkv, use_reentrant=use_reentrant), layer):
        torch.manual_seed(0)
        results.append(torch.autograd.grad(run(*leaves).sum(), leaves) if not use_reentrant else _backward(run, leaves))
    for mine, right in zip(*results, strict=True):
        assert torch.equal(mine, right)


def _backward(run: Callable[..., torch.Tensor], leaves: Tensors) -> Tensors:
    fresh = tuple(leaf.detach().clone().requires_grad_() for leaf in leaves)
    run(*fresh).sum().backward()
    return tuple(typing.cast(torch.Tensor, leaf.grad) for leaf in fresh)


def test_selective_checkpointing_keeps_what_it_is_told_to() -> None:
    from torch.utils.checkpoint import create_selective_checkpoint_contexts

    leaves = inputs()
    operator = torch.ops.flashgen.attention_forward.default

    def layer(*qkv: torch.Tensor) -> torch.Tensor:
        return flashgen.attention(*(t * 1.5 for t in qkv), causal=True).square()

    out = checkpoint(
        layer, *leaves, use_reentrant=False, context_fn=lambda: create_selective_checkpoint_contexts([operator])
    )
    for mine, right in zip(
        torch.autograd.grad(out.sum(), leaves), torch.autograd.grad(layer(*leaves).sum(), leaves), strict=True
    ):
        torch.testing.assert_close(mine, right)


def test_what_is_kept_for_the_backward_pass() -> None:
    q, k, v = (normal(1, 2, 200, 16, seed=seed).requires_grad_() for seed in range(3))
    kept: list[torch.Tensor] = []

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        kept.append(tensor)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        out = flashgen.attention(q, k, v, causal=True, softcap=3.0, dropout_p=0.1)
    assert sorted(tuple(t.shape) for t in kept) == [(1, 2, 200), *([(1, 2, 200, 16)] * 4), (2,)]
    pointers = {t.data_ptr() for t in kept}
    assert {t.data_ptr() for t in (q, k, v, out)} <= pointers


def test_a_second_derivative_is_refused() -> None:
    q, k, v = inputs()
    sinks = normal(6).requires_grad_()
    out = flashgen.attention(q, k, v, sinks=sinks)
    gradients = torch.autograd.grad(out.sum(), (q, k, v), create_graph=True)
    with pytest.raises(UnsupportedError, match="first derivatives alone"):
        torch.autograd.grad(gradients[0].sum(), q)
    with pytest.raises(UnsupportedError, match="first derivatives alone"):
        torch.func.grad(lambda x: torch.func.grad(lambda y: flashgen.attention(y, k, v).sum())(x).sum())(q)


def test_function_transforms() -> None:
    q, k, v = (t.detach() for t in inputs())
    sinks, bias = normal(6, seed=3), normal(10, 13, seed=4)

    def loss(
        q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, sinks: torch.Tensor, bias: torch.Tensor
    ) -> torch.Tensor:
        out, lse = flashgen.attention(q, k, v, sinks=sinks, bias=bias, causal=True, return_lse=True)
        return out.square().sum() + lse.sum()

    got = torch.func.grad(loss, argnums=(0, 1, 2, 3, 4))(q, k, v, sinks, bias)
    leaves = tuple(t.clone().requires_grad_() for t in (q, k, v, sinks, bias))
    for mine, right in zip(got, torch.autograd.grad(loss(*leaves), leaves), strict=True):
        torch.testing.assert_close(mine, right)


def test_gradients_of_each_sample() -> None:
    q, k, v = (torch.stack([t.detach(), 2 * t.detach(), -t.detach()]) for t in inputs())
    sinks = normal(6, seed=3)

    def loss(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        return flashgen.attention(q, k, v, sinks=sinks, causal=True).square().sum()

    got = torch.vmap(torch.func.grad(loss, argnums=(0, 1, 2)))(q, k, v)
    shared = torch.func.grad(lambda q: torch.vmap(loss)(q, k, v).sum())(q)
    for index in range(3):
        alone = torch.func.grad(loss, argnums=(0, 1, 2))(q[index], k[index], v[index])
        torch.testing.assert_close(shared[index], alone[0])
        for mine, right in zip(got, alone, strict=True):
            torch.testing.assert_close(mine[index], right)


def test_jacobian() -> None:
    q, k, v = (normal(1, 1, 3, 16, seed=seed) for seed in range(3))
    got = torch.func.jacrev(lambda q: flashgen.attention(q, k, v, causal=True))(q)
    wanted = torch.func.jacrev(lambda q: written_out(q, k, v, seen=torch.ones(3, 3).tril() > 0)[0])(q)
    torch.testing.assert_close(got, wanted, atol=1e-5, rtol=1e-5)


def test_what_has_no_gradient() -> None:
    q, k, v = (t.detach() for t in inputs())
    slopes, table = (normal(6, seed=seed).requires_grad_() for seed in (1, 2))
    with pytest.raises(UnsupportedError, match="alibi_slopes requires a gradient and has none"):
        flashgen.attention(q, k, v, alibi_slopes=slopes)
    with pytest.raises(UnsupportedError, match=r"captured tensor 0 .*requires a gradient"):
        flashgen.attention(q, k, v, score_mod=lambda score, b, h, i, j: score * table[h])
    with torch.no_grad():
        flashgen.attention(q, k, v, alibi_slopes=slopes, score_mod=lambda score, b, h, i, j: score * table[h])
    # Beside a tensor that has one: they are no more than constants.
    fixed = table.detach()
    out = flashgen.attention(
        q.requires_grad_(), k, v, alibi_slopes=slopes.detach(), score_mod=lambda score, b, h, i, j: score * fixed[h]
    )
    assert out.requires_grad


def test_wide_heads_and_fp8_have_no_gradient() -> None:
    wide = normal(1, 1, 4, 264)
    narrow = normal(1, 1, 4, 32).to(torch.float8_e4m3fn)
    for given, message in ((wide, "up to 256"), (narrow, "float8_e4m3fn, which has no backward pass")):
        with pytest.raises(UnsupportedError, match=message):
            flashgen.attention(given.clone().requires_grad_(), given, given)
        with pytest.raises(UnsupportedError, match=message):
            flashgen.attention(given, given, given, sinks=torch.zeros(1, requires_grad=True))
        assert not flashgen.attention(given, given, given).requires_grad


def test_a_parameter_is_a_leaf_too() -> None:
    q, k, v = (t.detach() for t in inputs())
    sinks, query = torch.nn.Parameter(normal(6)), torch.nn.Parameter(q)
    flashgen.attention(query, k, v, sinks=sinks).square().sum().backward()
    assert query.grad is not None
    assert sinks.grad is not None


def test_no_gradient_no_graph() -> None:
    leaves = inputs()
    for context in (torch.no_grad, torch.inference_mode):
        with context():
            assert flashgen.attention(*leaves).grad_fn is None
    assert flashgen.attention(*(t.detach() for t in leaves)).grad_fn is None


def test_the_config_of_a_call_is_the_forward_phase_s() -> None:
    config = TritonBackwardConfig(block_m1=32, block_n1=32, num_warps=4, num_stages=1, dq="atomic")
    with pytest.raises(ConfigError, match="triton/backward"):
        flashgen.attention(*inputs(), config=config)


@pytest.mark.parametrize("layout", ["bhsd", "bshd"])
def test_run_backward(layout: typing.Literal["bhsd", "bshd"]) -> None:
    problem = parse_problem("b=2 hq=6 hkv=2 sq=10 sk=13 d=40 dv=24 causal bias=fp32 sinks fp32 dbias backward")
    bias, sinks = normal(10, 13, seed=4).requires_grad_(), normal(6, seed=3).requires_grad_()
    extras = Extras(softmax_scale=0.2, bias=bias.detach().expand(2, 6, 10, 13), sinks=sinks.detach())
    leaves = inputs(layout)
    q, k, v = (t.detach() for t in leaves)
    forward = dataclasses.replace(problem, spec=problem.spec.forward())
    out, lse = run_problem(q, k, v, forward, extras, layout=layout)
    assert lse is not None
    dout, dlse = normal(*out.shape, seed=7), normal(*lse.shape, seed=8)
    found = run_backward(q, k, v, out, lse, dout, dlse, problem, extras, layout=layout)
    call = flashgen.attention(
        *leaves, causal=True, bias=bias, sinks=sinks, softmax_scale=0.2, layout=layout, return_lse=True
    )
    wanted = torch.autograd.grad(call, (*leaves, bias, sinks), [dout, dlse])
    assert found.dbias is not None
    assert found.dbias.shape == (1, 1, 10, 13)
    got = (found.dq, found.dk, found.dv, found.dbias[0, 0], found.dsinks)
    for mine, right in zip(got, wanted, strict=True):
        torch.testing.assert_close(mine, right)
    with pytest.raises(InputError, match="run_problem runs the forward phase"):
        run_problem(q, k, v, problem, extras, layout=layout)
    with pytest.raises(InputError, match="run_backward runs the backward phase"):
        run_backward(q, k, v, out, lse, dout, dlse, forward, extras, layout=layout)
    with pytest.raises(InputError, match=r"lse must be torch.float32 \[2, 6, 10\] on cpu, got"):
        run_backward(q, k, v, out, lse[:1], dout, None, problem, extras, layout=layout)


def test_explain_of_the_backward_phase() -> None:
    selection = flashgen.explain(*inputs(), causal=True, phase="backward", deterministic=True)
    assert selection.problem == parse_problem(
        "b=2 hq=6 hkv=2 sq=10 sk=13 d=40 dv=24 causal fp32 backward deterministic"
    )
    assert isinstance(selection.config, TritonBackwardConfig)
    bias = normal(10, 13).requires_grad_()
    assert flashgen.explain(*inputs(), bias=bias, phase="backward").problem.spec.dbias
    with pytest.raises(InputError, match="phase must be one of forward, backward, got 'both'"):
        flashgen.explain(*inputs(), phase="both")  # type: ignore[arg-type]


class _Reference(torch.autograd.Function):
    """The eager path in float64."""

    @staticmethod
    def forward(ctx: typing.Any, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, bias: torch.Tensor) -> Tensors:
        ctx.save_for_backward(q, k, v, bias)
        return attention_reference(q, k, v, spec=_SPEC.forward(), extras=_extras(bias), precision="float64")

    @staticmethod
    def backward(ctx: typing.Any, dout: torch.Tensor, dlse: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        q, k, v, bias = ctx.saved_tensors
        found = gradient_reference(q, k, v, dout, spec=_SPEC, extras=_extras(bias), precision="float64", dlse=dlse)
        return found.dq, found.dk, found.dv, found.dbias


_SPEC = parse_problem("b=1 hq=2 hkv=1 sq=3 sk=4 d=16 causal softcap bias=fp32 sinks fp32 dbias backward").spec


def _extras(bias: torch.Tensor) -> Extras:
    return Extras(softmax_scale=0.3, softcap=2.0, sinks=torch.tensor([0.2, -0.4]), bias=bias)


def test_gradcheck_of_the_eager_path_in_float64() -> None:
    sizes = ((1, 2, 3, 16), (1, 1, 4, 16), (1, 1, 4, 16), (1, 2, 3, 4))
    leaves = tuple(normal(*size, seed=i, dtype=torch.float64).requires_grad_() for i, size in enumerate(sizes))
    assert torch.autograd.gradcheck(_Reference.apply, leaves)
