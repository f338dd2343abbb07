"""Masks: counts and intervals against asking for each pair, how they compose, and how they are written."""

from __future__ import annotations

import functools
import itertools
import operator

import pytest
import torch

from flashgen.errors import InputError
from flashgen.spec import Causal, Full, Mask, Positions, causal, full, parse_mask
from flashgen.spec.masks import (
    FunctionMask,
    chunked,
    dilated_window,
    document,
    document_without_ids,
    global_tokens,
    prefix_lm,
    sliding_window,
)
from flashgen.spec.mods import parse_mod

LENGTHS = (*itertools.product((0, 1, 2, 3, 7, 8), repeat=2), (19, 31), (31, 19), (1, 40), (40, 1))

WINDOWS = (
    *(full(), causal(), sliding_window(0, 0), sliding_window(3, 0), sliding_window(2, 1), sliding_window(0, 4)),
    *(sliding_window(-1, 2), sliding_window(3, -1), sliding_window(100, 100)),
)
# Every key between the first and the last that a row sees is seen.
SOLID = (*WINDOWS, causal("top_left"), prefix_lm(0), prefix_lm(5), prefix_lm(100), chunked(1), chunked(3), chunked(64))
DILATED = (dilated_window(6, 0, 2), dilated_window(4, 3, 3), dilated_window(0, 0, 5), dilated_window(5, 5, 1))
BY_FORMULA = (
    *(*SOLID, *DILATED, causal() & chunked(4), chunked(5) & sliding_window(3, 1), prefix_lm(4) & sliding_window(6, -1)),
    *(dilated_window(9, 2, 2) & chunked(4), causal("top_left") & prefix_lm(2) & chunked(3)),
)
FUNCTION = parse_mask("mask_mod('return (q_idx + 2 * kv_idx) % 3 != 1')")
BY_TABLE = (
    *(global_tokens(0), global_tokens(2), ~causal(), sliding_window(2, 2) | global_tokens(1), ~chunked(3) & causal()),
    *(causal() | dilated_window(3, 3, 2), (causal() | chunked(3)) & ~prefix_lm(2), FUNCTION, FUNCTION & causal()),
)
EVERY = (*BY_FORMULA, *BY_TABLE)


