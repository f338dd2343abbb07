"""What every test runs under: no GPU needed, nothing of the user's touched."""

from __future__ import annotations

import importlib.util
import os
import sys
import types
from collections.abc import Iterator
from pathlib import Path

import pytest


def pytest_configure() -> None:
    if "PYTEST_XDIST_WORKER" in os.environ:
        # There is a worker for each core: more threads would wait for each other, and spin while they do. For the
        # processes that tests start, too; whoever loads OpenMP reads it, which none has yet.
        os.environ.setdefault("OMP_NUM_THREADS", "1")


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--update-golden", action="store_true", help="rewrite the golden files with what is rendered now")
    parser.addoption("--draws", type=int, help="how many random calls to draw in each of the product tests")
    parser.addoption("--draw-seed", type=int, default=0, help="seed of the first of them")


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    if "draw_seed" not in metafunc.fixturenames:
        return
    first, count = metafunc.config.getoption("--draw-seed"), metafunc.config.getoption("--draws")
    metafunc.parametrize("draw_seed", range(first, first + (metafunc.module.DRAWS if count is None else count)))


@pytest.fixture(scope="session")
def product() -> types.ModuleType:
    """The module that draws random calls, `product.py` beside this file."""
    return _module("product")


@pytest.fixture(scope="session")
def backward_product(product: types.ModuleType) -> types.ModuleType:
    """The module that draws random backward calls, `backward_product.py` beside this file."""
    return _module("backward_product")


def _module(name: str) -> types.ModuleType:
    spec = importlib.util.spec_from_file_location(name, Path(__file__).with_name(f"{name}.py"))
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    # Where dataclasses look for the annotations of a module.
    sys.modules[name] = module
    spec.loader.exec_module(module)
    return module


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


@pytest.fixture(scope="session", autouse=True)
def _quick_interpreter() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        # Importing it takes seconds: those who interpret have.
        if "triton.runtime.interpreter" in sys.modules:
            _module("quick_interpreter").install(patch)
        yield
