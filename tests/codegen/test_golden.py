"""Rendered kernels, byte for byte; `pytest tests/codegen --update-golden` rewrites the files for review."""

from __future__ import annotations

import ast
import dataclasses
import hashlib
import json
import os
import re
import subprocess
import sys
import typing
from pathlib import Path

import pytest

from flashgen.codegen import (
    HopperDecodeConfig,
    HopperForwardConfig,
    RenderedKernel,
    TritonBackwardConfig,
    TritonDecodeConfig,
    TritonForwardConfig,
    render,
)
from flashgen.codegen.config import QueryGradient
from flashgen.codegen.kernel_config import Loads, Loops
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

# What differs from a full mask of bf16, where dQ comes from, the loads and the loops.
BACKWARD: dict[str, tuple[dict[str, typing.Any], QueryGradient, Loads, Loops]] = {
    "full": ({}, "kernel", "descriptor", "split"),
    "full_atomic": ({}, "atomic", "descriptor", "split"),
    "causal": ({"mask": parse_mask("causal")}, "kernel", "pointer", "split"),
    "causal_atomic": ({"mask": parse_mask("causal")}, "atomic", "pointer", "split"),
    "causal_ordered": ({"mask": parse_mask("causal"), "deterministic": True}, "ordered", "pointer", "split"),
    "ordered": ({}, "ordered", "descriptor", "split"),
    "sliding_window": ({"mask": parse_mask(MASKS["sliding_window"])}, "kernel", "pointer", "split"),
    "window_single": ({"mask": parse_mask(MASKS["sliding_window"])}, "kernel", "pointer", "single"),
    "intersection": ({"mask": parse_mask("prefix_lm(9)&chunked(100)")}, "atomic", "descriptor", "split"),
    "dilated_window": ({"mask": parse_mask(MASKS["dilated_window"])}, "atomic", "descriptor", "single"),
    "document": ({"mask": parse_mask("document")}, "kernel", "pointer", "split"),
    "table": ({"mask": parse_mask(MASKS["mask_mod"]), "seqused": "k"}, "atomic", "pointer", "split"),
    "varlen": ({"varlen": True, "mask": parse_mask("causal")}, "kernel", "pointer", "split"),
    "varlen_ordered": ({"varlen": True, "seqused": "q"}, "ordered", "pointer", "split"),
    "seqused": ({"seqused": "qk"}, "kernel", "pointer", "split"),
    "softcap": ({"softcap": True}, "kernel", "pointer", "split"),
    "score_mod": ({"score_mod": parse_mod("score_mod('return tanh(score / 4.0) * w[h]', w='float32[h]')")},
                  "kernel", "pointer", "split"),
    "bias": ({"bias": "input"}, "atomic", "descriptor", "split"),
    "bias_unaligned": ({"bias": "fp32", "bias_aligned": False, "dbias": True}, "kernel", "pointer", "split"),
    "bias_varlen": ({"bias": "bool", "varlen": True}, "kernel", "pointer", "split"),
    "dropout": ({"dropout": True}, "kernel", "descriptor", "split"),
    "alibi": ({"alibi": True, "sinks": True}, "kernel", "descriptor", "split"),
    "tf32": ({"dtype": DType.TF32}, "kernel", "pointer", "single"),
    "everything": ({**EVERYTHING, "lse": False, "dbias": True}, "kernel", "pointer", "split"),
}  # fmt: skip

