"""The structures of the forward kernel for Hopper: which there are, what their sources have, how they are formatted."""

from __future__ import annotations

import dataclasses
import itertools
import random
import subprocess
import sys
import typing
from pathlib import Path

import pytest

from flashgen.codegen import HopperForwardConfig, argument_kind, constant_values, make_plan, render
from flashgen.codegen.constraints import check_config
from flashgen.codegen.hopper_plan import HopperForwardPlan
from flashgen.spec import AttentionSpec, DType, parse_mask
from flashgen.spec.mods import parse_mod
from flashgen.target import named_target

H200 = named_target("sm_90")
SPEC = AttentionSpec(dtype=DType.BF16, head_dim_qk=128, head_dim_v=128)
CONFIG = HopperForwardConfig(consumers=2, block_n=128, num_warps=4, num_stages=2)
MASKS = (
    "full",
    "causal",
    "causal(align=top_left)",
    "sliding_window(127,3)",
    "sliding_window(127,-1)",
    "sliding_window(-1,3)",
    "prefix_lm(100)",
    "chunked(100)",
    "dilated_window(300,0,3)",
    "causal&chunked(100)",
    "sliding_window(63,0)&~sliding_window(7,0)",
    "document",
    "document(batched)&causal",
    "mask_mod('return (q_idx - kv_idx) // 3 == h')",
    "mask_mod('return t[b, q_idx] % 2 < u[kv_idx - q_idx]', t='int32[b,q_idx]', u='int64[any]')|prefix_lm(3)",
)
SCORE_MOD = parse_mod("score_mod('return score * 2.0 + w[h, q_idx - kv_idx]', w='bfloat16[h,any]')")
FEATURES: list[dict[str, typing.Any]] = [
    {},
    {"score_mod": SCORE_MOD},
    {"score_mod": parse_mod("score_mod('return tanh(score / 4.0) * 4.0')")},
    {"softcap": True},
    {"alibi": True},
    {"sinks": True},
    {"varlen": True},
    {"lse": True},
]
CHOICES: list[dict[str, typing.Any]] = [
    {},
    {"consumers": 1},
    {"consumers": 3},
    {"queries": "registers"},
    {"turns": "alternate"},
    {"convert": "late"},
    {"convert": "held"},
    {"rescale": 8},
    {"out_buffer": "half"},
    {"out_buffer": "queries"},
    {"diagonal": "half"},
    {"tiles": "overlap"},
    {"loops": "single"},
    {"pack": "heads"},
    {"release": "named"},
]
# What depends on how many registers and how much shared memory there is, and not on structure.
ROOM = ("registers", "shared memory")


def spec_of(mask: str = "full", **changes: typing.Any) -> AttentionSpec:
    return dataclasses.replace(SPEC, mask=parse_mask(mask), **changes)


def plan_of(mask: str = "full", **numbers: typing.Any) -> HopperForwardPlan:
    plan = make_plan(spec_of(mask), dataclasses.replace(CONFIG, **numbers))
    assert isinstance(plan, HopperForwardPlan)
    return plan


def is_structure(spec: AttentionSpec, config: HopperForwardConfig) -> bool:
    reasons = check_config(config, spec, H200)
    return all(any(word in reason for word in ROOM) for reason in reasons)


def drawn_sources(count: int) -> dict[str, str]:
    """Return sources of random structures by their digests."""
    rng = random.Random(0)
    sources: dict[str, str] = {}
    while len(sources) < count:
        features: dict[str, typing.Any] = {}
        for feature in rng.sample(FEATURES, rng.choice((0, 1, 2, 4))):
            features |= feature
        dims = rng.choice(((128, 128), (64, 64), (96, 96), (192, 128), (128, 160)))
        spec = spec_of(rng.choice(MASKS), head_dim_qk=dims[0], head_dim_v=dims[1], **features)
        numbers: dict[str, typing.Any] = {}
        for choice in rng.sample(CHOICES, 5):
            numbers |= choice
        config = dataclasses.replace(CONFIG, **numbers)
        if is_structure(spec, config):
            kernel = render(spec, config)
            sources[kernel.digest] = kernel.source
    return sources


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("sources")
    for digest, source in drawn_sources(150).items():
        (path / f"kernel_{digest}.py").write_text(source)
    return path


