"""Rendered source to binary, for the GPU at hand or for a named architecture on a machine without one."""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import io
import typing

from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from triton.compiler import compile as triton_compile

from flashgen.codegen import (
    ForwardPlan,
    KernelConfig,
    KernelResources,
    RenderedKernel,
    argument_kind,
    constant_values,
)
from flashgen.codegen.arguments import element_type, scalar_type
from flashgen.compile.binary import amdgcn_resources, cubin_resources
from flashgen.compile.modules import load_kernel
from flashgen.errors import CompileError
from flashgen.spec import AttentionSpec
from flashgen.target import GpuTarget

# What compiled kernels assume of their arguments; who launches them must make sure.
POINTER_ALIGNMENT_BYTES = 16
STRIDE_ALIGNMENT = 8


@dataclasses.dataclass(frozen=True, kw_only=True)
class CompiledKernel:
    """A kernel built for one target.

    Attributes:
        handle: Triton's own compiled kernel, which loads itself on first launch.
        constants: values of the compile-time arguments, in the order of the signature.
        resources: what one program takes.
        binary_hash: equal for configs that compile to the same machine code.
    """

    handle: typing.Any
    constants: tuple[int, ...]
    resources: KernelResources
    binary_hash: str


def compile_kernel(
    rendered: RenderedKernel, spec: AttentionSpec, config: KernelConfig, target: GpuTarget
) -> CompiledKernel:
    """Return the kernel compiled for `target`; needs no GPU, and Triton's disk cache makes a second call cheap.

    The kernel assumes POINTER_ALIGNMENT_BYTES and STRIDE_ALIGNMENT of whoever launches it.

    Raises:
        CompileError: with Triton's message. Some inputs make the compiler abort the process instead: candidates
            that nobody has compiled before belong in a worker.
    """
    kernel = load_kernel(rendered)
    constants = constant_values(spec, config)
    plan = rendered.plan
    signature = {name: _argument_type(name, plan, spec, config) for name in plan.arguments}
    signature |= dict.fromkeys(plan.constants, "constexpr")
    options: dict[str, object] = {
        "num_warps": config.num_warps,
        "num_stages": config.num_stages,
        # Its default changes between Triton versions.
        "enable_fp_fusion": True,
    }
    if config.maxnreg:
        options["maxnreg"] = config.maxnreg
    source = ASTSource(kernel, signature, constexprs=constants, attrs=_alignment(plan, spec))
    arch: int | str = target.arch if target.backend == "hip" else target.capability
    try:
        # Where the assembler refuses a kernel, Triton prints all of it.
        with contextlib.redirect_stdout(io.StringIO()):
            handle = triton_compile(source, target=GPUTarget(target.backend, arch, target.warp_size), options=options)
    except Exception as error:
        raise CompileError(f"{config} for {target.arch}: {type(error).__name__}: {error}") from error
    return CompiledKernel(
        handle=handle,
        constants=tuple(constants[name] for name in plan.constants),
        resources=_resources(handle, target),
        binary_hash=hashlib.sha256(handle.kernel).hexdigest()[:16],
    )


def _resources(handle: typing.Any, target: GpuTarget) -> KernelResources:
    if target.backend == "hip":
        return amdgcn_resources(handle.asm["amdgcn"], handle.metadata.shared)
    return cubin_resources(handle.asm["cubin"], handle.metadata.shared)


def _argument_type(name: str, plan: ForwardPlan, spec: AttentionSpec, config: KernelConfig) -> str:
    kind = argument_kind(name)
    element = element_type(spec.dtype)
    if kind == "pointer":
        return f"*{dict(plan.pointer_types).get(name, element)}"
    if kind == "descriptor":
        if name.startswith("out"):
            element = element_type(spec.dtype.out)
        return f"tensordesc<{element}{list(descriptor_block(name, spec, config))}>"
    return scalar_type(kind)


def descriptor_block(name: str, spec: AttentionSpec, config: KernelConfig) -> tuple[int, int, int, int]:
    """Return the tile that the descriptor argument `name` moves, over [batch, heads, seqlen, head_dim]."""
    numbers = constant_values(spec, config)
    operand, suffix = descriptor_operand(name)
    rows = numbers["BLOCK_M"] if operand in ("q", "out") else numbers["BLOCK_N"]
    width = numbers[f"BLOCK_D{'QK' if operand in ('q', 'k') else 'V'}{suffix}"]
    return (1, 1, rows, width)


def descriptor_operand(name: str) -> tuple[str, str]:
    """Return the tensor behind the descriptor argument `name`, and the suffix of its tile of the head dimension."""
    operand = name.removesuffix("_desc")
    return operand.removesuffix("_1"), "_1" if operand.endswith("_1") else ""


_DENSE_POINTERS = ("q_ptr", "k_ptr", "v_ptr", "out_ptr")


def _alignment(plan: ForwardPlan, spec: AttentionSpec) -> dict[tuple[int], list[list[object]]]:
    # Head dimensions are multiples of 8, so strides of dense tensors are too: enough for 16-byte vectors of fp16.
    # Other tensors are small and may start anywhere; of a bias, the spec knows.
    bias = ("bias_ptr", "step_bz", "step_bh", "step_bm") if spec.bias != "none" and spec.bias_aligned else ()
    divisors: dict[tuple[int], list[list[object]]] = {}
    for index, name in enumerate(plan.arguments):
        if name in _DENSE_POINTERS or (name == "bias_ptr" and bias):
            divisors[(index,)] = [["tt.divisibility", POINTER_ALIGNMENT_BYTES]]
        elif argument_kind(name) == "stride" or name in bias:
            divisors[(index,)] = [["tt.divisibility", STRIDE_ALIGNMENT]]
    return divisors
