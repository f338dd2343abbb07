"""Gradients on a GPU: every length of the API, features, strides, memory, determinism, graphs, compilers, faces."""

from __future__ import annotations

import contextlib
import dataclasses
import gc
import itertools
import typing
from collections.abc import Callable, Iterator

import pytest
import torch
from torch.nn import functional
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.checkpoint import checkpoint

import flashgen
from flashgen.compat import flash_attn
from flashgen.measure import (
    API_LENGTHS,
    GradientOracle,
    Gradients,
    random_extras,
    random_inputs,
    random_lse_gradients,
    random_output_gradients,
)
from flashgen.ops import run_backward, run_problem
from flashgen.spec import Problem, parse_problem

pytestmark = pytest.mark.gpu

Tensors = tuple[torch.Tensor, ...]


@pytest.fixture
def poisoned(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """New memory is full of NaN; gradients need not be deterministic, for which PyTorch's setting would ask too."""
    before = torch.are_deterministic_algorithms_enabled(), torch.is_deterministic_algorithms_warn_only_enabled()
    torch.use_deterministic_algorithms(True)
    monkeypatch.setattr(torch, "are_deterministic_algorithms_enabled", lambda: False)
    assert bool(torch.isnan(torch.zeros(1, device="cuda").new_empty((1,)))), "PyTorch no longer poisons new memory"
    yield
    torch.use_deterministic_algorithms(before[0], warn_only=before[1])


def check_problem(
    text: str, *, seed: int = 0, layout: typing.Literal["bhsd", "bshd"] = "bhsd", lse: bool = False
) -> None:
    problem = parse_problem(text)
    q, k, v = random_inputs(problem, device="cuda", seed=seed, layout=layout)
    extras = random_extras(problem, device="cuda", seed=seed)
    dout = random_output_gradients(problem, device="cuda", seed=seed, layout=layout)
    dlse = random_lse_gradients(problem, device="cuda", seed=seed) if lse else None
    turned = layout == "bshd" and not problem.spec.varlen

    def in_order(tensor: torch.Tensor) -> torch.Tensor:
        return tensor.transpose(1, 2) if turned else tensor

    q_in, k_in, v_in, dout_in = (in_order(t) for t in (q, k, v, dout))
    forward = Problem(spec=problem.spec.forward(), shape=problem.shape)
    out, row_lse = run_problem(q_in, k_in, v_in, forward, extras, layout=layout)
    assert row_lse is not None
    found = run_backward(q_in, k_in, v_in, out, row_lse, dout_in, dlse, problem, extras, layout=layout)
    found = dataclasses.replace(found, dq=in_order(found.dq), dk=in_order(found.dk), dv=in_order(found.dv))
    report = GradientOracle(q, k, v, dout, spec=problem.spec, extras=extras, dlse=dlse).judge(found)
    assert report.ok, f"{report.reason}\n{problem} seed {seed} {layout}"


FEATURES = (
    "full",
    "causal",
    "causal deterministic",
    "sliding_window(100,30)",
    "causal softcap alibi",
    "bias=input sinks dbias",
    "dropout sinks causal",
    "document(batched)&causal",
    "score_mod('return score * 2.0 + (q_idx - kv_idx)') causal",
    "varlen causal sinks",
    "varlen seqused=qk bias=fp32 dbias",
)
WIDE = ("full", "causal", "causal deterministic", "varlen causal sinks", "bias=input sinks dbias")


@pytest.mark.usefixtures("poisoned")
@pytest.mark.parametrize(
    ("head_dim", "features"), [*((64, name) for name in FEATURES), *((128, name) for name in WIDE)], ids=str
)
def test_lengths(head_dim: int, features: str) -> None:
    plain = features in ("full", "causal", "causal deterministic")
    for seed, (sq, sk) in enumerate(API_LENGTHS):
        if max(sq, sk) > 2048 and not plain:
            continue
        layout: typing.Literal["bhsd", "bshd"] = "bhsd" if seed % 2 else "bshd"
        problem = f"b=2 hq=6 hkv=2 sq={sq} sk={sk} d={head_dim} {features} bf16 backward"
        check_problem(problem, seed=seed, layout=layout, lse=seed % 3 == 0)


@pytest.mark.usefixtures("poisoned")
@pytest.mark.parametrize("dtype", ["fp16", "fp32", "tf32"])
def test_dtypes(dtype: str) -> None:
    for sq, sk in ((1, 1), (113, 203), (239, 1), (384, 256)):
        check_problem(f"b=2 hq=6 hkv=2 sq={sq} sk={sk} d=64 causal {dtype} backward", lse=True)


@pytest.mark.usefixtures("poisoned")
@pytest.mark.parametrize("dims", ["d=32", "d=72 dv=40", "d=96", "d=192 dv=128", "d=256"])
def test_head_dimensions(dims: str) -> None:
    for sq, sk in ((203, 113), (384, 600)):
        check_problem(f"b=2 hq=6 hkv=2 sq={sq} sk={sk} {dims} causal bf16 backward")


@pytest.mark.usefixtures("poisoned")
@pytest.mark.parametrize("heads", ["hq=2 hkv=2", "hq=6 hkv=1", "hq=12 hkv=2"])
def test_groups(heads: str) -> None:
    for batch, (sq, sk) in itertools.product((1, 3), ((113, 203), (512, 256))):
        check_problem(f"b={batch} {heads} sq={sq} sk={sk} d=64 causal bf16 backward")


def normal(*sizes: int, seed: int = 0, dtype: torch.dtype = torch.bfloat16) -> torch.Tensor:
    generator = torch.Generator(device="cuda").manual_seed(seed)
    return torch.randn(sizes, generator=generator, device="cuda", dtype=dtype)


def leaves_of(*, seqlen: int = 300, heads: tuple[int, int] = (6, 2), batch: int = 2) -> Tensors:
    sizes = ((batch, heads[0], seqlen, 64), *([(batch, heads[1], seqlen, 64)] * 2))
    return tuple(normal(*size, seed=seed).requires_grad_() for seed, size in enumerate(sizes))


def near(got: Tensors, wanted: Tensors, tolerance: float = 3e-2) -> None:
    for mine, right in zip(got, wanted, strict=True):
        assert mine.shape == right.shape
        torch.testing.assert_close(
            mine.float(), right.float(), atol=tolerance * right.abs().max().item(), rtol=tolerance
        )


def transposed(t: torch.Tensor) -> torch.Tensor:
    return t.transpose(1, 2).contiguous().transpose(1, 2)


def last_strided(t: torch.Tensor) -> torch.Tensor:
    return t.transpose(2, 3).contiguous().transpose(2, 3)


def misaligned(t: torch.Tensor) -> torch.Tensor:
    return t.new_empty(t.numel() + 8)[1 : 1 + t.numel()].view(t.shape).copy_(t)


def guarded(t: torch.Tensor) -> torch.Tensor:
    big = t.new_full((t.shape[0], t.shape[1], 2 * t.shape[2] + 64, t.shape[3] + 24), float("nan"))
    return big[:, :, : 2 * t.shape[2] : 2, : t.shape[3]].copy_(t)


@pytest.mark.usefixtures("poisoned")
@pytest.mark.parametrize("change", [transposed, last_strided, misaligned, guarded])
@pytest.mark.parametrize("which", ["q", "kv", "dout"])
def test_strides(which: str, change: Callable[[torch.Tensor], torch.Tensor]) -> None:
    leaves, dout = leaves_of(), normal(2, 6, 300, 64, seed=9)
    wanted = torch.autograd.grad(flashgen.attention(*leaves, causal=True), leaves, dout)
    odd = tuple(
        (change(t.detach()) if name in which else t.detach()).requires_grad_()
        for name, t in zip("qkv", leaves, strict=True)
    )
    for _ in range(2):
        out = flashgen.attention(*odd, causal=True)
        near(torch.autograd.grad(out, odd, change(dout) if which == "dout" else dout), wanted)
    near(torch.autograd.grad(flashgen.attention(*leaves, causal=True), leaves, dout), wanted)


@pytest.mark.usefixtures("poisoned")
def test_expanded_tensors_and_gradients() -> None:
    q, k, v = leaves_of()
    expanded = [t[:, :1].expand(-1, 6, -1, -1) for t in (k, v)]
    got = torch.autograd.grad(flashgen.attention(q, *expanded, causal=True).sum(), (q, k, v))
    dense = [t.contiguous() for t in expanded]
    out = flashgen.attention(q, *dense, causal=True)
    near(got, torch.autograd.grad(out, (q, k, v), torch.ones_like(out)))


@pytest.mark.usefixtures("poisoned")
def test_rows_of_no_sequence() -> None:
    q, k, v = (normal(300, 2, 64, seed=seed).requires_grad_() for seed in range(3))
    starts = torch.tensor([3, 100, 100, 250], dtype=torch.int32, device="cuda")
    out = flashgen.attention_varlen(q, k, v, starts, starts, 150, 150, causal=True)
    outside = torch.tensor([*range(3), *range(250, 300)], device="cuda")
    for gradient in torch.autograd.grad(out.float().square().sum(), (q, k, v)):
        assert bool(gradient.isfinite().all())
        assert not bool(gradient[outside].any())


@pytest.mark.parametrize(
    "features", [{"causal": True}, {"causal": True, "sinks": True}, {"window": (200, 50)}], ids=str
)
def test_deterministic_gradients_are_the_same_bit_for_bit(features: dict[str, typing.Any]) -> None:
    options = dict(features)
    leaves = leaves_of(seqlen=1500, heads=(8, 2))
    if options.get("sinks"):
        options["sinks"] = normal(8, dtype=torch.float32).requires_grad_()
        leaves = (*leaves, options["sinks"])
    dout = normal(2, 8, 1500, 64, seed=9)
    first: Tensors | None = None
    for _ in range(100):
        out = flashgen.attention(*leaves[:3], **options, deterministic=True)
        gradients = torch.autograd.grad(out, leaves, dout)
        first = first or gradients
        assert all(torch.equal(mine, once) for mine, once in zip(gradients, first, strict=True))


def test_pytorchs_setting_asks_for_deterministic_gradients() -> None:
    leaves, dout = leaves_of(seqlen=1500), normal(2, 6, 1500, 64, seed=9)
    torch.use_deterministic_algorithms(True)
    try:
        runs = [torch.autograd.grad(flashgen.attention(*leaves), leaves, dout) for _ in range(10)]
    finally:
        torch.use_deterministic_algorithms(False)
    assert all(torch.equal(mine, once) for run in runs for mine, once in zip(run, runs[0], strict=True))


@pytest.mark.parametrize(
    "options", [{"causal": True}, {"causal": True, "deterministic": True}, {"softcap": 5.0}], ids=str
)
def test_memory_grows_with_the_length_alone(options: dict[str, typing.Any]) -> None:
    peaks = {}
    for seqlen in (2048, 8192, 65536):
        leaves = leaves_of(seqlen=seqlen, heads=(2, 1), batch=1)
        for _ in range(2):
            # What the compiling of the first call left behind in cycles is not to be freed in the second.
            gc.collect()
            torch.cuda.synchronize()
            torch.cuda.reset_peak_memory_stats()
            before = torch.cuda.memory_allocated()
            out = flashgen.attention(*leaves, **options)
            gradients = torch.autograd.grad(out, leaves, out.detach())
            peaks[seqlen] = torch.cuda.max_memory_allocated() - before
            del out, gradients
    assert peaks[65536] <= 1.1 * 8 * peaks[8192] + 2**20
    # q, out, dq, dout and their like, a float32 dQ, and statistics: far from 2**32 scores.
    assert peaks[65536] <= 16 * leaves[0].nbytes


def test_a_training_step_in_a_cuda_graph() -> None:
    flashgen.warmup(["b=2 hq=6 hkv=2 sq=300 sk=300 d=64 causal bf16 backward"], layout="bhsd")
    leaves, dout = leaves_of(), normal(2, 6, 300, 64, seed=9)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = flashgen.attention(*leaves, causal=True)
        gradients = torch.autograd.grad(out, leaves, dout)
    with torch.no_grad():
        leaves[0].mul_(0.5)
    graph.replay()
    torch.cuda.synchronize()
    near(gradients, torch.autograd.grad(flashgen.attention(*leaves, causal=True), leaves, dout))


@pytest.mark.parametrize("name", ["plain", "bias and sinks", "dropout"])
def test_a_compiled_training_step(name: str) -> None:
    extra: dict[str, torch.Tensor] = {}
    options: dict[str, typing.Any] = {"causal": True}
    if name == "bias and sinks":
        extra = {"bias": normal(300, 300).requires_grad_(), "sinks": normal(6, dtype=torch.float32).requires_grad_()}
    if name == "dropout":
        options |= {"dropout_p": 0.2, "seed": 3}
    leaves = (*leaves_of(), *extra.values())

    def loss(*given: torch.Tensor) -> torch.Tensor:
        side = dict(zip(extra, given[3:], strict=True))
        out, lse = flashgen.attention(given[0] * 1.5, *given[1:3], **side, **options, return_lse=True)
        return out.float().square().sum() + lse.sum()

    compiled = torch.compile(loss, fullgraph=True)
    near(torch.autograd.grad(compiled(*leaves), leaves), torch.autograd.grad(loss(*leaves), leaves))


@pytest.mark.parametrize("use_reentrant", [False, True])
def test_checkpointing(use_reentrant: bool) -> None:
    def layer(*qkv: torch.Tensor) -> torch.Tensor:
        return flashgen.attention(*qkv, causal=True, dropout_p=0.2, deterministic=True)

    results: list[Tensors] = []
    for run in (lambda *qkv: checkpoint(layer, *qkv, use_reentrant=use_reentrant), layer):
        torch.manual_seed(0)
        fresh = leaves_of()
        run(*fresh).float().square().sum().backward()
        results.append(tuple(typing.cast(torch.Tensor, t.grad) for t in fresh))
    assert all(torch.equal(mine, right) for mine, right in zip(*results, strict=True))


def test_autocast() -> None:
    leaves = tuple(t.detach().float().requires_grad_() for t in leaves_of())
    with torch.autocast("cuda", dtype=torch.bfloat16):
        out = flashgen.attention(*leaves, causal=True)
    gradients = torch.autograd.grad(out.float().square().sum(), leaves)
    assert {t.dtype for t in gradients} == {torch.float32}
    half = tuple(t.detach().bfloat16().requires_grad_() for t in leaves)
    wanted = torch.autograd.grad(flashgen.attention(*half, causal=True).float().square().sum(), half)
    near(gradients, wanted)


def test_function_transforms() -> None:
    q, k, v = (t.detach() for t in leaves_of())

    def loss(*qkv: torch.Tensor) -> torch.Tensor:
        return flashgen.attention(*qkv, causal=True).float().square().sum()

    leaves = leaves_of()
    wanted = torch.autograd.grad(loss(*leaves), leaves)
    near(torch.func.grad(loss, argnums=(0, 1, 2))(q, k, v), wanted)
    each = torch.vmap(torch.func.grad(loss, argnums=(0, 1, 2)))(q[:, None], k[:, None], v[:, None])
    near(tuple(t.squeeze(1) for t in each), wanted)


@contextlib.contextmanager
def _math() -> Iterator[None]:
    before = torch.backends.cuda.fp16_bf16_reduction_math_sdp_allowed()
    torch.backends.cuda.allow_fp16_bf16_reduction_math_sdp(True)
    with sdpa_kernel(SDPBackend.MATH):
        yield
    torch.backends.cuda.allow_fp16_bf16_reduction_math_sdp(before)


def assert_no_worse(run: Callable[..., torch.Tensor], plain: Callable[..., torch.Tensor], *given: torch.Tensor) -> None:
    """Hold gradients to twice the error of plain PyTorch at the same precision."""
    results = []
    for function, dtype in ((run, None), (plain, None), (plain, torch.float64)):
        leaves = [(t.detach() if dtype is None else t.detach().to(dtype)).requires_grad_() for t in given]
        out = function(*leaves)
        dout = normal(*out.shape, seed=9).to(out.dtype)
        results.append(torch.autograd.grad(out, leaves, dout))
    for mine, other, exact in zip(*results, strict=True):
        error, allowed = ((t.double() - exact).abs().max().item() for t in (mine, other))
        assert error <= 2 * allowed + 2.0**-7 * exact.abs().max().item(), f"off by {error}, plain PyTorch by {allowed}"


@pytest.mark.parametrize("is_causal", [False, True])
@pytest.mark.parametrize("head_dim", [64, 59])
def test_sdpa(head_dim: int, is_causal: bool) -> None:
    given = tuple(normal(2, heads, 257, head_dim, seed=seed) for seed, heads in enumerate((4, 2, 2)))

    def plain(*qkv: torch.Tensor) -> torch.Tensor:
        with _math():
            return functional.scaled_dot_product_attention(*qkv, is_causal=is_causal, enable_gqa=True)

    assert_no_worse(
        lambda *qkv: flashgen.scaled_dot_product_attention(*qkv, is_causal=is_causal, enable_gqa=True), plain, *given
    )


def test_sdpa_with_a_mask_of_numbers() -> None:
    given = (*(normal(2, 4, 257, 64, seed=seed) for seed in range(3)), normal(4, 257, 257, seed=4))

    def plain(*tensors: torch.Tensor) -> torch.Tensor:
        with _math():
            return functional.scaled_dot_product_attention(*tensors)

    assert_no_worse(flashgen.scaled_dot_product_attention, plain, *given)


def test_flash_attn() -> None:
    qkv = normal(2, 257, 3, 4, 64)

    def plain(qkv: torch.Tensor) -> torch.Tensor:
        q, k, v = (t.transpose(1, 2) for t in qkv.unbind(2))
        with _math():
            return functional.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2)

    def run(qkv: torch.Tensor) -> torch.Tensor:
        out = flash_attn.flash_attn_qkvpacked_func(qkv, causal=True)
        assert isinstance(out, torch.Tensor)
        return out

    assert_no_worse(run, plain, qkv)


