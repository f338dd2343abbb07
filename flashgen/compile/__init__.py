"""From rendered source to binaries and what they cost; imports triton, never torch."""

from flashgen.compile.binary import amdgcn_resources, cubin_resources
from flashgen.compile.compiler import (
    POINTER_ALIGNMENT_BYTES,
    STRIDE_ALIGNMENT,
    CompiledEntry,
    CompiledKernel,
    compile_kernel,
    descriptor_dtype,
    descriptor_operand,
    shared_layout,
)
from flashgen.compile.job import CompileReport, compile_job
from flashgen.compile.modules import load_kernel, source_path

__all__ = [
    "POINTER_ALIGNMENT_BYTES",
    "STRIDE_ALIGNMENT",
    "CompileReport",
    "CompiledEntry",
    "CompiledKernel",
    "amdgcn_resources",
    "compile_job",
    "compile_kernel",
    "cubin_resources",
    "descriptor_dtype",
    "descriptor_operand",
    "load_kernel",
    "shared_layout",
    "source_path",
]