# What differs from a full mask of bf16, and from two consumers of 128 keys at a time.
HOPPER_DECODE: dict[str, tuple[dict[str, typing.Any], dict[str, typing.Any]]] = {
    "causal": ({"mask": parse_mask("causal")}, {"queries": "registers", "release": "named", "rescale": 8}),
    "pages": (
        {
            "mask": parse_mask("sliding_window(100,0)"), "lse": True, "sinks": True, "alibi": True, "softcap": True,
            "page_size": 256,
        },
        {"pack": "heads", "loops": "single"},
    ),
    "append": ({"append": True, "batch_idx": True}, {"consumers": 1}),
    "append_small_pages": (
        {"mask": parse_mask("causal"), "append": True, "rotary": "pairs", "page_size": 16, "head_dim_qk": 96},
        {"queries": "registers"},
    ),
}  # fmt: skip
HOPPER: dict[str, tuple[dict[str, typing.Any], dict[str, typing.Any]]] = {
    "full": ({}, {"queries": "registers", "turns": "alternate"}),
    "full_one_consumer": ({"lse": True}, {"consumers": 1, "programs": 2, "block_n": 64}),
    "causal": ({"mask": parse_mask("causal"), "lse": True}, {"queries": "registers", "diagonal": "half"}),
    "causal_overlap": (
        {"mask": parse_mask("causal"), "lse": True}, {"queries": "registers", "diagonal": "half", "tiles": "overlap"},
    ),
    "causal_rescale": (
        {"mask": parse_mask("causal(align=top_left)")}, {"convert": "late", "rescale": 8, "out_buffer": "half"},
    ),
    "causal_named": (
        {"mask": parse_mask("causal")}, {"convert": "held", "tiles": "overlap", "release": "named"},
    ),
    "causal_turns": ({"mask": parse_mask("causal")}, {"consumers": 3, "turns": "alternate", "tiles": "overlap"}),
    "prefix_lm": ({"mask": parse_mask("prefix_lm(100)")}, {"out_buffer": "queries"}),
    "sliding_window": ({"mask": parse_mask(MASKS["sliding_window"])}, {"queries": "registers"}),
    "window_single": ({"mask": parse_mask(MASKS["sliding_window"])}, {"loops": "single", "tiles": "overlap"}),
    "intersection": ({"mask": parse_mask(MASKS["intersection"]), "varlen": True}, {"diagonal": "half"}),
    "document": ({"mask": parse_mask(MASKS["document"])}, {"queries": "registers"}),
    "table": ({"mask": parse_mask(MASKS["mask_mod_captures"]), "varlen": True, "lse": True}, {"loops": "single"}),
    "mask_mod": ({"mask": parse_mask("mask_mod('return q_idx != kv_idx')")}, {"tiles": "overlap"}),
    "score_mod": ({"score_mod": SCORE_MOD, "softcap": True, "sinks": True}, {"queries": "registers"}),
    "softcap": ({"mask": parse_mask("causal"), "softcap": True}, {"block_n": 64}),
    "alibi": ({"mask": parse_mask("causal"), "alibi": True, "varlen": True}, {"consumers": 3, "block_n": 64}),
    "varlen": ({"varlen": True, "lse": True, "sinks": True}, {"tiles": "overlap"}),
    "heads": ({"mask": parse_mask("causal"), "varlen": True, "lse": True}, {"consumers": 3, "pack": "heads"}),
    "heads_alibi": ({"mask": parse_mask(MASKS["window_left"]), "alibi": True}, {"pack": "heads", "block_n": 64}),
    "head_tiles": (
        {"head_dim_qk": 192, "head_dim_v": 96, "varlen": True},
        {"out_buffer": "half", "rescale": 8, "tiles": "overlap"},
    ),
    "head_tiles_qk": ({"head_dim_qk": 80, "head_dim_v": 64, "mask": parse_mask("causal")}, {"diagonal": "half"}),
}  # fmt: skip

