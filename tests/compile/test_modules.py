"""Rendered sources as files: named by content, written whole."""

from __future__ import annotations

import concurrent.futures
import dataclasses
import os
from pathlib import Path

import pytest
from triton.runtime.jit import JITFunction

from flashgen.codegen import RenderedKernel, TritonForwardConfig, render
from flashgen.compile import load_kernel, source_path
from flashgen.spec import AttentionSpec, DType, causal

SPEC = AttentionSpec(dtype=DType.FP16, head_dim_qk=64, head_dim_v=64, mask=causal())
CONFIG = TritonForwardConfig(block_m=64, block_n=32, num_warps=4, num_stages=2)


@pytest.fixture
def rendered() -> RenderedKernel:
    return render(SPEC, CONFIG)


@pytest.fixture(autouse=True)
def _own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FLASHGEN_CACHE", str(tmp_path / "cache"))


def files(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.rglob("*") if path.is_file())


def test_file_holds_the_source_and_is_named_by_it(rendered: RenderedKernel, tmp_path: Path) -> None:
    path = source_path(rendered)
    assert path.read_bytes() == rendered.source.encode()
    assert rendered.digest in path.name
    assert path.is_relative_to(tmp_path / "cache")
    assert files(path.parent) == [path.name]


def test_equal_sources_share_a_file(rendered: RenderedKernel) -> None:
    path = source_path(rendered)
    before = path.stat()
    same = render(dataclasses.replace(SPEC, head_dim_qk=128, dtype=DType.BF16), CONFIG)
    assert source_path(same) == path
    assert (path.stat().st_mtime_ns, path.stat().st_ino) == (before.st_mtime_ns, before.st_ino)


def test_a_comment_makes_another_file_and_leaves_the_first(rendered: RenderedKernel) -> None:
    # Triton's own cache is keyed by text and line numbers.
    path = source_path(rendered)
    commented = dataclasses.replace(rendered, source="# a remark\n" + rendered.source)
    assert commented.digest == rendered.digest
    assert source_path(commented) != path
    assert source_path(commented).read_text().startswith("# a remark\n")
    assert path.read_text() == rendered.source


def test_a_write_that_fails_leaves_nothing(
    rendered: RenderedKernel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(source: object, target: object) -> None:
        raise OSError("disk full")

    with monkeypatch.context() as patch:
        patch.setattr(os, "replace", refuse)
        with pytest.raises(OSError, match="disk full"):
            source_path(rendered)
    assert files(tmp_path) == []
    assert source_path(rendered).read_text() == rendered.source


def test_the_name_appears_only_with_the_whole_source(rendered: RenderedKernel, monkeypatch: pytest.MonkeyPatch) -> None:
    replace = os.replace
    seen = []

    def watched(source: str, target: Path) -> None:
        seen.append((target.exists(), Path(source).read_text(), Path(source).parent == target.parent))
        replace(source, target)

    monkeypatch.setattr(os, "replace", watched)
    source_path(rendered)
    assert seen == [(False, rendered.source, True)]


def test_many_writers_at_once(rendered: RenderedKernel, tmp_path: Path) -> None:
    with concurrent.futures.ThreadPoolExecutor(8) as pool:
        paths = list(pool.map(lambda _: source_path(rendered), range(32)))
    assert len(set(paths)) == 1
    assert paths[0].read_text() == rendered.source
    assert files(tmp_path) == [paths[0].name]


def test_kernel_is_loaded_once(rendered: RenderedKernel) -> None:
    kernel = load_kernel(rendered)
    assert isinstance(kernel, JITFunction)
    assert kernel.__name__ == rendered.entry_point
    assert load_kernel(render(dataclasses.replace(SPEC, head_dim_v=32), CONFIG)) is kernel
