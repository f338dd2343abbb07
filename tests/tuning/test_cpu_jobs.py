"""The check in the interpreter lets right gradients pass and catches a fault in any of them."""

from __future__ import annotations

import pytest
import torch

from flashgen.codegen import TritonBackwardConfig, TritonDecodeConfig
from flashgen.launch import interpret_backward, interpret_decode
from flashgen.measure import Rejected
from flashgen.spec import parse_problem
from flashgen.tuning import cpu_jobs

CONFIG = TritonBackwardConfig(
    block_m1=32, block_n1=64, num_warps=4, num_stages=1, block_m2=64, block_n2=32, num_warps2=4, num_stages2=1
)
ATOMIC = TritonBackwardConfig(block_m1=64, block_n1=32, num_warps=4, num_stages=1, dq="atomic")


def problem(words: str):
    return parse_problem(f"b=2 hq=4 hkv=2 s=4096 d=16 backward {words}")


@pytest.mark.parametrize(
    ("words", "config"),
    [
        ("causal bf16", CONFIG),
        ("full bias=input fp16", ATOMIC),
        ("sliding_window(50,9) varlen fp32", CONFIG),
        ("causal dropout softcap tf32", ATOMIC),
    ],
)
def test_right_gradients_pass(words, config):
    worst = cpu_jobs.check_interpreted(problem(words), config)
    assert not isinstance(worst, Rejected)
    assert 0 < worst[0] <= worst[1]


@pytest.mark.parametrize(
    ("name", "fault"),
    [("dq", "one element"), ("dk", "factor"), ("dv", "not written"), ("dbias", "one element"), ("dbias", "factor")],
)
def test_a_fault_in_any_gradient_is_caught(monkeypatch, name, fault):
    def faulty(*args, **kwargs):
        gradients = interpret_backward(*args, **kwargs)
        wrong = gradients[name]
        if fault == "one element":
            wrong.view(-1)[wrong.numel() // 2] += wrong.abs().max() / 2
        elif fault == "not written":
            wrong[..., -1, -1] = torch.nan
        else:
            wrong *= 1.1
        return gradients

    monkeypatch.setattr(cpu_jobs, "interpret_backward", faulty)
    rejected = cpu_jobs.check_interpreted(problem("causal bias=fp32 fp16"), CONFIG)
    assert isinstance(rejected, Rejected)
    assert rejected.stage == "accuracy"
    assert rejected.reason.startswith("in the interpreter at b=1 hq=2 hkv=1 sq=133 sk=261")
    assert f" {name}" in rejected.reason


DECODE = TritonDecodeConfig(block_m=16, block_n=32, num_warps=4, num_stages=1, loops="single", min_blocks=2)


def decoding(words: str):
    return parse_problem(f"b=16 hq=8 hkv=2 sq=1 sk=4096 d=16 decode {words}")


@pytest.mark.parametrize("words", ["bf16", "causal append rotary=halves fp16", "shared_kv fp32", "fp8_kv bf16"])
def test_right_decoding_passes(words):
    worst = cpu_jobs.check_interpreted(decoding(words), DECODE)
    assert not isinstance(worst, Rejected)
    assert 0 < worst[0] <= worst[1]


@pytest.mark.parametrize("name", ["out", "lse", "k", "v"])
def test_a_fault_in_decoding_is_caught(monkeypatch, name):
    def faulty(tensors, **kwargs):
        interpret_decode(tensors, **kwargs)
        wrong = tensors[name]
        wrong[(-1,) * wrong.dim()] = 30.0

    monkeypatch.setattr(cpu_jobs, "interpret_decode", faulty)
    rejected = cpu_jobs.check_interpreted(decoding("causal append fp16"), DECODE)
    assert isinstance(rejected, Rejected)
    assert rejected.reason.startswith("in the interpreter at b=3 hq=2 hkv=1 sq=1 sk=261")
    assert name in rejected.reason
