"""Reading mods from Python functions: what they become, and what the refusals say."""

from __future__ import annotations

import functools
import importlib.util
import inspect
import math
import typing
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import where as choose
from torch.nn.attention.flex_attention import and_masks, noop_mask, or_masks

from flashgen.errors import InputError
from flashgen.spec import score_mods
from flashgen.spec.mods import Capture, parse_mod, read_mod

T = typing.Any
Mod = Callable[..., T]

WINDOW = 128
IDS = torch.zeros(2, 8, dtype=torch.int32)
SLOPES = torch.rand(4)
SCALE = torch.tensor(0.5)
b = torch.arange(9)


def causal(b: T, h: T, q: T, kv: T) -> T:
    """Docstrings are left out."""
    return q >= kv


def windowed(width: int) -> Mod:
    def mask(batch: T, head: T, query: T, key: T) -> T:
        distance = query - key
        unused = distance * 2  # noqa: F841 - dropped from the source
        return causal(batch, head, query, key) and distance < width

    return mask


def both(first: Mod, second: Mod) -> Mod:
    def mask(b: T, h: T, q_idx: T, kv_idx: T) -> T:
        return first(b, h, q_idx, kv_idx) & second(b, h, q_idx, kv_idx)

    return mask


def document(b: T, h: T, q_idx: T, kv_idx: T) -> T:
    rows = IDS[b]
    return rows[q_idx] == rows[kv_idx]


def names_that_clash(batch: T, h: T, q: T, kv: T) -> T:
    where = q // 2
    b_1 = kv // 3
    return b[where] > b[b_1]


def helper(x: T, low: int = 2) -> T:
    twice = x + x
    return torch.clamp(twice, low, max=9) + twice


def inlined_twice(b: T, h: T, q: T, kv: T) -> T:
    return helper(q - kv) < helper(kv, 3)


def augmented(score: T, b: T, h: T, q: T, kv: T) -> T:
    score += SLOPES[h] * abs(q - kv)
    score *= SCALE
    return choose(q % 2 == 0, score, -math.inf)


def many_functions(score: T, b: T, h: T, q: T, kv: T, base: float = 2.0) -> T:
    low = min(q, kv, 7) * math.log2(8)
    return (score / base).tanh() * base + torch.sigmoid(-score).clamp(min=0.1) + low.maximum(h) - score.exp2()


on_one_line = lambda b, h, q, kv: (q - kv) % 4 == 0  # noqa: E731


def test_names_are_canonical_and_values_become_literals() -> None:
    mod = read_mod(windowed(WINDOW), "mask")
    assert str(mod) == "mask_mod('distance = q_idx - kv_idx; return (q_idx >= kv_idx) & (distance < 128)')"
    assert read_mod(windowed(WINDOW), "mask") == mod
    assert read_mod(windowed(5), "mask") != mod
    assert read_mod(causal, "mask").source == "return q_idx >= kv_idx"
    assert read_mod(on_one_line, "mask").source == "return (q_idx - kv_idx) % 4 == 0"


def test_captured_tensors() -> None:
    mod = read_mod(document, "mask")
    assert mod.source == "return IDS[b, q_idx] == IDS[b, kv_idx]"
    assert mod.captures == (Capture(name="IDS", dtype="int32", axes=("b", "any")),)
    assert mod.tensors[0] is IDS
    score = read_mod(augmented, "score")
    assert score.source == (
        "score_1 = score + SLOPES[h] * abs(q_idx - kv_idx); score_2 = score_1 * SCALE; "
        'return where(q_idx % 2 == 0, score_2, float("-inf"))'
    )
    assert [str(capture) for capture in score.captures] == ["float32[h]", "float32[]"]


def test_names_that_mean_something_else_are_changed() -> None:
    assert str(read_mod(names_that_clash, "mask")) == (
        "mask_mod('where_1 = q_idx // 2; b_1_1 = kv_idx // 3; return b_1[where_1] > b_1[b_1_1]', b_1='int64[any]')"
    )


def test_called_functions_are_written_in_place() -> None:
    assert read_mod(inlined_twice, "mask").source == (
        "x = q_idx - kv_idx; twice = x + x; twice_1 = kv_idx + kv_idx; "
        "return minimum(maximum(twice, 2), 9) + twice < minimum(maximum(twice_1, 3), 9) + twice_1"
    )
    nested = both(both(causal, windowed(4)), both(document, on_one_line))
    assert read_mod(nested, "mask").source == (
        "distance = q_idx - kv_idx; return (q_idx >= kv_idx) & ((q_idx >= kv_idx) & (distance < 4)) & "
        "((IDS[b, q_idx] == IDS[b, kv_idx]) & ((q_idx - kv_idx) % 4 == 0))"
    )


