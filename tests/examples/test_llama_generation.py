"""The example that generates over a paged cache, on a model small enough for a test."""

from __future__ import annotations

import importlib
import json
import sys
import types
import typing
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch

import flashgen

EXAMPLES = Path(__file__).parents[2] / "examples"
# Three sequences, whose pages and chunks of a prompt end at different places.
SMALL = ["--batch", "3", "--prompt", "21", "--tokens", "8", "--chunk", "8", "--page-size", "4"]


@pytest.fixture(scope="module")
def example() -> Iterator[types.ModuleType]:
    """The script, beside the module of the model that it imports."""
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(EXAMPLES))
        yield importlib.import_module("llama_generation")
    for name in ("llama_generation", "llama_model"):
        sys.modules.pop(name, None)


@pytest.fixture
def model(example: types.ModuleType) -> types.ModuleType:
    return sys.modules["llama_model"]


def record(example: types.ModuleType, path: Path, *arguments: str) -> dict[str, typing.Any]:
    example.main([*SMALL, *arguments, "--json", str(path)])
    found: dict[str, typing.Any] = json.loads(path.read_text())
    return found


def test_flashgen_and_sdpa_give_the_tokens_of_eager_attention(
    example: types.ModuleType, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    found = record(example, tmp_path / "a.json", "--device", "cpu")
    tokens = found["tokens"]
    assert list(tokens) == ["eager", "flashgen", "sdpa"]
    assert tokens["flashgen"] == tokens["sdpa"] == tokens["eager"]
    assert [len(row) for row in tokens["eager"]] == [8, 8, 8]
    for agreement in found["agreements"].values():
        assert agreement["first_difference"] is None
        assert agreement["logit_difference"] < found["margin"]
    assert list(found["tokens_per_s"]) == ["flashgen", "sdpa"]
    printed = capsys.readouterr().out
    assert "flashgen: all 24 tokens equal eager's" in printed
    assert "x sdpa" in printed


def test_pages_and_chunks_change_no_token(example: types.ModuleType, tmp_path: Path) -> None:
    arguments = ["--device", "cpu", "--attention", "flashgen"]
    tokens = record(example, tmp_path / "a.json", *arguments)["tokens"]["flashgen"]
    other = record(example, tmp_path / "b.json", *arguments, "--page-size", "7", "--chunk", "5")["tokens"]["flashgen"]
    assert other == tokens
    other = record(example, tmp_path / "c.json", *arguments, "--seed", "1")["tokens"]["flashgen"]
    assert other != tokens


def test_the_kernel_itself_gives_these_tokens(example: types.ModuleType, tmp_path: Path) -> None:
    few = ["--batch", "2", "--prompt", "6", "--tokens", "3", "--chunk", "4", "--layers", "1"]
    with flashgen.interpreting():
        found = record(example, tmp_path / "a.json", *few, "--device", "cpu", "--attention", "flashgen")
    assert found["tokens"]["flashgen"] == found["tokens"]["eager"]
    assert found["agreements"]["flashgen"]["logit_difference"] < found["margin"]


def lengths_of_others(call: dict[str, typing.Any]) -> None:
    call["cache_seqlens"] = call["cache_seqlens"].flip(0)


def pages_out_of_order(call: dict[str, typing.Any]) -> None:
    call["page_table"] = call["page_table"].flip(1)


def positions_of_neighbours(call: dict[str, typing.Any]) -> None:
    call["rotary_interleaved"] = True


def without_causal(call: dict[str, typing.Any]) -> None:
    call["causal"] = False


@pytest.mark.parametrize("fault", [lengths_of_others, pages_out_of_order, positions_of_neighbours, without_causal])
def test_a_fault_in_a_call_is_told_by_the_tokens(
    example: types.ModuleType,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    fault: Callable[[dict[str, typing.Any]], None],
) -> None:
    right = flashgen.attention_with_kvcache

    def wrong(*args: torch.Tensor, **call: typing.Any) -> torch.Tensor:
        fault(call)
        return right(*args, **call)

    monkeypatch.setattr(flashgen, "attention_with_kvcache", wrong)
    with pytest.raises(SystemExit, match="tokens differ from eager attention's: flashgen"):
        example.main([*SMALL, "--device", "cpu", "--attention", "flashgen"])
    assert "flashgen: differs first at [" in capsys.readouterr().out


def test_pages_come_from_a_free_list_and_go_back(example: types.ModuleType, model: types.ModuleType) -> None:
    settings = model.Settings(batch=2, prompt=9, tokens=3, chunk=8, page_size=4, seed=0, device="cpu")
    cache = model.PagedCache(model.SIZES["tiny"], settings, torch.float32)
    assert sorted(cache.free) == list(range(6))
    cache.reserve(0, 4)
    cache.reserve(1, 9)
    cache.reserve(0, 5)
    assert [len(held) for held in cache.held] == [2, 3]
    assert sorted([*cache.free, *cache.held[0], *cache.held[1]]) == list(range(6))
    assert cache.page_table[0, :2].tolist() == cache.held[0]
    assert cache.page_table[1].tolist() == cache.held[1]
    cache.clear()
    assert sorted(cache.free) == list(range(6))
    assert cache.held == [[], []]


def test_bad_arguments_are_refused(example: types.ModuleType, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        example.main(["--attention", "eager"])
    assert "got 'eager'; allowed: flashgen, sdpa" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        example.main(["--heads", "3"])
    assert "got 3 and 2" in capsys.readouterr().err


@pytest.mark.gpu
def test_a_graph_replays_what_lengths_and_pages_become(example: types.ModuleType, tmp_path: Path) -> None:
    found = record(example, tmp_path / "a.json", "--device", "cuda", "--tokens", "40", "--head-dim", "64")
    assert list(found["agreements"]) == ["flashgen", "flashgen, graph", "sdpa", "sdpa, graph"]
    assert all(tokens == found["tokens"]["eager"] for tokens in found["tokens"].values())
    assert list(found["tokens_per_s"]) == list(found["agreements"])
