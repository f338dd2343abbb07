"""--phase: which problems it makes, which configs fit them, and the sums of a training step."""

from __future__ import annotations

import dataclasses
import json
import typing
from pathlib import Path

import pytest
import torch

import flashgen.tuning
from flashgen.cli.bench import show_comparisons, step_sums
from flashgen.cli.checking import check_interpreted
from flashgen.cli.comparison import OURS, Comparison, compare
from flashgen.cli.configs import parse_config, short_config
from flashgen.cli.machine import interpreter_finding
from flashgen.cli.problems import resolve_problems, training_steps
from flashgen.codegen import KernelConfig, TritonBackwardConfig, TritonDecodeConfig, render
from flashgen.dispatch import Selection
from flashgen.errors import ConfigError, InputError
from flashgen.measure import HostClock, Timing, gradient_reference, random_output_gradients
from flashgen.measure.peers import Peer
from flashgen.registry import RegistryEntry
from flashgen.spec import Extras, Problem, parse_problem
from flashgen.target import named_target
from flashgen.tuning.events import ProblemResult, TuneReport

MODEL = Path(__file__).parents[1] / "integrations" / "configs" / "llama-3-8b.json"
SMALL = "b=1 hq=2 hkv=1 s=64 d=32 causal fp16"
DECODE = "b=1 hq=2 hkv=1 sq=1 sk=64 d=32 full fp16 decode"
CHUNK = "b=1 hq=2 hkv=1 sq=8 sk=64 d=32 causal fp16"
TWO_KERNELS = "block_m1=32 block_n1=32 num_warps=2 num_stages=1 block_m2=32 block_n2=32 num_warps2=2 num_stages2=1"
ADDED = "block_m1=32 block_n1=64 num_warps=4 num_stages=2 dq=atomic"


def resolved(*shapes: str, phase: str | None = None, preset: str | None = None) -> list[str]:
    return list(map(str, resolve_problems(None, preset, shapes, phase=phase, seqlens="512")))


def texts(*lines: str) -> list[str]:
    return [str(parse_problem(line)) for line in lines]


@pytest.mark.parametrize(
    ("shape", "phase", "expected"),
    [
        (SMALL, None, [SMALL]),
        (SMALL, "forward", [SMALL]),
        (SMALL, "backward", [f"{SMALL} backward"]),
        (SMALL, "forward,backward", [f"{SMALL} lse", f"{SMALL} backward"]),
        (SMALL, "backward, forward", [f"{SMALL} lse", f"{SMALL} backward"]),
        (f"{SMALL} deterministic", "backward", [f"{SMALL} backward deterministic"]),
        (f"{SMALL} deterministic", "forward,backward", [f"{SMALL} lse", f"{SMALL} backward deterministic"]),
        (f"{SMALL} lse", "forward,backward", [f"{SMALL} lse", f"{SMALL} backward"]),
        # A text that names its phase keeps it.
        (f"{SMALL} backward", None, [f"{SMALL} backward"]),
        (f"{SMALL} backward", "forward,backward", [f"{SMALL} backward"]),
        (f"{SMALL} forward", "forward,backward", [f"{SMALL} forward"]),
        # Of one query over as many keys a causal mask hides nothing.
        (SMALL, "decode", [DECODE]),
        (SMALL, "decode,forward", [SMALL, DECODE]),
        (SMALL, "forward,backward,decode", [f"{SMALL} lse", f"{SMALL} backward", DECODE]),
        (f"{SMALL} deterministic", "backward,decode", [f"{SMALL} backward deterministic", DECODE]),
        (SMALL.replace("causal", "sliding_window(7,0)"), "decode", [DECODE.replace("full", "sliding_window(7,0)")]),
        # A text that says how many queries there are keeps them.
        (CHUNK, "decode", [f"{CHUNK} decode"]),
        (f"{CHUNK} lse page=16", "decode", [f"{CHUNK} lse page=16 decode"]),
        (f"{CHUNK} append rotary=pairs decode", None, [f"{CHUNK} append rotary=pairs decode"]),
    ],
)
def test_phases_of_a_shape(shape: str, phase: str | None, expected: list[str]) -> None:
    assert resolved(shape, phase=phase) == texts(*expected)


