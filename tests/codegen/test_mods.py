"""Mods as Triton: formatted, compiled, and run in the interpreter against the Python function and `evaluate`."""

from __future__ import annotations

import importlib.util
import subprocess
import sys
import types
import typing
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch.nn.attention.flex_attention import and_masks, or_masks
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from triton.compiler import compile as triton_compile

from flashgen.codegen.mods import division_helpers, mod_arguments, mod_lines
from flashgen.errors import InputError
from flashgen.launch.interpreted import run_interpreted
from flashgen.resources import resource_dir
from flashgen.spec import score_mods
from flashgen.spec.mods import ModFunction, Role, derivative, parse_mod, read_mod

POINTERS = {
    **dict.fromkeys(("bool", "uint8"), "*u8"),
    **{"int8": "*i8", "int16": "*i16", "int32": "*i32", "int64": "*i64"},
    **{"float16": "*fp16", "bfloat16": "*bf16", "float32": "*fp32"},
}
BLOCK = 16
FIRST = 40
BATCH = 1
HEAD = 2

_GENERATOR = torch.Generator().manual_seed(0)
WINDOW = 5
WIDTH = 8
KERNEL = 5
DOCUMENTS = torch.tensor([[0] * 64, [0] * 45 + [1] * 6 + [2] * 13], dtype=torch.int32)
PREFIX = torch.tensor([7, 50], dtype=torch.int64)
SMALL = torch.randint(-40, 40, (64,), generator=_GENERATOR, dtype=torch.int8)
BYTES = torch.randint(0, 255, (64,), generator=_GENERATOR, dtype=torch.uint8)
KEEP = torch.rand(64, generator=_GENERATOR) > 0.5
SLOPES = torch.rand(4, generator=_GENERATOR)
HALF = torch.rand(4, 64, 8, generator=_GENERATOR).to(torch.float16)
BRAIN = torch.rand(64, generator=_GENERATOR).to(torch.bfloat16)
SCALE = torch.tensor(0.25)

T = typing.Any


def causal(b: T, h: T, q: T, kv: T) -> T:
    return q >= kv


def sliding_window(b: T, h: T, q: T, kv: T) -> T:
    return causal(b, h, q, kv) & (q - kv <= WINDOW)


def prefix_lm(b: T, h: T, q: T, kv: T) -> T:
    return (kv < PREFIX[b]) | (kv <= q)


def document(b: T, h: T, q: T, kv: T) -> T:
    same = DOCUMENTS[b, q] == DOCUMENTS[b][kv]
    return same & causal(b, h, q, kv)


def dilated(b: T, h: T, q: T, kv: T) -> T:
    distance = q - kv
    return (abs(distance) <= 9) & (distance % 3 == 0)


