"""The shipped space serves every spec on every GPU, and a damaged file is refused with its place."""

from __future__ import annotations

import dataclasses
import itertools
import math
import random
from pathlib import Path

import pytest

from flashgen.codegen.config import TritonBackwardConfig, TritonForwardConfig
from flashgen.codegen.constraints import check_config, constraints_of
from flashgen.codegen.hopper_config import HopperForwardConfig
from flashgen.errors import ConfigError
from flashgen.resources import resource_dir
from flashgen.search_space import load_space
from flashgen.search_space import space as space_module
from flashgen.spec import AttentionSpec, DType, parse_problem
from flashgen.target import known_targets, named_target

TEMPLATE, BACKWARD, HOPPER = "triton/forward", "triton/backward", "gluon/hopper_forward"
DECODE = "triton/decode"
SHIPPED = (resource_dir("search_spaces") / f"{TEMPLATE}.yaml").read_text()
SHIPPED_BACKWARD = (resource_dir("search_spaces") / f"{BACKWARD}.yaml").read_text()


def bf16(head_dim: int) -> AttentionSpec:
    return AttentionSpec(dtype=DType.BF16, head_dim_qk=head_dim, head_dim_v=head_dim)


@pytest.fixture
def edited(tmp_path, monkeypatch):
    """Return a function that loads the shipped file of a template with one text replaced."""
    (tmp_path / "triton").mkdir()
    monkeypatch.setattr(space_module, "resource_dir", lambda name: tmp_path)

    def load(old: str, new: str, template: str = TEMPLATE):
        shipped = SHIPPED if template == TEMPLATE else SHIPPED_BACKWARD
        assert old in shipped
        (tmp_path / f"{template}.yaml").write_text(shipped.replace(old, new, 1))
        return load_space(template)

    return load


@pytest.mark.parametrize("target", known_targets(), ids=str)
def test_every_spec_has_seeds_and_legal_configs(target):
    space = load_space(TEMPLATE)
    for head_dim, dtype in itertools.product((16, 96, 256), DType):
        spec = AttentionSpec(dtype=dtype, head_dim_qk=head_dim, head_dim_v=head_dim)
        legal = space.legal(spec, target)
        assert legal.seeds
        assert set(legal.seeds) <= set(legal.configs)
        assert len(set(legal.configs)) == len(legal.configs) >= 5
        assert all(check_config(config, spec, target) == () for config in legal.configs)


@pytest.mark.parametrize("target", known_targets(), ids=str)
def test_every_backward_spec_has_seeds_and_legal_configs(target):
    space = load_space(BACKWARD)
    for head_dim, dtype in ((96, DType.BF16), (256, DType.BF16), (256, DType.FP32)):
        spec = AttentionSpec(dtype=dtype, head_dim_qk=head_dim, head_dim_v=head_dim).backward()
        legal = space.legal(spec, target)
        assert legal.seeds
        assert set(legal.seeds) <= set(legal.configs)
        assert len(set(legal.configs)) == len(legal.configs) >= 5
        # Whatever file and code say of one: as many of each kind as a test has time for.
        assert all(check_config(config, spec, target) == () for config in legal.configs[::97])
        assert {"kernel", "atomic", "ordered"} == {config.dq for config in legal.configs}


@pytest.mark.parametrize(
    ("words", "name"),
    [
        ("d=128 bf16", "H200"),
        ("d=576 dv=512 shared_kv", "B200"),
        ("d=192 dv=128 fp16", "A100"),
        ("d=128 fp8_kv page=16", "RTX5090"),
        ("d=256 fp32", "MI300X"),
    ],
)
def test_every_decode_spec_has_seeds_and_legal_configs(words, name):
    spec, target = parse_problem(f"h=1 sq=1 sk=64 decode {words}").spec, named_target(name)
    legal = load_space(DECODE).legal(spec, target)
    assert legal.seeds
    assert set(legal.seeds) <= set(legal.configs)
    assert len(set(legal.configs)) == len(legal.configs) >= 5
    # Whatever file and code say of one: as many as a test has time for.
    assert all(check_config(config, spec, target) == () for config in legal.configs[::997])
    assert ("dependent" in {config.launch for config in legal.configs}) is target.has_tma


