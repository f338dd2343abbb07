"""Peers compute the same attention, and say why where they cannot run."""

from __future__ import annotations

import typing
import warnings
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from flashgen.measure import (
    AccuracyReport,
    GradientOracle,
    Gradients,
    accuracy_error,
    random_extras,
    random_inputs,
    random_output_gradients,
)
from flashgen.measure.autograd_calls import Run, algorithms, bind_attend
from flashgen.measure.peer import gpu_peer
from flashgen.measure.peers import PEERS, default_baselines
from flashgen.spec import Extras, Problem, parse_problem

PROBLEM = parse_problem("b=1 h=2 s=16 d=16 causal fp16")
BACKWARD = parse_problem("b=1 h=2 s=16 d=16 causal fp16 backward")
EXTRAS = random_extras(PROBLEM, device="cpu", seed=0)


@pytest.mark.parametrize("problem", [PROBLEM, BACKWARD], ids=["forward", "backward"])
@pytest.mark.parametrize("name", PEERS)
def test_a_peer_says_that_it_needs_a_gpu(name: str, problem: Problem) -> None:
    q, k, v = random_inputs(problem, device="cpu", seed=0)
    answer = PEERS[name].make(q, k, v, problem, EXTRAS)
    assert isinstance(answer, str)
    assert name in answer
    assert "GPU" in answer


def test_no_baseline_on_a_cpu() -> None:
    assert default_baselines("cpu") == ()


def test_baselines_are_peers() -> None:
    names = [peer.name for peer in default_baselines("cuda:0")]
    assert "flash" in names
    assert set(names) <= set(PEERS)


def on_a_gpu(shape: tuple[int, ...] = (1, 2, 16, 16)) -> Tensor:
    return typing.cast(Tensor, SimpleNamespace(is_cuda=True, device=torch.device("cuda"), shape=shape))


def test_a_peer_gives_its_name_with_its_reason() -> None:
    peer = gpu_peer("other", lambda problem, extras, device: f"has no mask {problem.spec.mask} on {device}")
    assert peer.make(on_a_gpu(), on_a_gpu(), on_a_gpu(), PROBLEM, EXTRAS) == "other: has no mask causal on cuda"


def test_what_a_peer_raises_is_a_reason_with_what_it_warned_of() -> None:
    def bind(problem: Problem, extras: Extras, device: torch.device) -> str:
        warnings.warn("other kernel not used because:", stacklevel=1)
        warnings.warn("other was runtime disabled. (Triggered internally)", stacklevel=1)
        warnings.warn("Expected a head dimension of 8. (Triggered internally)", stacklevel=1)
        raise RuntimeError("\nno kernel\nat line 7")

    answer = gpu_peer("other", bind).make(on_a_gpu(), on_a_gpu(), on_a_gpu(), PROBLEM, EXTRAS)
    assert answer == "other: no kernel Expected a head dimension of 8."