# What differs from a full mask of bf16, and the loads and the loops.
DECODE: dict[str, tuple[dict[str, typing.Any], Loads, Loops]] = {
    "full": ({}, "descriptor", "split"),
    "causal_single": ({"mask": parse_mask("causal"), "lse": True}, "pointer", "single"),
    "window": ({"mask": parse_mask(MASKS["sliding_window"]), "sinks": True, "alibi": True}, "pointer", "split"),
    "pages": ({"mask": parse_mask("causal"), "page_size": 16, "lse": True}, "pointer", "split"),
    "pages_descriptor": ({"page_size": 256, "softcap": True}, "descriptor", "single"),
    "append": ({"mask": parse_mask("causal"), "append": True, "batch_idx": True}, "descriptor", "split"),
    "append_pages": (
        {"mask": parse_mask("causal"), "append": True, "rotary": "halves", "page_size": 64, "lse": True},
        "descriptor", "split",
    ),
    "everything": (
        {
            "mask": parse_mask("causal&chunked(64)"), "append": True, "rotary": "pairs", "rotary_fp32": True,
            "leftpad": True, "batch_idx": True, "score_mod": SCORE_MOD, "softcap": True, "alibi": True, "sinks": True,
            "lse": True, "head_dim_qk": 192, "head_dim_v": 96,
        },
        "pointer", "split",
    ),
    "fp8": ({"fp8_kv": True, "descale": True, "leftpad": True}, "pointer", "split"),
    "latent": ({"head_dim_qk": 576, "head_dim_v": 512, "shared_kv": True}, "descriptor", "split"),
}  # fmt: skip


def rendered(loads: Loads, loops: Loops = "split", **changes: typing.Any) -> RenderedKernel:
    spec = AttentionSpec(**{"dtype": DType.BF16, "head_dim_qk": 128, "head_dim_v": 128, **changes})
    config = TritonForwardConfig(
        block_m=128, block_n=64, num_warps=8, num_stages=2, loads=loads, head_tiles=2, loops=loops
    )
    return render(spec, config)


def rendered_backward(changes: dict[str, typing.Any], dq: QueryGradient, loads: Loads, loops: Loops) -> RenderedKernel:
    spec = AttentionSpec(**{"dtype": DType.BF16, "head_dim_qk": 128, "head_dim_v": 128, "phase": "backward", **changes})
    config = TritonBackwardConfig(block_m1=64, block_n1=128, num_warps=8, num_stages=2, dq=dq, loads=loads, loops=loops)
    if dq == "kernel":
        config = dataclasses.replace(config, block_m2=128, block_n2=64, num_warps2=8, num_stages2=2)
    return render(spec, config)


def rendered_decode(changes: dict[str, typing.Any], loads: Loads, loops: Loops) -> RenderedKernel:
    spec = AttentionSpec(**{"dtype": DType.BF16, "head_dim_qk": 128, "head_dim_v": 128, "phase": "decode", **changes})
    config = TritonDecodeConfig(
        block_m=16,
        block_n=64,
        num_warps=4,
        num_stages=3,
        loads=loads,
        loops=loops,
        head_tiles=2,
        launch="dependent" if loads == "descriptor" else "plain",
    )
    return render(spec, config)


def rendered_hopper(changes: dict[str, typing.Any], numbers: dict[str, typing.Any]) -> RenderedKernel:
    spec = AttentionSpec(**{"dtype": DType.BF16, "head_dim_qk": 128, "head_dim_v": 128, **changes})
    return render(
        spec, HopperForwardConfig(**{"consumers": 2, "block_n": 128, "num_warps": 4, "num_stages": 2, **numbers})
    )


def rendered_hopper_decode(changes: dict[str, typing.Any], numbers: dict[str, typing.Any]) -> RenderedKernel:
    spec = AttentionSpec(**{"dtype": DType.BF16, "head_dim_qk": 128, "head_dim_v": 128, "phase": "decode", **changes})
    return render(
        spec, HopperDecodeConfig(**{"consumers": 2, "block_n": 128, "num_warps": 4, "num_stages": 2, **numbers})
    )


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
    found |= {f"backward_{name}.py": rendered_backward(*how) for name, how in BACKWARD.items()}
    found |= {f"decode_{name}.py": rendered_decode(*how) for name, how in DECODE.items()}
    found |= {f"decode_hopper_{name}.py": rendered_hopper_decode(*how) for name, how in HOPPER_DECODE.items()}
    found |= {f"hopper_{name}.py": rendered_hopper(*how) for name, how in HOPPER.items()}
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
    phase = KERNELS[name].plan.spec.phase
    family = "gluon/hopper" if name.startswith(("hopper", "decode_hopper")) else "triton"
    assert f"templates/{family}{'_' if '/' in family else '/'}{phase}.py.jinja" in docstring
    assert f"{KERNELS[name].plan.mask.title} mask" in docstring
    for key, text in PLAIN_MASKS.items():
        if re.fullmatch(rf"forward_{key}_(pointer|descriptor)(_lse)?\.py", name):
            assert f"{text} mask" in docstring
    plan = KERNELS[name].plan
    assert family != "triton" or ("descriptor loads" if plan.descriptor else "pointer loads") in docstring
    assert ("with lse" in docstring) == plan.spec.lse
    assert phase != "backward" or f"dQ by {BACKWARD[name[9:-3]][1]}" in docstring
    assert ("with score_mod" in docstring) == (plan.spec.score_mod is not None)
    for feature in plan.spec.features:
        assert f"with {feature}" in docstring
    assert not re.search(r"\d{4}-\d\d|\d\d:\d\d", KERNELS[name].source), "a date or a time"
    assert str(Path.home()) not in KERNELS[name].source
    assert str(ROOT) not in KERNELS[name].source


