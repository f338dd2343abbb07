"""Compiling as a task for another process: plain values in and out."""

from __future__ import annotations

import dataclasses
import time

from flashgen.codegen import KernelConfig, KernelResources, render
from flashgen.compile.compiler import compile_kernel
from flashgen.spec import AttentionSpec
from flashgen.target import GpuTarget


@dataclasses.dataclass(frozen=True, kw_only=True)
class CompileReport:
    """What a compilation gave; the binary itself stays in Triton's disk cache, where the next process finds it.

    Attributes:
        resources: what one program takes.
        binary_hash: equal for equal machine code.
        seconds: how long it took.
    """

    resources: KernelResources
    binary_hash: str
    seconds: float


def compile_job(spec: AttentionSpec, config: KernelConfig, target: GpuTarget) -> CompileReport:
    """Return the report on one config.

    Raises:
        CompileError: if Triton refuses it.
    """
    start = time.perf_counter()
    compiled = compile_kernel(render(spec, config), spec, config, target)
    return CompileReport(
        resources=compiled.resources, binary_hash=compiled.binary_hash, seconds=time.perf_counter() - start
    )
