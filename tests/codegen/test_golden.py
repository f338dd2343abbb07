"""Rendered kernels, byte for byte; `pytest tests/codegen --update-golden` rewrites the files for review."""

from __future__ import annotations

import ast
import hashlib
import json
import os
import re
import subprocess
import sys
import typing
from pathlib import Path

import pytest

from flashgen.codegen import RenderedKernel, TritonForwardConfig, render
from flashgen.codegen.config import Loads, Loops
from flashgen.spec import AttentionSpec, DType, parse_mask
from flashgen.spec.mods import parse_mod

FOLDER = Path(__file__).parent / "golden"
ROOT = Path(__file__).parents[2]
LOADS: tuple[Loads, ...] = ("pointer", "descriptor")
PLAIN_MASKS = {"full": "full", "causal": "causal", "causal_top_left": "causal(align=top_left)"}
MASKS = {
    "sliding_window": "sliding_window(127,3)",
    "window_left": "sliding_window(127,-1)",
    "window_right": "sliding_window(-1,3)",
    "prefix_lm": "prefix_lm(100)",
    "chunked": "chunked(1024)",
    "dilated_window": "dilated_window(300,0,3)",
    "document": "causal&document(batched)",
    "global_tokens": "global_tokens(4)|sliding_window(127,127)",
    "intersection": "causal&chunked(100)",
    "two_windows": "sliding_window(63,0)&~sliding_window(7,0)",
    "complement": "~chunked(100)|causal(align=top_left)",
    "mask_mod": "mask_mod('return (q_idx - kv_idx) // 3 == h')",
    "mask_mod_captures": "mask_mod('return t[b, q_idx] % 2 < u[kv_idx - q_idx]', t='int32[b,q_idx]', u='int64[any]')"
    "|prefix_lm(3)",
}  # fmt: skip
SCORE_MOD = parse_mod("score_mod('return score * 2.0 + w[h, q_idx - kv_idx]', w='bfloat16[h,any]')")
EVERYTHING: dict[str, typing.Any] = {
    "mask": parse_mask("causal&document"), "score_mod": SCORE_MOD, "softcap": True, "bias": "fp32", "alibi": True,
    "sinks": True, "dropout": True, "varlen": True, "seqused": "qk", "lse": True,
}  # fmt: skip
# What differs from a full mask of bf16, and the kinds of loads that it changes in their own ways.
FEATURES: dict[str, tuple[dict[str, typing.Any], tuple[Loads, ...]]] = {
    "score_mod": ({"score_mod": SCORE_MOD}, ("pointer",)),
    "softcap": ({"softcap": True}, ("pointer",)),
    "bias": ({"bias": "input"}, ("descriptor",)),
    "bias_unaligned": ({"bias": "fp32", "bias_aligned": False}, ("pointer",)),
    "bias_bool": ({"bias": "bool"}, ("descriptor",)),
    "bias_bool_unaligned": ({"bias": "bool", "bias_aligned": False}, ("descriptor",)),
    "alibi": ({"alibi": True}, ("descriptor",)),
    "sinks": ({"sinks": True, "lse": True}, ("descriptor",)),
    "dropout": ({"dropout": True}, ("descriptor",)),
    "varlen": ({"varlen": True, "lse": True}, LOADS),
    "varlen_document": ({"varlen": True, "mask": parse_mask("document")}, LOADS),
    "seqused": ({"seqused": "qk", "lse": True}, LOADS),
    "seqused_k_chunked": ({"seqused": "k", "mask": parse_mask("chunked(64)")}, LOADS),
    "fp8": ({"dtype": DType.FP8, "descale": True}, LOADS),
    "tf32": ({"dtype": DType.TF32}, ("pointer",)),
    "everything": (EVERYTHING, LOADS),
    "head_tiles": ({"head_dim_qk": 192, "head_dim_v": 96}, LOADS),
    "head_tiles_qk": ({"head_dim_qk": 80, "head_dim_v": 64, "lse": True}, LOADS),
}


def rendered(loads: Loads, loops: Loops = "split", **changes: typing.Any) -> RenderedKernel:
    spec = AttentionSpec(**{"dtype": DType.BF16, "head_dim_qk": 128, "head_dim_v": 128, **changes})
    config = TritonForwardConfig(
        block_m=128, block_n=64, num_warps=8, num_stages=2, loads=loads, head_tiles=2, loops=loops
    )
    return render(spec, config)


