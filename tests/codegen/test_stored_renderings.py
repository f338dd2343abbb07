"""What one process rendered the next one reads, as long as no template and no code changed."""

from __future__ import annotations

import importlib
import types
import typing
from collections.abc import Iterator
from pathlib import Path

import pytest

from flashgen.codegen import RenderedKernel, TritonForwardConfig, render
from flashgen.spec import AttentionSpec, DType, causal, full

CONFIG = TritonForwardConfig(block_m=64, block_n=32, num_warps=4, num_stages=2)
# The package's attribute of that name is the function.
rendering: types.ModuleType = importlib.import_module("flashgen.codegen.render")


@pytest.fixture(autouse=True)
def _own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setenv("FLASHGEN_CACHE", str(tmp_path / "cache"))
    # Whatever was edited meanwhile: nothing of it is loaded here.
    monkeypatch.setattr(rendering, "tree_stamp", lambda *roots: "stamp")
    monkeypatch.setattr(rendering, "is_still", lambda *given: True)
    rendering._render.cache_clear()
    yield
    rendering._render.cache_clear()


@pytest.fixture
def read(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The template of each rendering that was made, not read."""
    names: list[str] = []
    environment = rendering._environment()

    def get_template(name: str) -> typing.Any:
        names.append(name)
        return environment.get_template(name)

    monkeypatch.setattr(rendering, "_environment", lambda: types.SimpleNamespace(get_template=get_template))
    return names


def rendered(**fields: typing.Any) -> RenderedKernel:
    """Return what a new process would."""
    rendering._render.cache_clear()
    values = {"dtype": DType.FP16, "head_dim_qk": 64, "head_dim_v": 64, "mask": causal()} | fields
    return render(AttentionSpec(**values), CONFIG)


def test_a_later_process_reads_it(read: list[str]) -> None:
    first, second = rendered(), rendered()
    assert second == first
    assert second is not first
    assert second.digest == rendering.code_digest(second.source)
    assert read == ["triton/forward.py.jinja"]
    assert rendered(mask=full()).source != first.source
    assert rendered(softcap=True).source != first.source
    assert len(read) == 3


def test_other_code_and_damage_render_anew(read: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first = rendered()
    monkeypatch.setattr(rendering, "tree_stamp", lambda *roots: "another")
    assert rendered() == first
    assert len(read) == 2
    for path in (tmp_path / "cache" / "rendered").iterdir():
        path.write_bytes(path.read_bytes()[:-2])
    assert rendered() == first
    assert len(read) == 3


def test_what_was_edited_meanwhile_is_not_kept(
    read: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(rendering, "is_still", lambda *given: False)
    rendered()
    monkeypatch.setattr(rendering, "is_still", lambda *given: True)
    monkeypatch.setattr(rendering, "tree_stamp", lambda *roots: None)
    rendered()
    rendered()
    assert len(read) == 3
    assert not (tmp_path / "cache").exists()


def test_the_stamp_is_of_the_code_the_templates_and_jinja(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[tuple[str, ...]] = []

    def stamp(*roots: str) -> None:
        seen.append(roots)

    monkeypatch.setattr(rendering, "tree_stamp", stamp)
    rendered()
    ((code, templates, jinja),) = seen
    assert (Path(code) / "codegen" / "render.py").is_file()
    assert (Path(templates) / "triton" / "forward.py.jinja").is_file()
    assert (Path(jinja) / "environment.py").is_file()
