"""flashgen.scaled_dot_product_attention against PyTorch's function: shapes, masks, errors."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch.nn.functional import scaled_dot_product_attention as torch_sdpa

import flashgen
from flashgen.errors import InputError, UnsupportedError
from flashgen.integrations.sdpa import scaled_dot_product_attention as sdpa


@pytest.fixture(autouse=True)
def _same_numbers() -> None:
    torch.manual_seed(0)


def randn(*sizes: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.randn(sizes, dtype=dtype)


def agree(got: torch.Tensor, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, **options: object) -> None:
    mask = options.pop("attn_mask", None)
    if isinstance(mask, torch.Tensor) and mask.is_floating_point():
        mask = mask.double()
    wanted = torch_sdpa(q.double(), k.double(), v.double(), attn_mask=mask, **options)  # type: ignore[arg-type]
    assert got.shape == wanted.shape
    assert got.dtype == q.dtype
    assert not got.isnan().any()
    tolerance = 1e-5 if q.dtype == torch.float32 else 2e-2
    torch.testing.assert_close(got.double(), wanted, rtol=0, atol=tolerance)


SIZES = {
    "2-D": ((5, 16), (7, 16), (7, 16)),
    "3-D": ((3, 5, 16), (3, 7, 16), (3, 7, 16)),
    "4-D": ((2, 3, 5, 16), (2, 3, 7, 16), (2, 3, 7, 16)),
    "5-D": ((2, 3, 4, 5, 16), (2, 3, 4, 7, 16), (2, 3, 4, 7, 16)),
    "one query": ((2, 3, 1, 16), (2, 3, 7, 16), (2, 3, 7, 16)),
    "more queries": ((2, 3, 9, 16), (2, 3, 4, 16), (2, 3, 4, 16)),
    "another Ev": ((2, 3, 5, 16), (2, 3, 7, 16), (2, 3, 7, 24)),
    "key head shared": ((2, 4, 5, 16), (2, 1, 7, 16), (2, 1, 7, 16)),
    "key head alone shared": ((2, 4, 5, 16), (2, 1, 7, 16), (2, 4, 7, 16)),
    "query head shared": ((2, 1, 5, 16), (2, 4, 7, 16), (2, 4, 7, 16)),
    "key batch shared": ((2, 3, 5, 16), (1, 3, 7, 16), (1, 3, 7, 16)),
    "query batch shared": ((1, 3, 5, 16), (2, 3, 7, 16), (1, 3, 7, 16)),
    "3-D query, 4-D key": ((3, 5, 16), (2, 3, 7, 16), (2, 3, 7, 16)),
    "4-D query, 2-D key": ((2, 3, 5, 16), (7, 16), (7, 16)),
    "2-D query, 4-D key": ((5, 16), (2, 3, 7, 16), (2, 3, 7, 16)),
    "5-D, broadcast in part": ((2, 3, 4, 5, 16), (2, 1, 4, 7, 16), (1, 3, 4, 7, 16)),
}


@pytest.mark.parametrize("is_causal", [False, True])
@pytest.mark.parametrize("sizes", SIZES.values(), ids=SIZES.keys())
def test_leading_dimensions_broadcast(sizes: tuple[tuple[int, ...], ...], is_causal: bool) -> None:
    q, k, v = (randn(*size) for size in sizes)
    agree(sdpa(q, k, v, is_causal=is_causal), q, k, v, is_causal=is_causal)


@pytest.mark.parametrize(
    ("head_dim", "head_dim_v"), [(1, 1), (8, 8), (15, 17), (20, 20), (59, 40), (111, 3), (264, 264)]
)
@pytest.mark.parametrize("scale", [None, 0.3])
def test_any_head_dim(head_dim: int, head_dim_v: int, scale: float | None) -> None:
    q, k, v = randn(2, 3, 5, head_dim), randn(2, 3, 7, head_dim), randn(2, 3, 7, head_dim_v)
    agree(sdpa(q, k, v, scale=scale), q, k, v, scale=scale)


@pytest.mark.parametrize(
    ("of_q", "of_k", "of_v"),
    [((2, 6), (2, 3), (2, 3)), ((2, 6), (2, 2), (2, 3)), ((2, 6), (2, 1), (2, 6)), ((6,), (2,), (2,))],
)
def test_grouped_heads(of_q: tuple[int, ...], of_k: tuple[int, ...], of_v: tuple[int, ...]) -> None:
    q, k, v = randn(*of_q, 5, 16), randn(*of_k, 7, 16), randn(*of_v, 7, 16)
    agree(sdpa(q, k, v, enable_gqa=True), q, k, v, enable_gqa=True)


@pytest.mark.parametrize("kind", ["bool", "float"])
@pytest.mark.parametrize(
    "size", [(5, 7), (1, 7), (5, 1), (1, 1), (3, 5, 7), (3, 1, 7), (1, 5, 7), (2, 1, 1, 7), (2, 1, 5, 7), (2, 3, 5, 7)]
)
def test_masks_broadcast(size: tuple[int, ...], kind: str) -> None:
    q, k, v = randn(2, 3, 5, 16), randn(2, 3, 7, 16), randn(2, 3, 7, 16)
    mask = randn(*size) > -0.5 if kind == "bool" else randn(*size)
    agree(sdpa(q, k, v, mask), q, k, v, attn_mask=mask)


@pytest.mark.parametrize(
    "size", [(5, 7), (4, 5, 7), (1, 1, 1, 5, 7), (1, 3, 1, 5, 7), (2, 1, 4, 1, 7), (2, 3, 1, 5, 7)]
)
def test_masks_of_several_batch_dimensions(size: tuple[int, ...]) -> None:
    q, k, v = randn(2, 3, 4, 5, 16), randn(2, 3, 4, 7, 16), randn(2, 3, 4, 7, 16)
    mask = randn(*size)
    agree(sdpa(q, k, v, mask), q, k, v, attn_mask=mask)


def test_masks_of_calls_without_heads() -> None:
    q, k, v, mask = randn(5, 16), randn(7, 16), randn(7, 16), randn(5, 7)
    agree(sdpa(q, k, v, mask), q, k, v, attn_mask=mask)


@pytest.mark.parametrize("size", [(7,), ()])
def test_masks_with_fewer_dimensions_than_scores(size: tuple[int, ...]) -> None:
    # PyTorch's own CPU kernel fails on these for 4-D inputs, its others take them.
    q, k, v, mask = randn(2, 3, 5, 16), randn(2, 3, 7, 16), randn(2, 3, 7, 16), randn(*size)
    agree(sdpa(q, k, v, mask), q, k, v, attn_mask=mask.expand(5, 7))


@pytest.mark.parametrize("mask_dtype", [torch.bfloat16, torch.float32, torch.bool])
def test_mask_dtypes_beside_16_bits(mask_dtype: torch.dtype) -> None:
    q, k, v = (randn(2, 3, n, 16, dtype=torch.bfloat16) for n in (5, 7, 7))
    mask = randn(5, 7) > -0.5 if mask_dtype == torch.bool else randn(5, 7).to(mask_dtype)
    agree(sdpa(q, k, v, mask), q, k, v, attn_mask=mask)


@pytest.mark.parametrize("mask", [torch.zeros(5, 7, dtype=torch.bool), torch.full((5, 7), float("-inf"))])
def test_rows_without_keys_are_zero(mask: torch.Tensor) -> None:
    mask = mask.clone()
    mask[3] = True if mask.dtype == torch.bool else 0.0
    q, k, v = randn(2, 3, 5, 16), randn(2, 3, 7, 16), randn(2, 3, 7, 16)
    out = sdpa(q, k, v, mask)
    agree(out, q, k, v, attn_mask=mask)
    assert not out[:, :, [0, 1, 2, 4]].any()
    assert out[:, :, 3].any()


def test_causal_bias_of_pytorch() -> None:
    bias = pytest.importorskip("torch.nn.attention.bias")
    q, k, v = randn(2, 3, 5, 16), randn(2, 3, 7, 16), randn(2, 3, 7, 16)
    rows, keys = torch.arange(5)[:, None], torch.arange(7)[None, :]
    agree(sdpa(q, k, v, bias.causal_lower_right(5, 7)), q, k, v, attn_mask=keys <= rows + 2)
    agree(sdpa(q, k, v, bias.causal_upper_left(5, 7)), q, k, v, attn_mask=keys <= rows)
    with pytest.raises(ValueError, match="4 x 9"):
        sdpa(q, k, v, bias.causal_upper_left(4, 9))


EMPTY = {
    "no queries": ((2, 3, 0, 16), (2, 3, 7, 16), (2, 3, 7, 16)),
    "no keys": ((2, 3, 5, 16), (2, 3, 0, 16), (2, 3, 0, 16)),
    "no batch": ((0, 3, 5, 16), (0, 3, 7, 16), (0, 3, 7, 16)),
    "no heads": ((2, 0, 5, 16), (2, 0, 7, 16), (2, 0, 7, 16)),
    "no head_dim": ((2, 3, 5, 0), (2, 3, 7, 0), (2, 3, 7, 8)),
    "no Ev": ((2, 3, 5, 16), (2, 3, 7, 16), (2, 3, 7, 0)),
    "no keys, 2-D": ((5, 16), (0, 16), (0, 16)),
}


@pytest.mark.parametrize("sizes", EMPTY.values(), ids=EMPTY.keys())
def test_dimensions_of_size_0(sizes: tuple[tuple[int, ...], ...]) -> None:
    q, k, v = (randn(*size) for size in sizes)
    agree(sdpa(q, k, v), q, k, v)


def test_dropout_follows_pytorchs_seed_and_keeps_its_share() -> None:
    q, k = randn(1, 4, 64, 16), randn(1, 4, 64, 16)
    v = torch.ones(1, 4, 64, 16)
    torch.manual_seed(5)
    out = sdpa(q, k, v, dropout_p=0.25)
    torch.manual_seed(5)
    assert torch.equal(out, sdpa(q, k, v, dropout_p=0.25))
    assert not torch.equal(out, sdpa(q, k, v, dropout_p=0.25))
    # With ones for V a row is the share that was kept over what is expected of it: 256 rows of some 20 effective keys.
    assert abs(out[..., 0].mean().item() - 1) < 0.03
    assert not sdpa(q, k, v, dropout_p=1.0).any()


def test_autocast() -> None:
    q, k, v, mask = randn(2, 3, 5, 16), randn(2, 3, 7, 16).half(), randn(2, 3, 7, 16), randn(5, 7).half()
    with torch.autocast("cpu", torch.bfloat16):
        out = sdpa(q, k, v, mask)
    assert out.dtype == torch.bfloat16
    agree(out, *(t.bfloat16() for t in (q, k, v)), attn_mask=mask)


@pytest.mark.parametrize("is_causal", [False, True])
def test_the_kernel_itself(is_causal: bool) -> None:
    q, k, v = randn(2, 4, 20, 20), randn(2, 1, 33, 20), randn(2, 1, 33, 9)
    mask = None if is_causal else randn(2, 1, 1, 33) > 0
    with flashgen.interpreting():
        out = sdpa(q, k, v, mask, is_causal=is_causal)
    agree(out, q, k, v, attn_mask=mask, is_causal=is_causal)


def test_compiles_into_one_graph() -> None:
    def call(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        return sdpa(q, k, v, mask) + sdpa(q, k, v, is_causal=True)

    q, k, v, mask = randn(2, 4, 5, 20), randn(2, 1, 7, 20), randn(2, 1, 7, 20), randn(1, 7) > 0
    compiled = torch.compile(call, backend="aot_eager", fullgraph=True)
    torch.testing.assert_close(compiled(q, k, v, mask), call(q, k, v, mask), rtol=0, atol=1e-6)


REFUSED_BY_BOTH = {
    "1-D": (((5,), (7, 16), (7, 16)), {}),
    "head_dim": (((2, 3, 5, 16), (2, 3, 7, 8), (2, 3, 7, 16)), {}),
    "batch": (((2, 3, 5, 16), (4, 3, 7, 16), (4, 3, 7, 16)), {}),
    "heads": (((2, 4, 5, 16), (2, 2, 7, 16), (2, 2, 7, 16)), {}),
    "grouped heads": (((2, 4, 5, 16), (2, 3, 7, 16), (2, 3, 7, 16)), {"enable_gqa": True}),
    "query heads fewer": (((2, 1, 5, 16), (2, 2, 7, 16), (2, 2, 7, 16)), {"enable_gqa": True}),
    "dropout": (((2, 3, 5, 16), (2, 3, 7, 16), (2, 3, 7, 16)), {"dropout_p": 1.5}),
    "mask size": (((2, 3, 5, 16), (2, 3, 7, 16), (2, 3, 7, 16)), {"attn_mask": torch.zeros(2, 5, 7)}),
    "mask dimensions": (((3, 5, 16), (3, 7, 16), (3, 7, 16)), {"attn_mask": torch.zeros(2, 3, 5, 7)}),
    "mask wider": (((2, 3, 1, 16), (2, 3, 7, 16), (2, 3, 7, 16)), {"attn_mask": torch.zeros(5, 7)}),
    "mask of float64": (((2, 3, 5, 16), (2, 3, 7, 16), (2, 3, 7, 16)), {"attn_mask": torch.zeros(5, 7).double()}),
    "mask of integers": (((2, 3, 5, 16), (2, 3, 7, 16), (2, 3, 7, 16)), {"attn_mask": torch.ones(5, 7).int()}),
}


@pytest.mark.parametrize(("sizes", "options"), REFUSED_BY_BOTH.values(), ids=REFUSED_BY_BOTH.keys())
def test_what_pytorch_refuses_is_refused_alike(sizes: tuple[tuple[int, ...], ...], options: dict[str, object]) -> None:
    q, k, v = (randn(*size) for size in sizes)
    with pytest.raises(RuntimeError):
        torch_sdpa(q, k, v, **options)  # type: ignore[arg-type]
    with pytest.raises(RuntimeError) as caught:
        sdpa(q, k, v, **options)  # type: ignore[arg-type]
    assert isinstance(caught.value, InputError)


def test_mixed_dtypes_and_devices_are_refused() -> None:
    q, k = randn(2, 3, 5, 16), randn(2, 3, 7, 16)
    with pytest.raises(RuntimeError, match="one dtype"):
        sdpa(q, k.half(), k)
    with pytest.raises(RuntimeError, match="one device"):
        sdpa(q, k.to("meta"), k)
    with pytest.raises(RuntimeError, match="int64"):
        sdpa(q.long(), k.long(), k.long())
    with pytest.raises(RuntimeError, match="must be a tensor"):
        sdpa([[1.0]], k, k)  # type: ignore[arg-type]


def test_mask_and_is_causal_exclude_each_other() -> None:
    q, k = randn(2, 3, 5, 16), randn(2, 3, 7, 16)
    with pytest.raises(RuntimeError, match="exclude each other"):
        sdpa(q, k, k, torch.zeros(5, 7), is_causal=True)


@pytest.mark.parametrize("dtype", [torch.float64, torch.complex64])
def test_other_types_are_unsupported(dtype: torch.dtype) -> None:
    q = torch.ones(1, 1, 4, 16, dtype=dtype)
    with pytest.raises(UnsupportedError, match=str(dtype)):
        sdpa(q, q, q)


def test_head_dims_beyond_the_kernels_are_unsupported() -> None:
    q, v = randn(1, 1, 4, 520), randn(1, 1, 4, 16)
    with pytest.raises(UnsupportedError, match="520"):
        sdpa(q, q, v)
    with pytest.raises(UnsupportedError, match="520"):
        sdpa(v, v, q)


@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors")
def test_nested_tensors_are_unsupported() -> None:
    nested = torch.nested.nested_tensor([randn(3, 2, 16), randn(4, 2, 16)])
    with pytest.raises(UnsupportedError, match="nested"):
        sdpa(nested, nested, nested)


def gradients(
    function: Callable[..., torch.Tensor], *given: torch.Tensor, **options: object
) -> tuple[torch.Tensor, ...]:
    leaves = [t.detach().clone().requires_grad_() for t in given]
    out = function(*leaves, **options)
    weights = torch.linspace(-1, 1, out.numel(), dtype=torch.float64).view(out.shape)
    return torch.autograd.grad((out * weights).sum(), leaves)


@pytest.mark.parametrize("is_causal", [False, True])
@pytest.mark.parametrize("sizes", SIZES.values(), ids=SIZES.keys())
def test_gradients(sizes: tuple[tuple[int, ...], ...], is_causal: bool) -> None:
    given = tuple(randn(*size) for size in sizes)
    wanted = gradients(torch_sdpa, *(t.double() for t in given), is_causal=is_causal)
    for mine, right in zip(gradients(sdpa, *given, is_causal=is_causal), wanted, strict=True):
        assert mine.dtype == torch.float32
        torch.testing.assert_close(mine.double(), right, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("head_dims", [(8, 8), (20, 59)])
def test_gradients_of_padded_heads(head_dims: tuple[int, int]) -> None:
    head_dim, head_dim_v = head_dims
    given = randn(2, 4, 5, head_dim), randn(2, 2, 7, head_dim), randn(2, 2, 7, head_dim_v)
    wanted = gradients(torch_sdpa, *(t.double() for t in given), enable_gqa=True)
    for mine, right in zip(gradients(sdpa, *given, enable_gqa=True), wanted, strict=True):
        torch.testing.assert_close(mine.double(), right, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("size", [(5, 7), (1, 7), (5, 1), (3, 5, 7), (2, 1, 1, 7), (2, 3, 5, 7)])
def test_gradients_of_masks(size: tuple[int, ...]) -> None:
    given = randn(2, 3, 5, 16), randn(2, 3, 7, 16), randn(2, 3, 7, 16), randn(*size)
    wanted = gradients(torch_sdpa, *(t.double() for t in given))
    for mine, right in zip(gradients(sdpa, *given), wanted, strict=True):
        torch.testing.assert_close(mine.double(), right, rtol=1e-5, atol=1e-5)


def test_a_masked_row_has_no_gradient() -> None:
    given = randn(2, 3, 5, 16), randn(2, 3, 7, 16), randn(2, 3, 7, 16)
    mask = torch.ones(5, 7, dtype=torch.bool)
    mask[3] = False
    dq, dk, dv = gradients(sdpa, *given, attn_mask=mask)
    assert not any(t.isnan().any() for t in (dq, dk, dv))
    assert not dq[:, :, 3].any()


def test_heads_beyond_the_backward_kernels() -> None:
    q = randn(1, 1, 4, 264).requires_grad_()
    with pytest.raises(UnsupportedError, match="up to 256"):
        sdpa(q, q, q)
    with torch.no_grad():
        agree(sdpa(q, q, q), q.detach(), q.detach(), q.detach())


def test_scale_and_enable_gqa_are_named_as_in_pytorch() -> None:
    q = randn(1, 1, 4, 16)
    with pytest.raises(TypeError):
        torch_sdpa(q, q, q, None, 0.0, False, 1.0)  # type: ignore[misc]
    with pytest.raises(TypeError):
        sdpa(q, q, q, None, 0.0, False, 1.0)  # type: ignore[misc]
