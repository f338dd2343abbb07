"""The operator under torch's own machinery: opcheck, compile, export, fake tensors, flop counting."""

from __future__ import annotations

import dataclasses
import itertools
import typing

import pytest
import torch
import torch._dynamo.testing
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode

import flashgen
from flashgen.codegen import TritonForwardConfig
from flashgen.errors import UnsupportedError
from flashgen.ops.backward_op import split_backward
from flashgen.ops.call import decode_config, encode_config
from flashgen.spec import causal, full, masks, parse_problem
from flashgen.spec.masks import Mask
from flashgen.spec.mods import read_mod

Layout = typing.Literal["bhsd", "bshd"]
OP = torch.ops.flashgen.attention_forward.default
BACKWARD = torch.ops.flashgen.attention_backward.default


def tensors(layout: Layout = "bhsd", seqlen: int = 10) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seqlen)

    def normal(heads: int, length: int, dim: int) -> torch.Tensor:
        rows = (heads, length) if layout == "bhsd" else (length, heads)
        return torch.randn(2, *rows, dim, generator=generator)

    return normal(6, seqlen, 40), normal(2, seqlen + 3, 40), normal(2, seqlen + 3, 24)


@pytest.fixture(autouse=True)
def _fresh_dynamo() -> None:
    torch._dynamo.reset()


def operands(
    function: typing.Callable[..., object],
    *args: typing.Any,
    operator: typing.Any = OP,
    **options: typing.Any,
) -> tuple[typing.Any, ...]:
    """What an operator is called with by a call of a public function."""
    seen: list[tuple[typing.Any, ...]] = []

    class Recorder(TorchDispatchMode):
        def __torch_dispatch__(
            self, func: typing.Any, types: object, args: typing.Any = (), kwargs: typing.Any = None
        ) -> object:
            if func is operator:
                seen.append(args)
            return func(*args, **(kwargs or {}))

    with Recorder():
        function(*args, **options)
    # What reaches a backward pass of a graph carries that graph along.
    return tuple(t.detach() if isinstance(t, torch.Tensor) else t for t in seen[0])


@pytest.mark.parametrize("return_lse", [False, True])
@pytest.mark.parametrize("layout", ["bhsd", "bshd"])
def test_opcheck(layout: Layout, return_lse: bool) -> None:
    for mask in (full(), causal("top_left")):
        options = {"mask": mask, "softmax_scale": 0.2, "layout": layout, "return_lse": return_lse}
        torch.library.opcheck(OP, operands(flashgen.attention, *tensors(layout), **options))


def test_opcheck_of_strided_inputs() -> None:
    q, k, v = (t.transpose(1, 2).contiguous().transpose(1, 2) for t in tensors())
    torch.library.opcheck(OP, operands(flashgen.attention, q, k, v, causal=True, return_lse=True))


IDS = torch.arange(13) // 4
TABLE = torch.linspace(0.5, 2.0, 6)
SCORE_MOD = read_mod(lambda score, b, h, q_idx, kv_idx: score * TABLE[h] + (q_idx - kv_idx), "score")
FEATURES: dict[str, dict[str, typing.Any]] = {
    "window": {"window": (3, 2)},
    "masks": {"mask": masks.sliding_window(3, 2) | masks.chunked(4), "causal": True},
    "document": {"mask": masks.document(IDS[:10], IDS) & masks.causal()},
    "score_mod": {"score_mod": SCORE_MOD},
    "softcap": {"softcap": 2.0},
    "bias": {"bias": torch.linspace(-1, 1, 780).view(6, 10, 13)},
    "bool bias": {"bias": torch.arange(130).view(10, 13) % 3 > 0},
    "alibi": {"alibi_slopes": TABLE.double()},
    "sinks": {"sinks": TABLE.half()},
    "dropout": {"dropout_p": 0.25, "seed": 7},
    "all": {"causal": True, "score_mod": SCORE_MOD, "softcap": 2.0, "sinks": TABLE, "dropout_p": 0.25, "seed": 7},
}
VARLEN = {
    "cu_seqlens_q": torch.tensor([0, 4, 4, 10], dtype=torch.int32),
    "cu_seqlens_k": torch.tensor([0, 3, 8, 13], dtype=torch.int32),
    "max_seqlen_q": 6,
    "max_seqlen_k": 5,
}


