"""verify and bench of the decode phase."""

from __future__ import annotations

import dataclasses
import json
import typing
from collections.abc import Sequence

import pytest
import torch

from flashgen.cli.bench import show_comparisons
from flashgen.cli.comparison import OURS, Comparison
from flashgen.cli.configs import parse_config
from flashgen.cli.decode_comparison import compare_decoding
from flashgen.cli.decoding import DecodeCase
from flashgen.cli.machine import interpreter_finding
from flashgen.measure import DecodeCall, HostClock, decode_reference
from flashgen.measure.peers import Peer
from flashgen.spec import parse_problem

CONFIG = "triton/decode block_m=16 block_n=32 num_warps=2 num_stages=1"
PROBLEM = "b=2 hq=4 hkv=2 sq=1 sk=30 d=32 decode"
CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def _interpreter() -> None:
    finding = interpreter_finding()
    if finding.state != "ok":
        pytest.skip(finding.value)


def reference_peer(factor: float = 1.0) -> Peer:
    def make_decode(calls: Sequence[DecodeCall]) -> typing.Any:
        def run(call: DecodeCall) -> tuple[torch.Tensor, ...]:
            extras = call.extras
            out, _ = decode_reference(call.q, call.k, call.v, spec=call.problem.spec, extras=extras, precision="input")
            return (out * factor,)

        return tuple(lambda call=call: run(call) for call in calls)

    return Peer(name=f"times-{factor:g}", make=lambda *_: "of the decode phase alone", make_decode=make_decode)


def compared(words: str, *peers: Peer) -> Comparison:
    problem = parse_problem(f"{PROBLEM} {words}")
    config = parse_config(CONFIG, [problem])
    return compare_decoding(problem, peers, device=CPU, clock=HostClock(), target_ms=1, config=config)


@pytest.mark.parametrize("words", ["causal append rotary=halves fp16", "page=16 leftpad softcap bf16"])
def test_verify_decodes_in_the_interpreter(run: typing.Any, words: str) -> None:
    result = run("verify", "--shape", f"{PROBLEM} {words}", "--target", "sm_90", "--config", CONFIG, "--json")
    assert result.exit_code == 0, result.stderr
    (problem,) = json.loads(result.stdout)["problems"]
    assert len(problem["checks"]) >= 6
    assert all(check["ok"] and check["max_error"] <= check["allowed_error"] for check in problem["checks"])


def test_a_cache_that_is_left_wrong_fails_the_check() -> None:
    problem = parse_problem(f"{PROBLEM} append fp16")
    config = parse_config(CONFIG, [problem])
    assert config is not None
    case = DecodeCase.of(problem, CPU, ragged=True)

    def run() -> None:
        case.interpret(config)
        assert case.call.extras.cache_seqlens is not None
        case.call.v[0, 1, int(case.call.extras.cache_seqlens[0]), 3] += 1

    report = case.check(run)
    assert not report.ok
    assert report.reason.startswith("v cache")


def test_peers_decode_beside_flashgen_or_say_why_not() -> None:
    absent = Peer(name="gone", make=lambda *_: "gone")
    result = compared("causal fp16", reference_peer(), reference_peer(1.2), absent)
    assert set(result.timings) == {OURS, "times-1"}
    assert result.absent["times-1.2"].startswith("wrong result: out")
    assert result.absent["gone"] == "no adapter for decode"
    assert result.tbps(OURS) == pytest.approx(result.problem.min_bytes() / result.timings[OURS].median_us / 1e6)


def test_rates_of_decoding_are_shown_in_bytes(capsys: pytest.CaptureFixture[str]) -> None:
    show_comparisons([compared("fp16", reference_peer())])
    shown = capsys.readouterr().out
    assert "TB/s" in shown.split("fastest peer")[0]
    assert "TB/s" in shown.split("fastest peer")[1]


def test_a_chunk_that_products_bound_is_rated_by_them() -> None:
    few = compared("fp16", reference_peer())
    chunk = parse_problem("b=1 hq=64 hkv=8 sq=256 sk=131072 d=128 causal bf16 decode")
    assert few.rate(OURS).endswith(" TB/s")
    assert dataclasses.replace(few, problem=chunk).rate(OURS).endswith(" TFLOP/s")


@pytest.mark.gpu
def test_bench_times_decoding_as_graphs_replay_it(run: typing.Any) -> None:
    shape = "b=2 hq=16 hkv=4 sq=1 sk=2048 d=128 causal decode bf16"
    result = run("bench", "--shape", shape, "--peers", "cudnn,flash", "--ms", 5, "--json")
    assert result.exit_code == 0, result.stderr
    (problem,) = json.loads(result.stdout)["problems"]
    assert {OURS, "cudnn", "flash"} <= set(problem["timings"]), problem["absent"]
    # What H200 memory gives, with the room of a rounded datasheet.
    assert all(0 < timing["tbps"] < 10 for timing in problem["timings"].values())


@pytest.mark.gpu
@pytest.mark.parametrize(
    "words",
    ["causal bf16", "causal append rotary=pairs page=16 bf16", "leftpad batch_idx softcap sinks fp16",
     "fp8_kv descale page=64 bf16", "sliding_window(100,0) alibi fp16"],
)  # fmt: skip
def test_verify_decodes_on_the_gpu(run: typing.Any, words: str) -> None:
    result = run("verify", "--shape", f"b=4 hq=16 hkv=4 sq=3 sk=3000 d=128 decode {words}", "--json")
    assert result.exit_code == 0, result.stderr
    (problem,) = json.loads(result.stdout)["problems"]
    assert problem["checks"]
