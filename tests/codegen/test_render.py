"""What changes a rendered source, what changes its digest, and what a template may not do."""

from __future__ import annotations

import dataclasses
import importlib
import typing

import jinja2
import pytest

from flashgen.codegen import (
    HopperForwardConfig,
    KernelConfig,
    TritonForwardConfig,
    argument_kind,
    code_digest,
    constant_values,
    is_current,
    make_plan,
    render,
)
from flashgen.codegen.head_tiles import head_tiles, next_power_of_two
from flashgen.codegen.render import _canonical_module, _environment
from flashgen.errors import ConfigError
from flashgen.resources import module_source
from flashgen.spec import AttentionSpec, DType, causal

SPEC = AttentionSpec(dtype=DType.FP16, head_dim_qk=64, head_dim_v=64, mask=causal())
CONFIG = TritonForwardConfig(block_m=64, block_n=32, num_warps=4, num_stages=2)


class OtherConfig(KernelConfig):
    template: typing.ClassVar[str] = "triton/other"


OTHER = OtherConfig(num_warps=4, num_stages=2)


@pytest.mark.parametrize("loads", ["pointer", "descriptor"])
def test_numbers_do_not_change_the_source(loads: str) -> None:
    config = dataclasses.replace(CONFIG, loads=loads)
    source = render(SPEC, config).source
    for d, dv in ((16, 16), (72, 40), (192, 128), (256, 256)):
        assert render(dataclasses.replace(SPEC, head_dim_qk=d, head_dim_v=dv), config).source == source
    for dtype in (DType.FP16, DType.BF16, DType.FP32):
        assert render(dataclasses.replace(SPEC, dtype=dtype), config).source == source
    for dtype in (DType.FP8, DType.TF32):
        assert render(dataclasses.replace(SPEC, dtype=dtype), config).source != source
    for change in ({"block_m": 128}, {"block_n": 128}, {"num_warps": 8}, {"num_stages": 3}, {"maxnreg": 128}):
        assert render(SPEC, dataclasses.replace(config, **change)).source == source


def test_head_group_and_loads() -> None:
    assert render(SPEC, dataclasses.replace(CONFIG, head_group=8)).source == render(SPEC, CONFIG).source
    assert render(SPEC, dataclasses.replace(CONFIG, loads="descriptor")).source != render(SPEC, CONFIG).source


def test_digest_ignores_what_is_not_code() -> None:
    source = render(SPEC, CONFIG).source
    digest = code_digest(source)
    assert digest == render(SPEC, CONFIG).digest
    assert len(digest) == 16
    assert set(digest) <= set("0123456789abcdef")
    remarks = source.replace("# Epilogue: normalise once", "# The end").replace("Online softmax over", "Softmax of")
    assert remarks != source
    assert code_digest(remarks) == digest
    without_glossary = "\n".join(line for line in source.splitlines() if not line.lstrip().startswith("#"))
    assert code_digest(without_glossary) == digest
    assert code_digest(source.replace("\n\n\n", "\n")) == digest


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ("kv_idx <= q_idx", "kv_idx < q_idx"),
        ('float("-inf")', 'float("inf")'),
        ("tl.maximum(m_i, tl.max(qk, 1))", "tl.minimum(m_i, tl.max(qk, 1))"),
        ("tl.where(l_i == 0.0, 1.0, l_i)", "tl.where(l_i == 0.0, 2.0, l_i)"),
        ('input_precision="ieee"', 'input_precision="tf32"'),
        ("acc = acc * alpha[:, None]", "acc = acc * alpha[None, :]"),
    ],
)
def test_digest_changes_with_the_code(old: str, new: str) -> None:
    source = render(SPEC, CONFIG).source
    assert old in source
    assert code_digest(source.replace(old, new, 1)) != code_digest(source)


def test_digest_changes_with_every_statement_that_is_dropped() -> None:
    source = "def f(a, b=1):\n    x = a\n    y = None\n    return x\n"
    variants = [
        source,
        source.replace("y = None", "y = 0"),
        source.replace("y = None", "y = False"),
        source.replace("    y = None\n", ""),
        source.replace("return x", "return"),
        source.replace("b=1", "b=True"),
        source.replace("b=1", "b=1.0"),
        source.replace("b=1", "*, b=1"),
        source.replace("b=1", "b: int = 1"),
    ]
    assert len({code_digest(variant) for variant in variants}) == len(variants)


HOPPER = HopperForwardConfig(consumers=2, block_n=128, num_warps=4, num_stages=2)
PRIMITIVES = "flashgen.primitives.hopper"
# By its name it is the function.
RENDER_MODULE = importlib.import_module("flashgen.codegen.render")