@pytest.mark.parametrize(
    ("shape", "phase", "said"),
    [
        (SMALL, "forward,sideways", "--phase takes forward, backward, decode or several"),
        (SMALL, "", "--phase takes forward, backward, decode or several"),
        (f"{SMALL} decode", "forward", "--phase asks for forward, the shape .* is decode"),
        (f"{SMALL} varlen", "decode", "the decode phase has no varlen"),
        (f"{SMALL} page=16", "forward,decode", "page_size: of the decode phase alone, got forward"),
        (f"{SMALL} backward", "forward", "--phase asks for forward, the shape .* is backward"),
        (f"{SMALL} forward", "backward", "is forward"),
        (f"{SMALL} lse", "backward", "lse is an output of the forward phase"),
        (f"{SMALL} deterministic", None, "belong to the backward phase"),
        ("b=1 h=2 s=64 d=32 fp8", "forward,backward", "fp8 has no backward phase"),
    ],
)
def test_phases_that_do_not_fit_are_refused(shape: str, phase: str | None, said: str) -> None:
    with pytest.raises(InputError, match=said):
        resolved(shape, phase=phase)


def test_phases_of_a_preset_come_in_pairs() -> None:
    quick = resolved(preset="quick")[0]
    assert resolved(preset="quick", phase="backward") == texts(quick.replace("forward", "backward"))
    both = resolved(preset="llama3-8b", phase="forward,backward")
    assert [text.split()[5] for text in both] == ["forward", "backward"] * 6
    assert all(text.endswith("lse") == ("forward" in text) for text in both)


def test_listed_problems_without_the_phase_are_skipped_and_named(capsys: pytest.CaptureFixture[str]) -> None:
    everything, backward = resolved(preset="more"), resolved(preset="more", phase="backward")
    skipped = [line for line in capsys.readouterr().err.splitlines() if line.startswith("skipped: ")]
    assert len(backward) + len(skipped) == len(everything)
    assert skipped
    assert all(" fp8" in line or "up to 256" in line for line in skipped)


def test_a_preset_decodes_its_next_tokens_and_one_of_decoding_does_nothing_else(
    capsys: pytest.CaptureFixture[str],
) -> None:
    (quick,) = resolved(preset="quick", phase="decode")
    assert quick == "b=1 hq=32 hkv=8 sq=1 sk=4096 decode d=128 full bf16"
    decode = resolved(preset="decode")
    assert resolved(preset="decode", phase="decode") == decode
    assert capsys.readouterr().err == ""
    with pytest.raises(InputError, match="none of these problems has the phase forward"):
        resolved(preset="decode", phase="forward")
    assert capsys.readouterr().err.count("decode problems have no forward phase") == len(decode)


def test_a_model_has_prefill_and_decoding() -> None:
    def of(phase: str | None) -> list[Problem]:
        return list(resolve_problems(MODEL, None, None, phase=phase, seqlens="4096"))

    forward, decode = of("forward"), of("decode")
    assert list(map(str, forward)) == texts("b=4 hq=32 hkv=8 s=4096 d=128 causal bf16")
    assert of(None) == [*forward, *decode]
    assert {problem.spec.phase for problem in decode} == {"decode"}
    assert [problem.spec.phase for problem in of("forward,backward")] == ["forward", "backward"]
    assert of("forward,backward")[0].spec.lse


def test_only_the_phases_of_one_problem_are_a_training_step() -> None:
    lines = [f"{SMALL} lse", f"{SMALL} backward deterministic", f"{SMALL} softcap backward", "b=2 h=2 s=64 d=32"]
    problems = [parse_problem(line) for line in lines]
    assert list(training_steps(problems)) == [(problems[0], problems[1])]


