"""Help, wrong arguments, and how commands end."""

from __future__ import annotations

import json
import subprocess
import sys
import typing
from pathlib import Path

import pytest

import flashgen
from flashgen.cli.exits import exit_code
from flashgen.cli.output import printable
from flashgen.errors import (
    CompileError,
    ConfigError,
    FlashgenError,
    InputError,
    NoKernelError,
    RegistryError,
    UnsupportedError,
)
from flashgen.integrations import load_presets

ROOT = Path(__file__).parents[2]
COMMANDS = (
    "tune", "join", "retune", "report", "show", "explain",
    "emit", "compile", "bench", "verify", "export", "schema", "doctor",
)  # fmt: skip
SHAPE = "b=1 h=2 s=128 d=64 fp16"


def loaded_by(*arguments: str) -> str:
    code = (
        "import sys\n"
        f"sys.argv = ['flashgen', *{arguments!r}]\n"
        "import flashgen.cli\n"
        "try:\n    flashgen.cli.main()\nexcept SystemExit as end:\n    assert not end.code, end.code\n"
        "print('loaded:', sorted({'torch', 'triton', 'optuna'} & set(sys.modules)))"
    )
    result = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=False, cwd=ROOT
    )
    assert result.returncode == 0, result.stderr
    return result.stdout.splitlines()[-1]


@pytest.mark.parametrize("arguments", [("tune", "--help"), ("bench", "--help"), ("show",), ("show", "--json")])
def test_starts_without_torch_triton_and_optuna(arguments: tuple[str, ...]) -> None:
    assert loaded_by(*arguments) == "loaded: []"


@pytest.mark.parametrize("command", COMMANDS)
def test_help_teaches_by_example(run: typing.Any, command: str) -> None:
    result = run(command, "--help")
    assert result.exit_code == 0
    assert f"Example: flashgen {command}" in result.stdout


@pytest.mark.parametrize("command", sorted({*COMMANDS} - {"join", "report", "show", "schema", "doctor"}))
def test_help_names_every_preset(run: typing.Any, command: str) -> None:
    words = " ".join(run(command, "--help").stdout.split())
    listed = words.partition("--preset NAME A named list of problems: ")[2].partition(". ")[0]
    names = listed.replace("; with gradients: ", ", ").replace("; of decoding: ", ", ").split(", ")
    assert len(set(names)) == len(names)
    assert set(names) == load_presets().keys()


def test_lists_every_command(run: typing.Any) -> None:
    listed = run("--help").stdout.split("Commands:")[1]
    words = [line.split()[0] for line in listed.splitlines()[1 : len(COMMANDS) + 2]]
    assert words == [*COMMANDS, "registry"]


def test_version(run: typing.Any) -> None:
    result = run("--version")
    assert (result.exit_code, result.stdout) == (0, f"flashgen {flashgen.__version__}\n")


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (("explain",), "--preset quick"),
        (("explain", "--preset", "no-such"), "llama3-8b"),
        (("explain", "--shape", "b=1 h=2 s=128"), "must give"),
        (("explain", "--shape", SHAPE, "--phase", "forward,sideways"), "forward, backward, decode"),
        (("explain", "--shape", SHAPE, "--target", "sm_12"), "H100 (NVIDIA H100"),
        (("explain", "--shape", SHAPE, "--target", "sm_90", "--device", "cuda:0"), "either --device"),
        (("explain", "--shape", SHAPE, "--device", "tpu"), "cuda:N"),
        (("explain", "--shape", f"{SHAPE} window=127,0"), "sliding_window(127,0)"),
        (("explain", "--shape", f"{SHAPE} sliding_window(127"), "a bracket has no partner"),
        (("explain", "--model", "no/such.json"), "no/such.json"),
        (("explain", "--model", "x.json", "--seqlen", "1k"), "whole numbers"),
        (("emit", "--preset", "grid", "--target", "sm_90"), "different sources"),
        (("emit", "--shape", SHAPE, "--target", "sm_90", "--config", "block_m=64"), "missing fields"),
        (("emit", "--shape", SHAPE, "--target", "sm_90", "--config", "block_m=64 block_m=32"), "given twice"),
        (("compile", "--shape", SHAPE, "--target", "sm_90", "--device", "cuda:0"), "either --device"),
        (("tune", "--shape", SHAPE, "--budget", "soon"), "1h30m"),
    ],
)
def test_bad_usage_says_what_is_allowed(run: typing.Any, arguments: tuple[str, ...], said: str) -> None:
    result = run(*arguments)
    assert result.exit_code == 2
    assert result.stderr.splitlines()[-1].startswith("error: ")
    assert said in result.stderr
    assert result.stdout == ""


def test_unknown_option_is_bad_usage(run: typing.Any) -> None:
    assert run("show", "--colour").exit_code == 2


@pytest.mark.parametrize(
    ("error", "code"),
    [
        (InputError, 2),
        (ConfigError, 2),
        (NoKernelError, 3),
        (UnsupportedError, 1),
        (RegistryError, 1),
        (CompileError, 1),
        (FlashgenError, 1),
    ],
)
def test_exit_code_of_an_error(error: type[FlashgenError], code: int) -> None:
    assert exit_code(error("x")) == code


def test_interrupt_anywhere_ends_with_130(run: typing.Any, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupted(*args: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("flashgen.cli.show.load", interrupted)
    result = run("show")
    assert (result.exit_code, result.stderr) == (130, "interrupted\n")


def test_a_bug_keeps_its_traceback(run: typing.Any, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*args: object) -> None:
        raise RuntimeError("a bug")

    monkeypatch.setattr("flashgen.cli.show.load", broken)
    result = run("show")
    assert isinstance(result.exception, RuntimeError)
    assert result.exc_info[2] is not None


def test_control_characters_of_others_stay_out_of_the_terminal() -> None:
    assert printable("a\x1b[31mb\nc\x07") == "a\N{REPLACEMENT CHARACTER}[31mb\nc\N{REPLACEMENT CHARACTER}"


def test_a_model_says_what_it_skips(run: typing.Any) -> None:
    config = ROOT / "tests" / "integrations" / "configs" / "lfm2-1.2b.json"
    result = run("explain", "--model", config, "--seqlen", "1024", "--target", "H200", "--json")
    assert "skipped in lfm2: conv layers (10 of 16)" in result.stderr
    assert result.exit_code == 3


def test_a_model_asks_for_its_windows(run: typing.Any) -> None:
    config = ROOT / "tests" / "integrations" / "configs" / "mistral-7b-v0.1.json"
    result = run(
        "explain", "--model", config, "--seqlen", "1024,8192", "--phase", "forward", "--target", "H200", "--json"
    )
    assert "skipped" not in result.stderr
    asked = [selection["problem"] for selection in json.loads(result.stdout)["selections"]]
    assert ["sliding_window(4095,0)" in problem for problem in asked] == [False, True]
