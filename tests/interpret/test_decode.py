"""Random calls of decoding in Triton's interpreter, with random configs, against float64; caches are judged, too."""

from __future__ import annotations

import dataclasses
import random

import pytest
import torch

from flashgen.codegen import TritonDecodeConfig
from flashgen.codegen.constraints import check_config
from flashgen.launch import interpret_decode
from flashgen.measure import CacheOracle, Oracle, poisoned_outputs, random_decode_call
from flashgen.spec import Problem, parse_problem
from flashgen.target import named_target

H200 = named_target("H200")
MASKS = ("full", "causal", "sliding_window(20,0)", "sliding_window(9,3)&causal", "chunked(32)&causal", "prefix_lm(9)")
DIMS = ("d=16", "d=32", "d=64", "d=48", "d=24 dv=40", "d=96 dv=64")
# Of each, something or nothing.
FEATURES = (
    ("append", "append rotary=halves", "append rotary=pairs", "append rotary=pairs rotary_fp32", "", ""),
    ("page=1", "page=16", "page=64", "page=5", "", ""),
    ("leftpad", "", ""),
    ("softcap", "", ""),
    ("alibi", "", ""),
    ("sinks", ""),
    ("lse", ""),
)
DRAWS = 40


def draw(number: int) -> tuple[Problem, TritonDecodeConfig, int]:
    """Return a problem, a config that is legal for it, and into how many parts the keys are cut."""
    chance = random.Random(number)
    group, nheads_kv = chance.choice((1, 2, 3, 6)), chance.choice((1, 2))
    while True:
        words = [chance.choice(choices) for choices in FEATURES]
        if "page" not in " ".join(words):
            words.append(chance.choice(("batch_idx", "")))
        if "append" not in " ".join(words):
            words.append(chance.choice(("shared_kv", "", "")))
        sizes = f"b={chance.choice((1, 2, 5))} hq={group * nheads_kv} hkv={nheads_kv}"
        lengths = f"sq={chance.choice((1, 1, 2, 5, 19))} sk={chance.choice((19, 64, 65, 130))}"
        dims = chance.choice(("d=64 dv=32", "d=32", "d=80 dv=64") if "shared_kv" in words else DIMS)
        text = f"{sizes} {lengths} {dims} {chance.choice(MASKS)} {' '.join(words)} fp16 decode"
        problem = parse_problem(text)
        config = TritonDecodeConfig(
            block_m=chance.choice((16, 32, 64)),
            block_n=chance.choice((16, 32, 64)),
            num_warps=2,
            num_stages=2,
            loads=chance.choice(("pointer", "descriptor")),
            loops=chance.choice(("split", "single")),
            head_tiles=chance.choice((1, 2)),
            programs=chance.choice((1, 2, 3, 8)),
            launch=chance.choice(("plain", "dependent")),
            min_blocks=chance.choice((1, 2)),
        )
        if not check_config(config, problem.spec, H200):
            return problem, config, chance.choice((0, 0, 1, 2, 7, 32))


@pytest.mark.parametrize("number", range(DRAWS))
def test_random_calls(number: int) -> None:
    problem, config, num_splits = draw(number)
    call = random_decode_call(problem, device="cpu", seed=number, ragged=True)
    extras = dataclasses.replace(call.extras, num_splits=num_splits)
    oracle = Oracle(call.q, call.k, call.v, spec=problem.spec, extras=extras)
    caches = CacheOracle(call)
    out, lse = poisoned_outputs(problem, device="cpu")
    tensors = {"q": call.q, "k": call.k, "v": call.v, "out": out, **({} if lse is None else {"lse": lse})}
    interpret_decode(tensors, problem=problem, config=config, extras=extras)
    report = oracle.judge(out, lse)
    assert report.ok, f"{problem} {config} splits {num_splits}: {report.reason}"
    assert not caches.fault()


def test_the_draws_meet_every_feature() -> None:
    drawn = [draw(number) for number in range(DRAWS)]
    specs = [problem.spec for problem, _, _ in drawn]
    for name in ("append", "rotary", "rotary_fp32", "leftpad", "batch_idx", "shared_kv", "sinks", "alibi", "softcap"):
        assert {bool(getattr(spec, name)) for spec in specs} == {False, True}, name
    assert {spec.page_size for spec in specs} == {0, 1, 5, 16, 64}
    assert {config.loads for _, config, _ in drawn} == {"pointer", "descriptor"}
    assert {splits for _, _, splits in drawn} == {0, 1, 2, 7, 32}


@pytest.mark.parametrize("lengths", [(0, 0, 0), (0, 1, 100), (100, 100, 100), (64, 63, 65)])
@pytest.mark.parametrize("programs", [1, 2])
def test_any_lengths_in_one_batch(lengths: tuple[int, ...], programs: int) -> None:
    problem = parse_problem("b=3 hq=4 hkv=2 sq=2 sk=100 d=16 causal lse fp32 decode")
    call = random_decode_call(problem, device="cpu", seed=0, lengths=lengths)
    oracle = Oracle(call.q, call.k, call.v, spec=problem.spec, extras=call.extras)
    out, lse = poisoned_outputs(problem, device="cpu")
    assert lse is not None
    config = TritonDecodeConfig(block_m=16, block_n=16, num_warps=4, num_stages=1, programs=programs)
    interpret_decode(
        {"q": call.q, "k": call.k, "v": call.v, "out": out, "lse": lse},
        problem=problem,
        config=config,
        extras=call.extras,
    )
    report = oracle.judge(out, lse)
    assert report.ok, report.reason
    empty = torch.tensor(lengths) == 0
    assert (out[empty] == 0).all()
    assert (lse[empty] == float("-inf")).all()
