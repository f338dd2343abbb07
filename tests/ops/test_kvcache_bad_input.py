"""What `attention_with_kvcache` refuses, before anything is launched or written."""

from __future__ import annotations

import re
import typing

import pytest
import torch

import flashgen
from flashgen.codegen import TritonForwardConfig
from flashgen.errors import ConfigError, InputError, UnsupportedError
from flashgen.spec import masks

FP8 = torch.float8_e4m3fn


def zeros(*sizes: int, dtype: torch.dtype = torch.float16) -> torch.Tensor:
    return torch.zeros(*sizes, dtype=dtype)


def whole(*numbers: int) -> torch.Tensor:
    return torch.tensor(numbers, dtype=torch.int32)


GIVEN: dict[str, typing.Any] = {
    "q": zeros(2, 1, 6, 32),
    "k_cache": zeros(2, 24, 2, 32),
    "v_cache": zeros(2, 24, 2, 32),
    "cache_seqlens": whole(3, 5),
}
NEW: dict[str, typing.Any] = {"k": zeros(2, 1, 2, 32), "v": zeros(2, 1, 2, 32)}
TABLE = zeros(2, 3, dtype=torch.int32)
TURN = {"rotary_cos": zeros(24, 8), "rotary_sin": zeros(24, 8)}

WRONG: list[tuple[dict[str, typing.Any], str]] = [
    ({"q": zeros(2, 6, 32)}, "q must be a tensor with 4 dimensions, got shape (2, 6, 32)"),
    ({"k_cache": None}, "k_cache must be a tensor with 4 dimensions, got NoneType"),
    ({"layout": "thd"}, "layout must be"),
    ({"k_cache": zeros(2, 24, 2, 40)}, "q and k_cache must have one head_dim, got 32 and 40"),
    ({"v_cache": zeros(2, 23, 2, 32)}, "must differ in head_dim alone"),
    ({"v_cache": zeros(2, 24, 2, 32, dtype=torch.bfloat16)}, "k_cache and v_cache must have one dtype"),
    ({"q": zeros(2, 1, 6, 32, dtype=torch.bfloat16)}, "the caches must have the dtype of q"),
    ({"q": zeros(2, 1, 6, 32, dtype=torch.float64)}, "the caches must have the dtype of q"),
    ({"q": zeros(2, 1, 5, 32)}, "nheads_q must be a positive multiple of nheads_kv, got 5 and 2"),
    ({"q": zeros(3, 1, 6, 32), "cache_seqlens": whole(1, 2, 3)}, "an entry for each sequence, got 2 of a batch of 3"),
    ({"v_cache": zeros(2, 24, 2, 32).to("meta")}, "v_cache must be on the device of q, cpu, got meta"),
    ({"k_cache": zeros(2, 24, 32, 2).mT, "v_cache": zeros(2, 24, 32, 2).mT}, "k_cache must be readable in place"),
    ({"v_cache": zeros(2, 24, 2, 36)[..., :32]}, "v_cache must be readable in place"),
    ({"v_cache": zeros(2, 24, 2, 40)[..., 4:36]}, "v_cache must be readable in place"),
    ({"cache_seqlens": whole(3)}, "cache_seqlens must be torch.int32 [batch], here [2]; got torch.int32 [1]"),
    ({"cache_seqlens": torch.tensor([3, 5])}, "got torch.int64 [2]"),
    ({"cache_seqlens": 25}, "cache_seqlens must be from 0 to 24"),
    ({"cache_seqlens": -1}, "cache_seqlens must be from 0 to 24"),
    ({"cache_seqlens": 2.0}, "cache_seqlens must be an int32 tensor [batch] or a whole number, got 2.0"),
    ({"cache_seqlens": None, **NEW}, "give cache_seqlens, which says where"),
    ({"cache_batch_idx": torch.tensor([0, 1])}, "cache_batch_idx must be torch.int32 [batch]"),
    ({"cache_leftpad": whole(0, 0, 0)}, "cache_leftpad must be torch.int32 [batch], here [2]"),
    ({"page_table": TABLE.long()}, "page_table must be torch.int32 [batch, pages of a sequence], here [2, any]"),
    ({"page_table": TABLE[:1]}, "got torch.int32 [1, 3]"),
    ({"page_table": TABLE[0]}, "got torch.int32 [3]"),
    ({"page_table": TABLE, "cache_batch_idx": whole(0, 1)}, "both say where"),
    ({"page_table": TABLE, "k_cache": zeros(9, 0, 2, 32), "v_cache": zeros(9, 0, 2, 32)}, "at least one key"),
    ({"k": NEW["k"]}, "k and v are appended together: v is missing"),
    ({"v": NEW["v"]}, "k and v are appended together: k is missing"),
    ({"k": zeros(2, 1, 3, 32), "v": NEW["v"]}, "k must have batch 2, 2 heads and head_dim 32, got 2, 3 and 32"),
    ({"k": zeros(2, 25, 2, 32), "v": zeros(2, 25, 2, 32)}, "k must have from 1 to 24 rows"),
    ({"k": zeros(2, 0, 2, 32), "v": zeros(2, 0, 2, 32)}, "k must have from 1 to 24 rows"),
    ({"k": zeros(2, 2, 2, 32), "v": NEW["v"]}, "k and v must have equally many rows"),
    ({"k": NEW["k"].float(), "v": NEW["v"]}, "k must be torch.float16, as q"),
    ({**NEW, "v_cache": GIVEN["k_cache"]}, "share memory"),
    ({**NEW, "q": zeros(2, 0, 6, 32)}, "q must have at least one row where keys are appended"),
    ({"k_cache": zeros(2, 24, 2, 32).to(FP8), "v_cache": zeros(2, 24, 2, 32).to(FP8), **NEW}, "nothing is appended to"),
    ({**TURN}, "give k and v, too"),
    ({**NEW, "rotary_cos": TURN["rotary_cos"]}, "rotary_cos and rotary_sin are given together"),
    ({**NEW, "rotary_cos": zeros(24, 8), "rotary_sin": zeros(24, 9)}, "rotary_sin must be torch.float16"),
    ({**NEW, "rotary_cos": zeros(24, 8), "rotary_sin": zeros(24, 8).float()}, "must have one dtype"),
    ({**NEW, "rotary_cos": zeros(24, 17), "rotary_sin": zeros(24, 17)}, "a multiple of 16 up to head_dim 32, got 34"),
    ({**NEW, "rotary_cos": zeros(0, 8), "rotary_sin": zeros(0, 8)}, "must have a row for each position"),
    ({"k_descale": 2.0}, "k_descale and v_descale belong to caches of torch.float8_e4m3fn"),
    ({"alibi_slopes": zeros(5)}, "alibi_slopes must be torch.float32 [nheads_q] or [batch, nheads_q]"),
    ({"sinks": zeros(2, 6)}, "sinks must be torch.float32 [nheads_q]"),
    ({"num_splits": -1}, "num_splits must be 'auto' or at least 0"),
    ({"num_splits": 1.5}, "num_splits must be 'auto' or a whole number"),
    ({"softcap": -1.0}, "softcap must be a finite number"),
    ({"softmax_scale": float("nan")}, "softmax_scale must be a finite number"),
    ({"window": (1, 2, 3)}, "window must be two whole numbers"),
    ({"mask": masks.document(torch.zeros(24, dtype=torch.int32))}, "takes masks that a formula bounds"),
    ({"mask": torch.ones(2, 2, dtype=torch.bool)}, "pass it as bias="),
]


