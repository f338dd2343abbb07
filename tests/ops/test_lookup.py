"""Which kernel a call gets: `explain`, registries, bundles beside a model, and the memo of calls."""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

import flashgen
from flashgen.codegen import KernelResources, TritonForwardConfig, render
from flashgen.launch import software_versions
from flashgen.ops import cpu, torch_op
from flashgen.ops.call import NO_TENSORS, Options
from flashgen.ops.runtime import operands_of, registry_for
from flashgen.registry import (
    Accuracy,
    MeasuredRange,
    Performance,
    Provenance,
    RegistryEntry,
    export_bundle,
    generation,
    write_entries,
)
from flashgen.spec import Problem, parse_problem
from flashgen.target import named_target

PROBLEM = parse_problem("b=2 hq=6 hkv=2 sq=40 sk=52 d=64 causal fp16")
TUNED = TritonForwardConfig(block_m=32, block_n=32, num_warps=2, num_stages=1, head_group=3)


def entry_for(problem: Problem, config: TritonForwardConfig = TUNED) -> RegistryEntry:
    # CPU tensors are explained for the first sm_90 device of the table.
    target = named_target("sm_90")
    return RegistryEntry(
        device_name=target.device_name,
        arch=target.arch,
        spec=problem.spec.tuning_key(),
        range=MeasuredRange.of(problem.shape),
        config=config,
        origin="measured",
        resources=KernelResources(registers=100, spills=0, smem_bytes=32768),
        performance=Performance(
            median_us=10.0, spread=0.01, tflops=1.0, baseline="none", baseline_us=None, timing="cold-l2"
        ),
        accuracy=Accuracy(max_error=1e-3, allowed_error=2e-3),
        runners_up=(),
        provenance=Provenance(
            template_digest=render(problem.spec, config).digest,
            date="2026-11-22T07:00:00Z",
            trials=1,
            seed=0,
            **dataclasses.asdict(software_versions()),
        ),
    )


def tensors() -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    kv = torch.zeros(2, 2, 52, 64, dtype=torch.float16)
    return torch.zeros(2, 6, 40, 64, dtype=torch.float16), kv, kv


def test_explain_without_any_entry() -> None:
    selection = flashgen.explain(*tensors(), causal=True)
    assert selection.problem == PROBLEM
    assert selection.target == named_target("sm_90")
    assert selection.rung == "heuristic"
    assert "nothing tuned" in str(selection)


def test_explain_reads_layout_and_lse() -> None:
    q, k, v = (t.transpose(1, 2).contiguous() for t in tensors())
    selection = flashgen.explain(q, k, v, layout="bshd", mask=flashgen.masks.causal("top_left"), return_lse=True)
    assert selection.problem == parse_problem("b=2 hq=6 hkv=2 sq=40 sk=52 d=64 causal(align=top_left) fp16 lse")


def test_explain_with_a_config() -> None:
    selection = flashgen.explain(*tensors(), config=TUNED)
    assert (selection.rung, selection.config) == ("explicit", TUNED)


@pytest.mark.parametrize("kind", [str, Path], ids=["text", "path"])
def test_explain_with_a_registry(tmp_path: Path, kind: Callable[[Path], str | Path]) -> None:
    folder = tmp_path / "mine"
    (path,) = write_entries(folder, [entry_for(PROBLEM)])
    for place in (folder, path):
        selection = flashgen.explain(*tensors(), causal=True, registry=kind(place))  # type: ignore[arg-type]
        assert (selection.config, selection.path) == (TUNED, path)
        assert selection.rung == "exact"
    assert flashgen.explain(*tensors(), causal=True).entry is None


