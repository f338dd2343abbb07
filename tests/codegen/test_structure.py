"""What shares a source and a compiled kernel: specs and configs of one structure, whatever their numbers."""

from __future__ import annotations

import dataclasses
import itertools
import typing

import pytest
import torch

from flashgen.codegen import TritonBackwardConfig, TritonForwardConfig, argument_kind, constant_values, render
from flashgen.codegen.backward_plan import BackwardPlan
from flashgen.codegen.head_tiles import next_power_of_two
from flashgen.codegen.mask_plan import capture_names, mask_numbers, plan_mask
from flashgen.spec import AttentionSpec, DType, parse_mask
from flashgen.spec.masks import Mask, document
from flashgen.spec.mods import parse_mod

SPEC = AttentionSpec(dtype=DType.BF16, head_dim_qk=64, head_dim_v=64)
CONFIG = TritonForwardConfig(block_m=64, block_n=32, num_warps=4, num_stages=2)
CONFIGS = [
    dataclasses.replace(CONFIG, loads=loads, loops=loops, head_tiles=tiles)
    for loads in ("pointer", "descriptor")
    for loops in ("split", "single")
    for tiles in (1, 2)
]

# Masks of one structure in a line, of another in the next.
ONE_STRUCTURE = [
    ("sliding_window(127,0)", "sliding_window(5,0)", "sliding_window(0,9)"),
    ("sliding_window(127,-1)", "sliding_window(0,-1)"),
    ("sliding_window(-1,3)", "sliding_window(-1,100000)"),
    ("causal", "causal"),
    ("causal(align=top_left)",),
    ("full",),
    ("prefix_lm(0)", "prefix_lm(77)"),
    ("chunked(1)", "chunked(8192)"),
    ("dilated_window(8,8,2)", "dilated_window(30,0,1)"),
    ("global_tokens(4)|sliding_window(8,8)", "global_tokens(1)|sliding_window(2,1)"),
    ("global_tokens(4)&sliding_window(8,8)",),
    ("causal&chunked(8)", "causal&chunked(1024)"),
    ("~chunked(4)|causal", "~chunked(9)|causal"),
    ("document",),
    ("document(batched)",),
    ("mask_mod('return q_idx - kv_idx < 3')",),
    ("mask_mod('return q_idx - kv_idx < 4')",),
]


def spec_of(mask: str | Mask, **changes: typing.Any) -> AttentionSpec:
    return dataclasses.replace(SPEC, mask=parse_mask(mask) if isinstance(mask, str) else mask, **changes)


@pytest.mark.parametrize("masks", ONE_STRUCTURE, ids=lambda masks: masks[0])
def test_numbers_of_a_mask_change_neither_source_nor_compile_key(masks: tuple[str, ...]) -> None:
    for config in CONFIGS:
        kernels = [render(spec_of(mask), config) for mask in masks]
        assert len({(kernel.source, kernel.digest) for kernel in kernels}) == 1
        assert len({kernel.plan for kernel in kernels}) == 1
    structures = {spec_of(mask).structure() for mask in masks}
    assert len(structures) == 1
    (structure,) = structures
    assert structure.structure() == structure
    assert render(structure, CONFIG).source == render(spec_of(masks[0]), CONFIG).source


def test_other_structures_have_other_sources_and_compile_keys() -> None:
    for config in CONFIGS:
        specs = [spec_of(masks[0]) for masks in ONE_STRUCTURE]
        assert len({render(spec, config).digest for spec in specs}) == len(specs)
        assert len({spec.structure() for spec in specs}) == len(specs)


def test_a_single_loop_is_another_source_only_where_it_differs() -> None:
    for masks in ONE_STRUCTURE:
        split, single = (render(spec_of(masks[0]), dataclasses.replace(CONFIG, loops=m)) for m in ("split", "single"))
        two_edges = any(word in masks[0] for word in ("sliding_window(127", "chunked(1)", "dilated", "causal&chunked"))
        assert (split.source != single.source) == two_edges, masks[0]
        assert single.plan.single_loop == two_edges


FEATURES: list[dict[str, typing.Any]] = [
    {},
    {"score_mod": parse_mod("score_mod('return score * 2.0')")},
    {"score_mod": parse_mod("score_mod('return score * 3.0')")},
    {"softcap": True},
    {"bias": "input"},
    {"bias": "bool"},
    {"bias": "fp32", "bias_aligned": False},
    {"alibi": True},
    {"sinks": True},
    {"dropout": True},
    {"varlen": True},
    {"seqused": "q"},
    {"seqused": "k"},
    {"seqused": "qk"},
    {"dtype": DType.FP8},
    {"dtype": DType.FP8, "descale": True},
    {"dtype": DType.TF32},
    {"lse": True},
]


