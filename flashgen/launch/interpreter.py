"""The same rendered kernel on CPU tensors, through Triton's interpreter: for tests and for reading, not for speed."""

from __future__ import annotations

import dataclasses
import typing

import torch

from flashgen.codegen import KernelConfig, TritonDecodeConfig, render, templates_of
from flashgen.compile import load_kernel
from flashgen.errors import ConfigError, UnsupportedError
from flashgen.launch.backward import BackwardCall, layouts_of
from flashgen.launch.decode import decode_arguments
from flashgen.launch.forward import allocate_outputs, grid_size, kernel_arguments
from flashgen.launch.interpreted import run_interpreted
from flashgen.spec import DType, Extras, Problem

# Interpreted products of bf16 are wrong, of fp8 unknown to NumPy, and there is no matrix unit to round to tf32.
_WIDENED = (DType.BF16, DType.FP8, DType.TF32)
# Of the GPU that the interpreter stands for: few, so that programs have several units each, as on a GPU.
_INTERPRETED_SMS = 3


def interpret_forward(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, *, problem: Problem, config: KernelConfig, extras: Extras
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Return out and lse of the kernel that `config` renders to, computed on the CPU.

    bf16, fp8 and tf32 are computed in float32 and rounded at the end.

    Args:
        q, k, v: CPU tensors, seen as [batch, heads, seqlen, head_dim], or packed [tokens, heads, head_dim].

    Raises:
        UnsupportedError: for a config of a Gluon template, which has no interpreter, and where this Triton and this
            NumPy cannot interpret together.
    """
    spec = problem.spec
    if config.template.startswith("gluon/"):
        known = ", ".join(name for name in templates_of(spec.phase) if not name.startswith("gluon/"))
        raise UnsupportedError(
            f"kernels of {config.template} run on their GPU alone; the interpreter runs those of {known}"
        )
    if spec.dtype in _WIDENED:
        return _interpret_wide(q, k, v, problem=problem, config=config, extras=extras)
    rendered = render(spec, config)
    out, lse = allocate_outputs(q, spec)
    if out.numel() == 0:
        return out, lse
    tensors = {"q": q, "k": k, "v": v, "out": out} | ({"lse": lse} if lse is not None else {})
    arguments = kernel_arguments(rendered.plan, problem, config, extras, tensors)
    run_interpreted(load_kernel(rendered), (grid_size(problem.shape, config),), arguments)
    return out, lse


def interpret_backward(
    tensors: typing.Mapping[str, torch.Tensor], *, problem: Problem, config: KernelConfig, extras: Extras
) -> dict[str, torch.Tensor]:
    """Return dq, dk, dv and, where the spec asks for it, dbias of the kernels that `config` renders to.

    bf16 and tf32 are computed in float32 and rounded at the end; dbias is float32.

    Args:
        tensors: q, k, v, out, do and lse, and dlse where there is one, as `bind_backward` takes them, on the CPU; and
            dbias, of any content, where the spec asks for it: its sizes say how the bias is broadcast.

    Raises:
        UnsupportedError: where this Triton and this NumPy cannot interpret together.
    """
    dtype = problem.spec.dtype
    wide = dict(tensors)
    if dtype in _WIDENED:
        wide |= {name: tensors[name].float() for name in ("q", "k", "v", "out", "do")}
        bias = extras.bias.float() if extras.bias is not None and problem.spec.bias == "input" else extras.bias
        extras = dataclasses.replace(extras, bias=bias)
        problem = dataclasses.replace(problem, spec=dataclasses.replace(problem.spec, dtype=DType.FP32))
    gradients = {f"d{name}": torch.empty_like(wide[name]) for name in "qkv"}
    if "dbias" in tensors:
        gradients["dbias"] = torch.empty_like(tensors["dbias"])
    given = {**wide, **gradients}
    call = BackwardCall(problem, config, extras, layouts_of(given))
    given = call.with_scratch(given, extras)
    for entry in call.plan.entries:
        grid = call.grid(entry)
        if grid:
            run_interpreted(load_kernel(call.rendered, entry.name), (grid,), call.arguments(entry, given))
        call.after(entry.name, given)
    return {name: t if name == "dbias" else t.to(tensors[name[1:]].dtype) for name, t in gradients.items()}


def interpret_decode(
    tensors: typing.Mapping[str, torch.Tensor], *, problem: Problem, config: KernelConfig, extras: Extras
) -> None:
    """Fill out, lse and the appended rows of the caches with what the kernel that `config` renders to computes.

    bf16, tf32 and e4m3 caches are computed in float32 and rounded at the end.

    Args:
        tensors: as `bind_decode` takes them, on the CPU.

    Raises:
        ConfigError: if the config is not one of a decode kernel.
        UnsupportedError: where this Triton and this NumPy cannot interpret together.
    """
    if not isinstance(config, TritonDecodeConfig):
        raise ConfigError(f"template {config.template!r} has no decode kernel")
    given, spec = dict(tensors), problem.spec
    if spec.dtype in _WIDENED or spec.fp8_kv:
        wide = {name: t.float() for name, t in given.items() if name in ("q", "k", "v", "out")}
        if spec.shared_kv:
            wide["v"] = wide["k"][..., : spec.head_dim_v]
        cast = {
            name: value.float()
            for name in ("k_new", "v_new", "rotary_cos", "rotary_sin")
            if (value := getattr(extras, name)) is not None
        }
        spec = dataclasses.replace(spec, dtype=DType.FP32, fp8_kv=False, rotary_fp32=False)
        given, extras = {**given, **wide}, dataclasses.replace(extras, **cast)
    problem = dataclasses.replace(problem, spec=spec)
    # Nothing runs before or after it.
    config = dataclasses.replace(config, launch="plain")
    rendered = render(spec, config)
    grid, arguments = decode_arguments(rendered.plan, problem, config, extras, given, _INTERPRETED_SMS)
    if grid:
        run_interpreted(load_kernel(rendered), (grid,), arguments)
    for name in ("out", "k", "v") if spec.append else ("out",):
        if given[name] is not tensors[name]:
            tensors[name].copy_(given[name])


def _interpret_wide(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, *, problem: Problem, config: KernelConfig, extras: Extras
) -> tuple[torch.Tensor, torch.Tensor | None]:
    spec = problem.spec
    factors = (extras.q_descale, extras.k_descale, extras.v_descale) if spec.descale else (None, None, None)
    starts = (extras.cu_seqlens_q, extras.cu_seqlens_k, extras.cu_seqlens_k)
    q, k, v = (_scaled(t.float(), f, s) for t, f, s in zip((q, k, v), factors, starts, strict=True))
    bias = extras.bias
    if bias is not None and spec.bias == "input":
        bias = bias.float()
    wide = dataclasses.replace(spec, dtype=DType.FP32, descale=False)
    out, lse = interpret_forward(
        q,
        k,
        v,
        problem=dataclasses.replace(problem, spec=wide),
        config=config,
        extras=dataclasses.replace(extras, bias=bias),
    )
    return out.to(getattr(torch, spec.dtype.out.torch_name)), lse


def _scaled(tensor: torch.Tensor, factors: torch.Tensor | None, cu_seqlens: torch.Tensor | None) -> torch.Tensor:
    """Return a tensor times its factors [batch, nheads_kv], one for a group of heads."""
    if factors is None:
        return tensor
    factors = factors.repeat_interleave(tensor.shape[1] // factors.shape[1], 1)
    if cu_seqlens is None:
        return tensor * factors[:, :, None, None]
    tokens = factors.repeat_interleave(cu_seqlens.diff(), 0)
    # Tokens that no sequence owns are never read.
    scaled = tensor.clone()
    scaled[: len(tokens)] *= tokens[:, :, None]
    return scaled


def fill_unseen(out: torch.Tensor, lse: torch.Tensor | None) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Return the outputs of rows that see no key: out 0, lse -inf."""
    out.zero_()
    return out, (lse.fill_(float("-inf")) if lse is not None else None)