def packed() -> tuple[torch.Tensor, ...]:
    return tuple(t[0].transpose(0, 1).contiguous() for t in tensors())


@pytest.mark.parametrize("name", FEATURES)
def test_opcheck_of_features(name: str) -> None:
    torch.library.opcheck(OP, operands(flashgen.attention, *tensors(), return_lse=True, **FEATURES[name]))


def test_opcheck_of_packed_sequences() -> None:
    used = torch.tensor([2, 0, 6], dtype=torch.int32)
    call = operands(flashgen.attention_varlen, *packed(), **VARLEN, causal=True, return_lse=True, seqused_q=used)
    torch.library.opcheck(OP, call)


def test_opcheck_of_fp8() -> None:
    q, k, v = (torch.randn(2, heads, 10, 32).to(torch.float8_e4m3fn) for heads in (6, 2, 2))
    # The schema's check would compare fp8 tensors on the CPU, which PyTorch cannot.
    call = operands(flashgen.attention, q, k, v, q_descale=2.0, return_lse=True)
    torch.library.opcheck(OP, call, test_utils=("test_faketensor", "test_autograd_registration"))


def step(
    function: typing.Callable[..., tuple[torch.Tensor, torch.Tensor]], *args: torch.Tensor, **options: typing.Any
) -> tuple[torch.Tensor, ...]:
    """The gradients of a training step's q, k, v and, where there are any, bias and sinks."""
    leaves = [t.detach().clone().requires_grad_() for t in args]
    side = {name: options[name].detach().clone() for name in ("bias", "sinks") if name in options}
    leaves += [t.requires_grad_() for t in side.values() if t.is_floating_point()]
    out, lse = function(*leaves[:3], **{**options, **side}, return_lse=True)
    return torch.autograd.grad(out.square().sum() + lse.sin().sum(), leaves)


@pytest.mark.parametrize("name", ["masks", "bias", "sinks", "dropout", "all"])
def test_opcheck_with_gradients(name: str) -> None:
    options = FEATURES[name]
    torch.library.opcheck(BACKWARD, operands(step, flashgen.attention, *tensors(), operator=BACKWARD, **options))
    forward = list(operands(flashgen.attention, *tensors(), return_lse=True, **options))
    forward[:3] = [t.detach().clone().requires_grad_() for t in forward[:3]]
    torch.library.opcheck(OP, tuple(forward))


@pytest.mark.parametrize("layout", ["bhsd", "bshd"])
def test_opcheck_of_a_backward_pass_without_lse_s_gradient(layout: Layout) -> None:
    def function(*args: torch.Tensor) -> None:
        q, k, v = (t.detach().requires_grad_() for t in args)
        flashgen.attention(q, k, v, layout=layout, causal=True).sum().backward()

    call = operands(function, *tensors(layout), operator=BACKWARD)
    # A sum's gradient is one number, expanded.
    assert call[5].stride() == (0, 0, 0, 0)
    assert call[6] is None
    torch.library.opcheck(BACKWARD, call)


def test_opcheck_of_a_packed_backward_pass() -> None:
    used = torch.tensor([2, 0, 6], dtype=torch.int32)
    call = operands(
        step,
        flashgen.attention_varlen,
        *packed(),
        operator=BACKWARD,
        **VARLEN,
        causal=True,
        seqused_q=used,
        sinks=TABLE,
    )
    torch.library.opcheck(BACKWARD, call)


