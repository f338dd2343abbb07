"""What a user gets from a wheel, a source distribution and an editable install."""

from __future__ import annotations

import os
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]

PRINT_PLACES = """
import flashgen
from flashgen.integrations import load_presets
from flashgen.resources import resource_dir, shipped_registry_dir
print(flashgen.__file__)
for folder in (resource_dir("templates"), resource_dir("search_spaces"), shipped_registry_dir()):
    assert any(folder.rglob("*")), folder
    print(folder)
assert load_presets()
"""


def data_files() -> list[str]:
    """Return every file that is no Python but must ship, relative to the checkout."""
    patterns = {
        "templates": "*.jinja",
        "search_spaces": "*.yaml",
        "flashgen/tuned": "*.yaml",
        "flashgen/report": "*.jinja",
    }
    found = {folder: sorted((ROOT / folder).rglob(pattern)) for folder, pattern in patterns.items()}
    assert all(found.values()), found
    files = [path.relative_to(ROOT).as_posix() for paths in found.values() for path in paths]
    return [*files, "flashgen/py.typed"]


def run(*command: str | Path, cwd: Path) -> str:
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    result = subprocess.run(
        [str(word) for word in command],
        cwd=cwd,
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
        env=environment,
    )
    assert result.returncode == 0, result.stdout + result.stderr
    return result.stdout


@pytest.fixture(scope="module")
def distributions(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("dist")
    # The wheel is built from the unpacked source distribution: that one is complete, or this fails.
    run(sys.executable, "-m", "build", "--no-isolation", "--outdir", folder, ROOT, cwd=folder)
    return folder


def only(folder: Path, pattern: str) -> Path:
    (found,) = folder.glob(pattern)
    return found


def test_wheel_holds_the_data(distributions: Path) -> None:
    with zipfile.ZipFile(only(distributions, "*.whl")) as wheel:
        names = set(wheel.namelist())
    wanted = {name if name.startswith("flashgen/") else f"flashgen/{name}" for name in data_files()}
    assert wanted - names == set()
    assert not [name for name in names if name.startswith(("tests/", "templates/", "search_spaces/"))]
    assert [name for name in names if name.endswith("licenses/LICENSE")]


def test_sdist_holds_the_data(distributions: Path) -> None:
    with tarfile.open(only(distributions, "*.tar.gz")) as sdist:
        names = {name.split("/", 1)[1] for name in sdist.getnames() if "/" in name}
    assert {*data_files(), "LICENSE", "README.md", "CHANGELOG.md", "pyproject.toml"} - names == set()


def test_installed_wheel_finds_its_data(distributions: Path, tmp_path: Path) -> None:
    site = tmp_path / "site"
    wheel = only(distributions, "*.whl")
    run(
        sys.executable,
        "-m",
        "pip",
        "install",
        "--quiet",
        "--no-deps",
        "--no-index",
        "--target",
        site,
        wheel,
        cwd=tmp_path,
    )
    code = f"import sys; sys.path.insert(0, {str(site)!r})\n{PRINT_PLACES}"
    places = run(sys.executable, "-c", code, cwd=tmp_path).splitlines()
    assert len(places) == 4
    assert all(Path(place).is_relative_to(site / "flashgen") for place in places)


def test_editable_install_finds_its_data(tmp_path: Path) -> None:
    # A .pth file is what an editable install puts into site-packages; its build hook is called as pip calls it.
    wheels, site = tmp_path / "wheels", tmp_path / "site"
    wheels.mkdir()
    run(sys.executable, "-c", f"import hatchling.build as b; b.build_editable({str(wheels)!r})", cwd=ROOT)
    with zipfile.ZipFile(only(wheels, "*.whl")) as wheel:
        wheel.extractall(site)
    code = (
        f"import site, sys; old = list(sys.path); site.addsitedir({str(site)!r})\n"
        f"sys.path = [p for p in sys.path if p not in old] + old\n{PRINT_PLACES}"
    )
    places = run(sys.executable, "-c", code, cwd=tmp_path).splitlines()
    assert len(places) == 4
    assert all(Path(place).is_relative_to(ROOT) for place in places)


def test_checkout_finds_its_data(tmp_path: Path) -> None:
    code = f"import sys; sys.path.insert(0, {str(ROOT)!r})\n{PRINT_PLACES}"
    places = run(sys.executable, "-c", code, cwd=tmp_path).splitlines()
    assert len(places) == 4
    assert all(Path(place).is_relative_to(ROOT) for place in places)