def test_alternatives_are_not_mixed():
    space, target = load_space(BACKWARD), named_target("H200")
    deterministic = bf16(64).backward(deterministic=True)
    legal = space.legal(deterministic, target)
    assert {config.dq for config in legal.configs} == {"kernel", "ordered"}
    assert all((config.block_m2 > 0) == (config.dq == "kernel") for config in legal.configs)
    # Every pair of a tile of dK and dV with one of dQ, and none of them refused for what no alternative has.
    first, second = ("block_m1", "block_n1", "num_warps", "num_stages"), ("block_m2", "block_n2", "num_warps2")
    own = [config for config in legal.configs if config.dq == "kernel"]
    parts = [{tuple(getattr(c, name) for name in names) for c in own} for names in (first, second)]
    pairs = {tuple(getattr(c, name) for name in (*first, *second)) for c in own}
    assert len(pairs) == len(parts[0]) * len(parts[1])
    assert legal.refused["dq_kernel_described"] == 0
    general = math.prod(len(values) for values in space.content.parameters.values())
    total = sum(general * math.prod(len(v) for v in own.values()) for own in space.content.alternatives)
    assert len(legal.configs) + sum(legal.refused.values()) == total
    assert space.parameters(target)["dq"] == ("kernel", "atomic", "ordered")
    assert space.parameters(named_target("gfx942"))["num_stages2"] == (1, 2)


def test_first_backward_seeds_are_of_every_kind():
    seeds = load_space(BACKWARD).legal(bf16(128).backward(), named_target("H200")).seeds
    assert isinstance(seeds[0], TritonBackwardConfig)
    assert {(seed.dq, seed.loads) for seed in seeds} >= {
        ("kernel", "descriptor"),
        ("atomic", "descriptor"),
        ("ordered", "descriptor"),
        ("kernel", "pointer"),
    }


def hopper_seeds(words: str) -> tuple[HopperForwardConfig, ...]:
    spec, target = parse_problem(f"b=1 h=8 s=4096 {words}").spec, named_target("H200")
    legal = load_space(HOPPER).legal(spec, target)
    assert set(legal.seeds) <= set(legal.configs)
    assert len(set(legal.configs)) == len(legal.configs) >= 200
    # Whatever file and code say of one: as many as a test has time for.
    assert all(check_config(config, spec, target) == () for config in legal.configs[::97])
    return legal.seeds


@pytest.mark.parametrize(
    ("words", "consumers", "block_n", "more"),
    [
        # What won on an H200, among the first eight.
        ("d=128 full bf16", 2, 128, {"queries": "registers", "turns": "alternate"}),
        ("d=128 causal bf16", 2, 128, {"queries": "registers", "diagonal": "half", "head_group": 8, "tail_heads": 32}),
        ("d=64 full bf16", 3, 128, {"turns": "alternate", "head_group": 4}),
        ("d=64 causal bf16", 3, 128, {"turns": "free", "head_group": 8, "tail_heads": 32}),
        ("d=256 full bf16", 2, 64, {"rescale": 8, "out_buffer": "half", "convert": "late", "head_group": 1}),
        ("d=256 causal fp16", 2, 64, {"rescale": 8, "out_buffer": "half", "head_group": 8}),
        ("d=192 dv=128 causal bf16", 2, 128, {"out_buffer": "half"}),
        ("d=192 full bf16", 2, 64, {"rescale": 8}),
        ("d=96 full bf16", 2, 128, {"queries": "registers"}),
        ("d=128 sliding_window(127,0) bf16", 2, 64, {"queries": "shared", "loops": "single"}),
        ("d=128 sliding_window(1023,0) bf16", 2, 128, {"queries": "shared", "loops": "single"}),
        ("d=64 document bf16", 2, 128, {"queries": "registers"}),
    ],
)
def test_first_seeds_for_hopper_are_the_measured_winners(words, consumers, block_n, more):
    first = hopper_seeds(words)[:8]
    assert len(first) >= 6
    assert any(
        (seed.consumers, seed.block_n) == (consumers, block_n)
        and all(getattr(seed, name) == value for name, value in more.items())
        for seed in first
    )


def test_seeds_for_hopper_have_twins_and_small_grids():
    seeds = hopper_seeds("d=128 causal bf16")
    assert {seed.tiles for seed in seeds} == {"apart", "overlap"}
    assert {(seed.consumers, seed.programs) for seed in seeds} == {(1, 1), (1, 2), (2, 1), (3, 1)}


