"""Matrix operands are no wider than their tiles: four lanes share the summed dimension, and must all have some of it.

Triton takes the elements of a lane from the narrowest load behind an operand; where four lanes hold more than the tile
has, it compiles all the same and the products are wrong.
"""

from __future__ import annotations

import dataclasses
import re

import pytest

from flashgen.codegen import TritonBackwardConfig, TritonForwardConfig, render
from flashgen.codegen.constraints import check_config
from flashgen.compile import compile_kernel
from flashgen.spec import parse_problem
from flashgen.target import named_target

TARGET = named_target("sm_90")
# Products of single warps, which do not go through the instructions of whole warpgroups.
CONFIG = TritonForwardConfig(block_m=32, block_n=16, num_warps=1, num_stages=1, loads="descriptor")
SPECS = (
    "causal dropout bias=bool fp16",
    "causal dropout bias=bool:unaligned bf16",
    "causal dropout alibi sinks fp16",
    "full score_mod('return where(keep[kv_idx], score, score - 1.0)', keep='bool[kv_idx]') dropout bf16",
    "document bias=input bf16",
    "causal varlen fp8",
    "causal dropout bias=bool fp8",
    "causal dropout alibi bias=input score_mod('return where(keep[kv_idx], score, 0.0)', keep='bool[kv_idx]') fp8",
)
BACKWARD_SPECS = (
    "causal dropout bias=bool fp16",
    "causal bias=bool:unaligned bf16",
    "full score_mod('return where(keep[kv_idx], score, score - 1.0)', keep='bool[kv_idx]') dropout bf16",
    "document bias=input bf16",
)
_OPERAND = re.compile(r"tensor<(\d+)x(\d+)x\w+, #ttg\.dot_op<\{opIdx = (\d), parent = #\w+, kWidth = (\d+)\}>>")


@pytest.mark.parametrize("block_n", [16, 32])
@pytest.mark.parametrize("words", SPECS)
def test_lanes_share_the_summed_dimension(words: str, block_n: int) -> None:
    spec = parse_problem(f"h=1 s=1 d=64 {words}").spec
    config = dataclasses.replace(CONFIG, block_n=block_n)
    if check_config(config, spec, TARGET):
        # What is refused is never compiled; the wider tile must then be legal.
        assert block_n == 16
        return
    intermediate = compile_kernel(render(spec, config), spec.structure(), config, TARGET).entries[0].handle.asm["ttgir"]
    check_operands(intermediate)


def check_operands(intermediate: str) -> None:
    operands = _OPERAND.findall(intermediate)
    assert operands
    for rows, columns, index, width in operands:
        summed = rows if index == "1" else columns
        assert int(summed) >= 4 * int(width), f"{width} elements a lane of {summed}"


@pytest.mark.parametrize("words", BACKWARD_SPECS)
def test_lanes_share_the_summed_dimension_of_backward_products(words: str) -> None:
    spec = parse_problem(f"h=1 s=1 d=64 {words} backward").spec
    configs = [
        TritonBackwardConfig(block_m1=side, block_n1=side, num_warps=1, num_stages=1, dq="atomic") for side in (16, 32)
    ]
    smallest = next(config for config in configs if not check_config(config, spec, TARGET))
    compiled = compile_kernel(render(spec, smallest), spec.structure(), smallest, TARGET)
    check_operands(next(e for e in compiled.entries if e.name == "attn_bwd_dkdv").handle.asm["ttgir"])
