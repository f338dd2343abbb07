"""compile, verify, bench and doctor: what touches kernels."""

from __future__ import annotations

import dataclasses
import json
import typing
from pathlib import Path

import pytest
import torch

from flashgen.cli.bench import show_comparisons
from flashgen.cli.comparison import OURS, Comparison, compare
from flashgen.cli.configs import parse_config, short_config
from flashgen.cli.machine import interpreter_finding, quarantine_finding
from flashgen.codegen import HopperForwardConfig, TritonForwardConfig
from flashgen.errors import ConfigError
from flashgen.measure import AccuracyReport, HostClock, Rejected, attention_reference
from flashgen.measure.peers import Peer
from flashgen.spec import Extras, Problem, parse_problem
from flashgen.target import Software, named_target
from flashgen.tuning.quarantine import Quarantine, default_quarantine

SMALL = "b=1 hq=2 hkv=1 s=128 d=64 causal fp16"


def test_compile_writes_what_it_built(run: typing.Any, tmp_path: Path) -> None:
    result = run("compile", "--shape", SMALL, "--target", "sm_90", "--out", tmp_path / "build", "--json")
    assert result.exit_code == 0, result.stderr
    (kernel,) = json.loads(result.stdout)["kernels"]
    assert kernel["arch"] == "sm_90"
    assert 32 <= kernel["registers"] <= 255
    assert kernel["smem_bytes"] > 0
    files = {Path(name).suffix: Path(name) for name in kernel["files"]}
    assert set(files) == {".cubin", ".ptx", ".py"}
    assert files[".cubin"].stat().st_size == kernel["binary_bytes"]
    assert ".target sm_90" in files[".ptx"].read_text(encoding="utf-8")


@pytest.fixture
def interpreter() -> None:
    """Skip where this Triton and this NumPy cannot interpret: `flashgen doctor` says so too."""
    finding = interpreter_finding()
    if finding.state != "ok":
        pytest.skip(finding.value)


@pytest.mark.usefixtures("interpreter")
def test_verify_interprets_without_a_gpu(run: typing.Any) -> None:
    config = "block_m=32 block_n=32 num_warps=2 num_stages=1"
    result = run("verify", "--shape", SMALL, "--target", "sm_90", "--config", config, "--json")
    assert result.exit_code == 0, result.stderr
    document = json.loads(result.stdout)
    assert document["where"] == "interpreter"
    (problem,) = document["problems"]
    assert len(problem["checks"]) >= 6
    assert all(check["ok"] and check["max_error"] <= check["allowed_error"] for check in problem["checks"])


GLUON = "gluon/hopper_forward consumers=2 block_n=64 num_warps=4 num_stages=2"


def test_verify_leaves_unchecked_what_only_a_gpu_runs_and_says_so(run: typing.Any) -> None:
    words = ("verify", "--shape", SMALL, "--target", "H200", "--config", GLUON)
    result = run(*words)
    assert result.exit_code == 0, result.stderr
    assert "not checked" in result.stdout
    assert f"not checked: {parse_problem(SMALL)}: gluon/hopper_forward is written in Gluon" in result.stderr
    assert "--device cuda" in result.stderr
    (problem,) = json.loads(run(*words, "--json").stdout)["problems"]
    assert problem["checks"] == []
    assert "needs a GPU" in problem["unchecked"]


@pytest.mark.usefixtures("interpreter")
def test_verify_checks_the_rest_beside_what_it_cannot(run: typing.Any) -> None:
    portable = SMALL.replace("causal", "causal dropout").replace("s=128", "s=32")
    result = run("verify", "--shape", SMALL, "--shape", portable, "--target", "H200", "--json")
    assert result.exit_code == 0, result.stderr
    gluon, triton = json.loads(result.stdout)["problems"]
    assert gluon["unchecked"]
    assert triton["unchecked"] is None
    assert triton["checks"]
    assert all(check["ok"] for check in triton["checks"])


def test_kernels_for_hopper_are_emitted_and_compiled_without_a_gpu(run: typing.Any, tmp_path: Path) -> None:
    result = run("emit", "--shape", SMALL, "--target", "H200", "--config", GLUON)
    assert result.exit_code == 0, result.stderr
    assert "from triton.experimental import gluon" in result.stdout
    words = ("--shape", SMALL, "--target", "H200", "--config", GLUON, "--out", tmp_path / "build")
    result = run("compile", *words, "--json")
    assert result.exit_code == 0, result.stderr
    (kernel,) = json.loads(result.stdout)["kernels"]
    assert kernel["config"]["template"] == "gluon/hopper_forward"
    assert {Path(name).suffix for name in kernel["files"]} == {".cubin", ".ptx", ".py"}
    table = run("compile", "--shape", SMALL, "--target", "H200", "--config", GLUON).stdout
    assert "hopper 2x64 n64 s2" in table