CASES = {
    "causal": "b=2 h=4 s=256 d=64 causal bf16",
    "grouped": "b=1 hq=8 hkv=2 sq=192 sk=320 d=128 full fp16",
    "bottom right": "b=2 h=4 sq=100 sk=260 d=64 causal bf16",
    "float32": "b=1 h=2 s=64 d=64 causal fp32",
    "window": "b=2 hq=4 hkv=2 s=256 d=64 sliding_window(60,0) bf16",
}
REFUSED = {
    ("cudnn", "bottom right"),
    ("cudnn", "float32"),
    ("cudnn", "window"),
    ("flash", "float32"),
    ("efficient", "grouped"),
    ("efficient", "window"),
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
    (out,) = run()
    report = accuracy_error(out, None, q, k, v, spec=problem.spec, extras=extras)
    assert report.ok, f"{name}: {report.reason}"


@pytest.mark.gpu
@pytest.mark.parametrize("words", ["causal", "full", "sliding_window(60,0)"])
@pytest.mark.parametrize("name", ["flash", "flex"])
def test_packed_sequences_agree_with_the_reference(name: str, words: str) -> None:
    problem = parse_problem(f"b=4 hq=4 hkv=2 s=200 d=64 {words} varlen bf16")
    q, k, v = random_inputs(problem, device="cuda", seed=0)
    extras = random_extras(problem, device="cuda", seed=0)
    run = PEERS[name].make(q, k, v, problem, extras)
    assert not isinstance(run, str), run
    (out,) = run()
    report = accuracy_error(out, None, q, k, v, spec=problem.spec, extras=extras)
    assert report.ok, f"{name}: {report.reason}"


FLEX_CASES = (
    "b=2 hq=4 hkv=2 s=256 d=64 sliding_window(60,0) bf16",
    "b=2 hq=4 hkv=2 s=256 d=64 causal&document bf16",
    "b=2 h=4 sq=100 sk=260 d=64 global_tokens(20)|sliding_window(30,30) bf16",
    "b=2 hq=4 hkv=2 s=256 d=64 causal softcap alibi bias=input bf16",
    "b=2 hq=4 hkv=2 s=256 d=64 sliding_window(60,0) sinks bf16",
)


@pytest.mark.gpu
@pytest.mark.parametrize("text", FLEX_CASES)
def test_flex_computes_the_features_too(text: str) -> None:
    problem = parse_problem(text)
    q, k, v = random_inputs(problem, device="cuda", seed=0)
    extras = random_extras(problem, device="cuda", seed=0)
    run = PEERS["flex"].make(q, k, v, problem, extras)
    assert not isinstance(run, str), run
    (out,) = run()
    report = accuracy_error(out, None, q, k, v, spec=problem.spec, extras=extras)
    assert report.ok, report.reason


def causal_sdpa(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return F.scaled_dot_product_attention(q, k, v, is_causal=True)


def judged_gradients(problem: Problem, run: Run, q: Tensor, k: Tensor, v: Tensor, extras: Extras) -> AccuracyReport:
    dq, dk, dv = run()
    dout = random_output_gradients(problem, device=q.device, seed=0)
    got = Gradients(dq=dq, dk=dk, dv=dv)
    return GradientOracle(q, k, v, dout, spec=problem.spec, extras=extras).judge(got)


@pytest.mark.parametrize("words", ["", "deterministic"])
def test_a_backward_call_gives_the_gradients_every_time(words: str) -> None:
    problem = parse_problem(f"{BACKWARD} {words}")
    q, k, v = random_inputs(problem, device="cpu", seed=0)
    run = bind_attend(causal_sdpa, q, k, v, problem)
    assert judged_gradients(problem, run, q, k, v, EXTRAS).ok
    assert all(map(torch.equal, run(), run()))
    assert not q.requires_grad


def test_the_forward_of_a_training_step_runs_under_autograd() -> None:
    needed: list[bool] = []

    def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        needed.append(q.requires_grad)
        return causal_sdpa(q, k, v)

    q, k, v = random_inputs(PROBLEM, device="cpu", seed=0)
    (plain,) = bind_attend(attend, q, k, v, PROBLEM)()
    (with_lse,) = bind_attend(attend, q, k, v, parse_problem(f"{PROBLEM} lse"))()
    assert needed == [False, True]
    assert torch.equal(plain, with_lse)
    assert not with_lse.requires_grad


@pytest.mark.parametrize("warn_only", [False, True])
def test_deterministic_algorithms_are_put_back(warn_only: bool) -> None:
    before = torch.are_deterministic_algorithms_enabled(), torch.is_deterministic_algorithms_warn_only_enabled()
    torch.use_deterministic_algorithms(warn_only, warn_only=warn_only)
    try:
        with algorithms(deterministic=True):
            assert torch.are_deterministic_algorithms_enabled()
            assert not torch.is_deterministic_algorithms_warn_only_enabled()
            assert not torch.utils.deterministic.fill_uninitialized_memory
        assert torch.are_deterministic_algorithms_enabled() == warn_only
        assert torch.is_deterministic_algorithms_warn_only_enabled() == warn_only
        assert torch.utils.deterministic.fill_uninitialized_memory
    finally:
        torch.use_deterministic_algorithms(before[0], warn_only=before[1])


def test_a_problem_that_may_differ_from_run_to_run_changes_no_setting() -> None:
    with algorithms(deterministic=False):
        assert not torch.are_deterministic_algorithms_enabled()


@pytest.mark.gpu
@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("name", ["cudnn", "flash", "efficient", "flex"])
def test_gradients_of_peers_agree_with_the_reference_or_refuse(name: str, case: str) -> None:
    problem = parse_problem(f"{CASES[case]} backward")
    q, k, v = random_inputs(problem, device="cuda", seed=0)
    extras = random_extras(problem, device="cuda", seed=0)
    run = PEERS[name].make(q, k, v, problem, extras)
    if (name, case) in REFUSED:
        assert isinstance(run, str)
        assert name in run
        return
    assert not isinstance(run, str), run
    report = judged_gradients(problem, run, q, k, v, extras)
    assert report.ok, f"{name}: {report.reason}"


@pytest.mark.gpu
@pytest.mark.parametrize("text", FLEX_CASES)
def test_flex_differentiates_the_features_too(text: str) -> None:
    problem = parse_problem(f"{text} backward")
    q, k, v = random_inputs(problem, device="cuda", seed=0)
    extras = random_extras(problem, device="cuda", seed=0)
    run = PEERS["flex"].make(q, k, v, problem, extras)
    assert not isinstance(run, str), run
    report = judged_gradients(problem, run, q, k, v, extras)
    assert report.ok, report.reason


@pytest.mark.gpu
@pytest.mark.parametrize("name", ["cudnn", "flash", "efficient", "flex"])
def test_deterministic_gradients_are_equal_in_their_bits_or_refused(name: str) -> None:
    problem = parse_problem("b=2 h=4 s=1024 d=64 causal bf16 backward deterministic")
    q, k, v = random_inputs(problem, device="cuda", seed=0)
    extras = random_extras(problem, device="cuda", seed=0)
    run = PEERS[name].make(q, k, v, problem, extras)
    if isinstance(run, str):
        # PyTorch asks cuDNN for no deterministic backward pass.
        assert name == "cudnn", run
        return
    first = run()
    assert all(all(map(torch.equal, first, run())) for _ in range(5))