@pytest.mark.parametrize("line_length", [88, 120])
@pytest.mark.parametrize("own_package", [False, True], ids=["elsewhere", "in the checkout"])
def test_drawn_structures_are_formatted_as_ruff_would(folder: Path, line_length: int, own_package: bool) -> None:
    ruff = [sys.executable, "-m", "ruff"]
    options = ["--isolated", "--no-cache", f"--line-length={line_length}", str(folder)]
    # Where flashgen lies decides whether its modules are sorted as one's own.
    where = Path(__file__).parents[2] if own_package else folder
    for command in ([*ruff, "format", "--check", "--diff"], [*ruff, "check"]):
        result = subprocess.run(
            [*command, *options], cwd=where, capture_output=True, text=True, timeout=60, check=False
        )
        assert result.returncode == 0, result.stdout[-3000:] + result.stderr


def test_every_choice_has_its_own_source_where_it_matters() -> None:
    for mask in ("causal", "sliding_window(9,3)", "document"):
        legal = [choice for choice in CHOICES if is_structure(spec_of(mask), dataclasses.replace(CONFIG, **choice))]
        digests = {render(spec_of(mask), dataclasses.replace(CONFIG, **choice)).digest for choice in legal}
        assert len(digests) == len(legal), mask
        assert len(legal) >= len(CHOICES) - 2


def test_every_feature_and_every_pair_of_features_has_its_own_source() -> None:
    pairs = [first | second for first, second in itertools.combinations(FEATURES, 2)]
    found: dict[str, AttentionSpec] = {}
    for changes in [*FEATURES, *pairs]:
        spec = spec_of("causal", **changes)
        assert found.setdefault(render(spec, CONFIG).digest, spec) == spec
    assert len(found) > len(FEATURES)


def test_every_mask_has_its_own_source() -> None:
    for choice in CHOICES:
        config = dataclasses.replace(CONFIG, **choice)
        specs = [spec for spec in map(spec_of, MASKS) if is_structure(spec, config)]
        assert len({render(spec, config).digest for spec in specs}) == len(specs)


def test_numbers_do_not_change_the_source() -> None:
    for choice in CHOICES:
        config = dataclasses.replace(CONFIG, **choice)
        numbers: tuple[dict[str, int], ...] = (
            {"block_n": 64}, {"num_stages": 3}, {"programs": 2}, {"head_group": 8, "tail_heads": 32},
        )  # fmt: skip
        source = render(spec_of("causal"), config).source
        for change in numbers:
            assert render(spec_of("causal"), dataclasses.replace(config, **change)).source == source
        for dims in ((16, 16), (64, 32), (256, 256)):
            spec = spec_of("causal", head_dim_qk=dims[0], head_dim_v=dims[1], dtype=DType.FP16)
            assert render(spec, config).source == source
    # The threshold is a number, whether there is one is not.
    rarely = [dataclasses.replace(CONFIG, rescale=rescale) for rescale in (1, 8)]
    assert len({render(SPEC, config).source for config in rarely}) == 1
    windows = [spec_of(f"sliding_window({left},0)") for left in (0, 4096)]
    assert len({render(spec, CONFIG).source for spec in windows}) == 1


