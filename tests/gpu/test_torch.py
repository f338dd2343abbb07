"""CUDA graphs, streams, and torch.compile on a GPU."""

from __future__ import annotations

import pytest
import torch

import flashgen
from flashgen.errors import FlashgenError

pytestmark = pytest.mark.gpu


def inputs(
    *, dim: int = 64, seqlen: int = 300, seed: int = 0, layout: str = "bhsd"
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    generator = torch.Generator(device="cuda").manual_seed(seed)

    def normal(heads: int) -> torch.Tensor:
        rows = (heads, seqlen) if layout == "bhsd" else (seqlen, heads)
        return torch.randn(2, *rows, dim, generator=generator, device="cuda", dtype=torch.bfloat16)

    return normal(6), normal(2), normal(2)


@pytest.mark.parametrize("layout", ["bhsd", "bshd"])
def test_graph_capture_after_warmup(layout: str) -> None:
    q, k, v = inputs(layout=layout, seqlen=320)
    flashgen.warmup(["b=2 hq=6 hkv=2 s=320 d=64 causal bf16"], layout=layout)  # type: ignore[arg-type]
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out, lse = flashgen.attention(q, k, v, causal=True, layout=layout, return_lse=True)  # type: ignore[call-overload]
    for seed in (1, 2):
        for static, fresh in zip((q, k, v), inputs(layout=layout, seqlen=320, seed=seed), strict=True):
            static.copy_(fresh)
        graph.replay()
        want, want_lse = flashgen.attention(q, k, v, causal=True, layout=layout, return_lse=True)  # type: ignore[call-overload]
        assert torch.equal(out, want)
        assert torch.equal(lse, want_lse)


def test_graph_capture_after_a_call() -> None:
    q, k, v = inputs(seqlen=352)
    want = flashgen.attention(q, k, v)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = flashgen.attention(q, k, v)
    graph.replay()
    assert torch.equal(out, want)


def test_graph_capture_of_a_cold_call_says_what_to_do() -> None:
    # A head dimension that no other test uses, so that nothing is compiled for it.
    q, k, v = inputs(dim=24)
    torch.cuda.synchronize()
    with pytest.raises(FlashgenError, match=r"flashgen\.warmup"), torch.cuda.graph(torch.cuda.CUDAGraph()):
        flashgen.attention(q, k, v)
    # The failed capture leaves the process usable.
    torch.cuda.synchronize()
    assert bool(flashgen.attention(q, k, v).isfinite().all())


def test_graph_capture_of_a_kernel_that_was_compiled_but_never_run() -> None:
    # `explain` compiles; whether loading in a capture is possible is the driver's affair, silence about it is not.
    q, k, v = inputs(dim=40)
    flashgen.explain(q, k, v)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    try:
        with torch.cuda.graph(graph):
            out = flashgen.attention(q, k, v)
    except FlashgenError as error:
        assert "flashgen.warmup" in str(error)  # noqa: PT017
        return
    graph.replay()
    assert torch.equal(out, flashgen.attention(q, k, v))


def test_two_streams() -> None:
    calls = [inputs(seqlen=512, seed=seed) for seed in range(8)]
    want = [flashgen.attention(*tensors, causal=True) for tensors in calls]
    torch.cuda.synchronize()
    streams = [torch.cuda.Stream(), torch.cuda.Stream()]
    for _ in range(5):
        got: list[torch.Tensor] = []
        for index, tensors in enumerate(calls):
            with torch.cuda.stream(streams[index % 2]):
                got.append(flashgen.attention(*tensors, causal=True))
        torch.cuda.synchronize()
        assert all(torch.equal(a, b) for a, b in zip(got, want, strict=True))


def test_launches_on_the_current_stream() -> None:
    q, k, v = inputs(seqlen=512)
    want = flashgen.attention(2 * q, k, v)
    torch.cuda.synchronize()
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        # The copy ends long after the launch is queued: a kernel on another stream would read the old Q.
        torch.cuda._sleep(20_000_000)
        q.mul_(2)
        out = flashgen.attention(q, k, v)
    stream.synchronize()
    assert torch.equal(out, want)


@pytest.mark.parametrize("layout", ["bhsd", "bshd"])
def test_inductor(layout: str) -> None:
    torch._dynamo.reset()

    @torch.compile(fullgraph=True)
    def function(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        # Transposed inside the graph: the operator must get the strides that eager code would give it.
        return flashgen.attention(q * 2, k, v, causal=True, layout=layout) + 1  # type: ignore[call-overload]

    q, k, v = inputs(layout=layout)
    want = flashgen.attention(q * 2, k, v, causal=True, layout=layout) + 1  # type: ignore[call-overload]
    torch.testing.assert_close(function(q, k, v), want)


def test_cuda_graphs_of_the_compiler() -> None:
    torch._dynamo.reset()
    q, k, v = inputs()
    want = flashgen.attention(q, k, v, causal=True)
    function = torch.compile(lambda q, k, v: flashgen.attention(q, k, v, causal=True), mode="reduce-overhead")
    for _ in range(3):
        torch.compiler.cudagraph_mark_step_begin()
        assert torch.equal(function(q, k, v), want)


def test_opcheck() -> None:
    rest = (*[None] * 11, [], 0, 0, "causal", "", 0.125, 0.0, 0.0)
    for layout in ("bhsd", "bshd"):
        arguments = (*inputs(seqlen=40, layout=layout), *rest, layout, True, False, "", "")
        torch.library.opcheck(torch.ops.flashgen.attention_forward.default, arguments)


def test_graph_capture_of_packed_sequences() -> None:
    q, k, v = (t[0].transpose(0, 1).contiguous() for t in inputs(seqlen=300))
    starts = torch.tensor([0, 100, 300], dtype=torch.int32, device="cuda")
    flashgen.warmup(["b=2 hq=6 hkv=2 s=200 d=64 varlen causal bf16"])
    # Packed tensors of other sizes are another kind of call: this one prepares it.
    flashgen.attention_varlen(q, k, v, starts, starts, 200, 200, causal=True)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = flashgen.attention_varlen(q, k, v, starts, starts, 200, 200, causal=True)
    for middle in (150, 190):
        starts[1] = middle
        graph.replay()
        want = flashgen.attention_varlen(q, k, v, starts, starts, 200, 200, causal=True)
        assert torch.equal(out, want)


def test_graph_capture_of_dropout_draws_anew() -> None:
    q, k, v = inputs(seqlen=320)
    flashgen.attention(q, k, v, dropout_p=0.5)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = flashgen.attention(q, k, v, dropout_p=0.5)
    graph.replay()
    first = out.clone()
    graph.replay()
    assert not torch.equal(out, first)


def test_graph_capture_with_a_seed() -> None:
    q, k, v = inputs(seqlen=320)
    want = flashgen.attention(q, k, v, dropout_p=0.5, seed=11)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = flashgen.attention(q, k, v, dropout_p=0.5, seed=11)
    graph.replay()
    assert torch.equal(out, want)


def test_graph_capture_of_a_mask_that_only_its_tensors_bound() -> None:
    q, k, v = inputs(seqlen=320)
    mask = flashgen.masks.document(torch.arange(320, device="cuda") // 50)
    want = flashgen.attention(q, k, v, mask=mask)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = flashgen.attention(q, k, v, mask=mask)
    graph.replay()
    assert torch.equal(out, want)


def test_options_do_not_wait_for_the_gpu() -> None:
    q, k, v = inputs(seqlen=320)
    options = {"dropout_p": 0.5, "seed": 3, "window": (40, 0), "sinks": torch.zeros(6, device="cuda"), "softcap": 9.0}
    flashgen.attention(q, k, v, **options)
    before = torch.cuda.get_sync_debug_mode()
    torch.cuda.set_sync_debug_mode("error")
    try:
        flashgen.attention(q, k, v, **options)
    finally:
        torch.cuda.set_sync_debug_mode(before)


def test_inductor_with_features() -> None:
    torch._dynamo.reset()
    bias = torch.randn(6, 300, 300, device="cuda", dtype=torch.bfloat16)
    ids = torch.arange(300, device="cuda") // 70

    @torch.compile(fullgraph=True)
    def function(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        mask = flashgen.masks.document(ids) & flashgen.masks.causal()
        return flashgen.attention(q * 2, k, v, bias=bias * 2, mask=mask, sinks=bias[:, 0, 0]) + 1

    q, k, v = inputs()
    mask = flashgen.masks.document(ids) & flashgen.masks.causal()
    want = flashgen.attention(q * 2, k, v, bias=bias * 2, mask=mask, sinks=bias[:, 0, 0]) + 1
    torch.testing.assert_close(function(q, k, v), want)
