"""Masks: the count of visible pairs against asking for each pair."""

from __future__ import annotations

import itertools

import pytest

from flashgen.errors import InputError
from flashgen.spec import Causal, causal, full
from flashgen.spec.masks import Mask

LENGTHS = (*itertools.product(range(10), repeat=2), (113, 203), (203, 113), (1, 40), (40, 1))


@pytest.mark.parametrize("mask", [full(), causal(), causal("top_left")], ids=str)
def test_visible_pairs_are_those_that_sees_allows(mask: Mask) -> None:
    for sq, sk in LENGTHS:
        seen = sum(bool(mask.sees(i, j, sq, sk)) for i in range(sq) for j in range(sk))
        assert mask.visible_pairs(sq, sk) == seen, (sq, sk)


def test_bottom_right_lets_the_last_row_see_the_last_key() -> None:
    mask = causal()
    rows = [[mask.sees(i, j, 2, 4) for j in range(4)] for i in range(2)]
    assert rows == [[True, True, True, False], [True, True, True, True]]
    # More queries than keys: the first rows see nothing.
    assert [mask.sees(i, 0, 4, 2) for i in range(4)] == [False, False, True, True]


def test_top_left_lets_the_first_row_see_the_first_key() -> None:
    mask = causal("top_left")
    assert [mask.sees(i, j, 2, 4) for i in range(2) for j in range(4)] == [True] + [False] * 3 + [True] * 2 + [
        False
    ] * 2


def test_masks_are_values() -> None:
    assert causal() == Causal() == causal("bottom_right")
    assert len({full(), full(), causal(), Causal(), causal("top_left")}) == 3


def test_unknown_alignment() -> None:
    with pytest.raises(InputError, match="align must be 'bottom_right' or 'top_left', got 'left'"):
        causal("left")  # type: ignore[arg-type]