def ids_of(seqlen_q: int, seqlen_k: int) -> tuple[torch.Tensor, torch.Tensor]:
    return (torch.arange(seqlen_q) * 5 // max(seqlen_q, 1), torch.arange(seqlen_k) * 4 // max(seqlen_k, 1))


@functools.cache
def seen(mask: Mask, seqlen_q: int, seqlen_k: int, b: int = 0, h: int = 0) -> torch.Tensor:
    """What each pair says, asked with tensors: bool [seqlen_q, seqlen_k]."""
    at = Positions(
        q_idx=torch.arange(seqlen_q)[:, None],
        kv_idx=torch.arange(seqlen_k)[None, :],
        seqlen_q=seqlen_q,
        seqlen_k=seqlen_k,
        b=torch.tensor(b),
        h=torch.tensor(h),
        ops=torch,
    )
    return torch.as_tensor(mask.sees(at)).expand(seqlen_q, seqlen_k)


@pytest.mark.parametrize("mask", [m for m in EVERY if FUNCTION not in m.leaves], ids=str)
def test_plain_numbers_and_tensors_are_answered_alike(mask: Mask) -> None:
    for sq, sk in ((3, 7), (7, 3)):
        for i, j in itertools.product(range(sq), range(sk)):
            answer = mask.sees(Positions(q_idx=i, kv_idx=j, seqlen_q=sq, seqlen_k=sk))
            assert bool(answer) == bool(seen(mask, sq, sk)[i, j]), (i, j, sq, sk)
            assert isinstance(answer, bool)


@pytest.mark.parametrize("mask", [*SOLID, *DILATED], ids=str)
def test_visible_pairs_are_those_that_sees_allows(mask: Mask) -> None:
    for sq, sk in LENGTHS:
        assert mask.visible_pairs(sq, sk) == int(seen(mask, sq, sk).sum()), (sq, sk)


@pytest.mark.parametrize("mask", EVERY, ids=str)
def test_visible_pairs_are_never_too_few(mask: Mask) -> None:
    for sq, sk in LENGTHS:
        assert int(seen(mask, sq, sk).sum()) <= mask.visible_pairs(sq, sk) <= sq * sk, (sq, sk)


@pytest.mark.parametrize("mask", BY_FORMULA, ids=str)
def test_row_interval_holds_what_a_row_sees(mask: Mask) -> None:
    assert mask.by_formula
    for sq, sk in LENGTHS:
        ends = []
        for row in range(sq):
            interval = mask.row_interval(row, sq, sk)
            assert interval is not None
            lo, hi = max(interval[0], 0), min(interval[1], sk)
            keys = seen(mask, sq, sk)[row].nonzero().flatten().tolist()
            assert all(lo <= key < hi for key in keys), (row, sq, sk)
            if mask in SOLID:
                assert keys == list(range(lo, hi)), (row, sq, sk)
            ends.append(interval)
        # A tile of queries sees what lies between the first row's start and the last row's end.
        assert ends == sorted(ends)
        assert [hi for _, hi in ends] == sorted(hi for _, hi in ends)


@pytest.mark.parametrize("mask", BY_TABLE, ids=str)
def test_a_mask_without_a_formula_says_so_for_every_row(mask: Mask) -> None:
    assert not mask.by_formula
    assert all(mask.row_interval(row, sq, sk) is None for sq, sk in ((7, 7), (3, 9)) for row in range(sq))


def test_bottom_right_lets_the_last_row_see_the_last_key() -> None:
    assert seen(causal(), 2, 4).tolist() == [[True, True, True, False], [True, True, True, True]]
    # More queries than keys: the first rows see nothing.
    assert seen(causal(), 4, 2)[:, 0].tolist() == [False, False, True, True]


def test_top_left_lets_the_first_row_see_the_first_key() -> None:
    assert seen(causal("top_left"), 2, 4).tolist() == [[True, False, False, False], [True, True, False, False]]


def test_windows_chunks_and_global_tokens_by_hand() -> None:
    def rows(mask: Mask) -> list[str]:
        return ["".join("x" if key else "." for key in row) for row in seen(mask, 3, 5).tolist()]

    assert rows(sliding_window(1, 0)) == [".xx..", "..xx.", "...xx"]
    assert rows(sliding_window(-1, 1)) == ["xxxx.", "xxxxx", "xxxxx"]
    assert rows(prefix_lm(4)) == ["xxxx.", "xxxx.", "xxxxx"]
    assert rows(chunked(2)) == ["..xx.", "..xx.", "....x"]
    assert rows(dilated_window(2, 1, 2)) == ["x.x..", ".x.x.", "..x.x"]
    assert rows(global_tokens(1)) == ["x....", "x....", "x...."]
    assert rows(global_tokens(3)) == ["xxxxx", "xxx..", "xxx.."]


@pytest.mark.parametrize(("sq", "sk"), [(8, 8), (3, 11), (11, 3), (1, 6)])
def test_operators_mean_what_they_say(sq: int, sk: int) -> None:
    for a, b in itertools.product(EVERY, repeat=2):
        left, right = seen(a, sq, sk), seen(b, sq, sk)
        assert torch.equal(seen(a & b, sq, sk), left & right), (a, b)
        assert torch.equal(seen(a | b, sq, sk), left | right), (a, b)
    for a in EVERY:
        assert torch.equal(seen(~a, sq, sk), ~seen(a, sq, sk)), a


def test_the_laws_of_composition() -> None:
    for a, b in itertools.product(EVERY, repeat=2):
        assert a & b == b & a
        assert a | b == b | a
        assert hash(a & b) == hash(b & a)
    for a, b, c in itertools.permutations((causal(), chunked(3), FUNCTION, global_tokens(2), prefix_lm(4)), 3):
        assert (a & b) & c == a & (b & c)
        assert (a | b) | c == a | (b | c)
    for a in EVERY:
        assert a & a == a == a | a
        assert a & full() == a == full() & a
        assert ~~a == a
        assert (a & causal()) & causal() == a & causal()


@pytest.mark.parametrize(
    ("first", "second", "merged"),
    [
        (causal(), sliding_window(3, 5), sliding_window(3, 0)),
        (sliding_window(3, -1), causal(), sliding_window(3, 0)),
        (sliding_window(7, 2), sliding_window(4, 6), sliding_window(4, 2)),
        (sliding_window(-1, 4), sliding_window(2, -1), sliding_window(2, 4)),
        (sliding_window(-1, 4), causal(), causal()),
        (full(), sliding_window(1, 1), sliding_window(1, 1)),
    ],
    ids=str,
)
def test_windows_merge(first: Mask, second: Mask, merged: Mask) -> None:
    assert first & second == merged == second & first
    assert isinstance((first & chunked(4)) & second, Mask)


def test_merging_never_changes_what_is_seen() -> None:
    for a, b in itertools.product(WINDOWS, repeat=2):
        assert (a & b) in (a, b) or str(a & b).startswith("sliding_window(")
        for sq, sk in ((9, 9), (4, 9), (9, 4)):
            assert torch.equal(seen(a & b, sq, sk), seen(a, sq, sk) & seen(b, sq, sk)), (a, b)


def test_a_top_left_causal_mask_is_no_window() -> None:
    mask = causal("top_left") & sliding_window(3, 3)
    assert mask.kind == "intersection"
    assert set(mask.leaves) == {causal("top_left"), sliding_window(3, 3)}


def test_unbounded_windows_are_the_masks_they_mean() -> None:
    assert sliding_window(-1, -1) == Full() == full()
    assert sliding_window(-1, 0) == Causal() == causal() == causal("bottom_right")


def test_masks_are_values() -> None:
    assert len({*EVERY, *map(parse_mask, map(str, EVERY))}) == len(set(EVERY))
    assert len({str(mask) for mask in EVERY}) == len(set(EVERY))
    assert sliding_window(3, 0) != sliding_window(4, 0)
    assert prefix_lm(3) != chunked(3) != global_tokens(3)
    with pytest.raises(TypeError):
        causal() & True  # type: ignore[operator]
    with pytest.raises(TypeError):
        causal() | "full"  # type: ignore[operator]


@pytest.mark.parametrize("mask", [*EVERY, document_without_ids(False), document_without_ids(True) & causal()], ids=str)
def test_every_mask_reads_back_as_it_was(mask: Mask) -> None:
    assert parse_mask(str(mask)) == mask
    assert str(parse_mask(str(mask))) == str(mask)
    assert mask.structure(keep_numbers=True) == mask
    neutral = mask.structure()
    assert neutral.structure() == neutral
    assert neutral.by_formula == mask.by_formula
    assert [leaf.kind for leaf in neutral.leaves] == [leaf.kind for leaf in mask.leaves]
    assert [name for leaf in neutral.leaves for name, _ in leaf.parameters] == [
        name for leaf in mask.leaves for name, _ in leaf.parameters
    ]


def test_numbers_alone_do_not_change_the_structure() -> None:
    pairs = (
        *((sliding_window(127, 0), sliding_window(1023, 5)), (prefix_lm(3), prefix_lm(1024)), (chunked(7), chunked(8))),
        *((dilated_window(1, 2, 3), dilated_window(4, 5, 6)), (global_tokens(1), global_tokens(9))),
        ((causal() & chunked(4)), (causal() & chunked(8192))),
    )
    for a, b in pairs:
        assert a != b
        assert a.structure() == b.structure()
    assert sliding_window(3, -1).structure() != sliding_window(3, 0).structure()
    assert sliding_window(-1, 3).structure() != sliding_window(3, -1).structure()


def test_documents_see_their_own_id() -> None:
    for sq, sk in ((6, 6), (4, 9), (9, 4)):
        q_ids, kv_ids = ids_of(sq, sk)
        expected = q_ids[:, None] == kv_ids[None, :]
        assert torch.equal(seen(document(q_ids, kv_ids), sq, sk), expected)
        assert torch.equal(seen(document(q_ids, kv_ids) & causal(), sq, sk), expected & seen(causal(), sq, sk))
    batched = torch.tensor([[0, 0, 1], [0, 1, 1]])
    assert seen(document(batched), 3, 3, b=1).tolist() == [
        [True, False, False],
        [False, True, True],
        [False, True, True],
    ]
    assert not document(batched).by_formula
    with pytest.raises(InputError, match=r"\[seqlen\] or \[batch, seqlen\]"):
        document(torch.zeros(1, 2, 3))
    with pytest.raises(InputError, match="queries and keys alike"):
        document(torch.zeros(3), torch.zeros(1, 3))


def test_tensors_are_no_part_of_a_mask_and_find_their_leaves_again() -> None:
    first, second = (document(torch.tensor(ids)) for ids in ([0, 0, 1, 1], [0, 1, 1, 1]))
    assert first == second == document_without_ids(False)
    assert hash(first) == hash(second)
    assert str(first) == "document"
    table = torch.tensor([True, False, True, True])
    function = parse_mod("mask_mod('return keep[kv_idx]', keep='bool[kv_idx]')")
    by_table = FunctionMask(function).with_tensors([table])
    for mask in (first & by_table, by_table | ~first, (~by_table & causal()) | second):
        assert mask.capture_count == len(mask.tensors) == 3
        bare = mask.structure(keep_numbers=True)
        assert bare.tensors == ()
        again = parse_mask(str(mask)).with_tensors(mask.tensors)
        assert again == mask
        assert all(a is b for a, b in zip(again.tensors, mask.tensors, strict=True))
        assert torch.equal(seen.__wrapped__(again, 4, 4), seen.__wrapped__(mask, 4, 4))


def test_two_documents_are_two_masks() -> None:
    # Tensors take no part in equality, and yet none may be lost.
    first, second = torch.tensor([0, 0, 1, 1]), torch.tensor([0, 1, 1, 2])
    mask = document(first) & document(second)
    assert mask.capture_count == 4
    both = (first[:, None] == first) & (second[:, None] == second)
    assert torch.equal(seen.__wrapped__(mask, 4, 4), both)
    again = parse_mask(str(mask)).with_tensors(mask.tensors)
    assert again == mask
    assert torch.equal(seen.__wrapped__(again, 4, 4), both)


def test_long_compositions_read_back() -> None:
    mask = functools.reduce(operator.or_, map(prefix_lm, range(40)))
    assert parse_mask(str(mask)) == mask


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: causal("left"), "align must be 'bottom_right' or 'top_left', got 'left'"),
        (lambda: sliding_window(-2, 0), "left must be a whole number from -1"),
        (lambda: sliding_window(0, 1.5), "right must be a whole number from -1 to 1073741824, got 1.5"),
        (lambda: sliding_window(True, 0), "left must be a whole number"),
        (lambda: sliding_window(2**31, 0), "left must be a whole number"),
        (lambda: prefix_lm(-1), "length must be a whole number from 0"),
        (lambda: chunked(0), "size must be a whole number from 1"),
        (lambda: dilated_window(-1, 0, 1), "left must be a whole number from 0"),
        (lambda: dilated_window(1, 0, 0), "dilation must be a whole number from 1"),
        (lambda: global_tokens(-3), "count must be a whole number from 0"),
    ],
)
def test_numbers_out_of_range(make: functools.partial[Mask], message: str) -> None:
    with pytest.raises(InputError, match=message):
        make()