def test_functions_and_methods() -> None:
    assert read_mod(many_functions, "score").source == (
        "low = minimum(minimum(q_idx, kv_idx), 7) * 3.0; return tanh(score / 2.0) * 2.0 + "
        "maximum(sigmoid(-score), 0.1) + maximum(low, h) - exp2(score)"
    )


def test_combinations_of_flex_attention() -> None:
    joined = and_masks(causal, or_masks(document, on_one_line))
    assert read_mod(joined, "mask").source == (
        "return (q_idx >= kv_idx) & ((IDS[b, q_idx] == IDS[b, kv_idx]) | ((q_idx - kv_idx) % 4 == 0))"
    )
    assert read_mod(noop_mask, "mask").source == "return True"


def test_score_mods() -> None:
    assert read_mod(score_mods.softcap(30.0), "score").source == "return 30.0 * tanh(score / 30.0)"
    assert read_mod(score_mods.relative_position(), "score").source == "return score + (q_idx - kv_idx)"
    alibi = read_mod(score_mods.alibi(SLOPES), "score")
    assert alibi.source == "return score - slopes[h] * abs(q_idx - kv_idx)"
    assert alibi.captures == (Capture(name="slopes", dtype="float32", axes=("h",)),)
    with pytest.raises(InputError, match="softcap must be a positive number, got 0"):
        score_mods.softcap(0)
    with pytest.raises(InputError, match=r"alibi slopes must be a tensor \[nheads_q\], got Tensor of shape \(2, 8\)"):
        score_mods.alibi(IDS)


READABLE: list[tuple[Mod, typing.Literal["mask", "score"]]] = [
    (causal, "mask"),
    (windowed(3), "mask"),
    (document, "mask"),
    (names_that_clash, "mask"),
    (inlined_twice, "mask"),
    (augmented, "score"),
    (many_functions, "score"),
]


@pytest.mark.parametrize(("function", "role"), READABLE)
def test_text_and_back(function: Mod, role: typing.Literal["mask", "score"]) -> None:
    mod = read_mod(function, role)
    again = parse_mod(str(mod))
    assert again == mod
    assert str(again) == str(mod)
    assert again.body == mod.body


def with_if(b: T, h: T, q: T, kv: T) -> T:
    if q > kv:
        return h > 0
    return b > 0


def with_loop(b: T, h: T, q: T, kv: T) -> T:
    seen = q > kv
    for step in (1, 2):
        seen = seen | (kv == step)
    return seen


def with_conversion(b: T, h: T, q: T, kv: T) -> T:
    near = (q - kv).to(torch.float32)
    return near < 3


def with_power(score: T, b: T, h: T, q: T, kv: T) -> T:
    return score + 0.5 ** (q - kv)


def with_shape(b: T, h: T, q: T, kv: T) -> T:
    return q < IDS.shape[1]


def with_too_few_indices(b: T, h: T, q: T, kv: T) -> T:
    return IDS[b] == 0


def with_float_index(b: T, h: T, q: T, kv: T) -> T:
    return IDS[b, q / 2] == 0


def with_unknown_function(score: T, b: T, h: T, q: T, kv: T) -> T:
    return torch.softmax(score, 0)


def with_object(b: T, h: T, q: T, kv: T) -> T:
    return q < LIMITS["q"]


def with_number_as_mask(b: T, h: T, q: T, kv: T) -> T:
    return q - kv


def with_boolean_as_score(score: T, b: T, h: T, q: T, kv: T) -> T:
    return score > 0


def with_tuple(b: T, h: T, q: T, kv: T) -> T:
    x, y = q, kv
    return x > y


def with_name_before_its_value(b: T, h: T, q: T, kv: T) -> T:
    near = q - late  # noqa: F821 - that is what is tested
    late = kv
    return near > late


def with_accent(b: T, h: T, q: T, kv: T) -> T:
    größe = q - kv
    return (größe > 3) & größe.item()


def with_refused_helper(b: T, h: T, q: T, kv: T) -> T:
    return with_loop(b, h, q, kv) & (q > 0)


def with_recursion(b: T, h: T, q: T, kv: T) -> T:
    return with_recursion(b, h, q, kv)


def with_starred(*arguments: T) -> T:
    return arguments[2] > arguments[3]


def with_too_few(b: T, q: T, kv: T) -> T:
    return q > kv


def with_too_many(b: T, h: T, q: T, kv: T, more: T) -> T:
    return q > kv


LIMITS = {"q": 3}


