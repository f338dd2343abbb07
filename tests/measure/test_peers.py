"""Peers compute the same attention, and say why where they cannot run."""

from __future__ import annotations

import pytest

from flashgen.measure import accuracy_error, random_extras, random_inputs
from flashgen.measure.peers import PEERS, default_baselines
from flashgen.spec import parse_problem

PROBLEM = parse_problem("b=1 h=2 s=16 d=16 causal fp16")
EXTRAS = random_extras(PROBLEM, device="cpu", seed=0)


@pytest.mark.parametrize("name", PEERS)
def test_a_peer_says_that_it_needs_a_gpu(name: str) -> None:
    q, k, v = random_inputs(PROBLEM, device="cpu", seed=0)
    answer = PEERS[name].make(q, k, v, PROBLEM, EXTRAS)
    assert isinstance(answer, str)
    assert name in answer
    assert "GPU" in answer


def test_no_baseline_on_a_cpu() -> None:
    assert default_baselines("cpu") == ()


def test_baselines_are_peers() -> None:
    names = [peer.name for peer in default_baselines("cuda:0")]
    assert "flash" in names
    assert set(names) <= set(PEERS)


CASES = {
    "causal": "b=2 h=4 s=256 d=64 causal bf16",
    "grouped": "b=1 hq=8 hkv=2 sq=192 sk=320 d=128 full fp16",
    "bottom right": "b=2 h=4 sq=100 sk=260 d=64 causal bf16",
    "float32": "b=1 h=2 s=64 d=64 causal fp32",
}
REFUSED = {
    ("cudnn", "bottom right"),
    ("cudnn", "float32"),
    ("flash", "float32"),
    ("efficient", "grouped"),
}


@pytest.mark.gpu
@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("name", ["cudnn", "flash", "efficient", "flex"])
def test_peers_agree_with_the_reference_or_refuse(name: str, case: str) -> None:
    problem = parse_problem(CASES[case])
    q, k, v = random_inputs(problem, device="cuda", seed=0)
    extras = random_extras(problem, device="cuda", seed=0)
    run = PEERS[name].make(q, k, v, problem, extras)
    if (name, case) in REFUSED:
        assert isinstance(run, str)
        assert name in run
        return
    assert not isinstance(run, str), run
    report = accuracy_error(run(), None, q, k, v, spec=problem.spec, extras=extras)
    assert report.ok, f"{name}: {report.reason}"


FLEX_CASES = (
    "b=2 hq=4 hkv=2 s=256 d=64 sliding_window(60,0) bf16",
    "b=2 hq=4 hkv=2 s=256 d=64 causal&document bf16",
    "b=2 h=4 sq=100 sk=260 d=64 global_tokens(20)|sliding_window(30,30) bf16",
    "b=2 hq=4 hkv=2 s=256 d=64 causal softcap alibi bias=input bf16",
)


@pytest.mark.gpu
@pytest.mark.parametrize("text", FLEX_CASES)
def test_flex_computes_the_features_too(text: str) -> None:
    problem = parse_problem(text)
    q, k, v = random_inputs(problem, device="cuda", seed=0)
    extras = random_extras(problem, device="cuda", seed=0)
    run = PEERS["flex"].make(q, k, v, problem, extras)
    assert not isinstance(run, str), run
    report = accuracy_error(run(), None, q, k, v, spec=problem.spec, extras=extras)
    assert report.ok, report.reason