def test_explain_names_the_template(run: typing.Any) -> None:
    result = run("explain", "--shape", SMALL, "--target", "H200")
    assert result.exit_code == 3
    assert "kernel    gluon/hopper_forward block_n=" in result.stdout
    assert "kernel    triton/forward block_m=" in run("explain", "--shape", SMALL, "--target", "B200").stdout


def test_a_config_may_be_of_any_template_of_the_phase() -> None:
    problems = [parse_problem(SMALL)]
    config = parse_config(
        f"{GLUON} queries=registers turns=alternate rescale=8 head_group=4 tail_heads=32 convert=late", problems
    )
    assert isinstance(config, HopperForwardConfig)
    assert short_config(config) == "hopper 2x64 n64 s2 registers alternate late rescale8 g4+32"
    assert parse_config(str(config), problems) == config
    several = dataclasses.replace(config, consumers=1, programs=2, turns="free", convert="early", rescale=0)
    assert short_config(dataclasses.replace(several, tail_heads=0)) == "hopper 1x64 n64 s2 p2 registers g4"
    others = dataclasses.replace(
        several, programs=1, out_buffer="half", diagonal="half", tiles="overlap", loops="single", head_group=1
    )
    assert short_config(others) == "hopper 1x64 n64 s2 registers out-half half overlap single g1+32"
    assert short_config(dataclasses.replace(config, pack="heads", tail_heads=0, turns="free")) == (
        "hopper 2x64 n64 s2 heads registers late rescale8 g4"
    )
    chunk = [parse_problem("hq=8 hkv=2 sq=64 sk=640 d=64 decode")]
    decoding = parse_config(f"{GLUON.replace('forward', 'decode')} pack=heads release=named min_blocks=4", chunk)
    assert decoding is not None
    assert short_config(decoding) == "hopper 2x64 n64 s2 heads named b4"
    assert parse_config(str(decoding), chunk) == decoding
    with pytest.raises(ConfigError, match="cannot run backward problems: they take triton/backward"):
        parse_config(GLUON, [parse_problem(f"{SMALL} backward")])
    with pytest.raises(ConfigError, match="cannot run forward problems: they take triton/forward or gluon/hopper"):
        parse_config(
            "triton/backward block_m1=32 block_n1=64 num_warps=4 num_stages=1 dq=atomic", [parse_problem(SMALL)]
        )


def test_verify_fails_on_wrong_numbers(run: typing.Any, monkeypatch: pytest.MonkeyPatch) -> None:
    def zeros(q: torch.Tensor, *_: torch.Tensor, problem: Problem, **__: object) -> tuple[torch.Tensor, torch.Tensor]:
        return torch.zeros_like(q), q.new_zeros(q.shape[:3], dtype=torch.float32)

    monkeypatch.setattr("flashgen.cli.checking.interpret_forward", zeros)
    result = run("verify", "--shape", SMALL, "--target", "sm_80")
    assert result.exit_code == 1
    assert "FAILED" in result.stdout
    assert f"failed: {parse_problem(SMALL)} at " in result.stderr


@pytest.mark.skipif(torch.cuda.is_available(), reason="torch.cuda.is_available() is True")
@pytest.mark.parametrize("arguments", [("bench",), ("bench", "--device", "cuda:0"), ("verify", "--device", "cuda:0")])
def test_without_a_gpu_the_answer_is_one_sentence(run: typing.Any, arguments: tuple[str, ...]) -> None:
    result = run(*arguments, "--shape", SMALL)
    assert result.exit_code == 1
    assert result.stderr.startswith("error: ")
    assert "no" in result.stderr
    assert result.stdout == ""


def compared(*peers: Peer) -> Comparison:
    problem = parse_problem(SMALL)
    return compare(problem, peers, device=torch.device("cpu"), clock=HostClock(), target_ms=1)


def reference_peer(factor: float) -> Peer:
    def make(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, problem: Problem, extras: Extras) -> typing.Any:
        scaled = dataclasses.replace(extras, softmax_scale=factor * extras.softmax_scale)
        return lambda: attention_reference(q, k, v, spec=problem.spec, extras=scaled, precision="input")[:1]

    return Peer(name=f"times-{factor:g}", make=make)


