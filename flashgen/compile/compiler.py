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
from triton.experimental.gluon import language as gl
from triton.experimental.gluon._runtime import GluonASTSource

from flashgen.codegen import (
    EntryPlan,
    KernelConfig,
    KernelResources,
    RenderedKernel,
    argument_kind,
    constant_values,
)
from flashgen.codegen.arguments import element_type, scalar_type
from flashgen.compile.binary import amdgcn_resources, cubin_resources
from flashgen.compile.modules import load_kernel
from flashgen.compile.stored import Recipe, binary_key, keep_kernel, stored_kernel
from flashgen.errors import CompileError
from flashgen.spec import AttentionSpec, DType
from flashgen.target import GpuTarget

# What compiled kernels assume of their arguments; who launches them must make sure.
POINTER_ALIGNMENT_BYTES = 16
STRIDE_ALIGNMENT = 8


@dataclasses.dataclass(frozen=True, kw_only=True)
class CompiledEntry:
    """One entry point built for one target.

    Attributes:
        name: of the `@triton.jit` function.
        handle: Triton's own compiled kernel, which loads itself on first launch.
        constants: values of the compile-time arguments, in the order of the signature.
        resources: what one program takes.
    """

    name: str
    handle: typing.Any
    constants: tuple[int, ...]
    resources: KernelResources


@dataclasses.dataclass(frozen=True, kw_only=True)
class CompiledKernel:
    """A rendered module built for one target.

    Attributes:
        entries: its entry points, in the order of the plan.
        binary_hash: equal for configs that compile to the same machine code.
    """

    entries: tuple[CompiledEntry, ...]
    binary_hash: str

    @property
    def resources(self) -> KernelResources:
        """The most that any of the entry points takes of each."""
        return KernelResources(
            registers=max(entry.resources.registers for entry in self.entries),
            spills=max(entry.resources.spills for entry in self.entries),
            smem_bytes=max(entry.resources.smem_bytes for entry in self.entries),
        )


def compile_kernel(
    rendered: RenderedKernel, spec: AttentionSpec, config: KernelConfig, target: GpuTarget
) -> CompiledKernel:
    """Return the module compiled for `target`; needs no GPU, and Triton's disk cache makes a second call cheap.

    The kernels assume POINTER_ALIGNMENT_BYTES and STRIDE_ALIGNMENT of whoever launches them.

    Raises:
        CompileError: with Triton's message. Some inputs make the compiler abort the process instead: candidates
            that nobody has compiled before belong in a worker.
    """
    entries = tuple(_compile_entry(entry, rendered, spec, config, target) for entry in rendered.plan.entries)
    binaries = hashlib.sha256(b"".join(entry.handle.kernel for entry in entries))
    return CompiledKernel(entries=entries, binary_hash=binaries.hexdigest()[:16])


def _compile_entry(
    entry: EntryPlan, rendered: RenderedKernel, spec: AttentionSpec, config: KernelConfig, target: GpuTarget
) -> CompiledEntry:
    constants = {name: value for name, value in constant_values(spec, config).items() if name in entry.constants}
    launch = config.launch_options(entry.name)
    options: dict[str, object] = {
        "num_warps": launch.num_warps,
        "num_stages": launch.num_stages,
        # Its default changes between Triton versions.
        "enable_fp_fusion": True,
    }
    if launch.maxnreg:
        options["maxnreg"] = launch.maxnreg
    signature = {name: _argument_type(name, entry, spec, constants) for name in entry.arguments}
    signature |= dict.fromkeys(entry.constants, "constexpr")
    arch: int | str = target.arch if target.backend == "hip" else target.capability
    recipe = Recipe(
        rendered=rendered,
        entry=entry.name,
        signature=signature,
        constants=constants,
        alignment=_alignment(entry, spec),
        options=options,
        target=GPUTarget(target.backend, arch, target.warp_size),
    )
    try:
        handle = _built(recipe, GluonASTSource if entry.language == "gluon" else ASTSource)
    except Exception as error:
        raise CompileError(f"{config} for {target.arch}: {type(error).__name__}: {error}") from error
    return CompiledEntry(
        name=entry.name,
        handle=handle,
        constants=tuple(constants[name] for name in entry.constants),
        resources=_resources(handle, target),
    )