def _all_kernels() -> dict[str, RenderedKernel]:
    found = {
        f"forward_{name}_{loads}{'_lse' * lse}.py": rendered(loads, mask=parse_mask(text), lse=lse)
        for name, text in PLAIN_MASKS.items()
        for loads in LOADS
        for lse in (False, True)
    }
    # The loads of a mask's kernel are those of any other.
    found |= {f"mask_{name}.py": rendered("descriptor", mask=parse_mask(text)) for name, text in MASKS.items()}
    for name in ("sliding_window", "window_left", "chunked", "dilated_window", "intersection"):
        found[f"mask_{name}_single.py"] = rendered("descriptor", "single", mask=parse_mask(MASKS[name]))
    for name, (changes, loads) in FEATURES.items():
        found |= {f"feature_{name}_{load}.py": rendered(load, **changes) for load in loads}
    return found


KERNELS = _all_kernels()


@pytest.mark.parametrize("name", KERNELS)
def test_source_is_the_golden_file(name: str, request: pytest.FixtureRequest) -> None:
    path = FOLDER / name
    if request.config.getoption("--update-golden"):
        path.parent.mkdir(exist_ok=True)
        path.write_bytes(KERNELS[name].source.encode())
    # Bytes: a carriage return or a missing last newline is a difference.
    assert KERNELS[name].source.encode() == path.read_bytes(), f"{name} changed; review, then run with --update-golden"


def test_no_golden_file_is_left_over(request: pytest.FixtureRequest) -> None:
    for path in FOLDER.iterdir() if request.config.getoption("--update-golden") else ():
        if path.name not in KERNELS:
            path.unlink()
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


def hashes() -> dict[str, list[str]]:
    """What must be the same in every process."""
    return {n: [hashlib.sha256(k.source.encode()).hexdigest(), k.digest] for n, k in KERNELS.items()}


_PRINT_HASHES = """
import importlib.util, json, sys
spec = importlib.util.spec_from_file_location("golden_kernels", sys.argv[1])
module = importlib.util.module_from_spec(spec)
spec.loader.exec_module(module)
print(json.dumps(module.hashes()))
"""


@pytest.mark.parametrize("seed", ["0", "4242"])
def test_same_bytes_in_every_process(seed: str) -> None:
    path = os.pathsep.join(filter(None, [os.environ.get("PYTHONPATH"), str(ROOT)]))
    result = subprocess.run(
        [sys.executable, "-c", _PRINT_HASHES, __file__],
        capture_output=True,
        text=True,
        timeout=60,
        check=True,
        env={**os.environ, "PYTHONHASHSEED": seed, "PYTHONPATH": path},
    )
    assert json.loads(result.stdout) == hashes()


@pytest.mark.parametrize("name", KERNELS)
def test_source_says_where_it_comes_from_and_not_when(name: str) -> None:
    docstring = ast.get_docstring(ast.parse(KERNELS[name].source))
    assert docstring is not None
    assert "templates/triton/forward.py.jinja" in docstring
    assert f"{KERNELS[name].plan.mask.title} mask" in docstring
    for key, text in PLAIN_MASKS.items():
        if re.fullmatch(rf"forward_{key}_(pointer|descriptor)(_lse)?\.py", name):
            assert f"{text} mask" in docstring
    plan = KERNELS[name].plan
    assert ("descriptor loads" if plan.descriptor else "pointer loads") in docstring
    assert ("with lse" in docstring) == plan.spec.lse
    assert ("with score_mod" in docstring) == (plan.spec.score_mod is not None)
    for feature in plan.spec.features:
        assert f"with {feature}" in docstring
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
    assert [a.arg for a in arguments] == [*kernel.plan.entries[0].arguments, *kernel.plan.entries[0].constants]
    constants = [a.arg for a in arguments if a.annotation and ast.unparse(a.annotation) == "tl.constexpr"]
    assert constants == list(kernel.plan.entries[0].constants)


@pytest.mark.parametrize("name", KERNELS)
def test_nothing_that_is_defined_is_unused(name: str) -> None:
    kernel = KERNELS[name]
    tree = ast.parse(kernel.source)
    defined = {node.name for node in tree.body if isinstance(node, ast.FunctionDef)}
    called = {n.func.id for n in ast.walk(tree) if isinstance(n, ast.Call) and isinstance(n.func, ast.Name)}
    assert defined - called == {kernel.entry_point} | ({"attn_tiles"} if kernel.plan.mask.table else set())


@pytest.mark.parametrize("name", KERNELS)
def test_every_argument_of_the_kernel_is_used(name: str) -> None:
    kernel = KERNELS[name]
    functions = (node for node in ast.parse(kernel.source).body if isinstance(node, ast.FunctionDef))
    body = next(function for function in functions if function.name == kernel.entry_point)
    used = {node.id for node in ast.walk(body) if isinstance(node, ast.Name)}
    assert {*kernel.plan.entries[0].arguments, *kernel.plan.entries[0].constants} - used == set()
