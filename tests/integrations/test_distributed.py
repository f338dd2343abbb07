"""Ranks that compare what they would choose from: real process groups over gloo, and the words for every difference."""

from __future__ import annotations

import dataclasses
import multiprocessing
import os
import typing
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

from flashgen.errors import FlashgenError
from flashgen.integrations import RankMismatchError, check_ranks, distributed
from flashgen.registry import clear_bundles, read_file, use_bundle, write_entries
from flashgen.resources import shipped_registry_dir

WORLD = 3
SHIPPED = shipped_registry_dir() / "nvidia_h200.forward.yaml"


def _folders(rank: int, root: Path) -> dict[str, tuple[Path, ...]]:
    """Return the folders of FLASHGEN_REGISTRY of a rank, by scenario."""
    one, two, copy = root / "one", root / "two", root / f"copy{min(rank, 1)}"
    return {
        "equal": (one, two),
        "equal again": (one, two),
        "copies at other places": (copy, two),
        "the same file twice": (one, copy)[: 1 + rank % 2],
        "a file that one lacks": (one, two) if rank != 1 else (one,),
        "another order": (one, two) if rank != 2 else (two, one),
        "nothing at all": (),
    }


def _run_scenarios(rank: int, root: Path, results: multiprocessing.Queue[tuple[int, dict[str, str]]]) -> None:
    # Each rank has caches of its own, as on different hosts.
    os.environ["FLASHGEN_CACHE"] = str(root / f"cache{rank}")
    os.environ["XDG_DATA_HOME"] = str(root / "data")
    dist.init_process_group("gloo", init_method=f"file://{root / 'meeting'}", rank=rank, world_size=WORLD)
    said = {}

    def ask(name: str, group: dist.ProcessGroup | None = None, registry: Path | None = None) -> None:
        # What was loaded for an earlier scenario is stale.
        clear_bundles()
        try:
            check_ranks(group, registry=registry)
            said[name] = ""
        except FlashgenError as error:
            said[name] = f"{type(error).__name__} {error}"

    for name, folders in _folders(rank, root).items():
        os.environ["FLASHGEN_REGISTRY"] = os.pathsep.join(map(str, folders))
        ask(name)
    ask("by argument", registry=root / ("one" if rank else "two"))
    pair = dist.new_group([0, 2])
    os.environ["FLASHGEN_REGISTRY"] = str(root / "one") if rank == 1 else str(root / "two")
    ask("equal in the group", group=pair)
    ask("a group of one", group=[dist.new_group([r]) for r in range(WORLD)][rank])
    if rank == 1:
        distributed.registry_for = lambda path: 1 / 0  # type: ignore[assignment,return-value]
    ask("a rank that fails")
    results.put((rank, said))
    dist.destroy_process_group()


@pytest.fixture(scope="module")
def said(tmp_path_factory: pytest.TempPathFactory) -> dict[str, list[str]]:
    """What each rank of a job was told, by scenario."""
    root = tmp_path_factory.mktemp("ranks")
    entries = read_file(SHIPPED).entries
    for name, some in {"one": entries[:2], "two": entries[2:3], "copy0": entries[:2], "copy1": entries[:2]}.items():
        write_entries(root / name, some)
    context = multiprocessing.get_context("spawn")
    results = context.Queue()
    ranks = [context.Process(target=_run_scenarios, args=(rank, root, results)) for rank in range(WORLD)]
    for rank in ranks:
        rank.start()
    answers = dict(results.get(timeout=120) for _ in ranks)
    for rank in ranks:
        rank.join(60)
    assert [rank.exitcode for rank in ranks] == [0] * WORLD
    return {name: [answers[rank][name] for rank in range(WORLD)] for name in answers[0]}


@pytest.mark.parametrize(
    "name",
    [
        *("equal", "equal again", "copies at other places", "the same file twice", "nothing at all"),
        *("equal in the group", "a group of one"),
    ],
)
def test_ranks_that_agree_go_on(said: dict[str, list[str]], name: str) -> None:
    assert said[name] == [""] * WORLD


