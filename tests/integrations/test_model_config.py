"""Attention problems from the configs of published models: `configs/` holds whole files, not only the keys read."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path

import pytest

from flashgen.errors import InputError
from flashgen.integrations import problems_from_config, read_model_config
from flashgen.spec import DType, Mask, Positions, parse_problem

CONFIGS = Path(__file__).parent / "configs"


def load(name: str) -> Mapping[str, object]:
    return read_model_config(CONFIGS / f"{name}.json")


@pytest.mark.parametrize(
    ("name", "model_type", "problem"),
    [
        ("llama-3-8b", "llama", "b=8 hq=32 hkv=8 s=2048 d=128 causal bf16"),
        ("mistral-7b-v0.1", "mistral", "b=8 hq=32 hkv=8 s=2048 d=128 causal bf16"),
        ("qwen2.5-7b", "qwen2", "b=8 hq=28 hkv=4 s=2048 d=128 causal bf16"),
        ("qwen3-8b", "qwen3", "b=8 hq=32 hkv=8 s=2048 d=128 causal bf16"),
        ("deepseek-v3", "deepseek_v3", "b=8 hq=128 hkv=128 s=2048 d=192 dv=128 causal bf16"),
        ("falcon-7b", "falcon", "b=8 hq=71 hkv=1 s=2048 d=64 causal bf16"),
        ("falcon-40b", "falcon", "b=8 hq=128 hkv=8 s=2048 d=64 causal bf16"),
        ("gpt2", "gpt2", "b=8 h=12 s=2048 d=64 causal bf16"),
        ("phi-2", "phi", "b=8 h=32 s=2048 d=80 causal fp16"),
        ("bert-base", "bert", "b=8 h=12 s=2048 d=64 full bf16"),
        ("lfm2-1.2b", "lfm2", "b=8 hq=32 hkv=8 s=2048 d=64 causal bf16"),
    ],
)
def test_published_model(name: str, model_type: str, problem: str) -> None:
    found = problems_from_config(load(name), seqlens=[2048])
    assert found.model_type == model_type
    assert found.problems == (parse_problem(problem),)


@pytest.mark.parametrize(
    ("name", "problems"),
    [
        ("gemma-3-12b", ["b=8 hq=16 hkv=8 s=2048 d=256 sliding_window(1023,0)", "b=8 hq=16 hkv=8 s=2048 d=256 causal"]),
        (
            "gemma-3-27b",
            ["b=8 hq=32 hkv=16 s=2048 d=128 sliding_window(1023,0)", "b=8 hq=32 hkv=16 s=2048 d=128 causal"],
        ),
        (
            "gpt-oss-20b",
            ["b=8 hq=64 hkv=8 s=2048 d=64 sliding_window(127,0) sinks", "b=8 hq=64 hkv=8 s=2048 d=64 causal sinks"],
        ),
        # Both kinds of its layers see everything up to 4096.
        ("gemma-2-9b", ["b=8 hq=16 hkv=8 s=2048 d=256 causal softcap fp32"]),
    ],
)
def test_published_model_with_more_than_plain_attention(name: str, problems: list[str]) -> None:
    found = problems_from_config(load(name), seqlens=[2048])
    assert found.skipped == ()
    assert found.problems == tuple(map(parse_problem, problems))


def test_softcap_and_windows_combine() -> None:
    found = problems_from_config(load("gemma-2-9b"), seqlens=[8192], dtype=DType.BF16)
    assert [(str(p.spec.mask), p.spec.softcap) for p in found.problems] == [
        ("sliding_window(4095,0)", True),
        ("causal", True),
    ]


def test_window_is_plain_causal_up_to_its_length() -> None:
    # Phi-3-mini: 32 heads of 96 and a window of 2047 keys, the query's own among them.
    found = problems_from_config(load("phi-3-mini-4k"), seqlens=[1024, 2047, 2048, 4096], batch=1)
    assert [(p.shape.seqlen_q, str(p.spec.mask)) for p in found.problems] == [
        (1024, "causal"),
        (2047, "causal"),
        (2048, "sliding_window(2046,0)"),
        (4096, "sliding_window(2046,0)"),
    ]
    assert {p.spec.head_dim_qk for p in found.problems} == {96}
    assert found.skipped == ()


def seen(mask: Mask, seqlen: int) -> list[list[bool]]:
    rows = range(seqlen)
    return [[mask.sees(Positions(q_idx=i, kv_idx=j, seqlen_q=seqlen, seqlen_k=seqlen)) for j in rows] for i in rows]


@pytest.mark.parametrize("seqlen", [1, 2, 3, 4, 5, 6, 7, 9, 12])
def test_what_a_window_or_chunk_hides_is_what_transformers_hides(seqlen: int) -> None:
    def masks(**keys: object) -> list[Mask]:
        config = {**load("llama-3-8b"), "num_hidden_layers": 1, **keys}
        return [p.spec.mask for p in problems_from_config(config, seqlens=[seqlen]).problems]

    rows = range(seqlen)
    (window,) = masks(sliding_window=4)
    assert seen(window, seqlen) == [[0 <= i - j < 4 for j in rows] for i in rows]
    (chunk,) = masks(attention_chunk_size=4)
    assert seen(chunk, seqlen) == [[j <= i and i // 4 == j // 4 for j in rows] for i in rows]
    (both_ways,) = masks(sliding_window=4, is_causal=False)
    assert seen(both_ways, seqlen) == [[abs(i - j) <= 2 for j in rows] for i in rows]


def test_layers_without_attention_are_named() -> None:
    found = problems_from_config(load("lfm2-1.2b"), seqlens=[256])
    assert found.skipped == ("conv layers (10 of 16): no kernel in this version",)


def test_full_and_windowed_layers_that_coincide_are_one_problem() -> None:
    assert len(problems_from_config(load("gemma-3-12b"), seqlens=[512, 512]).problems) == 1


def test_batch_fills_the_tokens() -> None:
    llama = load("llama-3-8b")
    found = problems_from_config(llama, seqlens=[512, 16384, 65536])
    assert [p.shape.batch for p in found.problems] == [32, 1, 1]
    assert problems_from_config(llama, seqlens=[512], tokens=1024).problems[0].shape.batch == 2
    assert problems_from_config(llama, seqlens=[512], batch=3).problems[0].shape.batch == 3


def test_dtype_is_the_checkpoints_unless_given() -> None:
    gpt2 = {**load("gpt2"), "torch_dtype": "float32"}
    assert problems_from_config(gpt2, seqlens=[64]).problems[0].spec.dtype is DType.FP32
    assert problems_from_config({**gpt2, "dtype": "float16"}, seqlens=[64]).problems[0].spec.dtype is DType.FP16
    assert problems_from_config(gpt2, seqlens=[64], dtype=DType.BF16).problems[0].spec.dtype is DType.BF16
    with pytest.raises(InputError, match="float8_e4m3fn"):
        problems_from_config({**gpt2, "torch_dtype": "float8_e4m3fn"}, seqlens=[64])


def test_dtype_of_the_outer_config_reaches_the_text_part() -> None:
    config = {**load("gemma-3-27b"), "torch_dtype": "float16"}
    assert problems_from_config(config, seqlens=[64]).problems[0].spec.dtype is DType.FP16


def test_qwen_window_spares_the_first_layers() -> None:
    config = {**load("qwen2.5-7b"), "use_sliding_window": True, "sliding_window": 4096, "max_window_layers": 21}
    found = problems_from_config(config, seqlens=[8192])
    assert [str(p.spec.mask) for p in found.problems] == ["causal", "sliding_window(4095,0)"]
    found = problems_from_config({**config, "max_window_layers": 0}, seqlens=[8192])
    assert [str(p.spec.mask) for p in found.problems] == ["sliding_window(4095,0)"]


def test_chunked_layers_are_plain_up_to_a_chunk() -> None:
    text = {**load("llama-3-8b"), "model_type": "llama4_text", "attention_chunk_size": 8192, "head_dim": 128}
    text["layer_types"] = ["chunked_attention"] * 3
    found = problems_from_config({"model_type": "llama4", "text_config": text}, seqlens=[8192, 8193])
    assert [(p.shape.seqlen_q, str(p.spec.mask)) for p in found.problems] == [
        (8192, "causal"),
        (8193, "causal&chunked(8192)"),
    ]


def test_head_dim_per_layer() -> None:
    text = {
        "model_type": "gemma4_text",
        "hidden_size": 2560,
        "num_attention_heads": 8,
        "num_key_value_heads": 2,
        "head_dim": 256,
        "global_head_dim": 512,
        "sliding_window": 512,
        "layer_types": ["sliding_attention", "full_attention"],
    }
    found = problems_from_config(text, seqlens=[512])
    assert [p.spec.head_dim_qk for p in found.problems] == [256, 512]
    found = problems_from_config({**text, "global_head_dim": 1024}, seqlens=[512])
    assert [p.spec.head_dim_qk for p in found.problems] == [256]
    assert found.skipped == ("full-attention layers: head_dim_qk must be a multiple of 8 from 16 to 512 (forward phase), got 1024",)
    per_layer = {
        "hidden_size": 1280,
        "num_query_heads": [12, 16],
        "num_kv_heads": [3, 4],
        "head_dim": 64,
        "n_layers": 2,
    }
    shapes = [p.shape for p in problems_from_config(per_layer, seqlens=[64]).problems]
    assert [(s.nheads_q, s.nheads_kv) for s in shapes] == [(12, 3), (16, 4)]


def test_decoder_made_of_bert_is_causal() -> None:
    problem = problems_from_config({**load("bert-base"), "is_decoder": True}, seqlens=[64]).problems[0]
    assert str(problem.spec.mask) == "causal"


@pytest.mark.parametrize(
    ("change", "features"),
    [
        ({"alibi": True}, ("alibi",)),
        ({"attn_config": {"alibi": True}}, ("alibi",)),
        ({"model_type": "bloom"}, ("alibi",)),
        ({"position_embedding_type": "alibi"}, ("alibi",)),
        ({"attn_logit_softcapping": 30.0}, ("softcap",)),
        ({"model_type": "gpt_oss"}, ("sinks",)),
        ({"alibi": False, "attn_logit_softcapping": None}, ()),
    ],
)
def test_what_every_layer_adds(change: dict[str, object], features: tuple[str, ...]) -> None:
    found = problems_from_config({**load("llama-3-8b"), **change}, seqlens=[64])
    assert [p.spec.features for p in found.problems] == [features]
    assert found.skipped == ()


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"position_embedding_type": "relative_key"}, "relative position bias"),
        ({"model_type": "longformer"}, "windowed attention with global tokens"),
    ],
)
def test_what_no_kernel_does_is_named(change: dict[str, object], reason: str) -> None:
    found = problems_from_config({**load("llama-3-8b"), **change}, seqlens=[64, 2048])
    assert found.problems == ()
    assert found.skipped == (f"all attention layers: {reason} has no kernel in this version",)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"is_encoder_decoder": True}, "encoder-decoder"),
        ({"num_attention_heads": None}, "num_attention_heads"),
        ({"num_attention_heads": "many"}, "whole number"),
        ({"num_attention_heads": 24}, "no multiple of 24"),
        ({"num_key_value_heads": 5}, "32 query heads cannot share 5"),
        ({"kv_lora_rank": 512}, "qk_nope_head_dim"),
        ({"num_hidden_layers": 10**12}, "layers"),
    ],
)
def test_config_that_makes_no_sense(change: dict[str, object], message: str, tmp_path: Path) -> None:
    config = {**load("llama-3-8b"), **change}
    with pytest.raises(InputError, match=message):
        problems_from_config(config, seqlens=[64])
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(InputError, match=message) as raised:
        read_model_config(tmp_path)
    assert str(tmp_path / "config.json") in str(raised.value)


@pytest.mark.parametrize(
    "sizes", [{"seqlens": []}, {"seqlens": [0]}, {"seqlens": [8], "batch": 0}, {"seqlens": [8], "tokens": -1}]
)
def test_sizes_out_of_range(sizes: dict[str, object]) -> None:
    with pytest.raises(InputError, match="at least 1"):
        problems_from_config(load("gpt2"), **sizes)  # type: ignore[arg-type]


def test_folder_and_file_read_alike(tmp_path: Path) -> None:
    text = (CONFIGS / "gpt2.json").read_text()
    (tmp_path / "config.json").write_text(text)
    assert read_model_config(tmp_path) == read_model_config(tmp_path / "config.json") == json.loads(text)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "does not exist"),
        (b"{", "not valid JSON"),
        (b"\xff\xfe", "not valid JSON"),
        (b"[1]", "JSON object"),
        (b'{"a": 1}', "no attention that is known"),
    ],
)
def test_unreadable_file_is_named(content: bytes | None, message: str, tmp_path: Path) -> None:
    if content is not None:
        (tmp_path / "config.json").write_bytes(content)
    with pytest.raises(InputError, match=message) as raised:
        read_model_config(tmp_path)
    assert str(tmp_path / "config.json") in str(raised.value)
