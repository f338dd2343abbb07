"""What every test runs under: no GPU needed, nothing of the user's touched."""

from __future__ import annotations

from collections.abc import Iterator

import pytest


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--update-golden", action="store_true", help="rewrite the golden files with what is rendered now")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    gpu_items = [item for item in items if item.get_closest_marker("gpu")]
    if not gpu_items:
        return
    import torch  # takes seconds: only when a collected test asks for a GPU

    if torch.cuda.is_available():
        return
    for item in gpu_items:
        item.add_marker(pytest.mark.skip(reason="torch.cuda.is_available() is False"))


@pytest.fixture(scope="session", autouse=True)
def _isolated_environment(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    # Session scope comes before every other fixture; a test that needs other values sets them by its own monkeypatch.
    root = tmp_path_factory.mktemp("flashgen")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("FLASHGEN_CACHE", str(root / "cache"))
        patch.setenv("XDG_DATA_HOME", str(root / "data"))
        patch.delenv("FLASHGEN_REGISTRY", raising=False)
        patch.delenv("FLASHGEN_INTERPRET", raising=False)
        yield