def test_every_feature_and_every_pair_of_features_has_its_own_source() -> None:
    pairs = [first | second for first, second in itertools.combinations(FEATURES, 2)]
    found: dict[str, AttentionSpec] = {}
    for changes in [*FEATURES, *pairs]:
        if changes.get("descale") and changes.get("dtype") is not DType.FP8:
            continue
        spec = spec_of("causal", **changes)
        digest = render(spec, CONFIG).digest
        assert found.setdefault(digest, spec) == spec
    assert len(found) > len(FEATURES)


def test_tensors_of_a_mask_are_no_part_of_a_kernel() -> None:
    first, second = (document(torch.arange(n)) for n in (3, 7))
    assert spec_of(first).structure() == spec_of(second).structure() == spec_of("document").structure()
    assert render(spec_of(first), CONFIG).source == render(spec_of("document"), CONFIG).source
    assert not spec_of(first).structure().mask.tensors


def test_head_tiles_are_structure_only_where_they_are_two() -> None:
    two = dataclasses.replace(CONFIG, head_tiles=2)
    for dims in (64, 112, 128):
        spec = dataclasses.replace(SPEC, head_dim_qk=dims, head_dim_v=dims)
        assert render(spec, two).source == render(spec, CONFIG).source
    cut = {render(dataclasses.replace(SPEC, head_dim_qk=d, head_dim_v=d), two).source for d in (80, 96, 160, 192)}
    assert len(cut) == 1
    assert render(SPEC, CONFIG).source not in cut
    unequal = {
        render(dataclasses.replace(SPEC, head_dim_qk=qk, head_dim_v=v), two).source
        for qk, v in itertools.product((64, 96), (64, 96))
    }
    assert len(unequal) == 4


def test_numbers_of_a_mask_have_the_names_that_its_kernel_takes() -> None:
    texts = [mask for masks in ONE_STRUCTURE for mask in masks]
    texts.append("(sliding_window(9,3)&~sliding_window(2,1)&~sliding_window(0,0))|chunked(5)&~chunked(3)")
    for text in texts:
        mask = parse_mask(text)
        plan = plan_mask(mask.structure())
        assert tuple(mask_numbers(mask)) == tuple(name for leaf in plan.leaves for name in leaf.numbers)
        assert len(set(plan.arguments)) == len(plan.arguments)
        assert {f"{name}_ptr" for name in capture_names(mask)} <= set(plan.arguments)
        kernel = render(spec_of(mask), CONFIG)
        assert set(plan.arguments) <= set(kernel.plan.entries[0].arguments)
        assert [*mask_numbers(mask).values()] == [value for leaf in mask.leaves for _, value in leaf.parameters]


def test_constants_are_the_numbers_of_a_config_and_of_the_head_dimensions() -> None:
    for config in CONFIGS:
        for dims in ((64, 64), (96, 64), (192, 128), (80, 160)):
            spec = dataclasses.replace(SPEC, head_dim_qk=dims[0], head_dim_v=dims[1])
            (entry,) = render(spec, config).plan.entries
            assert sorted(constant_values(spec, config)) == sorted(entry.constants)


# Backward modules.

BACKWARD = TritonBackwardConfig(
    block_m1=32, block_n1=64, num_warps=4, num_stages=2, block_m2=64, block_n2=32, num_warps2=4, num_stages2=2
)
ADDED = dataclasses.replace(BACKWARD, dq="atomic", block_m2=0, block_n2=0, num_warps2=0, num_stages2=0)
BACKWARDS = [
    dataclasses.replace(config, loads=loads, loops=loops)
    for config in (BACKWARD, ADDED, dataclasses.replace(ADDED, dq="ordered"))
    for loads in ("pointer", "descriptor")
    for loops in ("split", "single")
]


@pytest.mark.parametrize("masks", ONE_STRUCTURE, ids=lambda masks: masks[0])
def test_numbers_change_no_backward_source(masks: tuple[str, ...]) -> None:
    for config in BACKWARDS:
        specs = [spec_of(mask).backward() for mask in masks]
        specs += [dataclasses.replace(specs[0], head_dim_qk=qk, head_dim_v=v) for qk, v in ((80, 80), (192, 128))]
        specs += [dataclasses.replace(specs[0], dtype=DType.FP16)]
        numbers: dict[str, int] = {"block_m1": 128, "block_n1": 32, "num_warps": 8, "num_stages": 1, "head_group": 4}
        if config.dq == "kernel":
            numbers |= {"block_m2": 128, "block_n2": 16, "num_warps2": 8, "num_stages2": 3}
        kernels = [render(spec, config) for spec in specs]
        kernels.append(render(specs[0], dataclasses.replace(config, **numbers, maxnreg=128)))
        assert len({(kernel.source, kernel.digest) for kernel in kernels}) == 1