@pytest.mark.parametrize("name", FEATURES)
def test_a_training_step_compiles_to_one_graph(name: str) -> None:
    def function(*args: torch.Tensor, **options: typing.Any) -> tuple[torch.Tensor, torch.Tensor]:
        out, lse = flashgen.attention(args[0] * 2, *args[1:], **options)
        return out + 1, lse * 2

    compiled = torch.compile(function, backend="aot_eager", fullgraph=True)
    options = FEATURES[name]
    for got, want in zip(step(compiled, *tensors(), **options), step(function, *tensors(), **options), strict=True):
        torch.testing.assert_close(got, want)


def test_a_packed_training_step_compiles_to_one_graph() -> None:
    compiled = torch.compile(flashgen.attention_varlen, backend="aot_eager", fullgraph=True, dynamic=True)
    got = step(compiled, *packed(), **VARLEN, sinks=TABLE)
    for mine, right in zip(got, step(flashgen.attention_varlen, *packed(), **VARLEN, sinks=TABLE), strict=True):
        torch.testing.assert_close(mine, right)


def test_a_compiled_step_knows_that_gradients_are_to_be_deterministic() -> None:
    seen: list[bool] = []

    class Recorder(TorchDispatchMode):
        def __torch_dispatch__(
            self, func: typing.Any, types: object, args: typing.Any = (), kwargs: typing.Any = None
        ) -> object:
            if func is BACKWARD:
                seen.append(split_backward(args)[2].deterministic)
            return func(*args, **(kwargs or {}))

    compiled = torch.compile(flashgen.attention, backend="aot_eager", fullgraph=True)
    with Recorder():
        for deterministic in (True, False):
            step(flashgen.attention, *tensors(), deterministic=deterministic)
    assert seen == [True, False]
    assert len(step(compiled, *tensors(), deterministic=True)) == 3


def test_the_operator_alone_has_gradients() -> None:
    # As of an exported program, made where no gradient was asked for: lse is not among its outputs.
    args = operands(flashgen.attention, *tensors(), causal=True, sinks=TABLE)
    leaves = [t.detach().clone().requires_grad_() for t in args[:3]]
    out, lse = OP(*leaves, *args[3:])
    assert not lse.numel()
    got = torch.autograd.grad(out.square().sum(), leaves)
    want = torch.autograd.grad(flashgen.attention(*leaves, causal=True, sinks=TABLE).square().sum(), leaves)
    for mine, right in zip(got, want, strict=True):
        torch.testing.assert_close(mine, right)