@pytest.mark.parametrize(
    ("text", "mask"),
    [
        ("sliding_window( 127 , 0 )", sliding_window(127, 0)),
        ("sliding_window(right=0, left=3)", sliding_window(3, 0)),
        ("causal(align='top_left')", causal("top_left")),
        ("causal & full", causal()),
        ("causal&sliding_window(4,-1)", sliding_window(4, 0)),
        ("((causal))|~(~chunked(2))", functools.reduce(operator.or_, (causal(), chunked(2)))),
        ("document&causal", causal() & document_without_ids(False)),
    ],
)
def test_other_spellings(text: str, mask: Mask) -> None:
    assert parse_mask(text) == mask


HOSTILE = (
    *(
        "",
        " ",
        "causal.x",
        "causal[0]",
        "causal()()",
        "lambda: causal",
        "causal and full",
        "not causal",
        "-causal",
        "1",
    ),
    *("'causal'", "causal=3", "causal\x00", "causal\ncausal", "causal;full", "caus\u0430l", "f(**x)", "causal(**x)"),
    *("__import__('os').system('x')", "document(3)", "document(q_ids)", "mask_mod()", "mask_mod(x)", "mask_mod('x')"),
    *("score_mod('return score')", "full(1)", "sliding_window(1)", "sliding_window(1,2,3)", "sliding_window(*[1,2])"),
    *("sliding_window({[]:1},0)", "sliding_window([1],0)", "sliding_window(1+2j,0)", "sliding_window('1',0)"),
    *("chunked(10**9)", "chunked(" + "9" * 6000 + ")", "chunked(" + "-" * 3000 + "1)", "chunked(None)", "chunked(0)"),
    *("a" * 30_000, "~" * 500 + "causal", "(" * 9_000 + "causal" + ")" * 9_000, "&".join(["causal"] * 5_000)),
)


@pytest.mark.parametrize("text", HOSTILE, ids=lambda text: ascii(text[:30]))
def test_hostile_text_is_refused_in_a_few_words(text: str) -> None:
    with pytest.raises(InputError) as caught:
        parse_mask(text)
    assert len(str(caught.value)) < 1_000


def test_unknown_mask_lists_what_is_known() -> None:
    names = "full, causal, sliding_window, prefix_lm, chunked, dilated_window, global_tokens, document, mask_mod"
    with pytest.raises(InputError, match=f"unknown mask 'window'; known: {names}"):
        parse_mask("window")
