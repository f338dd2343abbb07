"""Rendered kernels, byte for byte; `pytest tests/codegen --update-golden` rewrites the files for review."""

from __future__ import annotations

import ast
import hashlib
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from flashgen.codegen import RenderedKernel, TritonForwardConfig, render
from flashgen.codegen.config import Loads
from flashgen.spec import AttentionSpec, DType, causal, full
from flashgen.spec.masks import Mask

FOLDER = Path(__file__).parent / "golden"
ROOT = Path(__file__).parents[2]
MASKS: dict[str, Mask] = {"full": full(), "causal": causal(), "causal_top_left": causal("top_left")}
LOADS: tuple[Loads, ...] = ("pointer", "descriptor")


def rendered(mask: Mask, loads: Loads, lse: bool) -> RenderedKernel:
    spec = AttentionSpec(dtype=DType.BF16, head_dim_qk=128, head_dim_v=128, mask=mask, lse=lse)
    return render(spec, TritonForwardConfig(block_m=128, block_n=64, num_warps=8, num_stages=2, loads=loads))


KERNELS: dict[str, RenderedKernel] = {
    f"forward_{name}_{loads}{'_lse' * lse}.py": rendered(mask, loads, lse)
    for name, mask in MASKS.items()
    for loads in LOADS
    for lse in (False, True)
}


@pytest.mark.parametrize("name", KERNELS)
def test_source_is_the_golden_file(name: str, request: pytest.FixtureRequest) -> None:
    path = FOLDER / name
    if request.config.getoption("--update-golden"):
        path.parent.mkdir(exist_ok=True)
        path.write_bytes(KERNELS[name].source.encode())
    # Bytes: a carriage return or a missing last newline is a difference.
    assert KERNELS[name].source.encode() == path.read_bytes(), f"{name} changed; review, then run with --update-golden"


def test_no_golden_file_is_left_over() -> None:
    assert {path.name for path in FOLDER.iterdir()} == set(KERNELS)


def test_structures_differ_in_code() -> None:
    assert len({kernel.digest for kernel in KERNELS.values()}) == len(KERNELS)


@pytest.mark.parametrize("line_length", [88, 120])
def test_formatted_as_ruff_would(line_length: int) -> None:
    ruff = [sys.executable, "-m", "ruff"]
    options = ["--isolated", "--no-cache", f"--line-length={line_length}", str(FOLDER)]
    for command in ([*ruff, "format", "--check", "--diff"], [*ruff, "check"]):
        result = subprocess.run([*command, *options], capture_output=True, text=True, timeout=60, check=False)
        assert result.returncode == 0, result.stdout + result.stderr


_HASHES = """
import hashlib, json
from flashgen.codegen import TritonForwardConfig, render
from flashgen.spec import AttentionSpec, DType, causal, full
found = {}
for name, mask in (("full", full()), ("causal", causal()), ("causal_top_left", causal("top_left"))):
    for loads in ("pointer", "descriptor"):
        for lse in (False, True):
            spec = AttentionSpec(dtype=DType.BF16, head_dim_qk=128, head_dim_v=128, mask=mask, lse=lse)
            config = TritonForwardConfig(block_m=128, block_n=64, num_warps=8, num_stages=2, loads=loads)
            kernel = render(spec, config)
            sha = hashlib.sha256(kernel.source.encode()).hexdigest()
            found[f"forward_{name}_{loads}{'_lse' * lse}.py"] = [sha, kernel.digest]
print(json.dumps(found))
"""


@pytest.mark.parametrize("seed", ["0", "1", "4242"])
def test_same_bytes_in_every_process(seed: str) -> None:
    environment = {**os.environ, "PYTHONHASHSEED": seed}
    result = subprocess.run(
        [sys.executable, "-c", _HASHES],
        capture_output=True,
        text=True,
        timeout=60,
        check=True,
        env=environment,
        cwd=ROOT,
    )
    here = {n: [hashlib.sha256(k.source.encode()).hexdigest(), k.digest] for n, k in KERNELS.items()}
    assert json.loads(result.stdout) == here


@pytest.mark.parametrize("name", KERNELS)
def test_source_says_where_it_comes_from_and_not_when(name: str) -> None:
    docstring = ast.get_docstring(ast.parse(KERNELS[name].source))
    assert docstring is not None
    assert "templates/triton/forward.py.jinja" in docstring
    mask = {"full": "full mask", "causal": "causal mask", "causal_top_left": "causal(align=top_left) mask"}
    key = re.sub(r"forward_(.*)_(pointer|descriptor).*", r"\1", name)
    assert mask[key] in docstring
    assert ("pointer" if "pointer" in name else "descriptor") in docstring
    assert ("lse" in docstring) == ("lse" in name)
    assert not re.search(r"\d{4}-\d\d|\d\d:\d\d", KERNELS[name].source), "a date or a time"
    assert str(Path.home()) not in KERNELS[name].source
    assert str(ROOT) not in KERNELS[name].source


@pytest.mark.parametrize("name", KERNELS)
def test_signature_is_the_plan(name: str) -> None:
    kernel = KERNELS[name]
    function = next(
        node
        for node in ast.parse(kernel.source).body
        if isinstance(node, ast.FunctionDef) and node.name == kernel.entry_point
    )
    arguments = function.args.args
    assert [a.arg for a in arguments] == [*kernel.plan.arguments, *kernel.plan.constants]
    constants = [a.arg for a in arguments if a.annotation and ast.unparse(a.annotation) == "tl.constexpr"]
    assert constants == list(kernel.plan.constants)


@pytest.mark.parametrize("name", KERNELS)
def test_nothing_that_is_defined_is_unused(name: str) -> None:
    tree = ast.parse(KERNELS[name].source)
    defined = {node.name for node in tree.body if isinstance(node, ast.FunctionDef)}
    called = {n.func.id for n in ast.walk(tree) if isinstance(n, ast.Call) and isinstance(n.func, ast.Name)}
    assert defined - called == {KERNELS[name].entry_point}