@pytest.mark.parametrize(
    ("function", "role", "what", "line", "caret", "instead"),
    [
        (with_if, "mask", "an `if` statement", "if q > kv:", "^", "Use torch.where(condition, a, b) or"),
        (with_loop, "mask", "a loop", "for step in (1, 2):", "^", "write its terms out"),
        (
            with_conversion,
            "mask",
            "the method `.to()`",
            "near = (q - kv).to(torch.float32)",
            "       ^^^^^^^^^^^^^^^^^^^^^^^^^^",
            "Types need no conversion",
        ),
        (with_power, "score", "the operator `**`", "return score + 0.5 ** (q - kv)", None, "torch.exp2"),
        (with_shape, "mask", "the attribute `.shape`", "return q < IDS.shape[1]", "           ^^^^^^^^^", "outside"),
        (with_too_few_indices, "mask", "a tensor of 2 dimensions with 1 indices", "return IDS[b] == 0", None, "[b, q"),
        (with_float_index, "mask", "an index of type float", "return IDS[b, q / 2] == 0", None, "integers"),
        (with_unknown_function, "score", "'torch.softmax' is a", "return torch.softmax(score, 0)", None, "where"),
        (with_object, "mask", "'LIMITS' is a dict; a mod can use int", 'return q < LIMITS["q"]', None, ""),
        (with_number_as_mask, "mask", "must return a boolean, this is int", "return q - kv", None, "Compare"),
        (with_boolean_as_score, "score", "must return a number", "return score > 0", None, "torch.where"),
        (with_tuple, "mask", "an assignment to anything but one name", "x, y = q, kv", "^^^^", "single names"),
        (with_name_before_its_value, "mask", "used before it is assigned", "near = q - late", None, ""),
        (
            with_accent,
            "mask",
            "the method `.item()`",
            "return (größe > 3) & größe.item()",
            "                     ^^^^^^^^^^^^",
            "Methods",
        ),
        (with_refused_helper, "mask", "a loop", "for step in (1, 2):", "^", "write its terms out"),
        (with_starred, "mask", "starred parameters", "def with_starred(*arguments: T) -> T:", None, "Name"),
        (
            with_too_few,
            "mask",
            "3 parameters where it is called with 4",
            "def with_too_few(",
            "^",
            "b, h, q_idx, kv_idx",
        ),
        (with_too_many, "mask", "5 parameters where it is called with 4", "def with_too_many(", "^", "need defaults"),
        (causal, "score", "4 parameters where it is called with 5", "def causal(", "^", "score, b, h, q_idx, kv_idx"),
    ],
)
def test_refusals_show_the_line(
    function: Mod, role: typing.Literal["mask", "score"], what: str, line: str, caret: str | None, instead: str
) -> None:
    with pytest.raises(InputError) as caught:
        read_mod(function, role)
    message = str(caught.value)
    first, shown, below = message.split("\n")[:3]
    assert first.startswith(f"{role}_mod {function.__name__!r} cannot be read")
    assert what in message
    assert shown.startswith(f"    {line}")
    assert instead in message
    place = first.split(", ")[1 if "which it calls" not in first else 2].split(": ")[0]
    path, _, number = place.rpartition(":")
    assert path == __file__
    assert Path(__file__).read_text(encoding="utf-8").split("\n")[int(number) - 1].strip().startswith(line)
    assert set(below.strip()) == {"^"}
    if caret is not None:
        assert below == f"    {caret}"


def test_recursion_is_refused() -> None:
    with pytest.raises(InputError, match="'with_recursion', which it calls: recursion"):
        read_mod(with_recursion, "mask")


def test_functions_without_source_are_refused() -> None:
    typed = eval("lambda b, h, q, kv: q > kv")
    with pytest.raises(InputError, match=r"Python has no source of it .* Define it with `def` in a file"):
        read_mod(typed, "mask")


@pytest.mark.parametrize("thing", [len, functools.partial(causal), torch.nn.Identity(), None, "causal"])
def test_only_plain_functions_are_read(thing: object) -> None:
    with pytest.raises(InputError, match="must be a plain Python function, got"):
        read_mod(thing, "mask")


def test_lambdas_on_one_line() -> None:
    two: tuple[Mod, Mod] = (lambda b, h, q, kv: q > kv, lambda b, h, q, kv: q < kv)
    with pytest.raises(InputError, match="2 lambdas begin on line"):
        read_mod(two[0], "mask")
    other: tuple[Mod, Mod] = (lambda b, h, q, kv: q > kv, lambda s, b, h, q, kv: s + q)
    assert read_mod(other[0], "mask").source == "return q_idx > kv_idx"
    assert read_mod(other[1], "score").source == "return score + q_idx"


def test_a_file_changed_under_the_process_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "user_masks.py"
    path.write_text("def mask(b, h, q, kv):\n    return q > kv\n")
    spec = importlib.util.spec_from_file_location("user_masks", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    assert read_mod(module.mask, "mask").source == "return q_idx > kv_idx"
    path.write_text("def mask(b, h, q, kv):\n    return q > kv + 10\n")
    assert "10" in inspect.getsource(module.mask)
    with pytest.raises(InputError, match=r"user_masks.py:1 is not what was run; the file has changed"):
        read_mod(module.mask, "mask")
