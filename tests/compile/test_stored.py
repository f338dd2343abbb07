"""Binaries of earlier processes are found without Triton's own key, and only where nothing stands between."""

from __future__ import annotations

import dataclasses
import typing
from collections.abc import Callable
from pathlib import Path

import pytest
import triton

from flashgen.codegen import HopperForwardConfig, KernelConfig, RenderedKernel, TritonForwardConfig, render
from flashgen.compile import CompiledKernel, compile_kernel, compiler, load_kernel, stored
from flashgen.spec import AttentionSpec, parse_problem
from flashgen.storage import own_folders, tree_stamp
from flashgen.target import named_target

SPEC = parse_problem("b=1 h=1 s=64 d=64 full fp16").spec
PORTABLE = TritonForwardConfig(block_m=64, block_n=32, num_warps=4, num_stages=2)
HOPPER = HopperForwardConfig(
    num_warps=4, num_stages=2, consumers=2, block_n=64, head_group=1, tail_heads=1, queries="shared"
)


@pytest.fixture(autouse=True)
def _own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FLASHGEN_CACHE", str(tmp_path / "cache"))
    # Whatever was edited meanwhile: nothing of it is loaded here.
    stamp = tree_stamp(*own_folders()) or "edited"
    monkeypatch.setattr(stored, "tree_stamp", lambda *roots: stamp)
    monkeypatch.setattr(stored, "is_still", lambda *given: True)


@pytest.fixture
def compilations(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The name of each kernel that Triton was asked for."""
    asked: list[str] = []

    def compile_(source: typing.Any, **options: typing.Any) -> object:
        asked.append(source.name)
        return triton_compile(source, **options)

    triton_compile = compiler.triton_compile
    monkeypatch.setattr(compiler, "triton_compile", compile_)
    return asked


def build(
    config: KernelConfig = PORTABLE, spec: AttentionSpec = SPEC, rendered: RenderedKernel | None = None
) -> CompiledKernel:
    return compile_kernel(rendered or render(spec, config), spec, config, named_target("sm_90"))


@pytest.mark.parametrize("config", [PORTABLE, HOPPER], ids=["triton", "gluon"])
def test_the_second_process_loads_what_the_first_compiled(config: KernelConfig, compilations: list[str]) -> None:
    first = build(config)
    second = build(config)
    assert compilations == ["attn_fwd"]
    assert second.binary_hash == first.binary_hash
    assert second.resources == first.resources
    (of_triton,), (ours,) = ([entry.handle for entry in built.entries] for built in (first, second))
    assert ours is not of_triton
    assert (ours.metadata, ours.packed_metadata, ours.name) == (
        of_triton.metadata,
        of_triton.packed_metadata,
        of_triton.name,
    )
    assert (ours.kernel, ours.hash) == (of_triton.kernel, of_triton.hash)
    # What launchers of Triton ask of the source, and what tools read.
    for name in ("signature", "constants", "attrs", "name"):
        assert getattr(ours.src, name) == getattr(of_triton.src, name)
    assert [*ours.src.fn.arg_names] == load_kernel(render(SPEC, config)).arg_names
    assert ours.src.fn.launch_metadata is of_triton.src.fn.launch_metadata is None
    assert ours.asm["ptx"] == of_triton.asm["ptx"]
    with pytest.raises(KeyError):
        ours.asm["nothing"]


def test_whatever_a_binary_depends_on_is_in_its_key(monkeypatch: pytest.MonkeyPatch) -> None:
    rendered = render(SPEC, PORTABLE)
    (entry,) = rendered.plan.entries
    seen: list[stored.Recipe] = []

    def built(recipe: stored.Recipe, make_source: object) -> typing.NoReturn:
        seen.append(recipe)
        raise RuntimeError("only the recipe is wanted")

    with monkeypatch.context() as patch:
        patch.setattr(compiler, "_built", built)
        for config in (PORTABLE, dataclasses.replace(PORTABLE, num_warps=8), dataclasses.replace(PORTABLE, block_n=64)):
            with pytest.raises(Exception, match="only the recipe"):
                build(config)
    recipe = seen[0]
    others = [
        *seen[1:],
        dataclasses.replace(recipe, rendered=dataclasses.replace(rendered, source=rendered.source + "# more\n")),
        # Of the modules that it imports, only the digest tells.
        dataclasses.replace(recipe, rendered=dataclasses.replace(rendered, digest="0" * 16)),
        dataclasses.replace(recipe, target=dataclasses.replace(recipe.target, arch=80)),
        dataclasses.replace(recipe, alignment={}),
        dataclasses.replace(recipe, signature={**recipe.signature, entry.arguments[0]: "*bf16"}),
    ]
    keys = {stored.binary_key(other) for other in (recipe, *others)}
    assert None not in keys
    assert len(keys) == 1 + len(others)
    key = stored.binary_key(recipe)
    for name, value in (("DISABLE_PTXAS_OPT", "1"), ("TRITON_DEFAULT_FP_FUSION", "0")):
        with monkeypatch.context() as patch:
            patch.setenv(name, value)
            assert stored.binary_key(recipe) != key
    monkeypatch.setattr(stored, "tree_stamp", lambda *roots: "another")
    assert stored.binary_key(recipe) != key
    monkeypatch.setattr(stored, "tree_stamp", lambda *roots: None)
    assert stored.binary_key(recipe) is None


def other_assembler(patch: pytest.MonkeyPatch) -> None:
    patch.setenv("TRITON_PTXAS_PATH", str(triton.knobs.nvidia.ptxas.path))


def always_compile(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(triton.knobs.compilation, "always_compile", True)


def a_listener(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(triton.knobs.compilation, "listener", lambda **given: None)


def a_hook(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(triton.knobs.runtime, "add_stages_inspection_hook", lambda *given: ("", ""))


@pytest.mark.parametrize("step", [other_assembler, always_compile, a_listener, a_hook])
def test_who_steps_between_is_asked(
    step: Callable[[pytest.MonkeyPatch], None], compilations: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    build()
    assert len(compilations) == 1
    with monkeypatch.context() as patch:
        step(patch)
        build()
    assert len(compilations) == 2
    build()
    assert len(compilations) == 2


def test_a_binary_that_is_gone_is_compiled_again(
    compilations: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(triton.knobs.cache, "dir", str(tmp_path / "triton"))
    first = build()
    for gone in ("metadata", "all"):
        (path,) = (tmp_path / "triton").rglob("attn_fwd.json")
        if gone == "metadata":
            path.unlink()
        else:
            monkeypatch.setattr(triton.knobs.cache, "dir", str(tmp_path / "another"))
        before = len(compilations)
        assert build().binary_hash == first.binary_hash
        assert len(compilations) == before + 1
    # What was left here says nothing that could be believed.
    for path in (tmp_path / "cache" / "binaries").iterdir():
        path.write_text("00000000" + "f" * 64)
    assert build().binary_hash == first.binary_hash
    assert compilations[-1] == "attn_fwd"