@pytest.mark.parametrize(
    ("mask", "want"),
    [
        ("full", False),
        ("causal", True),
        ("prefix_lm(100)", True),
        ("sliding_window(127,3)", True),
        ("sliding_window(-1,3)", False),
        ("document", False),
        ("document&causal", False),
    ],
)
def test_consumers_pass_over_keys_that_others_see(mask: str, want: bool) -> None:
    for numbers in ({}, {"tiles": "overlap"}, {"queries": "registers"}):
        config = dataclasses.replace(CONFIG, **numbers)
        assert plan_of(mask, **numbers).own_keys == want
        assert ("def pass_over(" in render(spec_of(mask), config).source) == want
        # One consumer has no others, and those that take turns take equally many steps.
        assert not plan_of(mask, **numbers, consumers=1).own_keys
        assert not plan_of(mask, **numbers, turns="alternate").own_keys
        assert not plan_of(mask, **numbers, pack="heads").own_keys


def test_only_masks_without_a_formula_read_a_table() -> None:
    for mask in MASKS:
        source = render(spec_of(mask), CONFIG).source
        assert ("tile_index_ptr" in source) != parse_mask(mask).by_formula
        assert ("kv_bounds(" in source) == parse_mask(mask).by_formula


def test_loops_mask_where_they_must() -> None:
    windows = {"sliding_window(127,3)", "chunked(100)", "dilated_window(300,0,3)", "causal&chunked(100)"}
    for mask in MASKS:
        split, single = plan_of(mask), plan_of(mask, loops="single")
        flags = "".join(flag[0] for flag, _ in split.key_loops)
        if mask == "full":
            # Keys past the end are in the first tile that is walked.
            assert (flags, split.branches, single.one_loop) == ("F", False, False)
            continue
        # Each tile asks whether it is masked.
        assert [flag for flag, _ in single.key_loops] == [single.is_masked]
        assert not single.branches
        assert single.one_loop
        # Between two edges there are three loops; else a loop without mask code where no other tile needs it.
        assert split.branches != split.mask.two_edges
        assert flags == "TFT"
        if mask in windows:
            assert split.mask.two_edges


def test_constants_are_those_of_the_kernel() -> None:
    for choice, dims in itertools.product(CHOICES, ((64, 64), (96, 64), (192, 128), (80, 160))):
        config = dataclasses.replace(CONFIG, **choice)
        spec = dataclasses.replace(SPEC, head_dim_qk=dims[0], head_dim_v=dims[1])
        (entry,) = render(spec, config).plan.entries
        constants = constant_values(spec, config)
        assert tuple(constants) == entry.constants
        assert constants["ROWS"] == 64
        assert constants["PRODUCER_REGISTERS"] == 24


@pytest.mark.parametrize("varlen", [False, True])
def test_descriptors_have_boxes(varlen: bool) -> None:
    for choice in CHOICES:
        config = dataclasses.replace(CONFIG, **choice)
        spec = dataclasses.replace(SPEC, head_dim_qk=96, head_dim_v=192, varlen=varlen)
        (entry,) = render(spec, config).plan.entries
        constants = constant_values(spec, config)
        half = 2 if config.out_buffer == "half" else 1
        want = {"q": (64, 64), "q_1": (64, 32), "k": (128, 64), "k_1": (128, 32), "v": (128, 128), "v_1": (128, 64)}
        want |= {"out": (64, 128 // half), "out_1": (64, 64 // half)}
        boxes = {name: entry.box(name, constants) for name in entry.arguments if argument_kind(name) == "descriptor"}
        assert boxes == {f"{name}_desc": (1,) * (3 if varlen else 2) + box for name, box in want.items()}
        assert entry.ragged == (boxes.keys() if varlen else frozenset())


def test_what_is_imported_is_used() -> None:
    for source in drawn_sources(40).values():
        imported = source.split("from flashgen.primitives.hopper import (")[1].split(")")[0]
        names = [name.strip() for name in imported.split(",") if name.strip()]
        body = source.split(")", 1)[1]
        assert names == sorted(names)
        for name in names:
            # Constants are in capitals; the body includes the imports themselves.
            assert body.count(name) > 1 if name.isupper() else f"{name}(" in body, name