def test_a_config_is_of_the_template_of_the_phase() -> None:
    config = parse_config(TWO_KERNELS, [parse_problem(f"{SMALL} backward")])
    assert isinstance(config, TritonBackwardConfig)
    assert parse_config(str(config), [parse_problem(f"{SMALL} backward")]) == config
    assert short_config(config) == "32x32 w2 s1 dq 32x32 w2 s1 pointer"
    added = parse_config(ADDED, [parse_problem(f"{SMALL} backward")])
    assert added is not None
    assert short_config(added) == "32x64 w4 s2 dq atomic pointer"


def test_a_config_of_decoding_in_a_few_characters() -> None:
    plain = parse_config("block_m=16 block_n=64 num_warps=4 num_stages=3", [parse_problem(DECODE)])
    assert isinstance(plain, TritonDecodeConfig)
    assert short_config(plain) == "16x64 w4 s3 pointer p2"
    other = dataclasses.replace(
        plain, loads="descriptor", maxnreg=128, head_tiles=2, loops="single", launch="dependent", min_blocks=4
    )
    assert short_config(other) == "16x64 w4 s3 descriptor r128 h2 single dependent p2 b4"
    assert parse_config(str(other), [parse_problem(DECODE)]) == other


@pytest.mark.parametrize(
    ("text", "phase", "said"),
    [
        (TWO_KERNELS, "forward", "config of triton/forward: unknown fields"),
        ("block_m=64 block_n=64 num_warps=4 num_stages=2", "backward", "config of triton/backward: unknown fields"),
        (f"triton/backward {TWO_KERNELS}", "forward", "a config of triton/backward cannot run forward problems"),
        (TWO_KERNELS, "forward,backward", "--config is of one phase, the problems are backward and forward"),
        (f"{TWO_KERNELS} dq=both", "backward", "dq must be one of kernel, atomic, ordered"),
    ],
)
def test_a_config_of_another_phase_is_refused(text: str, phase: str, said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        parse_config(text, resolve_problems(None, None, [SMALL], phase=phase, seqlens="512"))


@pytest.mark.parametrize("command", ["explain", "emit", "compile", "verify", "tune"])
def test_an_unknown_phase_is_bad_usage_everywhere(run: typing.Any, command: str) -> None:
    result = run(command, "--shape", SMALL, "--phase", "forward,sideways")
    assert (result.exit_code, result.stdout) == (2, "")
    assert "'forward,sideways'" in result.stderr


def test_decoding_is_emitted_and_explained(run: typing.Any) -> None:
    shown = run("emit", "--shape", SMALL, "--phase", "decode", "--target", "H200")
    assert shown.exit_code == 0, shown.stderr
    assert "def attn_decode(" in shown.stdout
    told = run("explain", "--shape", DECODE, "--target", "H200", "--json")
    (selection,) = json.loads(told.stdout)["selections"]
    assert selection["config"]["template"] == "triton/decode"
    assert selection["problem"] == str(parse_problem(DECODE))


def test_emit_prints_the_backward_module(run: typing.Any) -> None:
    problem = parse_problem(f"{SMALL} backward")
    config = parse_config(TWO_KERNELS, [problem])
    assert config is not None
    result = run("emit", "--shape", SMALL, "--phase", "backward", "--target", "H200", "--config", TWO_KERNELS)
    assert result.exit_code == 0, result.stderr
    assert result.stdout == render(problem.spec, config).source
    compile(result.stdout, "kernel.py", "exec")


def test_compile_writes_every_entry_point(run: typing.Any, tmp_path: Path) -> None:
    words = ("--shape", SMALL, "--phase", "backward", "--target", "sm_90", "--config", TWO_KERNELS)
    result = run("compile", *words, "--out", tmp_path / "build", "--json")
    assert result.exit_code == 0, result.stderr
    (kernel,) = json.loads(result.stdout)["kernels"]
    names = [entry["entry_point"] for entry in kernel["entries"]]
    assert names == ["attn_bwd_delta", "attn_bwd_dkdv", "attn_bwd_dq"]
    assert kernel["registers"] == max(entry["registers"] for entry in kernel["entries"])
    files = [Path(name) for name in kernel["files"]]
    assert [path.suffix for path in files] == [".cubin", ".ptx"] * 3 + [".py"]
    sizes = {path.name.rsplit("_", 4)[0]: path.stat().st_size for path in files if path.suffix == ".cubin"}
    assert sizes == {entry["entry_point"]: entry["binary_bytes"] for entry in kernel["entries"]}


def selection_of(problem: Problem) -> Selection:
    config = parse_config(TWO_KERNELS, [problem])
    assert config is not None
    return Selection(problem=problem, target=named_target("sm_90"), config=config, rung="explicit")


@pytest.mark.parametrize("words", ["backward", "backward deterministic", "bias=input backward dbias"])
def test_verify_interprets_the_backward_pass(words: str) -> None:
    finding = interpreter_finding()
    if finding.state != "ok":
        pytest.skip(finding.value)
    checks = check_interpreted(selection_of(parse_problem(f"{SMALL} {words}")))
    assert len(checks) >= 6
    assert [check.report.reason for check in checks if not check.report.ok] == []


def test_verify_fails_on_wrong_gradients(monkeypatch: pytest.MonkeyPatch) -> None:
    def zeros(tensors: dict[str, torch.Tensor], **_: object) -> dict[str, torch.Tensor]:
        return {f"d{name}": torch.zeros_like(tensors[name]) for name in "qkv"}

    monkeypatch.setattr("flashgen.cli.gradients.interpret_backward", zeros)
    checks = check_interpreted(selection_of(parse_problem(f"{SMALL} backward")))
    assert not any(check.report.ok for check in checks if check.shape.seqlen_k > 1)


def gradients_of(problem: Problem, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, extras: Extras) -> typing.Any:
    dout = random_output_gradients(problem, device="cpu", seed=0)
    return gradient_reference(q, k, v, dout, spec=problem.spec, extras=extras, precision="input")


def reference_peer(factor: float) -> Peer:
    def make(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, problem: Problem, extras: Extras) -> typing.Any:
        found = gradients_of(problem, q, k, v, extras)
        return lambda: (found.dq * factor, found.dk, found.dv)

    return Peer(name=f"times-{factor:g}", make=make)


@pytest.fixture
def comparison(monkeypatch: pytest.MonkeyPatch) -> Comparison:
    """A comparison whose kernels are replaced by the reference, beside a right peer and a wrong one."""

    def bind(
        problem: Problem, config: KernelConfig, compiled: object, extras: Extras, tensors: dict[str, torch.Tensor]
    ) -> typing.Callable[[], None]:
        def call() -> None:
            found = gradients_of(problem, tensors["q"], tensors["k"], tensors["v"], extras)
            for name in ("dq", "dk", "dv"):
                tensors[name].copy_(getattr(found, name))

        return call

    monkeypatch.setattr("flashgen.cli.gradients.bind_backward", bind)
    monkeypatch.setattr("flashgen.cli.gradients.compiled_kernel", lambda *_: None)
    monkeypatch.setattr("flashgen.cli.comparison.choose", lambda problem, *_: selection_of(problem))
    problem, peers = parse_problem(f"{SMALL} backward"), (reference_peer(1.0), reference_peer(2.0))
    return compare(problem, peers, device=torch.device("cpu"), clock=HostClock(), target_ms=1, host=True)


def test_compare_judges_gradients(comparison: Comparison) -> None:
    assert set(comparison.timings) == {OURS, "times-1"}
    assert comparison.absent["times-2"].startswith("wrong result: dq[")
    assert set(comparison.host_us) == {OURS, "times-1"}
    assert comparison.flops == comparison.problem.flops()


def timed(comparison: Comparison, problem: Problem, **median_us: float) -> Comparison:
    timings = {name: Timing(median_us=us, spread=0.01, samples=9) for name, us in median_us.items()}
    accuracy = dict.fromkeys(timings, comparison.accuracy[OURS])
    return dataclasses.replace(comparison, problem=problem, timings=timings, accuracy=accuracy, host_us={})


def test_a_training_step_is_the_sum_of_both_phases(comparison: Comparison, capsys: pytest.CaptureFixture[str]) -> None:
    forward, backward = parse_problem(f"{SMALL} lse"), comparison.problem
    comparisons = [
        timed(comparison, parse_problem(SMALL), flashgen=1, flash=1, cudnn=1),
        timed(comparison, forward, flashgen=10, flash=20, cudnn=15),
        timed(comparison, backward, flashgen=30, flash=60),
    ]
    assert step_sums(comparisons) == [(str(backward), [("flashgen", 40), ("flash", 80)])]
    # Without lse it is no forward of training.
    assert step_sums([comparisons[0], comparisons[2]]) == []
    show_comparisons(comparisons)
    rows = [line.split() for line in capsys.readouterr().out.split("training step")[1].splitlines()]
    assert [row[-3:] for row in rows if row and row[-1] in ("1.00x", "2.00x")] == [
        ["flashgen", "40.0", "1.00x"],
        ["flash", "80.0", "2.00x"],
    ]


def test_tune_sums_the_phases_of_a_problem(
    run: typing.Any, entry: RegistryEntry, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[Problem] = []

    def tune(problems: tuple[Problem, ...], **_: object) -> TuneReport:
        seen.extend(problems)
        # As the tuner does: what it tunes is the key, without lse.
        keys = [dataclasses.replace(problem, spec=problem.spec.tuning_key()) for problem in problems]
        results = [
            ProblemResult(
                problem=problem,
                entry=dataclasses.replace(entry, spec=problem.spec),
                trials=(),
                legal=1,
                baselines=baselines,
                tied=(),
                wall_s=1.0,
                note="",
            )
            for problem, baselines in zip(keys, ({"cudnn": 25.0, "flash": 30.0}, {"flash": 50.0}), strict=True)
        ]
        return TuneReport(
            target=named_target("H200"),
            results=tuple(results),
            files=(),
            study="study.log",
            interrupted=False,
            wall_s=2.0,
        )

    monkeypatch.setattr(flashgen.tuning, "tune", tune, raising=False)
    shape = "b=1 hq=2 hkv=1 s=1024 d=64 causal fp16"
    result = run("tune", "--shape", shape, "--phase", "forward,backward")
    assert result.exit_code == 0, result.stderr
    assert [str(problem) for problem in seen] == texts(f"{shape} lse", f"{shape} backward")
    row = result.stdout.split("training step")[1].splitlines()[2]
    assert "flash 80.0 us 2.00x" in row
    assert "cudnn" not in row
    document = json.loads(run("tune", "--shape", shape, "--phase", "forward,backward", "--json").stdout)
    (step,) = document["training_steps"]
    assert (step["us"], step["baselines_us"]) == (40.0, {"flash": 80.0})


@pytest.mark.gpu
def test_bench_of_a_training_step_on_a_gpu(run: typing.Any) -> None:
    words = ("--shape", SMALL.replace("s=64 d=32", "s=256 d=64"), "--phase", "forward,backward")
    result = run("bench", *words, "--peers", "flash", "--ms", "5", "--json")
    assert result.exit_code == 0, result.stderr
    document = json.loads(result.stdout)
    assert [set(problem["timings"]) for problem in document["problems"]] == [{OURS, "flash"}] * 2
    (sums,) = document["training_steps_us"].values()
    expected = sum(problem["timings"]["flash"]["median_us"] for problem in document["problems"])
    assert sums["flash"] == pytest.approx(expected)


@pytest.mark.gpu
@pytest.mark.parametrize("words", ["", "deterministic", "bias=fp32 dbias"])
def test_verify_of_gradients_on_a_gpu(run: typing.Any, words: str) -> None:
    result = run("verify", "--shape", f"{SMALL} {words}", "--phase", "backward", "--device", "cuda:0", "--json")
    assert result.exit_code == 0, result.stderr
    (problem,) = json.loads(result.stdout)["problems"]
    assert len(problem["checks"]) >= 7