@pytest.mark.parametrize("name", KERNELS)
def test_signatures_are_the_plan(name: str) -> None:
    kernel = KERNELS[name]
    functions = _functions(kernel)
    for entry in kernel.plan.entries:
        arguments = functions[entry.name].args.args
        assert [a.arg for a in arguments] == [*entry.arguments, *entry.constants]
        constants = [a.arg for a in arguments if a.annotation and ast.unparse(a.annotation)[2:] == ".constexpr"]
        assert constants == list(entry.constants)


def _functions(kernel: RenderedKernel) -> dict[str, ast.FunctionDef]:
    return {node.name: node for node in ast.parse(kernel.source).body if isinstance(node, ast.FunctionDef)}


@pytest.mark.parametrize("name", KERNELS)
def test_kernels_are_those_of_the_plan(name: str) -> None:
    kernel = KERNELS[name]
    names = [entry.name for entry in kernel.plan.entries]
    assert kernel.entry_point in names
    # In the order of their launches.
    assert [function for function in _functions(kernel) if function in names] == names
    if name.startswith("backward"):
        changes, dq, _, _ = BACKWARD[name[9:-3]]
        own_dq, dbias = ["attn_bwd_dq"] * (dq == "kernel"), ["attn_bwd_dbias"] * ("dbias" in changes)
        assert names == ["attn_bwd_delta", "attn_bwd_dkdv", *own_dq, *dbias]
    else:
        first = ["append_rows"] * name.startswith("decode_hopper_append")
        assert names == [*first, "attn_decode" if name.startswith("decode") else "attn_fwd"]


@pytest.mark.parametrize("name", KERNELS)
def test_nothing_that_is_defined_is_unused(name: str) -> None:
    kernel = KERNELS[name]
    used = {node.id for node in ast.walk(ast.parse(kernel.source)) if isinstance(node, ast.Name)}
    # Only portable modules ask a mask which tiles it leaves.
    asks = kernel.plan.mask.table and not name.startswith("hopper")
    launched = {entry.name for entry in kernel.plan.entries} | ({"attn_tiles"} if asks else set())
    assert _functions(kernel).keys() - used == launched


@pytest.mark.parametrize("name", KERNELS)
def test_every_argument_of_a_kernel_is_used(name: str) -> None:
    kernel = KERNELS[name]
    functions = _functions(kernel)
    for entry in kernel.plan.entries:
        used = {node.id for node in ast.walk(functions[entry.name]) if isinstance(node, ast.Name)}
        assert {*entry.arguments, *entry.constants} <= used, entry.name


@pytest.mark.parametrize("name", BACKWARD)
def test_every_backward_function_says_what_it_does(name: str) -> None:
    functions = _functions(KERNELS[f"backward_{name}.py"])
    assert [f for f, node in functions.items() if not ast.get_docstring(node)] == []


@pytest.mark.parametrize("name", HOPPER)
def test_every_device_function_for_hopper_says_what_it_does(name: str) -> None:
    functions = _functions(KERNELS[f"hopper_{name}.py"])
    assert [f for f, node in functions.items() if not ast.get_docstring(node)] == ["attn_fwd"]