def test_flash_attn_varlen_is_each_sequence_alone() -> None:
    lengths = (130, 0, 1, 300)
    qkv = normal(sum(lengths), 3, 4, 64).requires_grad_()
    ends = torch.tensor([0, *itertools.accumulate(lengths)], device="cuda", dtype=torch.int32)
    out = flash_attn.flash_attn_varlen_qkvpacked_func(qkv, ends, 300, causal=True)
    assert isinstance(out, torch.Tensor)
    (together,) = torch.autograd.grad(out.float().square().sum(), qkv)
    for part, got in zip(qkv.detach().split(lengths), together.split(lengths), strict=True):
        if len(part):
            leaf = part[None].requires_grad_()
            alone = flash_attn.flash_attn_qkvpacked_func(leaf, causal=True)
            assert isinstance(alone, torch.Tensor)
            (wanted,) = torch.autograd.grad(alone.float().square().sum(), leaf)
            near((got,), (wanted[0],))


def test_gradients_of_all_kinds_together_are_judged() -> None:
    # The checks above would be of little worth if a wrong gradient passed.
    problem = parse_problem("b=1 hq=2 hkv=1 sq=64 sk=64 d=64 causal bf16 backward")
    q, k, v = random_inputs(problem, device="cuda", seed=0)
    extras, dout = (
        random_extras(problem, device="cuda", seed=0),
        random_output_gradients(problem, device="cuda", seed=0),
    )
    out, lse = run_problem(q, k, v, Problem(spec=problem.spec.forward(), shape=problem.shape), extras)
    assert lse is not None
    found = run_backward(q, k, v, out, lse, dout, None, problem, extras)
    oracle = GradientOracle(q, k, v, dout, spec=problem.spec, extras=extras)
    assert oracle.judge(found).ok
    assert not oracle.judge(Gradients(dq=found.dq * 1.1, dk=found.dk, dv=found.dv)).ok