@pytest.mark.parametrize("target", known_targets(), ids=str)
def test_the_space_for_hopper_is_empty_elsewhere(target):
    legal = load_space(HOPPER).legal(bf16(128), target)
    assert bool(legal.configs) is bool(legal.seeds) is (target.arch == "sm_90")
    assert not load_space(HOPPER).legal(bf16(512), target).configs


def test_counts_every_refusal_once():
    space, target = load_space(TEMPLATE), named_target("H200")
    legal = space.legal(bf16(128), target)
    total = 1
    for values in space.parameters(target).values():
        total *= len(values)
    assert len(legal.configs) + sum(legal.refused.values()) == total
    assert legal.refused["shared_memory_fits"] > 0
    assert legal == load_space(TEMPLATE).legal(bf16(128), target)


def test_a_launch_is_judged_for_each_config_and_a_kernel_once(edited):
    space, target, spec = edited("head_group: [1, 4, 16]", "head_group: [1, 0, 16]"), named_target("H200"), bf16(128)
    legal, values = space.legal(spec, target), space.parameters(target)
    everything = [
        TritonForwardConfig(**dict(zip(values, numbers, strict=True)))
        for numbers in itertools.product(*values.values())
    ]
    reasons = {config: check_config(config, spec, target) for config in everything}
    assert legal.configs == tuple(config for config in everything if not reasons[config])
    only_launch = [
        config for config in everything if len(reasons[config]) == 1 and "head_group=0" in reasons[config][0]
    ]
    assert len(only_launch) == legal.refused["launch_within_limits"] == len(legal.configs) / 2
    assert len(legal.configs) + sum(legal.refused.values()) == len(everything)


@pytest.mark.parametrize(
    ("template", "words"),
    [
        (TEMPLATE, "causal bf16"),
        (BACKWARD, "causal bf16 backward"),
        (DECODE, "causal page=64 bf16 decode"),
        (HOPPER, "causal bf16"),
        ("gluon/hopper_decode", "causal page=128 bf16 decode"),
    ],
)
def test_predicates_of_kernels_do_not_look_at_the_launch(template, words):
    spec, target = parse_problem(f"h=1 s=1 d=128 {words}").spec, named_target("H200")
    space, table, rng = load_space(template), constraints_of(template), random.Random(0)
    at_rest = table.config_type.at_rest
    looked: set[str] = set()
    for _ in range(2000):
        values = rng.choice(space._products(target))
        config = table.config_type(**{name: rng.choice(values[name]) for name in values})
        launched = dataclasses.replace(config, **{name: rng.choice((-1, 0, 1, 2, 5, 64)) for name in at_rest})
        for name in table.predicates:
            if table.reason(name, launched, spec, target) != table.reason(name, config.kernel(), spec, target):
                looked.add(name)
    assert looked == table.of_launch


def test_first_seeds_on_hopper_are_the_measured_winners():
    seeds = load_space(TEMPLATE).legal(bf16(128), named_target("H200")).seeds
    winner = TritonForwardConfig(block_m=128, block_n=64, num_warps=4, num_stages=2, loads="descriptor")
    assert seeds[0] == winner
    assert {(seed.block_m, seed.block_n) for seed in seeds if seed.loads == "descriptor"} == {
        (128, 64),
        (64, 64),
        (64, 128),
    }


def test_architectures_replace_what_they_name():
    space = load_space(TEMPLATE)
    amd = space.parameters(named_target("gfx942"))
    assert (amd["loads"], amd["maxnreg"], amd["num_stages"]) == (("pointer",), (0,), (1, 2))
    assert amd["block_m"] == space.parameters(named_target("sm_90"))["block_m"]
    assert list(amd) == sorted(amd)


def test_a_value_added_to_the_file_is_searched(edited):
    space = edited("block_n: [32, 64, 128]", "block_n: [16, 32, 64, 128]")
    target = named_target("sm_90")
    added = set(space.legal(bf16(64), target).configs) - set(load_space_shipped().legal(bf16(64), target).configs)
    assert {config.block_n for config in added} == {16}


def load_space_shipped():
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(space_module, "resource_dir", resource_dir)
        return load_space(TEMPLATE)