def test_compare_times_the_right_and_refuses_the_wrong() -> None:
    absent = Peer(name="gone", make=lambda q, k, v, problem, extras: "gone is not installed")
    result = compared(reference_peer(1.0), reference_peer(2.0), absent)
    assert set(result.timings) == {OURS, "times-1"}
    assert result.absent["gone"] == "gone is not installed"
    assert result.absent["times-2"].startswith("wrong result: out[")
    assert result.accuracy[OURS].ok


def test_comparisons_are_shown_in_lines(capsys: pytest.CaptureFixture[str]) -> None:
    show_comparisons([compared(reference_peer(1.0))])
    out, standings = capsys.readouterr().out.split("fastest peer")
    assert "times-1" in standings
    assert sum("times-1" in line for line in out.splitlines()) == 1
    assert "1.00x" in next(line for line in out.splitlines() if "(heuristic)" in line)


def test_comparisons_without_ours_can_be_shown(capsys: pytest.CaptureFixture[str]) -> None:
    good = compared(reference_peer(1.0))
    timings = {name: timing for name, timing in good.timings.items() if name != OURS}
    bad = AccuracyReport(max_error=float("inf"), allowed_error=0.1, ok=False, reason="NaN")
    show_comparisons(
        [
            Comparison(
                problem=good.problem,
                selection=good.selection,
                flops=good.flops,
                timings=timings,
                accuracy={**good.accuracy, OURS: bad},
                absent={OURS: "wrong result: NaN"},
                host_us={"choosing a kernel": 1.5},
            )
        ]
    )
    out = capsys.readouterr().out
    assert "choosing a kernel" in out
    assert "1.50" in out


@pytest.mark.gpu
def test_verify_on_a_gpu(run: typing.Any) -> None:
    result = run("verify", "--shape", SMALL, "--device", "cuda:0", "--json")
    assert result.exit_code == 0, result.stderr
    document = json.loads(result.stdout)
    assert document["where"] == "cuda:0"
    assert len(document["problems"][0]["checks"]) >= 7


@pytest.mark.gpu
def test_bench_on_a_gpu(run: typing.Any) -> None:
    result = run("bench", "--shape", SMALL, "--peers", "flash", "--ms", "5", "--host", "--json")
    assert result.exit_code == 0, result.stderr
    (problem,) = json.loads(result.stdout)["problems"]
    assert problem["timings"][OURS]["median_us"] > 0
    assert set(problem["timings"]) | set(problem["absent"]) == {OURS, "flash"}
    assert {"raw launch of the same kernel", "choosing a kernel"} <= set(problem["host_us"])


def test_doctor_finds_what_is_here(run: typing.Any, tuned: Path) -> None:
    result = run("doctor", "--registry", tuned, "--json")
    assert result.exit_code == 0, result.stdout
    document = json.loads(result.stdout)
    found = {finding["name"]: finding for finding in document["findings"]}
    assert found["torch"]["value"].startswith(torch.__version__.split("+")[0])
    assert found["compiler"]["state"] == "ok"
    assert found["quarantine"]["value"].endswith("quarantine.json)")
    assert found["registry (argument)"]["value"].startswith("1 entries")


def test_doctor_counts_what_is_quarantined(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("FLASHGEN_CACHE", str(tmp_path))
    assert quarantine_finding().value.startswith("no config hung or killed a process")
    path, problem = default_quarantine(), parse_problem("b=1 hq=1 hkv=1 s=64 d=64 fp16")
    config = TritonForwardConfig(block_m=64, block_n=64, num_warps=4, num_stages=2)
    hung = Rejected(stage="run", reason="timeout: measuring process killed after 10 s")
    for driver in ("580.1", "590.1"):
        software = Software(flashgen="1", triton="3", torch="2", driver=driver)
        Quarantine(path, named_target("H200"), software).consider(problem, config, hung)
    found = quarantine_finding()
    assert found.value.startswith(f"2 kernels hung or killed a process; remembered in {path}")
    assert found.state == "note"
    path.write_text("{")
    assert "is not read" in quarantine_finding().value


def test_doctor_fails_where_something_is_missing(run: typing.Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("flashgen.cli.machine._NEEDED", {"torch": (99, 0), "no_such_module": (1, 0)})
    result = run("doctor")
    assert result.exit_code == 1
    assert "needs 99.0" in result.stdout
    assert "pip install no_such_module" in result.stdout
