"""Configs as values: order, text, and the codec that registry files and the operator go through."""

from __future__ import annotations

import dataclasses
import itertools
import json
import random

import pytest

from flashgen.codegen import TritonForwardConfig, config_from_dict
from flashgen.errors import ConfigError

CONFIG = TritonForwardConfig(block_m=128, block_n=64, num_warps=8, num_stages=2, loads="descriptor", head_group=4)
GOOD = CONFIG.as_dict()


def test_round_trip() -> None:
    for config in (
        CONFIG,
        TritonForwardConfig(block_m=16, block_n=16, num_warps=1, num_stages=1),
        dataclasses.replace(CONFIG, maxnreg=168),
        dataclasses.replace(CONFIG, head_tiles=2, loops="single"),
    ):
        assert config_from_dict(config.as_dict()) == config
        assert config_from_dict(json.loads(json.dumps(config.as_dict()))) == config
        assert hash(config_from_dict(config.as_dict())) == hash(config)


def test_defaults_may_be_left_out() -> None:
    short = {"template": "triton/forward", "block_m": 64, "block_n": 32, "num_warps": 4, "num_stages": 2}
    assert config_from_dict(short) == TritonForwardConfig(block_m=64, block_n=32, num_warps=4, num_stages=2)


def test_dict_and_text_are_in_a_fixed_order() -> None:
    assert list(GOOD) == ["template", *sorted(GOOD.keys() - {"template"})]
    assert str(CONFIG) == (
        "triton/forward block_m=128 block_n=64 head_group=4 head_tiles=1 loads=descriptor loops=split maxnreg=0 "
        "num_stages=2 num_warps=8"
    )


def test_configs_have_one_order() -> None:
    configs = [
        TritonForwardConfig(block_m=m, block_n=n, num_warps=w, num_stages=s, loads=loads, head_group=g, maxnreg=r)
        for m in (64, 128)
        for n in (32, 64)
        for w in (4, 8)
        for s in (1, 2)
        for loads in ("descriptor", "pointer")
        for g in (1, 2)
        for r in (0, 128)
    ]
    in_order = sorted(configs)
    shuffled = random.Random(0).sample(configs, len(configs))
    assert sorted(shuffled) == in_order
    assert all(a < b for a, b in itertools.pairwise(in_order))


def test_configs_cannot_be_changed() -> None:
    with pytest.raises(dataclasses.FrozenInstanceError):
        CONFIG.block_m = 64  # type: ignore[misc]


@pytest.mark.parametrize("template", ["triton/prefill", "", None, 3, ["triton/forward"]])
def test_unknown_template(template: object) -> None:
    with pytest.raises(ConfigError, match=r"unknown template .*; known: triton/forward"):
        config_from_dict({**GOOD, "template": template})


def test_missing_template() -> None:
    with pytest.raises(ConfigError, match="unknown template None"):
        config_from_dict({k: v for k, v in GOOD.items() if k != "template"})


def test_unknown_and_missing_fields_are_all_named() -> None:
    values = {k: v for k, v in GOOD.items() if k not in ("block_m", "num_warps")} | {"block_k": 3, "stages": 1}
    with pytest.raises(ConfigError) as caught:
        config_from_dict(values)
    message = str(caught.value)
    assert "unknown fields ['block_k', 'stages']" in message
    assert "missing fields ['block_m', 'num_warps']" in message
    fields = "block_m, block_n, head_group, head_tiles, loads, loops, maxnreg, num_stages, num_warps"
    assert f"its fields are {fields}" in message


@pytest.mark.parametrize("value", ["64", 64.0, -64, True, None, [64]])
@pytest.mark.parametrize("field", ["block_m", "num_stages", "maxnreg", "head_group", "head_tiles"])
def test_a_number_of_the_wrong_kind(field: str, value: object) -> None:
    with pytest.raises(ConfigError, match=f"{field} must be a whole number of at least 0, got"):
        config_from_dict({**GOOD, field: value})


@pytest.mark.parametrize("value", ["tma", "", 0, None, ["pointer"]])
def test_loads_of_the_wrong_kind(value: object) -> None:
    with pytest.raises(ConfigError, match="loads must be one of pointer, descriptor, got"):
        config_from_dict({**GOOD, "loads": value})


@pytest.mark.parametrize("value", ["both", "", 1, None, ["split"]])
def test_loops_of_the_wrong_kind(value: object) -> None:
    with pytest.raises(ConfigError, match="loops must be one of split, single, got"):
        config_from_dict({**GOOD, "loops": value})
