"""The operator under torch's own machinery: opcheck, compile, export, fake tensors, flop counting."""

from __future__ import annotations

import typing

import pytest
import torch
import torch._dynamo.testing
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils.flop_counter import FlopCounterMode

import flashgen
from flashgen.codegen import TritonForwardConfig
from flashgen.ops.torch_op import decode_config, encode_config
from flashgen.spec import causal, full, parse_problem
from flashgen.spec.masks import Mask

Layout = typing.Literal["bhsd", "bshd"]
OP = torch.ops.flashgen.attention_forward.default


def tensors(layout: Layout = "bhsd", seqlen: int = 10) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seqlen)

    def normal(heads: int, length: int, dim: int) -> torch.Tensor:
        rows = (heads, length) if layout == "bhsd" else (length, heads)
        return torch.randn(2, *rows, dim, generator=generator)

    return normal(6, seqlen, 40), normal(2, seqlen + 3, 40), normal(2, seqlen + 3, 24)


@pytest.fixture(autouse=True)
def _fresh_dynamo() -> None:
    torch._dynamo.reset()


@pytest.mark.parametrize("return_lse", [False, True])
@pytest.mark.parametrize("layout", ["bhsd", "bshd"])
def test_opcheck(layout: Layout, return_lse: bool) -> None:
    for mask in ("full", "causal(align=top_left)"):
        torch.library.opcheck(OP, (*tensors(layout), mask, 0.2, layout, return_lse, "", ""))


def test_opcheck_of_strided_inputs() -> None:
    q, k, v = (t.transpose(1, 2).contiguous().transpose(1, 2) for t in tensors())
    torch.library.opcheck(OP, (q, k, v, "causal", 0.2, "bhsd", True, "", ""))


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

    for seqlen in (10, 17, 33, 64):
        q, k, v = tensors(seqlen=seqlen)
        for tensor in (q, k, v):
            torch._dynamo.mark_dynamic(tensor, 2)
        torch.testing.assert_close(function(q, k, v), flashgen.attention(q, k, v, causal=True))
    assert counter.frame_count == 1


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
    problem = parse_problem(f"b=2 hq=6 hkv=2 sq=10 sk=13 d=40 dv=24 {mask} fp32")
    assert counter.get_flop_counts()["Global"][torch.ops.flashgen.attention_forward] == problem.flops()


def test_a_profiler_sees_the_operator() -> None:
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        flashgen.attention(*tensors())
    assert "flashgen::attention_forward" in {event.key for event in profile.key_averages()}


@pytest.mark.filterwarnings("ignore:There is a performance drop")
def test_vmap() -> None:
    q, k, v = (torch.stack([t, 2 * t, -t]) for t in tensors())
    got = torch.vmap(lambda q, k, v: flashgen.attention(q, k, v, causal=True))(q, k, v)
    want = torch.stack([flashgen.attention(*one, causal=True) for one in zip(q, k, v, strict=True)])
    torch.testing.assert_close(got, want)


def test_autocast() -> None:
    # Norms hand out float32 queries beside bfloat16 values; PyTorch's own attention casts them all.
    q, k, v = tensors()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        out = flashgen.attention(q, k, v.bfloat16())
        assert out.dtype == torch.nn.functional.scaled_dot_product_attention(q, q, q).dtype == torch.bfloat16
    torch.testing.assert_close(out, flashgen.attention(q.bfloat16(), k.bfloat16(), v.bfloat16()))


def test_config_goes_through_the_operator_as_text() -> None:
    config = TritonForwardConfig(block_m=64, block_n=32, num_warps=4, num_stages=1, loads="descriptor", maxnreg=128)
    assert decode_config(encode_config(config)) == config
    assert decode_config(encode_config(None)) is None