@pytest.mark.parametrize(("change", "message"), WRONG, ids=[message[:40] for _, message in WRONG])
@pytest.mark.parametrize("interpreted", [False, True])
def test_refusals(change: dict[str, typing.Any], message: str, interpreted: bool, monkeypatch: typing.Any) -> None:
    monkeypatch.setenv("FLASHGEN_INTERPRET", str(int(interpreted)))
    given = {**GIVEN, **change}
    with pytest.raises(InputError, match=re.escape(message)):
        flashgen.attention_with_kvcache(**given)


def test_a_config_of_another_phase() -> None:
    config = TritonForwardConfig(block_m=64, block_n=32, num_warps=4, num_stages=1)
    with pytest.raises(ConfigError, match="no kernels of the decode phase"):
        flashgen.attention_with_kvcache(**GIVEN, config=config)


@pytest.mark.parametrize("name", ["q", "k_cache", "k", "sinks"])
def test_gradients_are_refused_and_not_left_out(name: str) -> None:
    given = {**GIVEN, **NEW, "sinks": torch.zeros(6)}
    given[name] = given[name].clone().requires_grad_()
    with pytest.raises(UnsupportedError, match=rf"{name} requires a gradient, .* torch\.no_grad"):
        flashgen.attention_with_kvcache(**given)
    with torch.no_grad():
        assert not flashgen.attention_with_kvcache(**given).requires_grad


CHECKED: list[tuple[dict[str, typing.Any], str]] = [
    ({"cache_seqlens": whole(3, 25)}, "cache_seqlens[1] is 25; the cache of a sequence holds 24"),
    ({"cache_seqlens": whole(-1, 2)}, "cache_seqlens[0] is -1"),
    ({"cache_seqlens": whole(3, 24), **NEW}, "cache_seqlens[1] is 24 and 1 appended"),
    ({"cache_batch_idx": whole(0, 2)}, "cache_batch_idx[1] is 2; the caches have the entries 0 to 1"),
    ({"cache_leftpad": whole(4, 0)}, "cache_leftpad[0] is 4; it must be from 0 to cache_seqlens[0] = 3"),
    ({"cache_seqlens": whole(3, 25), "page_table": torch.tensor([[1, 9], [0, 2]], dtype=torch.int32)}, "[1, 1] is 2"),
    ({"cache_seqlens": whole(3, 24), "page_table": whole(1, -1).view(2, 1)}, "page_table[1, 0] is -1, of keys in use"),
    ({"rotary_cos": zeros(5, 8), "rotary_sin": zeros(5, 8), **NEW}, "has 5 positions; the call needs 6"),
]


@pytest.mark.parametrize(("change", "message"), CHECKED, ids=[message[:40] for _, message in CHECKED])
def test_numbers_are_looked_at_on_request(change: dict[str, typing.Any], message: str) -> None:
    before = GIVEN["k_cache"].clone()
    with pytest.raises(InputError, match=re.escape(message)):
        flashgen.attention_with_kvcache(**{**GIVEN, **change}, check=True)
    assert torch.equal(GIVEN["k_cache"], before)


def test_what_is_right_passes_the_check() -> None:
    pages = torch.tensor([[1, 99], [0, -5]], dtype=torch.int32)
    turn = {"rotary_cos": zeros(6, 8), "rotary_sin": zeros(6, 8)}
    flashgen.attention_with_kvcache(**GIVEN, **NEW, **turn, page_table=pages, check=True)
    flashgen.attention_with_kvcache(**GIVEN, cache_batch_idx=whole(1, 1), cache_leftpad=whole(3, 1), check=True)
