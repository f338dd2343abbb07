"""A compiler with a disk cache of its own: what one test compiled, the next finds."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator

import pytest

from flashgen.codegen import TritonForwardConfig, render
from flashgen.compile import CompiledKernel, compile_kernel
from flashgen.spec import AttentionSpec, DType, causal
from flashgen.target import named_target

Build = Callable[..., CompiledKernel]


@pytest.fixture(scope="session", autouse=True)
def _own_triton_cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TRITON_CACHE_DIR", str(tmp_path_factory.mktemp("triton")))
        yield


@functools.cache
def _build(
    arch: str,
    dtype: str = "fp16",
    *,
    loads: str = "pointer",
    block_m: int = 64,
    block_n: int = 32,
    num_warps: int = 4,
    num_stages: int = 2,
    maxnreg: int = 0,
    head_group: int = 1,
) -> CompiledKernel:
    spec = AttentionSpec(dtype=DType(dtype), head_dim_qk=64, head_dim_v=64, mask=causal(), lse=True)
    config = TritonForwardConfig(
        block_m=block_m,
        block_n=block_n,
        num_warps=num_warps,
        num_stages=num_stages,
        maxnreg=maxnreg,
        loads=loads,  # type: ignore[arg-type]
        head_group=head_group,
    )
    return compile_kernel(render(spec, config), spec, config, named_target(arch))


@pytest.fixture
def build() -> Build:
    """A function that compiles a small kernel (D=64, causal, lse) once a session."""
    return _build
