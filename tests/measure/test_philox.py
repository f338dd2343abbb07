"""Philox against published answers and Triton's own, dropout against its share."""

from __future__ import annotations

import pytest
import torch
import triton
import triton.language as tl

from flashgen.launch.interpreted import run_interpreted
from flashgen.measure import dropout_keep
from flashgen.measure.philox import philox4x32

# Random123 1.14, tests/kat_vectors, philox4x32-10: counter, key, words.
KNOWN = [
    ("00000000 00000000 00000000 00000000", "00000000 00000000", "6627e8d5 e169c58d bc57ac4c 9b00dbd8"),
    ("ffffffff ffffffff ffffffff ffffffff", "ffffffff ffffffff", "408f276d 41c83b0e a20bc7c6 6d5451fd"),
    ("243f6a88 85a308d3 13198a2e 03707344", "a4093822 299f31d0", "d16cfe09 94fdcceb 5001e420 24126ea1"),
]
SEED = 0x0123456789ABCDEF
OFFSET = 2**33 + 77
STATE = torch.tensor([SEED, OFFSET])


def words(text: str) -> tuple[torch.Tensor, ...]:
    return tuple(torch.tensor(int(word, 16)) for word in text.split())


@pytest.mark.parametrize(("counter", "key", "expected"), KNOWN)
def test_published_answers(counter: str, key: str, expected: str) -> None:
    found = philox4x32(words(counter), words(key))  # type: ignore[arg-type]
    assert " ".join(f"{int(word):08x}" for word in found) == expected


@triton.jit
def _random_words(out, seed, c0, c1, c2, c3, SIZE: tl.constexpr) -> None:  # type: ignore[no-untyped-def]
    lane = tl.arange(0, SIZE)
    a, b, c, d = tl.philox(seed, tl.load(c0 + lane), tl.load(c1 + lane), tl.load(c2 + lane), tl.load(c3 + lane))
    tl.store(out + lane, a)
    tl.store(out + SIZE + lane, b)
    tl.store(out + 2 * SIZE + lane, c)
    tl.store(out + 3 * SIZE + lane, d)


def test_triton_draws_the_same_words() -> None:
    size = 64
    generator = torch.Generator().manual_seed(0)
    counter = [torch.randint(0, 2**31, (size,), generator=generator, dtype=torch.int32) for _ in range(4)]
    out = torch.zeros(4, size, dtype=torch.int32)
    names = ("c0", "c1", "c2", "c3")
    run_interpreted(
        _random_words, (1,), {"out": out, "seed": SEED, **dict(zip(names, counter, strict=True)), "SIZE": size}
    )
    key = (torch.tensor(SEED & 0xFFFFFFFF), torch.tensor(SEED >> 32))
    expected = torch.stack(philox4x32(tuple(word.long() for word in counter), key))  # type: ignore[arg-type]
    assert torch.equal(out.long() & 0xFFFFFFFF, expected)


def test_each_word_serves_its_own_key() -> None:
    heads, q_idx, kv_idx = torch.arange(6)[:, None, None], torch.arange(5)[:, None], torch.arange(11)
    kept = dropout_keep(STATE, 0.3, heads, q_idx, kv_idx)
    assert kept.shape == (6, 5, 11)
    for head, row, key in [(0, 0, 0), (5, 4, 10), (2, 3, 7), (1, 1, 9), (3, 0, 6)]:
        counter = (key // 4, row, head, OFFSET % 2**32)
        found = philox4x32(
            tuple(torch.tensor(word) for word in counter),  # type: ignore[arg-type]
            (torch.tensor(SEED % 2**32), torch.tensor(SEED // 2**32)),
        )
        assert bool(kept[head, row, key]) == (int(found[key % 4]) >= int(0.3 * 2**32))


@pytest.mark.parametrize("p", [0.0, 0.1, 0.5, 0.83, 1.0])
def test_the_kept_share(p: float) -> None:
    heads, q_idx, kv_idx = torch.arange(8)[:, None, None], torch.arange(200)[:, None], torch.arange(200)
    kept = dropout_keep(STATE, p, heads, q_idx, kv_idx).double()
    spread = (p * (1 - p)) ** 0.5
    assert kept.mean().item() == pytest.approx(1 - p, abs=4 * spread / 8**0.5 / 200 + 1e-12)
    # Neither rows, nor keys, nor heads have a share of their own.
    assert (kept.mean(dim=(0, 1)) - (1 - p)).abs().max().item() <= 5 * spread / 1600**0.5
    assert (kept.mean(dim=(0, 2)) - (1 - p)).abs().max().item() <= 5 * spread / 1600**0.5
    assert (kept.mean(dim=(1, 2)) - (1 - p)).abs().max().item() <= 5 * spread / 200


@pytest.mark.parametrize("changed", [(SEED + 1, OFFSET), (SEED + 2**32, OFFSET), (-SEED, OFFSET), (SEED, OFFSET + 1)])
def test_seed_and_offset_change_the_mask(changed: tuple[int, int]) -> None:
    at = (torch.arange(2)[:, None, None], torch.arange(40)[:, None], torch.arange(40))
    kept, other = dropout_keep(STATE, 0.5, *at), dropout_keep(torch.tensor(changed), 0.5, *at)
    assert 0.4 < (kept == other).double().mean().item() < 0.6


def test_drops_are_independent_of_their_neighbours() -> None:
    kept = dropout_keep(STATE, 0.5, torch.arange(4)[:, None, None], torch.arange(256)[:, None], torch.arange(256))
    for dim in (0, 1, 2):
        agree = (kept == kept.roll(1, dims=dim)).double().mean().item()
        assert abs(agree - 0.5) < 0.01
