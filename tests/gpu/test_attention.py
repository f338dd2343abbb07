"""`flashgen.attention` on a GPU: every length of the API, dtypes, masks, groups, layouts, head dimensions, memory."""

from __future__ import annotations

import itertools
import random
from collections.abc import Callable

import pytest
import torch

import flashgen
from flashgen.codegen import TritonForwardConfig
from flashgen.errors import InputError
from flashgen.launch import detect_target
from flashgen.measure import API_LENGTHS
from flashgen.spec import causal, full
from flashgen.spec.masks import Mask

pytestmark = pytest.mark.gpu

Check = Callable[..., torch.Tensor]

MASKS = (full(), causal(), causal("top_left"))
SMALL = [pair for pair in API_LENGTHS if max(pair) <= 256]


def normal(*sizes: int, dtype: torch.dtype = torch.bfloat16, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator(device="cuda").manual_seed(seed)
    return torch.randn(sizes, generator=generator, device="cuda", dtype=dtype)


def inputs(
    lengths: tuple[int, int] = (113, 203),
    *,
    dims: tuple[int, int] = (64, 64),
    heads: tuple[int, int] = (6, 2),
    batch: int = 2,
    dtype: torch.dtype = torch.bfloat16,
    layout: str = "bhsd",
    seed: int = 0,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    def make(nheads: int, seqlen: int, dim: int, offset: int) -> torch.Tensor:
        rows = (nheads, seqlen) if layout == "bhsd" else (seqlen, nheads)
        return normal(batch, *rows, dim, dtype=dtype, seed=3 * seed + offset)

    return (
        make(heads[0], lengths[0], dims[0], 0),
        make(heads[1], lengths[1], dims[0], 1),
        make(heads[1], lengths[1], dims[1], 2),
    )


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("mask", MASKS, ids=str)
@pytest.mark.parametrize("lengths", API_LENGTHS, ids=lambda pair: f"{pair[0]}x{pair[1]}")
def test_lengths(check: Check, lengths: tuple[int, int], mask: Mask, dtype: torch.dtype) -> None:
    check(*inputs(lengths, dtype=dtype), mask)


@pytest.mark.parametrize("mask", MASKS, ids=str)
@pytest.mark.parametrize("lengths", SMALL, ids=lambda pair: f"{pair[0]}x{pair[1]}")
def test_lengths_in_float32(check: Check, lengths: tuple[int, int], mask: Mask) -> None:
    check(*inputs(lengths, dtype=torch.float32), mask)


@pytest.mark.parametrize("offset", [-65, -64, -63, -2, -1, 1, 2, 63, 64, 65, 127, 128, 129])
def test_lengths_at_the_edges_of_tiles(check: Check, offset: int) -> None:
    # Where the diagonal, or the last key, is one element into a key tile or short of it decides which loop has the
    # tile, or none.
    for mask in MASKS:
        check(*inputs((192, 192 + offset)), mask)


@pytest.mark.parametrize("batch", [1, 3])
@pytest.mark.parametrize("layout", ["bhsd", "bshd"])
@pytest.mark.parametrize("heads", [(2, 2), (6, 2), (6, 1), (12, 2), (8, 8)], ids=str)
def test_groups_and_layouts(check: Check, heads: tuple[int, int], layout: str, batch: int) -> None:
    for lengths in ((113, 203), (512, 256)):
        check(*inputs(lengths, heads=heads, layout=layout, batch=batch), causal(), layout=layout)


@pytest.mark.parametrize(
    "dims", [(16, 64), (32, 32), (72, 40), (80, 96), (96, 96), (128, 128), (192, 128), (256, 256)], ids=str
)
def test_head_dimensions(check: Check, dims: tuple[int, int]) -> None:
    for lengths in ((203, 113), (384, 600)):
        check(*inputs(lengths, dims=dims), causal())


@pytest.mark.parametrize("dims", [(128, 128), (72, 40)], ids=str)
@pytest.mark.parametrize("loads", ["pointer", "descriptor"])
def test_every_tile_order_and_kind_of_load(check: Check, loads: str, dims: tuple[int, int]) -> None:
    target = detect_target(torch.device("cuda", torch.cuda.current_device()))
    if loads == "descriptor" and not target.has_tma:
        pytest.skip(f"{target.arch} has no bulk copies")
    for head_group in (1, 2, 5, 64):
        config = TritonForwardConfig(
            block_m=64,
            block_n=64,
            num_warps=4,
            num_stages=2,
            loads=loads,
            head_group=head_group,  # type: ignore[arg-type]
        )
        for mask in MASKS:
            check(*inputs((300, 333), dims=dims), mask, config=config)


@pytest.mark.parametrize("scale", [-0.3, 0.0, 0.02, 1.0])
def test_scales(check: Check, scale: float) -> None:
    check(*inputs(), causal(), softmax_scale=scale)


@pytest.mark.parametrize(("lengths", "batch"), [((10, 0), 2), ((0, 12), 2), ((0, 0), 2), ((10, 12), 0)])
def test_empty(lengths: tuple[int, int], batch: int) -> None:
    q, k, v = inputs(lengths, batch=batch)
    out, lse = flashgen.attention(q, k, v, causal=True, return_lse=True)
    assert out.shape == (batch, 6, lengths[0], 64)
    assert lse.shape == (batch, 6, lengths[0])
    assert bool((out == 0).all())
    assert bool((lse == float("-inf")).all())


FEATURES = (
    "sliding_window(100,30)",
    "causal softcap alibi",
    "bias=input sinks",
    "causal bias=bool:unaligned",
    "dropout sinks causal",
    "document(batched)&causal",
    "score_mod('return score * 2.0 + (q_idx - kv_idx)') causal",
    "varlen causal sinks",
    "varlen seqused=qk bias=fp32",
)


@pytest.mark.parametrize("features", FEATURES)
@pytest.mark.parametrize("lengths", API_LENGTHS, ids=lambda pair: f"{pair[0]}x{pair[1]}")
def test_lengths_with_features(check_problem: Callable[..., None], lengths: tuple[int, int], features: str) -> None:
    problem = f"b=2 hq=6 hkv=2 sq={lengths[0]} sk={lengths[1]} d=64 {features} bf16 lse"
    for seed, layout in enumerate(("bhsd", "bshd")):
        check_problem(problem, seed=seed, layout=layout)


@pytest.mark.parametrize("features", ["full", "causal", "descale causal", "varlen descale"])
def test_fp8(check_problem: Callable[..., None], features: str) -> None:
    target = detect_target(torch.device("cuda", torch.cuda.current_device()))
    if target.backend != "cuda" or target.capability < 89:
        pytest.skip(f"{target.arch} has no fp8 products")
    for lengths in ((113, 203), (512, 256), (1023, 1024)):
        check_problem(f"b=2 hq=6 hkv=2 sq={lengths[0]} sk={lengths[1]} d=64 {features} fp8 lse")


def test_tf32(check_problem: Callable[..., None]) -> None:
    for lengths in ((113, 203), (384, 256)):
        check_problem(f"b=2 hq=6 hkv=2 sq={lengths[0]} sk={lengths[1]} d=64 causal tf32 lse")


def test_a_changed_setting_of_tf32_is_seen() -> None:
    q, k, v = inputs(dtype=torch.float32)
    before = torch.backends.cuda.matmul.fp32_precision
    try:
        torch.backends.cuda.matmul.fp32_precision = "ieee"
        exact = flashgen.attention(q, k, v)
        torch.backends.cuda.matmul.fp32_precision = "tf32"
        assert not torch.equal(flashgen.attention(q, k, v), exact)
        torch.backends.cuda.matmul.fp32_precision = "ieee"
        assert torch.equal(flashgen.attention(q, k, v), exact)
    finally:
        torch.backends.cuda.matmul.fp32_precision = before


def test_other_tensors_of_the_same_kind() -> None:
    # What a launch is bound to are sizes and strides; the numbers come with each call.
    q, k, v = inputs()
    for seed in (1, 2):
        bias, sinks = normal(113, 208, seed=seed)[:, :203], normal(6, dtype=torch.float32, seed=seed)
        got = flashgen.attention(q, k, v, bias=bias, sinks=sinks, softcap=3.0 * seed)
        want = flashgen.attention(*(t.cpu() for t in (q, k, v)), bias=bias.cpu(), sinks=sinks.cpu(), softcap=3.0 * seed)
        torch.testing.assert_close(got.cpu(), want, atol=3e-2, rtol=3e-2)


def test_packed_sequences_that_do_not_fit() -> None:
    q = normal(10, 2, 64)
    for starts, message in (([0, 6, 4], "must not decrease"), ([0, 6, 12], "ends at 12")):
        wrong = torch.tensor(starts, dtype=torch.int32, device="cuda")
        with pytest.raises(InputError, match=message):
            flashgen.attention_varlen(q, q, q, wrong, wrong, 10, 10)


def test_rows_of_no_sequence() -> None:
    q = normal(300, 2, 64)
    starts = torch.tensor([3, 100, 250], dtype=torch.int32, device="cuda")
    # Freed at once, so that the outputs get this memory.
    q.new_full((2, 300, 2, 64), float("nan"))
    out, lse = flashgen.attention_varlen(q, q, q, starts, starts, 150, 150, return_lse=True)
    outside = torch.tensor([*range(3), *range(250, 300)], device="cuda")
    assert bool((out[outside] == 0).all())
    assert bool((lse[:, outside] == float("-inf")).all())
    assert bool(out.isfinite().all())


def transposed(t: torch.Tensor) -> torch.Tensor:
    return t.transpose(1, 2).contiguous().transpose(1, 2)


def last_strided(t: torch.Tensor) -> torch.Tensor:
    return t.transpose(2, 3).contiguous().transpose(2, 3)


def guarded(t: torch.Tensor) -> torch.Tensor:
    """The same values in every second row and the first columns of a tensor of NaN."""
    big = t.new_full((t.shape[0], t.shape[1], 2 * t.shape[2] + 64, t.shape[3] + 24), float("nan"))
    view = big[:, :, : 2 * t.shape[2] : 2, : t.shape[3]]
    return view.copy_(t)


def misaligned(t: torch.Tensor) -> torch.Tensor:
    """The same values one element after a 16-byte boundary."""
    flat = t.new_empty(t.numel() + 8)
    view = flat[1 : 1 + t.numel()].view(t.shape)
    assert view.data_ptr() % 16 != 0
    return view.copy_(t)


def odd_rows(t: torch.Tensor) -> torch.Tensor:
    """The same values in rows that are no multiple of 16 bytes apart."""
    big = t.new_full((*t.shape[:3], t.shape[3] + 1), float("nan"))
    return big[..., : t.shape[3]].copy_(t)


@pytest.mark.parametrize("change", [transposed, last_strided, guarded, misaligned, odd_rows])
@pytest.mark.parametrize("which", ["q", "k", "v", "qkv"])
def test_memory(check: Check, which: str, change: Callable[[torch.Tensor], torch.Tensor]) -> None:
    dense = inputs((130, 203))
    q, k, v = (change(t) if name in which else t for name, t in zip("qkv", dense, strict=True))
    out = check(q, k, v, causal())
    # The same numbers, so the same bits where the same config runs; never further apart than the rule allows twice.
    torch.testing.assert_close(out, flashgen.attention(*dense, causal=True), atol=2e-2, rtol=2e-2)
    # What was bound for these strides is not used for dense tensors, nor the reverse.
    check(*dense, causal())
    check(q, k, v, causal())


def test_aligned_after_misaligned(check: Check) -> None:
    dense = inputs((130, 130))
    for tensors in ([misaligned(t) for t in dense], dense, [misaligned(t) for t in dense]):
        check(*tensors, full())


def test_expanded(check: Check) -> None:
    q, k, v = inputs()
    check(q, k[:, :1].expand(-1, 6, -1, -1), v[:, :1].expand(-1, 6, -1, -1), causal())
    check(*(t[:1].expand(4, -1, -1, -1) for t in (q, k, v)), causal())
    check(q, k[:, :, :1].expand(-1, -1, 203, -1), v, full())


def test_packed_projection(check: Check) -> None:
    packed = normal(2, 300, 10, 64).transpose(1, 2)
    check(*packed.split([6, 2, 2], dim=1), causal())


def test_random_calls(check: Check) -> None:
    rng = random.Random(0)
    for seed in range(60):
        nheads_kv = rng.choice((1, 2, 3))
        tensors = inputs(
            (rng.randint(1, 700), rng.randint(1, 700)),
            dims=rng.choice(((64, 64), (72, 40))),
            heads=(nheads_kv * rng.choice((1, 2, 3, 6)), nheads_kv),
            batch=rng.choice((1, 2)),
            dtype=rng.choice((torch.float16, torch.bfloat16)),
            seed=seed,
        )
        check(*tensors, rng.choice(MASKS), softmax_scale=rng.choice((None, 0.05, 1.0)))


@pytest.mark.parametrize("mask", MASKS, ids=str)
def test_same_bits_every_time(mask: Mask) -> None:
    q, k, v = inputs((1023, 1024), dims=(128, 128), heads=(16, 4))
    first, first_lse = flashgen.attention(q, k, v, mask=mask, return_lse=True)
    for _ in range(20):
        out, lse = flashgen.attention(q, k, v, mask=mask, return_lse=True)
        assert torch.equal(out, first)
        assert torch.equal(lse, first_lse)


def test_tensors_on_two_devices() -> None:
    q, k, v = inputs()
    for tensors in ((q.cpu(), k, v), (q, k.cpu(), v), (q, k, v.cpu())):
        with pytest.raises(InputError, match="one device"):
            flashgen.attention(*tensors)


def test_inputs_are_left_alone() -> None:
    tensors = inputs()
    copies = [t.clone() for t in tensors]
    for layout, scale in itertools.product(("bhsd",), (None, -0.5)):
        flashgen.attention(*tensors, layout=layout, softmax_scale=scale)  # type: ignore[arg-type]
    assert all(torch.equal(t, copy) for t, copy in zip(tensors, copies, strict=True))
