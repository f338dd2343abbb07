"""The example that trains GPT-2, on a model small enough for a test."""

from __future__ import annotations

import importlib.util
import json
import sys
import types
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parents[2] / "examples" / "gpt2_training.py"
TINY = ["--layers", "2", "--heads", "2", "--width", "64", "--vocabulary", "256", "--context", "64", "--batch", "2"]


@pytest.fixture(scope="module")
def example() -> types.ModuleType:
    spec = importlib.util.spec_from_file_location("gpt2_training", SCRIPT)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    with pytest.MonkeyPatch.context() as patch:
        # Where dataclasses look for the annotations of a module.
        patch.setitem(sys.modules, "gpt2_training", module)
        spec.loader.exec_module(module)
    return module


def curves(example: types.ModuleType, path: Path, *arguments: str) -> dict[str, list[float]]:
    """Return the loss curve of each run of the example."""
    example.main([*arguments, "--json", str(path)])
    return {run["attention"]: run["losses"] for run in json.loads(path.read_text())["runs"]}


def test_eager_on_cpu_learns_and_repeats(example: types.ModuleType, tmp_path: Path) -> None:
    arguments = [*TINY, "--device", "cpu", "--steps", "6", "--attention", "eager", "--learning-rate", "3e-3"]
    losses = curves(example, tmp_path / "a.json", *arguments)["eager"]
    assert len(losses) == 6
    # A new model knows next to nothing: ln 256.
    assert losses[0] == pytest.approx(5.545, abs=0.2)
    assert losses[-1] < losses[0] - 0.5
    assert curves(example, tmp_path / "b.json", *arguments)["eager"] == losses
    assert curves(example, tmp_path / "c.json", *arguments, "--seed", "1")["eager"] != losses


def test_flashgen_follows_eager_on_cpu(
    example: types.ModuleType, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    losses = curves(example, tmp_path / "curves.json", *TINY, "--device", "cpu", "--steps", "6")
    assert list(losses) == ["flashgen", "eager"]
    assert losses["flashgen"] == pytest.approx(losses["eager"], abs=1e-3)
    assert losses["eager"][-1] < losses["eager"][0]
    printed = capsys.readouterr().out
    assert "cudnn: skipped, cuDNN's attention needs a CUDA device" in printed
    assert "largest difference of flashgen's loss from eager's" in printed


def test_unknown_attention_is_refused(example: types.ModuleType, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        example.main(["--attention", "eager,flash"])
    assert "got 'flash'; allowed: flashgen, eager, cudnn" in capsys.readouterr().err


@pytest.mark.gpu
def test_all_three_agree_on_gpu(example: types.ModuleType, tmp_path: Path) -> None:
    size = [
        "--layers",
        "2",
        "--heads",
        "2",
        "--width",
        "128",
        "--vocabulary",
        "256",
        "--context",
        "256",
        "--batch",
        "4",
    ]
    losses = curves(example, tmp_path / "curves.json", *size, "--device", "cuda", "--steps", "20")
    assert list(losses) == ["flashgen", "eager", "cudnn"]
    assert losses["eager"][-1] < losses["eager"][0] - 0.5
    # bfloat16: roundings differ and the runs drift apart by them, never further.
    assert losses["flashgen"] == pytest.approx(losses["eager"], abs=0.05)
    assert losses["cudnn"] == pytest.approx(losses["eager"], abs=0.05)