def test_an_optional_number_can_be_left_out(edited):
    line = "  head_group: [1, 4, 16] # heads whose tiles go out together; a run-time number that costs no compile\n"
    legal = edited(line, "").legal(bf16(64), named_target("sm_90"))
    assert {config.head_group for config in legal.configs} == {1}


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("format: 1", "format: 2", r"format: .*1"),
        ("format: 1", "format: 1\nbudget: 5", "budget: Extra inputs"),
        ("format: 1", "format: [1", "not valid YAML in line 8: expected"),
        ("template: triton/forward", "template: triton/backward", "its place in the folder says 'triton/forward'"),
        ("num_warps: [2, 4, 8]", "num_warps: [2, 4, 4]", "parameters.num_warps: .*given twice: 4"),
        ("num_warps: [2, 4, 8]", "num_warps: []", "parameters.num_warps: .*at least 1"),
        ("num_warps: [2, 4, 8]", "num_warps: [2, true]", "parameters.num_warps.1"),
        ("num_warps: [2, 4, 8]", "num_warps: [2, 4.5]", "parameters.num_warps.1"),
        ("num_warps: [2, 4, 8]", "num_warps: [2, four]", "parameters.num_warps: num_warps must be a whole number"),
        ("num_warps: [2, 4, 8]", "warps: [2, 4]", "unknown fields .*warps.*missing fields .*num_warps"),
        ("loads: [pointer, descriptor]", "loads: [pointer, tma]", "loads must be one of"),
        ("- warps_fit_tile", "- warps_fit", "constraints: unknown warps_fit; known: block_power_of_two"),
        ("- warps_fit_tile", "- block_power_of_two", "constraints: .*given twice"),
        ("seeds: #", "seeds:\n  - {block_m: 128}\n#", "seeds.0: .*missing fields"),
        (
            "  sm_120:\n    parameters:",
            "  sm_120:\n    parameters:\n      head_groups: [1]",
            "targets.sm_120.parameters",
        ),
    ],
)
def test_a_damaged_file_is_refused_with_its_place(edited, old, new, message):
    with pytest.raises(ConfigError, match=rf"forward\.yaml: (?s:.*){message}"):
        edited(old, new)


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("- dq: [kernel]", "- dq: [kernels]", "alternatives.0.dq: dq must be one of kernel, atomic, ordered"),
        ("- dq: [atomic, ordered]", "- dq2: [atomic]", "alternatives.1.dq2: .*unknown fields .*dq2"),
        ("- dq: [atomic, ordered]", "- dq: []", "alternatives.1.dq: .*at least 1"),
        ("num_stages2: [1, 2]\n", "num_stages2: [-1]\n", "targets.gfx942.alternatives.0.num_stages2"),
        ("- order_is_known", "- warps_fit_tiles", "unknown warps_fit_tiles; known: dq_kernel_described"),
        ("template: triton/backward", "template: triton/forward", "its place in the folder says 'triton/backward'"),
    ],
)
def test_a_damaged_alternative_is_refused_with_its_place(edited, old, new, message):
    with pytest.raises(ConfigError, match=rf"backward\.yaml: (?s:.*){message}"):
        edited(old, new, BACKWARD)


def test_a_template_without_kernels_is_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(space_module, "resource_dir", lambda name: tmp_path)
    (tmp_path / "cuda").mkdir()
    (tmp_path / "cuda" / "forward.yaml").write_text(
        SHIPPED.replace("template: triton/forward", "template: cuda/forward")
    )
    with pytest.raises(ConfigError, match=r"forward\.yaml: no constraints for template 'cuda/forward'; known: triton"):
        load_space("cuda/forward")


def test_code_in_yaml_is_refused(edited):
    with pytest.raises(ConfigError, match="not valid YAML"):
        edited("format: 1", "format: !!python/object/apply:os.getcwd []")


def test_unknown_template_lists_the_known():
    with pytest.raises(ConfigError, match=r"'triton/sideways' .*known: .*triton/forward"):
        load_space("triton/sideways")


def test_unreadable_file_is_refused(edited, tmp_path: Path):
    edited("format: 1", "format: 1")
    (tmp_path / f"{TEMPLATE}.yaml").write_bytes(b"\xff\xfe\xff")
    with pytest.raises(ConfigError, match="cannot read"):
        load_space(TEMPLATE)
