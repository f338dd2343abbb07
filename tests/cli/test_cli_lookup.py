"""show, explain, emit and export: what the registries hold and what becomes of it."""

from __future__ import annotations

import dataclasses
import json
import typing
from pathlib import Path

import pytest

import flashgen
from flashgen.cli.configs import parse_config, short_config
from flashgen.codegen import config_from_dict, render
from flashgen.registry import RegistryEntry, RunnerUp, load, search_locations, write_entries
from flashgen.spec import parse_problem

TUNED = "b=1 hq=2 hkv=1 s=1024 d=64 causal fp16"
DECODED = "b=16 hq=32 hkv=8 sq=1 sk=4096 d=128 full bf16 decode"


def test_show_lists_an_entry(run: typing.Any, tuned: Path) -> None:
    result = run("show", "--registry", tuned)
    assert result.exit_code == 0
    row = next(line for line in result.stdout.splitlines() if "NVIDIA H200" in line)
    for cell in ("argument", "nvidia_h200.forward.yaml", "64x32 w4 s2 pointer", "1.25x cudnn", "measured", "current"):
        assert cell in row


def test_show_tells_the_bytes_of_decoding(run: typing.Any, tuned: Path, decode_entry: RegistryEntry) -> None:
    assert "TB/s" not in run("show", "--registry", tuned).stdout
    write_entries(tuned, [decode_entry])
    lines = run("show", "--registry", tuned).stdout.splitlines()
    assert " us TFLOP/s TB/s vs baseline " in " ".join(lines[1].split())
    (row,) = (line for line in lines if " decode " in line)
    assert row.split(" 64 ")[-1].split()[:3] == ["16.78", "4.20", "1.25x"]
    (row,) = (line for line in lines if " forward " in line)
    assert row.split(" 20 ")[-1].split()[:3] == ["300", "-", "1.25x"]
    entries = json.loads(run("show", "--registry", tuned, "--json").stdout)["entries"]
    assert {entry["phase"]: entry["tbps"] for entry in entries} == {"forward": None, "decode": 4.198}


def test_show_marks_stale_entries(run: typing.Any, tmp_path: Path, stale_entry: RegistryEntry) -> None:
    (tmp_path / "user").mkdir()
    write_entries(tmp_path / "user", [stale_entry])
    document = json.loads(run("show", "--json").stdout)
    assert [(e["from"], e["state"]) for e in document["entries"]] == [("user", "stale")]


def test_show_reports_a_damaged_file_with_its_line(run: typing.Any, tuned: Path) -> None:
    file = tuned / "nvidia_h200.forward.yaml"
    text = file.read_text(encoding="utf-8")
    file.write_text(text.replace("median_us: 20", "median_us: [", 1), encoding="utf-8")
    before = file.read_bytes()
    result = run("show", "--registry", tuned)
    assert result.exit_code == 0
    skipped = next(line for line in result.stderr.splitlines() if line.startswith("skipped: "))
    path, line, _ = skipped.removeprefix("skipped: ").split(":", 2)
    assert path == str(file)
    assert line.isdecimal()
    assert file.read_bytes() == before
    issue = json.loads(run("show", "--registry", tuned, "--json").stdout)["skipped"][0]
    assert issue["line"] == int(line)


def test_explain_names_the_entry(run: typing.Any, tuned: Path) -> None:
    result = run("explain", "--shape", TUNED, "--target", "H200", "--registry", tuned)
    assert result.exit_code == 0
    assert "other software" in result.stdout
    assert str(tuned) in result.stdout


def test_explain_tells_the_interval_and_the_runner_up(run: typing.Any, tmp_path: Path, entry: RegistryEntry) -> None:
    second = RunnerUp(config=dataclasses.replace(entry.config, num_stages=1), median_us=21.0)
    write_entries(tmp_path / "tuned", [dataclasses.replace(entry, runners_up=(second,))])
    arguments = ("explain", "--shape", TUNED, "--target", "H200", "--registry", tmp_path / "tuned")
    text = run(*arguments).stdout
    assert "timed     20 us, middle half within 0.2 us (1%), " in text
    assert f"runner-up {second.config}: 21 us, 1.050x the time" in text
    (selection,) = json.loads(run(*arguments, "--json").stdout)["selections"]
    assert selection["spread_us"] == 0.2
    assert selection["runner_up"] == {"config": second.config.as_dict(), "median_us": 21.0, "ratio": 1.05}


def test_explain_tells_the_bytes_of_decoding(run: typing.Any, tuned: Path, decode_entry: RegistryEntry) -> None:
    write_entries(tuned, [decode_entry])
    text = run("explain", "--shape", TUNED, "--shape", DECODED, "--target", "H200", "--registry", tuned).stdout
    first, second = (line for line in text.splitlines() if line.startswith("timed"))
    assert first.endswith(", 300 TFLOP/s (cudnn 25 us beside it)")
    assert second.endswith(", 16.78 TFLOP/s, 4.20 TB/s (cudnn 80 us beside it)")
    assert text.count("TB/s") == 1


