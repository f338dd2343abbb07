"""The kernels for Hopper, built without one: what its programs take, and the instructions that it is for."""

from __future__ import annotations

import dataclasses
import functools
import re

import pytest
import triton

from flashgen.codegen import HopperDecodeConfig, HopperForwardConfig, KernelConfig, render
from flashgen.codegen.constraints import check_config
from flashgen.codegen.hopper_config import HopperConfig, Release
from flashgen.codegen.hopper_constraints import shared_memory_lower_bound
from flashgen.compile import CompiledKernel, compile_kernel
from flashgen.primitives import hopper
from flashgen.search_space import load_space
from flashgen.spec import parse_problem
from flashgen.target import named_target

H200 = named_target("sm_90")
BASE = HopperForwardConfig(consumers=2, block_n=128, num_warps=4, num_stages=2)
DECODE = HopperDecodeConfig(consumers=2, block_n=128, num_warps=4, num_stages=2)
KERNELS: dict[str, tuple[str, HopperConfig]] = {
    "turns": ("d=128 full bf16", dataclasses.replace(BASE, queries="registers", turns="alternate")),
    "packed": ("d=64 causal varlen fp16 lse", dataclasses.replace(BASE, consumers=3, tiles="overlap")),
    "wide": (
        "d=192 dv=96 sliding_window(127,0) bf16",
        dataclasses.replace(BASE, block_n=64, convert="late", rescale=8, out_buffer="half", loops="single"),
    ),
    "table": ("d=64 document softcap sinks bf16", dataclasses.replace(BASE, consumers=1, programs=2, block_n=64)),
    "heads": ("d=64 sliding_window(100,30) bf16 lse", dataclasses.replace(BASE, block_n=64, pack="heads")),
    "named": (
        "d=128 causal bf16",
        dataclasses.replace(BASE, convert="held", release="named"),
    ),
    "scores": (
        "d=32 causal alibi score_mod('return score * 2.0 + w[h]', w='float32[h]') bf16",
        dataclasses.replace(BASE, diagonal="half", out_buffer="queries"),
    ),
    "chunk": (
        "d=128 causal lse bf16 decode",
        dataclasses.replace(DECODE, queries="registers", num_stages=3, release="named"),
    ),
    "chunk in pages": (
        "d=192 dv=96 sliding_window(100,0) page=128 sinks fp16 decode",
        dataclasses.replace(DECODE, block_n=64, rescale=8, loops="single"),
    ),
    "chunk in small pages": ("d=192 dv=96 causal page=16 fp16 decode", dataclasses.replace(DECODE, block_n=64)),
    "chunk that is appended": ("d=64 causal append rotary=halves page=64 bf16 decode", DECODE),
}
# Of a thread. ptxas keeps a few values of the code around the loops in memory, and none of the loops'.
MOST_SPILLS = 64


# Each takes seconds, and several tests look at one.
@functools.cache
def _compile(words: str, config: KernelConfig) -> CompiledKernel:
    spec = parse_problem(f"h=1 s=1 {words}").spec
    assert check_config(config, spec, H200) == ()
    return compile_kernel(render(spec, config), spec.structure(), config, H200)


@pytest.mark.parametrize("name", KERNELS)
def test_compiles_for_an_absent_gpu(name: str) -> None:
    words, config = KERNELS[name]
    compiled = _compile(words, config)
    handle = compiled.entries[-1].handle
    resources = compiled.resources
    spec = parse_problem(f"h=1 s=1 {words}").spec
    bound = shared_memory_lower_bound(config, spec)
    assert bound <= resources.smem_bytes <= min(bound + 512, H200.smem_bytes)
    # What every thread starts with, before the roles take theirs.
    assert resources.registers == config.launch_options(compiled.entries[-1].name).maxnreg
    # Each consumer is a warpgroup, and the producer takes the place of one.
    assert handle.metadata.num_warps == 4 * (config.consumers + 1)
    ptx = handle.asm["ptx"]
    assert "wgmma.mma_async" in ptx
    assert f"cp.async.bulk.tensor.{5 if spec.varlen else 4}d.shared" in ptx
    if spec.phase == "decode":
        # Caches end each sequence at its own last key; rows are written as they are.
        assert "cp.async.bulk.tensor.5d.shared" in ptx
        assert not re.search(r"cp\.async\.bulk\.tensor\.\dd\.global", ptx)
    else:
        assert f"cp.async.bulk.tensor.{5 if spec.varlen else 4}d.global" in ptx
    consumer, producer = config.role_registers
    taken = {int(number) for number in re.findall(r"setmaxnreg\.\w+\.sync\.aligned\.u32\s+(\d+)", ptx)}
    # The first consumer gets what the others leave.
    assert taken >= ({consumer, producer} if config.consumers > 1 else {producer})
    # Later versions of Triton than 3.6 spill more of what merging takes.
    of_merging = 0 if spec.phase == "forward" or triton.__version__.startswith("3.6.") else 2 * MOST_SPILLS
    assert resources.spills <= 2 * MOST_SPILLS + of_merging


@pytest.mark.skipif(
    not triton.__version__.startswith("3.6."), reason="the seeds were chosen with Triton 3.6, others allocate otherwise"
)
def test_seeds_for_a_diagonal_keep_their_registers() -> None:
    words = "d=128 causal bf16"
    spec = parse_problem(f"h=1 s=1 {words}").spec
    seeds = load_space("gluon/hopper_forward").legal(spec, H200).seeds
    # Those that are for no other mask. Run-time numbers share a kernel.
    kernels = {
        dataclasses.replace(seed, head_group=1, tail_heads=0)
        for seed in seeds
        if isinstance(seed, HopperForwardConfig) and seed.diagonal == "half"
    }
    assert kernels
    spills = {str(config): _compile(words, config).resources.spills for config in sorted(kernels)}
    assert {config: spilt for config, spilt in spills.items() if spilt > MOST_SPILLS} == {}


@pytest.mark.parametrize("release", ["mbarrier", "named"])
def test_held_exponentials_are_not_after_the_wait(release: Release) -> None:
    config = dataclasses.replace(BASE, convert="held", release=release)
    sass = _compile("d=64 full bf16", config).entries[0].handle.asm["sass"]
    # In the loop, what stands between the wait for the scores, which leaves one product running, and that for all.
    beside = re.findall(r"DEPBAR\.LE gsb0, 0x1\b(.*?)DEPBAR\.LE gsb0, 0x0\b", sass, re.DOTALL)
    assert beside
    # One for each score of a thread: 64 rows x 128 keys over 128 threads.
    assert {text.count("MUFU.EX2") >= 64 for text in beside} == {True}


def test_named_barriers_are_those_that_triton_leaves() -> None:
    taken: set[int] = set()
    # Of each number of consumers.
    for name in ("table", "heads", "packed"):
        ptx = _compile(*KERNELS[name]).entries[0].handle.asm["ptx"]
        # One for the threads of each role, and one for all of the program; ours are in registers.
        taken |= set(map(int, re.findall(r"bar(?:rier)?\.sync\s+(\d+)", ptx)))
    assert {0, 1, 2} <= taken
    # A ring has four buffers at most.
    first = hopper.K_BUFFERS.value
    assert max(taken) < first
    assert hopper.V_BUFFERS.value == first + 4