@pytest.mark.parametrize("name", FEATURES)
def test_features_compile_to_one_graph(name: str) -> None:
    def function(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        out, lse = flashgen.attention(q * 2, k, v, return_lse=True, **FEATURES[name])
        return out + 1, lse

    compiled = torch.compile(function, backend="aot_eager", fullgraph=True)
    for got, want in zip(compiled(*tensors()), function(*tensors()), strict=True):
        torch.testing.assert_close(got, want)


def test_packed_sequences_compile_to_one_graph() -> None:
    counter = torch._dynamo.testing.CompileCounterWithBackend("aot_eager")

    @torch.compile(backend=counter, fullgraph=True, dynamic=True)
    def function(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, starts: torch.Tensor, longest: int) -> torch.Tensor:
        return flashgen.attention_varlen(q, k, v, starts, starts, longest, longest, causal=True)

    graphs = 0
    for lengths in ([4, 5], [7, 3, 2, 9], [1, 20, 12]):
        starts = torch.tensor([0, *itertools.accumulate(lengths)], dtype=torch.int32)
        q, k, v = (torch.randn(sum(lengths), heads, 32) for heads in (6, 2, 2))
        for tensor in (q, k, v, starts):
            torch._dynamo.mark_dynamic(tensor, 0)
        got = function(q, k, v, starts, max(lengths))
        want = flashgen.attention_varlen(q, k, v, starts, starts, max(lengths), max(lengths), causal=True)
        torch.testing.assert_close(got, want)
        # Of dynamic=True the compiler tries some default numbers as symbols before it settles.
        graphs = graphs or counter.frame_count
        assert counter.frame_count == graphs


def test_masks_made_inside_a_compiled_function() -> None:
    @torch.compile(backend="aot_eager", fullgraph=True)
    def function(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, ids: torch.Tensor) -> torch.Tensor:
        return flashgen.attention(q, k, v, mask=masks.document(ids[:10], ids) & masks.sliding_window(5, 5))

    for ids in (IDS, IDS // 2):
        want = flashgen.attention(*tensors(), mask=masks.document(ids[:10], ids) & masks.sliding_window(5, 5))
        torch.testing.assert_close(function(*tensors(), ids), want)


def test_a_compiled_function_sees_another_mask() -> None:
    @torch.compile(backend="aot_eager", fullgraph=True)
    def function(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, mask: Mask) -> torch.Tensor:
        return flashgen.attention(q, k, v, mask=mask)

    given = (masks.chunked(4), masks.chunked(6), masks.sliding_window(2, 2), masks.sliding_window(3, -1))
    for mask in (*given, masks.chunked(4) | masks.prefix_lm(2), masks.chunked(4) | masks.prefix_lm(3)):
        torch.testing.assert_close(function(*tensors(), mask), flashgen.attention(*tensors(), mask=mask))


def test_a_compiled_function_sees_another_window() -> None:
    @torch.compile(backend="aot_eager", fullgraph=True)
    def function(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, left: int) -> torch.Tensor:
        return flashgen.attention(q, k, v, window=(left, 0))

    for left in (3, 5, 8, 3):
        torch.testing.assert_close(function(*tensors(), left), flashgen.attention(*tensors(), window=(left, 0)))


def test_a_python_function_inside_a_compiled_function_says_what_to_do() -> None:
    @torch.compile(backend="aot_eager", fullgraph=True)
    def function(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        return flashgen.attention(q, k, v, mask=lambda b, h, q_idx, kv_idx: q_idx >= kv_idx)

    with pytest.raises(Exception, match=r"flashgen\.masks\.function"):
        function(*tensors())


def test_a_config_inside_a_compiled_function() -> None:
    config = TritonForwardConfig(block_m=64, block_n=32, num_warps=4, num_stages=1)

    @torch.compile(backend="aot_eager", fullgraph=True)
    def function(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        return flashgen.attention(q, k, v, config=config)

    torch.testing.assert_close(function(*tensors()), flashgen.attention(*tensors(), config=config))


@pytest.mark.parametrize("layout", ["bhsd", "bshd"])
@pytest.mark.parametrize("options", [{"causal": True}, {"mask": causal("top_left")}, {"softmax_scale": 0.3}], ids=str)
def test_compiles_to_one_graph(layout: Layout, options: dict[str, typing.Any]) -> None:
    def function(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        out, lse = flashgen.attention(q * 2, k, v, layout=layout, return_lse=True, **options)
        return out + 1, lse

    compiled = torch.compile(function, backend="aot_eager", fullgraph=True)
    q, k, v = tensors(layout)
    for got, want in zip(compiled(q, k, v), function(q, k, v), strict=True):
        torch.testing.assert_close(got, want)
        assert got.stride() == want.stride()


def test_one_graph_for_all_lengths() -> None:
    counter = torch._dynamo.testing.CompileCounterWithBackend("aot_eager")

    @torch.compile(backend=counter, fullgraph=True, dynamic=True)
    def function(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        return flashgen.attention(q, k, v, causal=True)

    graphs = 0
    for seqlen in (10, 17, 33, 64):
        q, k, v = tensors(seqlen=seqlen)
        for tensor in (q, k, v):
            torch._dynamo.mark_dynamic(tensor, 2)
        torch.testing.assert_close(function(q, k, v), flashgen.attention(q, k, v, causal=True))
        # Of dynamic=True the compiler tries some default numbers as symbols before it settles.
        graphs = graphs or counter.frame_count
        assert counter.frame_count == graphs


def test_compiles_in_training_code_without_gradients() -> None:
    q, k, v = tensors()
    layer = torch.nn.Linear(40, 40)

    @torch.compile(backend="aot_eager", fullgraph=True)
    def function(q: torch.Tensor) -> torch.Tensor:
        return flashgen.attention(layer(q), k, v)

    with torch.no_grad():
        torch.testing.assert_close(function(q), flashgen.attention(layer(q), k, v))


def test_export() -> None:
    class Module(torch.nn.Module):
        def forward(self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
            return flashgen.attention(q, k, v, causal=True)

    sq, sk = torch.export.Dim("sq", min=2, max=4096), torch.export.Dim("sk", min=2, max=4096)
    program = torch.export.export(Module(), tensors(), dynamic_shapes=({2: sq}, {2: sk}, {2: sk}))
    assert OP in {node.target for node in program.graph.nodes}
    for seqlen in (10, 33):
        q, k, v = tensors(seqlen=seqlen)
        torch.testing.assert_close(program.module()(q, k, v), flashgen.attention(q, k, v, causal=True))


@pytest.mark.parametrize("device", ["cpu", "cuda"])
@pytest.mark.parametrize("layout", ["bhsd", "bshd"])
def test_fake_tensors(layout: Layout, device: str) -> None:
    with FakeTensorMode():
        q, k, v = (torch.empty_strided(t.shape, t.stride(), device=device) for t in tensors(layout))
        out, lse = flashgen.attention(q, k, v, layout=layout, return_lse=True)
        alone = flashgen.attention(q, k, v, layout=layout)
    assert out.shape == alone.shape == (*q.shape[:3], 24)
    assert lse.shape == (2, 6, 10)
    assert (out.dtype, lse.dtype) == (torch.float32, torch.float32)
    assert out.device.type == lse.device.type == device
    assert out.is_contiguous()


def test_gradients_of_fake_tensors() -> None:
    # Not on "cuda": there autograd wants a device even of fake tensors.
    with FakeTensorMode():
        q, k, v = (torch.empty(t.shape, requires_grad=True) for t in tensors())
        bias = torch.empty(10, 13, requires_grad=True)
        grads = torch.autograd.grad(flashgen.attention(q, k, v, bias=bias).sum(), (q, k, v, bias))
    for leaf, gradient in zip((q, k, v, bias), grads, strict=True):
        assert (gradient.shape, gradient.device, gradient.stride()) == (leaf.shape, leaf.device, leaf.stride())


def test_gradients_of_meta_tensors() -> None:
    leaves = tuple(t.to("meta", torch.bfloat16).requires_grad_() for t in tensors())
    for leaf, gradient in zip(leaves, torch.autograd.grad(flashgen.attention(*leaves).sum(), leaves), strict=True):
        assert (gradient.shape, gradient.dtype, gradient.device) == (leaf.shape, leaf.dtype, leaf.device)


@pytest.mark.parametrize("layout", ["bhsd", "bshd"])
def test_meta_tensors(layout: Layout) -> None:
    q, k, v = (t.to("meta", torch.bfloat16) for t in tensors(layout))
    out, lse = flashgen.attention(q, k, v, layout=layout, return_lse=True)
    assert (out.shape, out.dtype) == ((*q.shape[:3], 24), torch.bfloat16)
    assert (lse.shape, lse.dtype) == ((2, 6, 10), torch.float32)


@pytest.mark.parametrize("layout", ["bhsd", "bshd"])
@pytest.mark.parametrize("mask", [full(), causal(), causal("top_left")], ids=str)
def test_flops(mask: Mask, layout: Layout) -> None:
    with FlopCounterMode(display=False) as counter:
        flashgen.attention(*tensors(layout), mask=mask, layout=layout)
        step(flashgen.attention, *tensors(layout), mask=mask, layout=layout)
    problem = parse_problem(f"b=2 hq=6 hkv=2 sq=10 sk=13 d=40 dv=24 {mask} fp32")
    counts = counter.get_flop_counts()["Global"]
    assert counts[torch.ops.flashgen.attention_forward] == 2 * problem.flops()
    backward = dataclasses.replace(problem, spec=problem.spec.backward())
    assert counts[torch.ops.flashgen.attention_backward] == backward.flops()


def test_a_profiler_sees_the_operator() -> None:
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        step(flashgen.attention, *tensors())
    assert {"flashgen::attention_forward", "flashgen::attention_backward"} <= {e.key for e in profile.key_averages()}


@pytest.mark.parametrize("in_dims", [(0, 0, 0), (2, 2, 2), (0, None, None)], ids=str)
@pytest.mark.parametrize(
    "options", [{"causal": True}, {"sinks": TABLE, "alibi_slopes": TABLE, "window": (3, 3)}], ids=str
)
def test_vmap(options: dict[str, typing.Any], in_dims: tuple[int | None, ...]) -> None:
    q, k, v = (
        t if dim is None else torch.stack([t, 2 * t, -t], dim) for t, dim in zip(tensors(), in_dims, strict=True)
    )

    def function(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        return flashgen.attention(q, k, v, return_lse=True, **options)

    got = torch.vmap(function, in_dims=in_dims)(q, k, v)
    for index in range(3):
        one = (t if dim is None else t.select(dim, index) for t, dim in zip((q, k, v), in_dims, strict=True))
        for mapped, alone in zip(got, function(*one), strict=True):
            torch.testing.assert_close(mapped[index], alone)


@pytest.mark.parametrize("name", ["bias", "dropout", "batch"])
def test_vmap_of_what_has_a_batch_of_its_own(name: str) -> None:
    options = {"mask": lambda b, h, q_idx, kv_idx: q_idx >= b} if name == "batch" else FEATURES[name]
    with pytest.raises(UnsupportedError, match=r"torch\.vmap over flashgen\.attention cannot take"):
        torch.vmap(lambda q: flashgen.attention(q, *tensors()[1:], **options), randomness="same")(tensors()[0][None])


def test_flops_of_packed_sequences() -> None:
    with FlopCounterMode(display=False) as counter:
        flashgen.attention_varlen(*packed(), **VARLEN, causal=True)
    pairs = causal().visible_pairs(4, 3) + causal().visible_pairs(6, 5)
    assert counter.get_total_flops() == 2 * pairs * (40 + 24) * 6


def test_fake_packed_and_fp8() -> None:
    with FakeTensorMode():
        q, k, v = (torch.empty(10, heads, 32, device="cuda", dtype=torch.float8_e4m3fn) for heads in (6, 2, 2))
        starts = torch.empty(4, dtype=torch.int32, device="cuda")
        out, lse = flashgen.attention_varlen(q, k, v, starts, starts, 6, 6, return_lse=True)
    assert (out.shape, out.dtype) == ((10, 6, 32), torch.bfloat16)
    assert (lse.shape, lse.dtype) == ((6, 10), torch.float32)


def test_autocast() -> None:
    # Norms hand out float32 queries beside bfloat16 values; PyTorch's own attention casts them all.
    q, k, v = tensors()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        out = flashgen.attention(q, k, v.bfloat16())
        assert out.dtype == torch.nn.functional.scaled_dot_product_attention(q, q, q).dtype == torch.bfloat16
    torch.testing.assert_close(out, flashgen.attention(q.bfloat16(), k.bfloat16(), v.bfloat16()))


def test_autocast_leaves_fp8_alone_and_fits_a_bias() -> None:
    q, k, v = tensors()
    bias = FEATURES["bias"]["bias"]
    with torch.autocast("cpu", dtype=torch.bfloat16):
        narrow = flashgen.attention(*(t[..., :16].to(torch.float8_e4m3fn) for t in (q, k, v)))
        out = flashgen.attention(q, k, v, bias=bias.half())
    assert narrow.dtype == torch.bfloat16
    want = flashgen.attention(q.bfloat16(), k.bfloat16(), v.bfloat16(), bias=bias.half().bfloat16())
    torch.testing.assert_close(out, want)


def test_config_goes_through_the_operator_as_text() -> None:
    config = TritonForwardConfig(block_m=64, block_n=32, num_warps=4, num_stages=1, loads="descriptor", maxnreg=128)
    assert decode_config(encode_config(config)) == config
    assert decode_config(encode_config(None)) is None