def test_every_structure_of_a_backward_module_has_its_own_source() -> None:
    for spec in (spec_of("causal").backward(), spec_of("sliding_window(9,3)").backward()):
        assert len({render(spec, config).digest for config in BACKWARDS}) == len(BACKWARDS)
    # A table knows no loops: it has the tiles that are whole.
    spec = spec_of("document").backward()
    assert len({render(spec, config).digest for config in BACKWARDS}) == len(BACKWARDS) // 2


def test_every_feature_and_every_pair_has_its_own_backward_source() -> None:
    features = [f for f in FEATURES if f.get("dtype") is not DType.FP8 and "lse" not in f and "sinks" not in f]
    features += [{"bias": "input", "dbias": True}]
    pairs = [first | second for first, second in itertools.combinations(features, 2)]
    found: dict[str, AttentionSpec] = {}
    for changes in [*features, *(pair for pair in pairs if not pair.get("dbias") or pair["bias"] != "bool")]:
        spec = spec_of("causal", phase="backward", **changes)
        assert found.setdefault(render(spec, BACKWARD).digest, spec) == spec
    assert len(found) > len(features)


def test_what_is_part_of_lse_and_what_is_promised_change_no_backward_code() -> None:
    for config in BACKWARDS:
        digest = render(spec_of("causal").backward(), config).digest
        assert render(spec_of("causal", sinks=True).backward(), config).digest == digest
        assert render(spec_of("causal").backward(deterministic=True), config).digest == digest


def test_constants_of_a_backward_module_are_those_of_its_kernels() -> None:
    for config, dims in itertools.product(BACKWARDS, ((64, 64), (96, 64), (192, 128))):
        spec = dataclasses.replace(spec_of("causal").backward(), head_dim_qk=dims[0], head_dim_v=dims[1])
        constants = constant_values(spec, config)
        for entry in render(spec, config).plan.entries:
            assert set(entry.constants) <= set(constants)
            assert all(constants[name] > 0 for name in entry.constants), entry.name
        assert (constants["BLOCK_DQK"], constants["BLOCK_DV"]) == tuple(map(next_power_of_two, dims))


def test_descriptors_of_backward_kernels_have_boxes() -> None:
    for config in BACKWARDS:
        spec = dataclasses.replace(spec_of("causal").backward(), head_dim_qk=96)
        constants = constant_values(spec, config)
        sides = {"1": (config.block_m1, config.block_n1), "2": (config.block_m2, config.block_n2)}
        for entry in render(spec, config).plan.entries:
            m, n = sides["2" if entry.name == "attn_bwd_dq" else "1"]
            want = {"q": (m, 128), "do": (m, 64), "k": (n, 128), "v": (n, 64), "dq": (m, 128)}
            descriptors = [name for name in entry.arguments if argument_kind(name) == "descriptor"]
            tiles = {name: entry.box(name, constants) for name in descriptors}
            assert tiles == {name: (1, 1, *want[name.removesuffix("_desc")]) for name in descriptors}
            described = config.loads == "descriptor" and entry.name in ("attn_bwd_dkdv", "attn_bwd_dq")
            assert bool(descriptors) == described
            # The sums of dQ in float32 are added to by bulk copies, which end at no known time, or else by pointers.
            assert ("dq_desc" in descriptors) == (described and config.dq == "atomic")


@pytest.mark.parametrize("loops", ["split", "single"])
def test_a_backward_loop_masks_where_it_must(loops: typing.Literal["split", "single"]) -> None:
    config = dataclasses.replace(BACKWARD, loops=loops)
    masked = {}
    for mask in ("full", "causal", "sliding_window(9,3)", "document"):
        plan = render(spec_of(mask).backward(), config).plan
        assert isinstance(plan, BackwardPlan)
        masked[mask] = "".join(flag[0] for flag, _, _ in plan.row_loops), "".join(f[0] for f, _, _ in plan.key_loops)
    split = {"full": ("TF", "FT"), "causal": ("TF", "FT"), "sliding_window(9,3)": ("TFT", "TFT")}
    single = dict.fromkeys(split, ("T", "T"))
    assert masked == {**(split if loops == "split" else single), "document": ("FT", "FT")}
