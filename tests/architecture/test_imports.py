"""The direction of imports, and what stays out of a process until it is needed."""

from __future__ import annotations

import ast
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PACKAGE = ROOT / "flashgen"

# Path below flashgen/, or the start of one -> why functions there may import; everything else imports at the top.
FUNCTION_IMPORTS_ALLOWED = {
    "__init__.py": "public names are loaded at their first use, so that importing flashgen costs nothing",
    "cli/": "--help, show and export start without torch, triton and optuna",
    "launch/device.py": "pynvml is optional",
    "measure/peers.py": "torch.nn.attention.bias loads PyTorch's compiler, a second for each measuring process",
    "registry/index.py": "a fresh index loads without yaml and pydantic, which take longer than the lookup",
}


def modules() -> list[Path]:
    found = sorted(PACKAGE.rglob("*.py"))
    assert found
    return found


def parse(path: Path) -> ast.Module:
    return ast.parse(path.read_text(encoding="utf-8"), filename=str(path))


def run_python(code: str) -> str:
    result = subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
    )
    assert result.returncode == 0, result.stderr
    return result.stdout


def function_imports(path: Path) -> Iterator[str]:
    functions = (n for n in ast.walk(parse(path)) if isinstance(n, ast.FunctionDef | ast.AsyncFunctionDef))
    for function in functions:
        for node in ast.walk(function):
            if isinstance(node, ast.Import | ast.ImportFrom):
                yield f"{path.relative_to(ROOT)}:{node.lineno} in {function.name}"


def test_contracts_hold() -> None:
    # In a process of its own: import-linter sets up logging for all of this one.
    code = "import sys; from importlinter.cli import lint_imports; sys.exit(lint_imports(no_cache=True))"
    result = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, timeout=120, check=False, cwd=ROOT
    )
    assert result.returncode == 0, result.stdout + result.stderr


@pytest.mark.parametrize(
    "statement",
    [
        "import flashgen",
        "import flashgen.cli",
        "import flashgen.integrations",
        "import sys; sys.argv = ['flashgen', '--help']\n"
        "import flashgen.cli\n"
        "try:\n    flashgen.cli.main()\nexcept SystemExit as end:\n    assert not end.code, end.code",
    ],
    ids=["flashgen", "cli", "integrations", "help"],
)
def test_stays_light(statement: str) -> None:
    out = run_python(f"{statement}\nimport sys\nprint('loaded:', {{'torch', 'triton', 'optuna'}} & set(sys.modules))")
    assert out.splitlines()[-1] == "loaded: set()"


def test_tuned_kernels_run_without_optuna() -> None:
    # None in sys.modules makes every import of that name fail, as if it were not installed.
    out = run_python(
        "import sys; sys.modules['optuna'] = None\n"
        "import flashgen.ops, flashgen.dispatch\n"
        "print(sorted(m for m in sys.modules if m.startswith(('flashgen.tuning', 'flashgen.search_space'))))"
    )
    assert out.strip() == "[]"


def test_environment_is_read_in_resources_alone() -> None:
    readers = {"environ", "environb", "getenv", "getenvb", "putenv"}
    found = []
    for path in modules():
        for node in ast.walk(parse(path)):
            attribute = isinstance(node, ast.Attribute) and node.attr in readers
            imported = (
                isinstance(node, ast.ImportFrom) and node.module == "os" and readers & {a.name for a in node.names}
            )
            if (attribute or imported) and path != PACKAGE / "resources.py":
                found.append(f"{path.relative_to(ROOT)}:{node.lineno}")
    assert not found


def test_imports_stand_at_the_top() -> None:
    found = [
        where
        for path in modules()
        if not path.relative_to(PACKAGE).as_posix().startswith(tuple(FUNCTION_IMPORTS_ALLOWED))
        for where in function_imports(path)
    ]
    assert not found


def test_every_room_has_a_name() -> None:
    banned = {"utils", "util", "common", "helpers", "misc"}
    found = [p for p in PACKAGE.rglob("*") if p.stem in banned and (p.is_dir() or p.suffix == ".py")]
    assert not found