def test_environment_is_searched(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_entries(tmp_path / "mine", [entry_for(PROBLEM)])
    monkeypatch.setenv("FLASHGEN_REGISTRY", str(tmp_path / "mine"))
    assert flashgen.explain(*tensors(), causal=True).config == TUNED


def test_a_registry_that_is_not_there_is_said_once(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING, logger="flashgen"):
        for _ in range(2):
            flashgen.explain(*tensors(), registry=tmp_path / "missing")
    messages = [record.getMessage() for record in caplog.records if "missing" in record.getMessage()]
    assert len(messages) == 1
    assert "no such file or folder" in messages[0]


def test_a_bundle_is_found_after_use(tmp_path: Path) -> None:
    assert flashgen.explain(*tensors(), causal=True).entry is None
    (path,) = export_bundle([entry_for(PROBLEM)], tmp_path)
    before = generation()
    assert flashgen.use(tmp_path) == path.parent
    assert generation() > before
    selection = flashgen.explain(*tensors(), causal=True)
    assert (selection.config, selection.path) == (TUNED, path)


def test_the_interpreter_runs_the_bundle(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen = []

    def interpret(q: torch.Tensor, *rest: torch.Tensor, **options: object) -> tuple[torch.Tensor, None]:
        seen.append(options["config"])
        return q, None

    monkeypatch.setattr(cpu, "interpret_forward", interpret)
    export_bundle([entry_for(PROBLEM)], tmp_path)
    with flashgen.interpreting():
        flashgen.attention(*tensors(), causal=True)
        flashgen.use(tmp_path)
        flashgen.attention(*tensors(), causal=True)
    assert seen[0] != TUNED
    assert seen[1] == TUNED


def test_the_registry_is_read_once(tmp_path: Path) -> None:
    write_entries(tmp_path / "mine", [entry_for(PROBLEM)])
    assert registry_for(str(tmp_path / "mine")) is registry_for(str(tmp_path / "mine"))
    assert registry_for("") is not registry_for(str(tmp_path / "mine"))


class FakeGpuTensor:
    """What the operator reads of a CUDA tensor before it looks into its memo."""

    is_cuda = True
    dtype = torch.float16
    device = torch.device("cuda", 0)

    def __init__(self, seqlen: int) -> None:
        self.shape = torch.Size((1, 1, seqlen, 64))

    def stride(self) -> tuple[int, ...]:
        return (self.shape[2] * 64, self.shape[2] * 64, 64, 1)

    def data_ptr(self) -> int:
        return 4096


@pytest.fixture
def prepared(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The length of each call that was prepared: chosen, compiled, bound."""
    seen: list[int] = []

    def prepare(q: FakeGpuTensor, k: object, v: object, tensors: object, options: object) -> Callable[..., str]:
        seen.append(q.shape[2])
        return lambda *tensors: f"ran {q.shape[2]}"

    monkeypatch.setattr(torch_op, "prepare", prepare)
    return seen


def call(seqlen: int, *, mask: str = "full", scale: float = 0.125, layout: str = "bhsd", lse: bool = False) -> object:
    tensor: object = FakeGpuTensor(seqlen)
    options = Options(0, 0, mask, "", scale, 0.0, 0.0, layout, lse, False, "", "")
    return torch_op.forward(tensor, tensor, tensor, NO_TENSORS, options)  # type: ignore[arg-type]


def test_a_call_is_prepared_once(prepared: list[int]) -> None:
    assert [call(n) for n in (64, 128, 64, 64, 128)] == ["ran 64", "ran 128", "ran 64", "ran 64", "ran 128"]
    assert prepared == [64, 128]


def test_another_option_is_another_call(prepared: list[int]) -> None:
    call(64)
    for different in ({"mask": "causal"}, {"scale": 0.25}, {"layout": "bshd"}, {"lse": True}):
        call(64, **different)  # type: ignore[arg-type]
    assert len(prepared) == 5


def test_a_bundle_makes_every_call_choose_again(prepared: list[int], tmp_path: Path) -> None:
    call(64)
    export_bundle([entry_for(PROBLEM)], tmp_path)
    flashgen.use(tmp_path)
    call(64)
    assert prepared == [64, 64]


def test_memo_is_bounded(prepared: list[int], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch_op, "_MEMO_LIMIT", 10)
    for seqlen in range(1, 100):
        assert call(seqlen) == f"ran {seqlen}"
        assert len(torch_op._memo) <= 10
    assert call(99) == "ran 99"
    assert len(prepared) == 99


def test_operands_are_those_of_the_copies_that_are_made() -> None:
    problem = parse_problem("b=2 h=4 s=32 d=64 fp16")
    dense = torch.empty(2, 4, 32, 64, dtype=torch.float16)
    transposed = torch.empty(2, 4, 64, 32, dtype=torch.float16).transpose(2, 3)
    operands = operands_of(dense, transposed, dense, problem, "bhsd")
    assert operands.q.stride == operands.k.stride == operands.v.stride == operands.out.stride == (8192, 2048, 64, 1)
    strided = torch.empty(2, 32, 3, 4, 64, dtype=torch.float16)[:, :, 1].transpose(1, 2)
    assert operands_of(strided, dense, dense, problem, "bhsd").q.stride == strided.stride()