@pytest.mark.parametrize(
    ("name", "parts"),
    {
        "a file that one lacks": ("two/nvidia_h200.forward.yaml (environment, digest ", "on ranks 0, 2 only"),
        "another order": ("the same registry files in another order: ", "on ranks 0-1; ", "on rank 2"),
        "by argument": (
            "one/nvidia_h200.forward.yaml (argument, ",
            "on ranks 1-2 only",
            "two/nvidia",
            "on rank 0 only",
        ),
        "a rank that fails": ("rank 1 cannot say what it would run: ZeroDivisionError: division by zero",),
    }.items(),
)
def test_every_rank_refuses_and_says_what_differs(
    said: dict[str, list[str]], name: str, parts: tuple[str, ...]
) -> None:
    assert len(set(said[name])) == 1
    message = said[name][0]
    assert message.startswith("RankMismatchError ")
    for part in (*parts, "FLASHGEN_REGISTRY", "flashgen registry merge"):
        assert part in message


def test_without_a_job_it_returns_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(distributed, "registry_for", lambda path: pytest.fail("the registry was read"))
    check_ranks()


def _state(*digests: str, **versions: str) -> typing.Any:
    found = {"flashgen": "0.1.0", "triton": "3.6.0", "device": "NVIDIA H200 (sm_90)", **versions}
    return distributed._State(versions=found, files=tuple((d, f"/{d}.yaml", "user") for d in digests))


def test_versions_and_devices_are_told_by_rank() -> None:
    states = {rank: _state("a") for rank in range(8)}
    states[3] = states[5] = _state("a", triton="3.7.1")
    states[7] = _state("a", device="NVIDIA H100 80GB HBM3 (sm_90)", color="red")
    assert distributed._differences(states) == [
        "triton: 3.6.0 on ranks 0-2, 4, 6-7; 3.7.1 on ranks 3, 5",
        "device: NVIDIA H200 (sm_90) on ranks 0-6; NVIDIA H100 80GB HBM3 (sm_90) on rank 7",
        "color: not told on ranks 0-6; red on rank 7",
    ]


def test_many_files_are_counted() -> None:
    states = {0: _state(*map(str, range(30))), 1: _state()}
    told = distributed._differences(states)
    assert len(told) == 9
    assert told[0].startswith("registry file /0.yaml (user, digest 0): on rank 0 only")
    assert told[-1] == "and 22 more registry files"


def test_a_rank_compares_the_registry_that_calls_use(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("flashgen.resources.shipped_registry_dir", lambda: tmp_path / "nothing")
    entries = read_file(SHIPPED).entries
    try:
        assert distributed._own_state(None).files == ()
        (path,) = write_entries(tmp_path / "flashgen", entries[:1])
        use_bundle(tmp_path)
        state = distributed._own_state(None)
        assert [file[1:] for file in state.files] == [(str(path), "bundle")]
        assert state.failure == ""
        assert set(state.versions) == {"flashgen", "triton", "torch", "driver", "device"}
        write_entries(tmp_path / "flashgen", entries[1:2])
        assert distributed._own_state(None).order != state.order
    finally:
        clear_bundles()


def _run_nccl(rank: int, root: Path, results: multiprocessing.Queue[tuple[int, list[str]]]) -> None:
    torch.cuda.set_device(rank)
    dist.init_process_group("nccl", init_method=f"file://{root / 'meeting'}", rank=rank, world_size=2)
    said = []
    for registry in (None, root / "one" if rank else None):
        try:
            check_ranks(registry=registry)
            said.append("")
        except RankMismatchError as error:
            said.append(str(error))
    results.put((rank, said))
    dist.destroy_process_group()


@pytest.mark.gpu
@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="torch.cuda.device_count() < 2")
def test_nccl(tmp_path: Path) -> None:
    write_entries(tmp_path / "one", [dataclasses.replace(read_file(SHIPPED).entries[0], runners_up=())])
    context = multiprocessing.get_context("spawn")
    results = context.Queue()
    ranks = [context.Process(target=_run_nccl, args=(rank, tmp_path, results)) for rank in range(2)]
    for rank in ranks:
        rank.start()
    answers = dict(results.get(timeout=120) for _ in ranks)
    for rank in ranks:
        rank.join(60)
    assert answers[0] == answers[1]
    assert answers[0][0] == ""
    assert "one/nvidia_h200.forward.yaml (argument, " in answers[0][1]