def neighborhood(b: T, h: T, q: T, kv: T) -> T:
    q_x = q // WIDTH
    q_y = q % WIDTH
    center_x = q_x.clamp(KERNEL // 2, WIDTH - 1 - KERNEL // 2)
    center_y = torch.clamp(q_y, min=KERNEL // 2, max=WIDTH - 1 - KERNEL // 2)
    near_x = (center_x - kv // WIDTH).abs() <= KERNEL // 2
    near_y = (center_y - kv % WIDTH).abs() <= KERNEL // 2
    return near_x & near_y


def chunked(b: T, h: T, q: T, kv: T) -> T:
    return (q // WIDTH == kv // WIDTH) & (q >= kv)


def transformer_xl(b: T, h: T, q: T, kv: T) -> T:
    memory = kv < 48
    return torch.logical_or(memory & (kv + 6 >= q), torch.logical_not(memory) & (kv - 48 <= q - 42))


def negative_division(b: T, h: T, q: T, kv: T) -> T:
    d = kv - q
    return (d // 3 == -2) | (d % -4 == -3) | (d // -5 == 1) | (d % 7 == (q - kv) % (h + 1)) | (b // 2 == q % 2)


def float_division(b: T, h: T, q: T, kv: T) -> T:
    return ((q - kv) * 0.25 // 0.5 == -3.0) | ((kv - q) * 0.5 % 1.5 == 0.5)


def bits_and_types(b: T, h: T, q: T, kv: T) -> T:
    odd = (q ^ kv) & 1
    count = (q > kv) * 2 + KEEP[q] + (odd | 2)
    return (count == 4) ^ (~KEEP[kv] & (SMALL[q] + 1 < BYTES[kv])) | (KEEP[q] == KEEP[kv]) & ~(~q > -48)


def shifted(b: T, h: T, q: T, kv: T) -> T:
    return KEEP[torch.clamp(kv - q + 8, 0, 63)] & (DOCUMENTS[0, q] == 0)


def heads_and_batch(b: T, h: T, q: T, kv: T) -> T:
    return torch.minimum(b, h) < max(b, 1, h - 1)


def ternaries(b: T, h: T, q: T, kv: T) -> T:
    return torch.where(kv % 2 == 0, True, q > 48) if q % 3 else (kv > 50 if h == 2 else False)


def constant_indices(b: T, h: T, q: T, kv: T) -> T:
    return (DOCUMENTS[1, 46] + DOCUMENTS[1, q] == 2) & (DOCUMENTS[0, 0] + PREFIX[1] > kv) & (PREFIX[0] == h + 5)


def everything(b: T, h: T, q: T, kv: T) -> T:
    return True


def very_long(b: T, h: T, q: T, kv: T) -> T:
    return (
        ((q * 3 + kv * 5 + b * 7 + h * 11 + 1) % 13 == (q * 17 + kv * 19 + b * 23 + h * 29 + 2) % 31)
        | ((DOCUMENTS[b, q] + PREFIX[b] + DOCUMENTS[b, kv] - 2 * DOCUMENTS[b, q] * DOCUMENTS[b, kv]) % 3 == 1)
        | (
            KEEP[q]
            & KEEP[kv]
            & (BYTES[q] // 2 + BYTES[kv] // 2 > 100)
            & (SMALL[q] // 3 > SMALL[kv] - SMALL[q] // 2)
            & (q > kv)
        )
    )


def gated_relative_bias(score: T, b: T, h: T, q: T, kv: T) -> T:
    near = torch.clamp(q - kv, -4, 3) + 4
    score += HALF[h, q, near] * KEEP[kv] + BRAIN[q] / 2
    return score * SCALE


def functions(score: T, b: T, h: T, q: T, kv: T) -> T:
    small = torch.exp(-abs(score)) + torch.exp2(-score * score) + torch.sigmoid(score) + torch.log(kv + 1)
    large = torch.sqrt(q + 1) * torch.rsqrt(kv + 1) + torch.log2(torch.maximum(score, score * 0.5) + 20)
    return torch.where(kv > 45, small, large) + torch.floor(score) + torch.tanh(score) + (h / 2 + q / (kv + 1))


def only_where(score: T, b: T, h: T, q: T, kv: T) -> T:
    return torch.where(q >= kv, score, -float("inf"))


def literals(score: T, b: T, h: T, q: T, kv: T) -> T:
    return torch.where(q > kv, 1, 0) * torch.where(kv > 44, 2.0, 1)


def from_keys(score: T, b: T, h: T, q: T, kv: T) -> T:
    return kv * 2


def from_head(score: T, b: T, h: T, q: T, kv: T) -> T:
    return SLOPES[h]


def zero(score: T, b: T, h: T, q: T, kv: T) -> T:
    return 0


def swish_of_masked(score: T, b: T, h: T, q: T, kv: T) -> T:
    score = torch.where(q >= kv, score * SLOPES[h], -float("inf"))
    return score * torch.sigmoid(score) if h else score


def selections(score: T, b: T, h: T, q: T, kv: T) -> T:
    x = torch.clamp(score, -2, 3) * torch.where(h > 1, score, 2) + abs(score) * KEEP[kv]
    return torch.minimum(x * x, torch.sqrt(torch.clamp(score, min=0))) + torch.where(b > 5, x, 0) + (score > 0) * x


def products(score: T, b: T, h: T, q: T, kv: T) -> T:
    far = q * 100_000
    return score * far * far * 1e-10 + score * h + score * KEEP[q] * SMALL[kv] + score * kv / (q + 1) / score


def divisions(score: T, b: T, h: T, q: T, kv: T) -> T:
    return score % 2.0 * score + (score * 3) // 1.0 * score + 7.5 % (score * score + h) + kv / (1 + score * score)


MASKS = [
    causal,
    sliding_window,
    prefix_lm,
    document,
    dilated,
    neighborhood,
    chunked,
    transformer_xl,
    negative_division,
    float_division,
    bits_and_types,
    shifted,
    heads_and_batch,
    constant_indices,
    everything,
    very_long,
]
SCORES = [gated_relative_bias, functions, only_where, literals, from_keys, from_head, zero]
MODS: dict[str, tuple[Callable[..., T], Role]] = {
    **{function.__name__: (function, "mask") for function in MASKS},
    **{function.__name__: (function, "score") for function in SCORES},
    "and_masks": (and_masks(causal, document), "mask"),
    "or_masks": (or_masks(sliding_window, and_masks(prefix_lm, dilated)), "mask"),
    "softcap": (score_mods.softcap(3.0), "score"),
    "alibi": (score_mods.alibi(SLOPES), "score"),
    "relative_position": (score_mods.relative_position(), "score"),
    "ternaries": (ternaries, "mask"),
}
# Slopes that are literals, per head, per row, per key and per element; captures that are used no more.
DERIVATIVES = {
    **{name: derivative(read_mod(function, role)) for name, (function, role) in MODS.items() if role == "score"},
    **{
        function.__name__: derivative(read_mod(function, "score"))
        for function in (swish_of_masked, selections, products, divisions)
    },
    "per_head": derivative(parse_mod("score_mod('return score * h * h + where(h > 1, score, 0)')")),
    "per_row": derivative(parse_mod("score_mod('return where(q_idx > 45, score, q_idx)')")),
    "per_key": derivative(parse_mod("score_mod('return where(kv_idx % 3 == h, 2, 0.5) * score')")),
}


def module_source(mod: ModFunction) -> str:
    """A module with the device function and a kernel that writes its value over one tile."""
    arguments = mod_arguments(mod, "mod_")
    inputs = ["score"] * (mod.role == "score") + ["b", "h", "q_idx", "kv_idx", *arguments]
    lines = ["import triton", "import triton.language as tl", "", ""]
    for helper in sorted(division_helpers(mod)):
        lines += [*(resource_dir("templates") / "mods" / f"{helper}.py.jinja").read_text().split("\n"), ""]
    lines += ["@triton.jit", f"def {mod.role}_mod(", *(f"    {name}," for name in inputs), "):"]
    lines += [f"    {line}" for line in mod_lines(mod, "mod_")]
    lines += ["", "", "@triton.jit", "def kernel(", "    out_ptr,", "    score_ptr,", "    B,", "    H,", "    FIRST,"]
    lines += [*(f"    {name}," for name in arguments), "    BLOCK: tl.constexpr,", "):"]
    lines += ["    b = tl.program_id(0) + B", "    h = tl.program_id(0) + H", "    offs = tl.arange(0, BLOCK)"]
    lines += ["    q_idx = FIRST + offs[:, None]", "    kv_idx = FIRST + offs[None, :]"]
    lines += ["    tile = offs[:, None] * BLOCK + offs[None, :]", "    score = tl.load(score_ptr + tile)"]
    lines += [f"    value = {mod.role}_mod(", *(f"        {name}," for name in inputs), "    )"]
    stored = "value" if mod.role == "score" else "tl.where(value, score, 1000.0)"
    lines += [f"    tl.store(out_ptr + tile, {stored})", ""]
    return "\n".join(lines)


def load(mod: ModFunction, folder: Path, name: str) -> types.ModuleType:
    path = folder / f"{name}.py"
    path.write_text(module_source(mod))
    spec = importlib.util.spec_from_file_location(f"rendered_mods.{name}", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def kernel_values(mod: ModFunction) -> dict[str, object]:
    values: dict[str, object] = {}
    for capture, tensor in zip(mod.captures, typing.cast("tuple[torch.Tensor, ...]", mod.tensors), strict=True):
        dense = tensor.contiguous()
        values[f"mod_{capture.name}_ptr"] = dense.view(torch.uint8) if dense.dtype is torch.bool else dense
        values |= {f"mod_{capture.name}_size{d}": size for d, size in enumerate(dense.shape)}
    assert list(values) == list(mod_arguments(mod, "mod_"))
    return values


def interpreted(mod: ModFunction, module: types.ModuleType, score: torch.Tensor, first: int = FIRST) -> torch.Tensor:
    out = torch.full((BLOCK, BLOCK), float("nan"))
    values = {"out_ptr": out, "score_ptr": score, "B": BATCH, "H": HEAD, "FIRST": first, **kernel_values(mod)}
    run_interpreted(module.kernel, (1,), {**values, "BLOCK": BLOCK})
    return out


def indices(first: int = FIRST) -> tuple[torch.Tensor, ...]:
    positions = torch.arange(first, first + BLOCK)
    return torch.tensor(BATCH), torch.tensor(HEAD), positions[:, None], positions[None, :]


def evaluated(mod: ModFunction, score: torch.Tensor, first: int = FIRST) -> torch.Tensor:
    b, h, q_idx, kv_idx = indices(first)
    given = score if mod.role == "score" else None
    return mod.evaluate(torch, score=given, b=b, h=h, q_idx=q_idx, kv_idx=kv_idx).expand(BLOCK, BLOCK)


@pytest.fixture(name="score")
def score_fixture() -> torch.Tensor:
    return torch.randn(BLOCK, BLOCK, generator=torch.Generator().manual_seed(1)) * 4


@pytest.mark.parametrize("name", MODS)
def test_kernel_and_evaluate_are_the_python_function(name: str, score: torch.Tensor, tmp_path: Path) -> None:
    function, role = MODS[name]
    mod = read_mod(function, role)
    found = interpreted(mod, load(mod, tmp_path, name), score)
    ours = evaluated(mod, score)
    if role == "mask":
        assert ours.dtype == torch.bool
        assert torch.equal(found, torch.where(ours, score, 1000.0)), mod
    else:
        assert ours.dtype == torch.float32
        torch.testing.assert_close(found, ours, rtol=1e-5, atol=1e-5)
    if name == "ternaries":
        return  # Python's own `a if c else b` takes one element at a time.
    arguments = indices() if role == "mask" else (score.clone(), *indices())
    theirs = torch.as_tensor(function(*arguments)).expand(BLOCK, BLOCK)
    torch.testing.assert_close(
        ours.float(), theirs.float(), rtol=2e-3 if name == "gated_relative_bias" else 1e-5, atol=1e-5
    )


@pytest.mark.filterwarnings("ignore:invalid value:RuntimeWarning")  # -inf * 0 where the kernel does not select it
@pytest.mark.parametrize("name", DERIVATIVES)
def test_derivatives_in_the_kernel_are_what_evaluate_and_autograd_find(
    name: str, score: torch.Tensor, tmp_path: Path
) -> None:
    mod = DERIVATIVES[name]
    found = interpreted(mod, load(mod, tmp_path, f"d_{name}"), score)
    assert found.isfinite().all()
    torch.testing.assert_close(found, evaluated(mod, score), rtol=1e-5, atol=1e-5)
    if name not in MODS:
        return
    leaf = score.double().requires_grad_()
    value = evaluated(read_mod(*MODS[name]), leaf)
    if value.requires_grad:
        (expected,) = torch.autograd.grad(value.sum(), leaf)
        torch.testing.assert_close(found.double(), expected, rtol=1e-4, atol=1e-5)
    else:
        assert not found.any()


def test_a_derivative_takes_every_captured_tensor() -> None:
    mod = read_mod(score_mods.alibi(SLOPES), "score")
    assert mod_arguments(derivative(mod), "score_") == mod_arguments(mod, "score_")
    assert mod_arguments(derivative(mod), "score_") == ("score_slopes_ptr", "score_slopes_size0")
    assert mod_lines(derivative(mod), "score_") == ("return tl.full(score.shape, 1.0, tl.float32)",)
    assert mod_lines(derivative(read_mod(score_mods.softcap(30), "score")), "") == (
        "value = 2 * tl.sigmoid(2 * (score / 30)) - 1",
        "return 1.0 - value * value",
    )


@pytest.mark.parametrize("name", [name for name, (function, role) in MODS.items() if read_mod(function, role).captures])
def test_captures_are_zero_past_their_end(name: str, score: torch.Tensor, tmp_path: Path) -> None:
    mod = read_mod(*MODS[name])
    found = interpreted(mod, load(mod, tmp_path, name), score, first=56)
    ours = evaluated(mod, score, first=56)
    expected = torch.where(ours, score, 1000.0) if mod.role == "mask" else ours
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)


def test_a_capture_with_no_element_is_zero(score: torch.Tensor, tmp_path: Path) -> None:
    empty = torch.zeros(0, 4)

    def biased(score: T, b: T, h: T, q: T, kv: T) -> T:
        return score + empty[q, h]

    mod = read_mod(biased, "score")
    assert torch.equal(interpreted(mod, load(mod, tmp_path, "empty"), score), score)
    assert torch.equal(evaluated(mod, score), score)


def test_evaluate_in_float64_and_with_gradients(score: torch.Tensor) -> None:
    wide = score.double().requires_grad_()
    mod = read_mod(score_mods.softcap(3.0), "score")
    found = evaluated(mod, wide)
    torch.testing.assert_close(found, 3 * torch.tanh(wide / 3), rtol=1e-14, atol=0)
    found.sum().backward()
    torch.testing.assert_close(wide.grad, 1 - torch.tanh(wide.detach() / 3) ** 2, rtol=1e-12, atol=1e-14)
    mixed = read_mod(functions, "score")
    assert evaluated(mixed, wide).dtype == torch.float64


def test_evaluate_takes_other_tensors_and_needs_them() -> None:
    mod = read_mod(document, "mask").without_tensors()
    b, h, q_idx, kv_idx = indices()
    with pytest.raises(InputError, match=r"needs its captured tensors \(DOCUMENTS\), got 0"):
        mod.evaluate(torch, b=b, h=h, q_idx=q_idx, kv_idx=kv_idx)
    one = mod.evaluate(torch, b=b, h=h, q_idx=q_idx, kv_idx=kv_idx, tensors=[torch.zeros(2, 64, dtype=torch.int32)])
    assert torch.equal(one, q_idx >= kv_idx)


def test_rendered_lines() -> None:
    assert mod_lines(read_mod(document, "mask"), "mask_") == (
        "inside = tl.where(b < mask_DOCUMENTS_size0, q_idx < mask_DOCUMENTS_size1, False)",
        "offset = b.to(tl.int64) * mask_DOCUMENTS_size1 + q_idx",
        "DOCUMENTS_q_idx = tl.load(mask_DOCUMENTS_ptr + offset, mask=inside, other=0)",
        "inside = tl.where(b < mask_DOCUMENTS_size0, kv_idx < mask_DOCUMENTS_size1, False)",
        "offset = b.to(tl.int64) * mask_DOCUMENTS_size1 + kv_idx",
        "DOCUMENTS_kv_idx = tl.load(mask_DOCUMENTS_ptr + offset, mask=inside, other=0)",
        "same = DOCUMENTS_q_idx == DOCUMENTS_kv_idx",
        "return same & (q_idx >= kv_idx)",
    )
    assert mod_arguments(read_mod(document, "mask"), "mask_") == (
        "mask_DOCUMENTS_ptr",
        "mask_DOCUMENTS_size0",
        "mask_DOCUMENTS_size1",
    )
    assert mod_lines(read_mod(score_mods.softcap(30), "score"), "") == (
        "return 30 * (2 * tl.sigmoid(2 * (score / 30)) - 1)",
    )


def test_a_variable_called_like_an_argument_gets_another_name() -> None:
    mod = parse_mod("mask_mod('m_x_size0 = q_idx + h; return x[m_x_size0] > m_x_size0', x='int32[any]')")
    assert mod_lines(mod, "m_") == (
        "m_x_size02 = q_idx + h",
        "inside = m_x_size02 < m_x_size0",
        "x_m_x_size02 = tl.load(m_x_ptr + m_x_size02, mask=inside, other=0)",
        "return x_m_x_size02 > m_x_size02",
    )


def test_helpers_only_where_an_operand_may_be_negative() -> None:
    assert division_helpers(read_mod(neighborhood, "mask")) == set()
    assert division_helpers(read_mod(dilated, "mask")) == {"floor_mod"}
    assert "distance = q_idx - kv_idx" in mod_lines(read_mod(dilated, "mask"), "")


@pytest.mark.parametrize("line_length", [88, 120])
def test_formatted_as_ruff_would(tmp_path: Path, line_length: int) -> None:
    for name, (function, role) in MODS.items():
        (tmp_path / f"{name}.py").write_text(module_source(read_mod(function, role)))
    for name, derived in DERIVATIVES.items():
        (tmp_path / f"d_{name}.py").write_text(module_source(derived))
    ruff = [sys.executable, "-m", "ruff"]
    options = ["--isolated", "--no-cache", f"--line-length={line_length}", str(tmp_path)]
    for command in ([*ruff, "format", "--check", "--diff"], [*ruff, "check"]):
        result = subprocess.run([*command, *options], capture_output=True, text=True, timeout=60, check=False)
        assert result.returncode == 0, result.stdout + result.stderr


COMPILED = {name: read_mod(*known) for name, known in MODS.items()} | {f"d_{n}": mod for n, mod in DERIVATIVES.items()}


@pytest.mark.parametrize("name", COMPILED)
def test_compiles_for_a_gpu(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path / "triton"))
    mod = COMPILED[name]
    kernel = load(mod, tmp_path, name).kernel
    signature = {"out_ptr": "*fp32", "score_ptr": "*fp32", "B": "i32", "H": "i32", "FIRST": "i32", "BLOCK": "constexpr"}
    constants: dict[str, int] = {"BLOCK": BLOCK}
    for capture in mod.captures:
        signature[f"mod_{capture.name}_ptr"] = POINTERS[capture.dtype]
        for dimension in range(len(capture.axes)):
            # Triton makes a constant of an argument that is 1.
            size = f"mod_{capture.name}_size{dimension}"
            one = dimension == 0 or "DOCUMENTS" in capture.name
            signature[size] = "constexpr" if one else "i32"
            constants |= {size: 1} if one else {}
    ordered = {argument: signature[argument] for argument in kernel.arg_names}
    source = ASTSource(fn=kernel, signature=ordered, constexprs=constants)
    compiled = triton_compile(source, target=GPUTarget("cuda", 90, 32), options={"enable_fp_fusion": True})
    assert "kernel" in compiled.asm["ptx"]
