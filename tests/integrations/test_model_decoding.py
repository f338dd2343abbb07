"""The decoding of published models, whole and in tensor-parallel shards."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import pytest

from flashgen.errors import InputError
from flashgen.integrations import decoding_from_config, read_model_config
from flashgen.integrations.model_decoding import cache_lengths
from flashgen.spec import parse_problem

CONFIGS = Path(__file__).parent / "configs"


def load(name: str) -> Mapping[str, object]:
    return read_model_config(CONFIGS / f"{name}.json")


@pytest.mark.parametrize(
    ("name", "problems"),
    [
        ("llama-3-8b", ["b=1 hq=32 hkv=8 sq=1 sk=4096 d=128 decode"]),
        ("phi-2", ["b=1 h=32 sq=1 sk=4096 d=80 fp16 decode"]),
        ("falcon-7b", ["b=1 hq=71 hkv=1 sq=1 sk=4096 d=64 decode"]),
        # The absorbed form of latent attention: all heads share one row of 512 + 64 columns.
        ("deepseek-v3", ["b=1 hq=128 hkv=1 sq=1 sk=4096 d=576 dv=512 shared_kv decode"]),
        (
            "gpt-oss-20b",
            [
                "b=1 hq=64 hkv=8 sq=1 sk=4096 d=64 sliding_window(127,0) sinks decode",
                "b=1 hq=64 hkv=8 sq=1 sk=4096 d=64 sinks decode",
            ],
        ),
        # A window that hides nothing yet stays: the host does not know how long a cache is.
        (
            "gemma-2-9b",
            [
                "b=1 hq=16 hkv=8 sq=1 sk=4096 d=256 sliding_window(4095,0) softcap fp32 decode",
                "b=1 hq=16 hkv=8 sq=1 sk=4096 d=256 softcap fp32 decode",
            ],
        ),
    ],
)
def test_published_model(name: str, problems: list[str]) -> None:
    found = decoding_from_config(load(name), seqlens=[4096], batches=[1], shards=[1])
    assert found.problems == tuple(map(parse_problem, problems))
    assert found.skipped == ()


def test_batches_as_far_as_their_caches_go() -> None:
    found = decoding_from_config(load("llama-3-8b"), seqlens=[512, 4096, 16384], shards=[1]).problems
    sizes = [(p.shape.batch, p.shape.seqlen_k) for p in found]
    assert sizes == [(1, 4096), (16, 4096), (64, 4096), (1, 32768), (16, 32768)]


@pytest.mark.parametrize(
    ("seqlens", "lengths"),
    [
        ([1], (4096,)),
        ([512, 8192], (4096,)),
        ([16384], (32768,)),
        ([65536, 4096], (4096, 32768)),
        ([131072], (262144,)),
    ],
)
def test_lengths_come_in_steps_of_eight(seqlens: list[int], lengths: tuple[int, ...]) -> None:
    assert cache_lengths(seqlens) == lengths


def test_shards_have_fewer_heads_and_no_work_of_another() -> None:
    found = decoding_from_config(load("llama-3-8b"), seqlens=[4096, 32768]).problems
    parts = [(p.shape.batch, p.shape.nheads_q, p.shape.nheads_kv) for p in found if p.shape.nheads_q < 32]
    # 64 sequences of a quarter of the heads are as much as 16 with all of them.
    assert parts == [(1, 16, 4), (16, 16, 4), (64, 16, 4), (1, 8, 2), (16, 8, 2), (1, 4, 1), (16, 4, 1)]
    assert {p.shape.seqlen_k for p in found if p.shape.nheads_q < 32} == {4096}


def test_more_shards_than_heads_of_the_cache_share_them() -> None:
    def heads(name: str, shards: list[int]) -> list[tuple[int, int]]:
        found = decoding_from_config(load(name), seqlens=[4096], batches=[1], shards=shards).problems
        return [(p.shape.nheads_q, p.shape.nheads_kv) for p in found]

    assert heads("qwen2.5-7b", [1, 2, 4, 8]) == [(28, 4), (14, 2), (7, 1)]
    assert heads("deepseek-v3", [1, 8]) == [(128, 1), (16, 1)]
    assert heads("falcon-40b", [16]) == [(8, 1)]
    assert heads("falcon-7b", [1, 2, 71]) == [(71, 1), (1, 1)]


def test_a_windowed_layer_has_one_length() -> None:
    found = decoding_from_config(load("mistral-7b-v0.1"), seqlens=[4096, 32768], batches=[1], shards=[1]).problems
    assert [(str(p.spec.mask), p.shape.seqlen_k) for p in found] == [
        ("sliding_window(4095,0)", 4096),
        ("sliding_window(4095,0)", 32768),
    ]
    narrow = {**load("mistral-7b-v0.1"), "sliding_window": 1024}
    found = decoding_from_config(narrow, seqlens=[4096, 32768], batches=[1], shards=[1]).problems
    assert [(str(p.spec.mask), p.shape.seqlen_k) for p in found] == [("sliding_window(1023,0)", 4096)]


def test_what_does_not_decode_says_so() -> None:
    found = decoding_from_config(load("bert-base"), seqlens=[4096])
    assert found.problems == ()
    assert found.skipped == ("full-attention layers: tokens see those after them: nothing is decoded",)
    sparse = {**load("deepseek-v3"), "index_topk": 8192}
    found = decoding_from_config(sparse, seqlens=[4096, 32768])
    assert {p.shape.seqlen_k for p in found.problems} == {4096}
    assert "over caches of 32768" in found.skipped[0]


@pytest.mark.parametrize("sizes", [{"seqlens": []}, {"seqlens": [0]}, {"batches": [0]}, {"shards": []}], ids=str)
def test_sizes_are_at_least_one(sizes: dict[str, list[int]]) -> None:
    with pytest.raises(InputError, match="must be at least 1"):
        decoding_from_config(load("llama-3-8b"), **{"seqlens": [4096], **sizes})