def test_digest_covers_what_the_source_imports_from_flashgen(monkeypatch: pytest.MonkeyPatch) -> None:
    source = render(SPEC, HOPPER).source
    digest = code_digest(source)
    primitives = module_source(PRIMITIVES)
    changes = {
        "code": primitives.replace("count=1", "count=2"),
        "a comment": primitives + "# The end.\n",
        "a docstring": primitives.replace("Arrive at a barrier once.", "Arrive."),
        "the docstring of a constant": primitives.replace("Where packed sequences end", "Where sequences end"),
    }
    for what, text in changes.items():
        assert text != primitives, what
        with monkeypatch.context() as patch:
            patch.setattr(RENDER_MODULE, "module_source", {PRIMITIVES: text}.__getitem__)
            _canonical_module.cache_clear()
            assert (code_digest(source) != digest) == (what == "code"), what
    _canonical_module.cache_clear()
    assert code_digest(source) == digest


def test_digests_of_all_python_versions_are_one() -> None:
    # ast.dump, or a field that only some versions have, would give another.
    assert code_digest("def f(a: int, *, b=1):\n    return f'{a} {b:>{3}}', -1, 1.5, None, ...\n") == "2cba113fe85c6002"


def test_is_current() -> None:
    digest = render(SPEC, CONFIG).digest
    assert is_current(SPEC, CONFIG, digest)
    assert is_current(dataclasses.replace(SPEC, head_dim_qk=128), CONFIG, digest)
    assert not is_current(SPEC, dataclasses.replace(CONFIG, loads="descriptor"), digest)
    assert not is_current(SPEC, CONFIG, "0" * 16)


@pytest.mark.parametrize("text", ["{{ plan.no_such_field }}", "{{ misspelt }}", "{% if misspelt %}x{% endif %}"])
def test_an_undefined_name_in_a_template_is_an_error(text: str) -> None:
    with pytest.raises(jinja2.UndefinedError):
        _environment().from_string(text).render(spec=SPEC, plan=make_plan(SPEC, CONFIG))


@pytest.mark.parametrize("function", [render, make_plan, constant_values])
def test_unknown_template(function: typing.Callable[[AttentionSpec, KernelConfig], object]) -> None:
    with pytest.raises(ConfigError, match="'triton/other' has no kernels of the forward phase; known: triton/forward"):
        function(SPEC, OTHER)


def test_tiles_cover_a_head_dimension() -> None:
    for head_dim in range(16, 513, 8):
        (whole,) = head_tiles(head_dim, 1)
        assert whole == next_power_of_two(head_dim)
        assert head_dim <= whole < 2 * head_dim
        tiles = head_tiles(head_dim, 2)
        assert all(width >= 16 and width & (width - 1) == 0 for width in tiles)
        assert sum(tiles) >= head_dim
        assert len(tiles) == 1 or (sum(tiles) < whole and tiles[0] > tiles[1])
    # Products of fp8 sum over 32 columns at least.
    assert [head_tiles(dims, 2, 32) for dims in (16, 48, 80, 96, 144)] == [(32,), (64,), (64, 32), (64, 32), (128, 32)]
    composed = {dims: head_tiles(dims, 2) for dims in (80, 96, 112, 128, 160, 192)}
    assert composed == {
        80: (64, 16), 96: (64, 32), 112: (128,), 128: (128,), 160: (128, 32), 192: (128, 64),
    }  # fmt: skip


def test_constants_of_unequal_head_dimensions() -> None:
    spec = dataclasses.replace(SPEC, head_dim_qk=192, head_dim_v=72)
    blocks = {"BLOCK_M": 64, "BLOCK_N": 32}
    dims = {"HEAD_DIM_QK": 192, "HEAD_DIM_V": 72}
    assert constant_values(spec, CONFIG) == {**dims, "BLOCK_DQK": 256, "BLOCK_DV": 128, **blocks}
    two = dataclasses.replace(CONFIG, head_tiles=2)
    cut = {"BLOCK_DQK": 128, "BLOCK_DQK_1": 64, "BLOCK_DV": 64, "BLOCK_DV_1": 16}
    assert constant_values(spec, two) == {**dims, **cut, **blocks}
    assert set(make_plan(spec, two).constants) == {*dims, *cut, *blocks}


def test_argument_kinds() -> None:
    kinds = {name: argument_kind(name) for name in make_plan(dataclasses.replace(SPEC, lse=True), CONFIG).arguments}
    assert {n for n, k in kinds.items() if k == "pointer"} == {"q_ptr", "k_ptr", "v_ptr", "out_ptr", "lse_ptr"}
    assert [n for n, k in kinds.items() if k == "float"] == ["qk_scale"]
    assert sum(k == "stride" for k in kinds.values()) == 12
    described = make_plan(SPEC, dataclasses.replace(CONFIG, loads="descriptor")).arguments
    assert [n for n in described if argument_kind(n) == "descriptor"] == ["q_desc", "k_desc", "v_desc", "out_desc"]
    assert not [n for n in described if argument_kind(n) in ("pointer", "stride")]
