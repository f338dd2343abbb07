from __future__ import annotations

from pathlib import Path

import pytest

from flashgen.errors import InputError
from flashgen.integrations import load_presets, preset, presets
from flashgen.spec import parse_problem


def test_quick_is_one_problem() -> None:
    assert preset("quick") == (parse_problem("b=1 hq=32 hkv=8 s=4096 d=128 causal bf16"),)


def test_llama_keeps_the_tokens() -> None:
    problems = preset("llama3-8b")
    assert [p.shape.seqlen_q for p in problems] == [512, 1024, 2048, 4096, 8192, 16384]
    assert {p.shape.batch * p.shape.seqlen_q for p in problems} == {16384}
    assert {(p.shape.nheads_q, p.shape.nheads_kv, p.spec.head_dim_qk, str(p.spec.mask)) for p in problems} == {
        (32, 8, 128, "causal")
    }


def test_grid_is_complete_and_keeps_tokens_and_width() -> None:
    problems = preset("grid")
    cells = [(p.spec.head_dim_qk, str(p.spec.mask), p.shape.seqlen_q) for p in problems]
    assert cells == [(d, m, s) for d in (64, 128, 256) for m in ("full", "causal") for s in (512, 2048, 4096, 16384)]
    assert all(p.shape.batch * p.shape.seqlen_q == 16384 for p in problems)
    assert all(p.shape.nheads_q * p.spec.head_dim_qk == 2048 for p in problems)
    assert all(p.shape.nheads_q == p.shape.nheads_kv for p in problems)


def test_features_keep_the_tokens_and_the_heads() -> None:
    problems = preset("features")
    assert {p.shape.batch * p.shape.seqlen_q for p in problems} == {16384}
    assert {(p.shape.nheads_q, p.shape.nheads_kv) for p in problems} == {(32, 8)}
    meanings = {(str(p.spec.mask), p.spec.features) for p in problems}
    assert len(meanings) == 7
    assert len(problems) == 18


def test_decoding_is_of_few_queries_and_of_chunks() -> None:
    problems = preset("decode")
    assert {p.spec.phase for p in problems} == {"decode"}
    assert len(set(problems)) == len(problems) == 33
    # Of one query a causal mask hides nothing, and calls say so.
    assert {(p.shape.seqlen_q, str(p.spec.mask)) for p in problems} == {
        (1, "full"),
        (4, "causal"),
        (8, "causal"),
        (16, "causal"),
        (256, "causal"),
    }
    assert {p.shape.nheads_q for p in problems if p.shape.seqlen_q == 256} == {8, 16, 32, 64}
    latent = {(p.spec.head_dim_qk, p.spec.head_dim_v, p.shape.nheads_kv) for p in problems if p.spec.shared_kv}
    assert latent == {(576, 512, 1)}


def test_variants_and_prefill_name_what_the_grid_leaves_out() -> None:
    grid = set(preset("grid"))
    variants, prefill = preset("variants"), preset("prefill")
    assert not grid & {*variants, *prefill}
    assert {p.shape.seqlen_q for p in variants if "sliding" in str(p.spec.mask)} == {16384}
    (packed,) = (p for p in variants if p.spec.varlen)
    assert sum(seqlen for seqlen, _ in packed.lengths()) // packed.shape.batch == 1029
    assert {p.shape.batch * p.shape.seqlen_q for p in prefill} == {16384, 4096}
    assert {(p.shape.nheads_q, p.shape.nheads_kv, p.spec.head_dim_qk, p.spec.head_dim_v) for p in prefill} == {
        (64, 8, 64, 64),
        (16, 8, 256, 256),
        (28, 4, 128, 128),
        (32, 8, 128, 128),
        (64, 8, 128, 128),
        (128, 128, 192, 128),
        (16, 16, 192, 128),
    }
    assert {p.spec.features for p in prefill} == {("sinks",), ("softcap",), ()}


def test_small_problems_have_fewer_tiles_of_128_queries_than_an_h200_has_processors() -> None:
    problems = preset("small")
    assert len(problems) == 8
    assert all(p.shape.batch * p.shape.nheads_q * -(-p.shape.seqlen_q // 128) < 132 for p in problems)


def test_no_preset_repeats_a_problem() -> None:
    for name, problems in load_presets().items():
        assert problems, name
        assert len(set(problems)) == len(problems), name


def test_unknown_name_lists_the_known() -> None:
    with pytest.raises(InputError, match=r"'huge'.*quick, llama3-8b, grid"):
        preset("huge")


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "cannot read"),
        ("a: [", "cannot read"),
        ("- a", "must map names"),
        ("a: b=1", "list of lines"),
        ("a: [7]", "list of lines"),
        ("a: ['b=1 h=2 s=3 d=7']", "preset 'a'.*multiple of 8"),
    ],
)
def test_damaged_file_is_named(
    content: str | None, message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(presets, "resource_dir", lambda name: tmp_path)
    if content is not None:
        (tmp_path / "presets.yaml").write_text(content)
    with pytest.raises(InputError, match=message) as raised:
        load_presets()
    assert str(tmp_path / "presets.yaml") in str(raised.value)