def test_explain_without_entries_is_exit_3(run: typing.Any) -> None:
    result = run("explain", "--shape", TUNED, "--target", "H200", "--json")
    assert result.exit_code == 3
    (selection,) = json.loads(result.stdout)["selections"]
    assert selection["rung"] == "heuristic"
    assert selection["spread_us"] is selection["runner_up"] is None
    assert selection["problem"] == str(parse_problem(TUNED))


def test_explain_falls_back_on_other_features(run: typing.Any, tuned: Path) -> None:
    arguments = ("explain", "--shape", TUNED.replace("causal", "sliding_window(127, 0)"), "--target", "H200")
    result = run(*arguments, "--registry", tuned)
    # Something runs, but nothing is tuned for it.
    assert result.exit_code == 3
    assert "rung      other features: " in result.stdout
    assert "differs   measured on mask causal, not sliding_window(127,0)" in result.stdout
    (selection,) = json.loads(run(*arguments, "--registry", tuned, "--json").stdout)["selections"]
    assert selection["rung"] == "other features"
    assert len(selection["differences"]) == 1


@pytest.mark.parametrize(
    "words",
    [
        *("sliding_window(127, 0) softcap bf16", "causal & document alibi", "prefix_lm(64) sinks fp8 descale"),
        *("(causal|chunked(8)) bias=input", "score_mod('return score * 0.5') varlen", "full dropout tf32"),
    ],
)
def test_emit_understands_masks_and_features(run: typing.Any, words: str) -> None:
    problem = parse_problem(f"b=1 hq=4 hkv=2 s=1024 d=64 {words}")
    result = run("emit", "--shape", f"b=1 hq=4 hkv=2 s=1024 d=64 {words}", "--target", "H200", "--json")
    assert result.exit_code == 0, result.stderr
    document = json.loads(result.stdout)
    config = config_from_dict(document["selections"][0]["config"])
    assert document["selections"][0]["problem"] == str(problem)
    assert document["source"] == render(problem.spec, config).source
    compile(document["source"], "kernel.py", "exec")


def test_explain_without_a_gpu_says_what_it_answers_for(run: typing.Any) -> None:
    result = run("explain", "--shape", TUNED, "--device", "cpu")
    assert "answering for NVIDIA H200 (sm_90)" in result.stderr


def test_emit_prints_what_render_gives(run: typing.Any, tuned: Path, entry: RegistryEntry, tmp_path: Path) -> None:
    arguments = ("emit", "--shape", TUNED, "--target", "H200", "--registry", tuned)
    expected = render(entry.spec, entry.config)
    assert run(*arguments).stdout == expected.source
    document = json.loads(run(*arguments, "--json").stdout)
    assert (document["source"], document["digest"]) == (expected.source, expected.digest)
    result = run(*arguments, "-o", tmp_path / "kernel.py")
    assert result.stdout == ""
    assert (tmp_path / "kernel.py").read_text(encoding="utf-8") == expected.source


def test_emit_takes_a_config_and_refuses_an_illegal_one(run: typing.Any) -> None:
    text = "block_m=64 block_n=64 num_warps=4 num_stages=2 loads=descriptor"
    config = parse_config(text, [parse_problem(TUNED)])
    assert config is not None
    arguments = ("emit", "--shape", TUNED, "--config", text, "--target")
    assert run(*arguments, "sm_90").stdout == render(parse_problem(TUNED).spec, config).source
    refused = run(*arguments, "sm_80")
    assert refused.exit_code == 2
    assert "loads=descriptor needs bulk copies" in refused.stderr


def test_config_text_round_trips(entry: RegistryEntry) -> None:
    assert parse_config(str(entry.config), [parse_problem(TUNED)]) == entry.config
    assert short_config(entry.config) == "64x32 w4 s2 pointer"


@pytest.mark.parametrize("target", [(), ("--target", "H200")], ids=["every device", "one target"])
def test_export_writes_a_bundle_that_use_finds(
    run: typing.Any, tuned: Path, tmp_path: Path, entry: RegistryEntry, target: tuple[str, ...]
) -> None:
    model_dir = tmp_path / "model"
    model_dir.mkdir()
    other = "b=1 h=4 s=1024 d=128 fp16"
    shapes = ("--shape", TUNED, "--shape", other)
    result = run("export", *shapes, "--to", model_dir, "--registry", tuned, "--json", *target)
    assert result.exit_code == 0, result.stderr
    assert f"nothing tuned: {parse_problem(other)}" in result.stderr
    document = json.loads(result.stdout)
    assert document["entries"] == 1
    assert [problem["rung"] for problem in document["problems"]] == ["other software", None]
    folder = flashgen.use(model_dir)
    located = load(search_locations()).entries()
    assert [(x.location.label, x.location.path, x.entry) for x in located] == [("bundle", folder, entry)]


def test_export_with_nothing_tuned_is_exit_3(run: typing.Any, tmp_path: Path) -> None:
    result = run("export", "--shape", TUNED, "--to", tmp_path, "--target", "H200")
    assert result.exit_code == 3
    assert not (tmp_path / "flashgen").exists()