def _built(recipe: Recipe, make_source: typing.Any) -> typing.Any:
    """Return Triton's compiled kernel: what an earlier process left, or a new one."""
    key = binary_key(recipe)
    stored = None if key is None else stored_kernel(key, recipe, make_source)
    if stored is not None:
        return stored
    kernel = load_kernel(recipe.rendered, recipe.entry)
    source = make_source(kernel, dict(recipe.signature), dict(recipe.constants), dict(recipe.alignment))
    # Where the assembler refuses a kernel, Triton prints all of it.
    with contextlib.redirect_stdout(io.StringIO()):
        handle = triton_compile(source, target=recipe.target, options=dict(recipe.options))
    if key is not None:
        keep_kernel(key, recipe, handle)
    return handle


def _resources(handle: typing.Any, target: GpuTarget) -> KernelResources:
    if target.backend == "hip":
        return amdgcn_resources(handle.asm["amdgcn"], handle.metadata.shared)
    return cubin_resources(handle.asm["cubin"], handle.metadata.shared)


def _argument_type(name: str, entry: EntryPlan, spec: AttentionSpec, constants: dict[str, int]) -> str:
    kind = argument_kind(name)
    if kind == "pointer":
        return f"*{dict(entry.pointer_types).get(name, element_type(spec.dtype))}"
    if kind == "descriptor":
        element = element_type(descriptor_dtype(name, spec))
        box = list(entry.box(name, constants))
        # Triton finds the layout of a tile itself, Gluon is told.
        layout = f",{shared_layout(box, descriptor_dtype(name, spec))!r}" if entry.language == "gluon" else ""
        return f"tensordesc<{element}{box}{layout}>"
    return scalar_type(kind)


def shared_layout(box: typing.Sequence[int], dtype: DType) -> typing.Any:
    """Return the layout in which Gluon kernels hold a descriptor's tile in shared memory."""
    return gl.NVMMASharedLayout.get_default_for(list(box), getattr(gl, dtype.torch_name))


def descriptor_dtype(name: str, spec: AttentionSpec) -> DType:
    """Return the elements behind a descriptor argument."""
    if name.startswith("dq"):
        # Added up over key tiles.
        return DType.FP32
    if name.startswith("out"):
        return spec.dtype.out
    return spec.kv_dtype if name[0] in "kv" else spec.dtype


def descriptor_operand(name: str) -> str:
    """Return the tensor behind the descriptor argument `name`."""
    return name.removesuffix("_desc").removesuffix("_1")


_DENSE = ("q", "k", "v", "out", "do", "dq", "dk", "dv", "k_new", "v_new", "partial", "q_turned")
_DENSE_POINTERS = frozenset(f"{name}_ptr" for name in _DENSE)


def _alignment(entry: EntryPlan, spec: AttentionSpec) -> dict[tuple[int], list[list[object]]]:
    # Head dimensions are multiples of 8, so strides of dense tensors are too: enough for 16-byte vectors of fp16.
    # Other tensors are small and may start anywhere; of a bias, the spec knows.
    bias = ("bias_ptr", "step_bz", "step_bh", "step_bm") if spec.bias != "none" and spec.bias_aligned else ()
    divisors: dict[tuple[int], list[list[object]]] = {}
    for index, name in enumerate(entry.arguments):
        if name in _DENSE_POINTERS or (name == "bias_ptr" and bias):
            divisors[(index,)] = [["tt.divisibility", POINTER_ALIGNMENT_BYTES]]
        elif argument_kind(name) == "stride" or name in bias:
            divisors[(index,)] = [["tt.divisibility", STRIDE_ALIGNMENT]]
    return divisors
