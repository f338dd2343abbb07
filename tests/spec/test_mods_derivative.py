"""Derivatives of score mods against PyTorch's autograd, in float64."""

from __future__ import annotations

import math
import pickle
import random
import typing
from collections.abc import Callable

import pytest
import torch

from flashgen.errors import InputError
from flashgen.spec import score_mods
from flashgen.spec.mods import ModFunction, derivative, parse_mod, read_mod
from flashgen.spec.mods.expressions import FUNCTIONS, depth

T = typing.Any
BLOCK = 12

_GENERATOR = torch.Generator().manual_seed(0)
SLOPES = torch.rand(4, generator=_GENERATOR)
BIAS = torch.randn(4, 32, generator=_GENERATOR)
KEEP = torch.rand(32, generator=_GENERATOR) > 0.5
STEPS = torch.randint(-3, 4, (32,), generator=_GENERATOR, dtype=torch.int8)
SCALE = torch.tensor(0.25)
OFFSET = torch.tensor(3, dtype=torch.int32)
CAP = 2.5


def relative_bias(score: T, b: T, h: T, q: T, kv: T) -> T:
    return score + BIAS[h, torch.clamp(q - kv + 16, 0, 31)]


def gated(score: T, b: T, h: T, q: T, kv: T) -> T:
    return score * BIAS[h, q] * KEEP[kv] + STEPS[q] * score


def polynomial(score: T, b: T, h: T, q: T, kv: T) -> T:
    return 3 * score * score * score - 2 * score * score + score / 4 - 7


def nested_where(score: T, b: T, h: T, q: T, kv: T) -> T:
    return torch.where(
        q > kv, torch.where(score > 0.5, score * score, -score), torch.where(kv % 2 == 0, 1.5, score / 3)
    )


def masked(score: T, b: T, h: T, q: T, kv: T) -> T:
    return torch.where(q >= kv, score * 2, -float("inf"))


def masked_then_capped(score: T, b: T, h: T, q: T, kv: T) -> T:
    score = torch.where(q >= kv, score, -float("inf"))
    return CAP * torch.tanh(score / CAP)


def extrema(score: T, b: T, h: T, q: T, kv: T) -> T:
    return torch.minimum(score * 3, score * score) + torch.maximum(score, SCALE) - max(min(score, 0.1), -kv * score)


def clamped(score: T, b: T, h: T, q: T, kv: T) -> T:
    return torch.clamp(score, -0.5, 0.75) * score.clamp(min=-h * 0.1)


def exponentials(score: T, b: T, h: T, q: T, kv: T) -> T:
    return torch.exp(-score * score) + torch.exp2(score / 2) + torch.log(score * score + 1) + torch.log2(2 + abs(score))


def roots(score: T, b: T, h: T, q: T, kv: T) -> T:
    return torch.sqrt(1 + score * score) * torch.rsqrt(2 + score * score) + (score.abs() + 1).sqrt()


def gates(score: T, b: T, h: T, q: T, kv: T) -> T:
    return score * torch.sigmoid(1.5 * score) + torch.tanh(torch.tanh(score) - kv)


def reciprocal(score: T, b: T, h: T, q: T, kv: T) -> T:
    return (q + 1) / score + score / (kv + 1) + 1 / (score * score + SLOPES[h])


def absolute(score: T, b: T, h: T, q: T, kv: T) -> T:
    return abs(score) * score.abs() - torch.abs(score - 1)


def chained(score: T, b: T, h: T, q: T, kv: T) -> T:
    x = score * SLOPES[h]
    y = x * x + score
    d_x = torch.exp(-y)
    return x * y * d_x


def reassigned(score: T, b: T, h: T, q: T, kv: T) -> T:
    score = score * 2
    score += BIAS[h, kv]
    score *= score
    score = score - SCALE * score
    return score


def unused_locals(score: T, b: T, h: T, q: T, kv: T) -> T:
    x = score * score
    y = torch.exp(x)  # noqa: F841 - dropped
    return x + 1


def score_unused(score: T, b: T, h: T, q: T, kv: T) -> T:
    return BIAS[h, q] * kv


def score_in_condition_alone(score: T, b: T, h: T, q: T, kv: T) -> T:
    return torch.where(score > 0, BIAS[h, q], -1.0)


def scalars(score: T, b: T, h: T, q: T, kv: T) -> T:
    return score * SCALE * OFFSET + (score + OFFSET) / (OFFSET * SCALE)


def floored(score: T, b: T, h: T, q: T, kv: T) -> T:
    return score // 1 + torch.floor(score * 3) * score + (score * 5) // (1 + score * score)


def remainder(score: T, b: T, h: T, q: T, kv: T) -> T:
    return score % 2.0 + 7.5 % (score * score + 0.5) + (score * score) % (score + 9)


def booleans(score: T, b: T, h: T, q: T, kv: T) -> T:
    positive = score > 0
    return (positive + (q > kv)) * score + (positive & KEEP[kv]) * (score * score) - (~positive) * 2


def integers(score: T, b: T, h: T, q: T, kv: T) -> T:
    far = q * 100_000
    return score * far * far + torch.where(score > 0, 2, 3) * score


def branching(score: T, b: T, h: T, q: T, kv: T) -> T:
    return (score if q % 2 == 0 else score * score) if h else 3 * score


def negated(score: T, b: T, h: T, q: T, kv: T) -> T:
    return -(-score * score) - -(score - 3 * score)


def shared(score: T, b: T, h: T, q: T, kv: T) -> T:
    cap = 1 + torch.exp(score) * torch.exp(score)
    return cap / (cap + 1) * cap


def gumbel(score: T, b: T, h: T, q: T, kv: T) -> T:
    return -torch.log(-torch.log(torch.sigmoid(score)))


def doubled(x: T) -> T:
    return x + x * x


def inlined(score: T, b: T, h: T, q: T, kv: T) -> T:
    return doubled(doubled(score)) - doubled(kv)


FUNCTIONS_READ: list[Callable[..., T]] = [
    relative_bias,
    gated,
    polynomial,
    nested_where,
    masked,
    masked_then_capped,
    extrema,
    clamped,
    exponentials,
    roots,
    gates,
    reciprocal,
    absolute,
    chained,
    reassigned,
    unused_locals,
    score_unused,
    score_in_condition_alone,
    scalars,
    floored,
    remainder,
    booleans,
    integers,
    branching,
    negated,
    shared,
    gumbel,
    inlined,
]
MODS = {
    **{function.__name__: read_mod(function, "score") for function in FUNCTIONS_READ},
    "softcap": read_mod(score_mods.softcap(30.0), "score"),
    "alibi": read_mod(score_mods.alibi(SLOPES), "score"),
    "relative_position": read_mod(score_mods.relative_position(), "score"),
}


def random_score(seed: int = 1) -> torch.Tensor:
    return torch.randn(BLOCK, BLOCK, generator=torch.Generator().manual_seed(seed), dtype=torch.float64) * 1.5


def evaluated(mod: ModFunction, score: torch.Tensor) -> torch.Tensor:
    positions = torch.arange(BLOCK)
    found = mod.evaluate(torch, score=score, b=1, h=2, q_idx=positions[:, None], kv_idx=positions + 3)
    assert found.dtype == torch.float64
    return typing.cast("torch.Tensor", found).expand(BLOCK, BLOCK)


def autograd(mod: ModFunction, score: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Value and gradient of the mod, as PyTorch has them."""
    score = score.clone().requires_grad_()
    value = evaluated(mod, score)
    if not value.requires_grad:
        return value, torch.zeros_like(score)
    (found,) = torch.autograd.grad(value.sum(), score, allow_unused=True, materialize_grads=True)
    return value.detach(), found


def about(mod: ModFunction) -> Callable[[str], str]:
    return lambda message: f"{mod}\n{derivative(mod)}\n{message}"


def slope(mod: ModFunction, score: torch.Tensor) -> torch.Tensor:
    return evaluated(derivative(mod), score)


@pytest.mark.parametrize("name", MODS)
def test_is_what_autograd_finds(name: str) -> None:
    mod = MODS[name]
    score = random_score()
    value, expected = autograd(mod, score)
    assert expected.isfinite().all()
    assert value.isfinite().any()
    torch.testing.assert_close(slope(mod, score), expected, rtol=1e-10, atol=1e-12, msg=about(mod))


def text_mod(source: str) -> ModFunction:
    captures = {"table": "float32[any]", "steps": "int8[any]", "keep": "bool[any]"}
    used = [f"{name}={kind!r}" for name, kind in captures.items() if f"{name}[" in source]
    mod = parse_mod(f"score_mod({', '.join([repr(source), *used])})")
    tensors = {"table": BIAS[1], "steps": STEPS, "keep": KEEP}
    return ModFunction(
        role="score",
        source=mod.source,
        captures=mod.captures,
        tensors=tuple(tensors[capture.name] for capture in mod.captures),
    )


@pytest.mark.parametrize(
    ("source", "expected"),
    [
        ("score + table[q_idx]", "1.0"),
        ("score * 2", "2.0"),
        ("2 * score - score", "1.0"),
        ("score * 0 + h", "0.0"),
        ("h * q_idx", "0.0"),
        ("where(score > 0, 1, 0)", "0.0"),
        ("score - table[kv_idx] * abs(q_idx - kv_idx)", "1.0"),
        ("score * table[q_idx]", "table[q_idx]"),
        ("score * (q_idx - kv_idx)", "1.0 * (q_idx - kv_idx)"),
        ('where(q_idx >= kv_idx, score, float("-inf"))', "where(q_idx >= kv_idx, 1.0, 0.0)"),
        ('where(q_idx >= kv_idx, exp(score), float("-inf"))', "where(q_idx >= kv_idx, exp(score), 0.0)"),
        ("where(q_idx > 1, score, score + 1)", "1.0"),
        ("score * score", "2.0 * score"),
        ("exp(-score)", "-exp(-score)"),
        ("score // 1 + score % 2.0", "1.0"),
        ("minimum(score, score + 1)", "1.0"),
        ("log(score * 4)", "4.0 / (score * 4)"),
    ],
)
def test_folds_what_is_constant(source: str, expected: str) -> None:
    assert derivative(text_mod(f"return {source}")).source == f"return {expected}"


def test_shared_parts_are_computed_once_and_dead_ones_vanish() -> None:
    assert derivative(MODS["softcap"]).source == "value = tanh(score / 30.0); return 1.0 - value * value"
    assert derivative(MODS["unused_locals"]).source == "return 2.0 * score"
    mod = text_mod("x = score * table[h]; y = x * x; return y * keep[kv_idx]")
    assert derivative(mod).source == "x = score * table[h]; return 2.0 * (keep[kv_idx] * (x * table[h]))"


@pytest.mark.parametrize(
    ("source", "at", "expected"),
    [
        ("minimum(score, 0.5)", 0.5, 0.5),
        ("maximum(score, 0.5)", 0.5, 0.5),
        ("maximum(0.5, score * 3 - 1)", 0.5, 1.5),
        ("minimum(score, score * score)", 1.0, 1.5),
        ("maximum(2 * score, score + 1)", 1.0, 1.5),
        ("abs(score)", 0.0, 0.0),
        ("abs(score - 1) * 4", 1.0, 0.0),
        ("floor(score) + score // 1", 2.0, 0.0),
        ("score % 1.0", 2.0, 1.0),
        ("sqrt(score)", 0.0, math.inf),
    ],
)
def test_where_there_is_no_derivative_it_is_pytorchs(source: str, at: float, expected: float) -> None:
    mod = text_mod(f"return {source}")
    score = torch.full((BLOCK, BLOCK), at, dtype=torch.float64)
    assert torch.equal(autograd(mod, score)[1], torch.full_like(score, expected))
    assert torch.equal(slope(mod, score), torch.full_like(score, expected))


@pytest.mark.parametrize(
    "source",
    [
        "return where(score > 0, log(score), 0)",
        "return where(score > 0, sqrt(score) * score, -1)",
        "return sqrt(maximum(score, 0))",
        "x = maximum(score, 0); return log(x) * 2",
        "x = where(score > 0, score, 0); y = x * 2; return sqrt(y) + 1 / x",
        "x = minimum(maximum(score, 0), 4); return rsqrt(x + x)",
        'x = where(score > 0, score, float("-inf")); return x * sigmoid(x)',
        'x = where(score > 0, score * 2, float("-inf")); return 3 * tanh(x / 3) + exp(x)',
    ],
)
def test_a_part_that_is_not_selected_has_slope_zero(source: str) -> None:
    mod = text_mod(source)
    score = random_score()
    positive = score > 0
    found = slope(mod, score)
    assert torch.equal(found[~positive], torch.zeros_like(found[~positive]))
    torch.testing.assert_close(found[positive], autograd(mod, score)[1][positive], rtol=1e-12, atol=1e-14)


class Random:
    """Random score mods in the language's text."""

    def __init__(self, seed: int) -> None:
        self._random = random.Random(seed)
        self._known = ["score"]

    def source(self) -> str:
        statements = []
        for position in range(self._random.randrange(3)):
            name = f"x{position}"
            statements.append(f"{name} = {self.number(3)} + {self._random.choice(self._known)}")
            self._known.append(name)
        # Every captured tensor must have a use, and the random ones may have been folded away.
        used = " + ".join([*self._known, "table[h] + steps[h] + keep[h]"])
        return "; ".join([*statements, f"return {self.number(4)} + {used}"])

    def number(self, levels: int) -> str:
        if levels == 0 or self._random.random() < 0.1:
            # The score and what is computed from it more often than the rest.
            leaves = ["table[q_idx]", "steps[kv_idx]", "keep[q_idx]", "kv_idx", "2", "0.5", "1.25"]
            return self._random.choice([*leaves, *self._known * 4])
        a, b = (self.number(levels - 1) for _ in range(2))
        templates = [
            f"({a} + {b})",
            f"({a} - {b})",
            f"({a} * {b})",
            f"({a} / (1.5 + abs({b})))",
            f"({a} / (0.3 + {b}))",
            f"({a} // (0.7 + {b}))",
            f"({a} % (0.7 + {b}))",
            f"(-{a})",
            f"where({self.condition(levels - 1)}, {a}, {b})",
            f"minimum({a}, {b})",
            f"maximum({a}, {b})",
            *(f"{name}({a})" for name in ("abs", "floor", "tanh", "sigmoid")),
            *(f"{name}(minimum({a}, 3))" for name in ("exp", "exp2")),
            *(f"{name}(abs({a}) + 0.1)" for name in ("log", "log2", "sqrt", "rsqrt")),
            f"sqrt(maximum({a}, 0))",
        ]
        return self._random.choice(templates)

    def condition(self, levels: int) -> str:
        a, b = (self.number(levels) for _ in range(2))
        comparison = self._random.choice(["<", "<=", ">", ">=", "!="])
        return self._random.choice([f"{a} {comparison} {b}", "keep[kv_idx]", f"(q_idx > 4) & ~({a} > 0)"])


@pytest.mark.parametrize("first", range(0, 200, 20))
def test_random_expressions(first: int) -> None:
    varying = 0
    for seed in range(first, first + 20):
        mod = text_mod(Random(seed).source())
        score = random_score(seed)
        value, expected = autograd(mod, score)
        found = slope(mod, score)
        compared = value.isfinite() & expected.isfinite()
        varying += len(expected[compared].unique()) > 2
        torch.testing.assert_close(found[compared], expected[compared], rtol=1e-8, atol=1e-9, msg=about(mod))
    assert varying >= 10


def test_every_function_of_the_language_has_a_derivative() -> None:
    counts = {"where": 3, "minimum": 2, "maximum": 2}
    for name in FUNCTIONS:
        arguments = ["score"] * counts.get(name, 1)
        assert derivative(text_mod(f"return {name}({', '.join(arguments)})")).role == "score"
    for operator in ("+", "-", "*", "/", "//", "%"):
        assert derivative(text_mod(f"return score {operator} score")).role == "score"


def test_second_derivative() -> None:
    mod = MODS["polynomial"]
    score = random_score()
    expected = 18 * score - 4
    torch.testing.assert_close(slope(derivative(mod), score), expected, rtol=1e-12, atol=1e-12)


def test_captures_stay() -> None:
    mod = MODS["relative_bias"]
    found = derivative(mod)
    assert found.source == "return 1.0"
    assert found.captures == mod.captures
    assert found.tensors[0] is BIAS
    assert found.uses == frozenset()
    assert found == derivative(mod.without_tensors())
    assert hash(found) == hash(derivative(mod))
    assert derivative(mod.without_tensors()).tensors == ()
    copied = pickle.loads(pickle.dumps(found.without_tensors()))
    assert copied == found
    assert copied.body == found.body
    assert torch.equal(evaluated(found, random_score()), torch.ones(BLOCK, BLOCK, dtype=torch.float64))


def test_names_do_not_clash() -> None:
    mod = parse_mod(
        "score_mod('value = exp(score) * d_value[h]; d_score = value * value * exp(score); return d_score * d_score', "
        "d_value='float32[any]')"
    )
    mod = ModFunction(role="score", source=mod.source, captures=mod.captures, tensors=(SLOPES,))
    body = derivative(mod).body
    names = [name for name, _ in body.statements]
    assert len({*names, "d_value"}) == len(names) + 1
    score = random_score() / 4
    torch.testing.assert_close(slope(mod, score), autograd(mod, score)[1], rtol=1e-10, atol=1e-12)


def test_long_and_deep_mods_stay_small() -> None:
    chain = "; ".join(f"x{i + 1} = maximum(x{i} * {i + 2}, minimum(x{i}, 1)) / {i + 2}" for i in range(60))
    deep = "sigmoid(" * 90 + "score" + ")" * 90
    product = " * ".join(["score"] * 80)
    for source in (f"x0 = score + 0.5; {chain}; return x60", f"return {deep}", f"return {product}"):
        mod = text_mod(source)
        found = derivative(mod)
        assert len(found.source) < 12 * len(source)
        assert max(depth(value) for value in (found.body.result, *(v for _, v in found.body.statements))) < 60
        score = random_score() / 2
        torch.testing.assert_close(slope(mod, score), autograd(mod, score)[1], rtol=1e-9, atol=1e-12)


def test_a_mask_has_none() -> None:
    with pytest.raises(InputError, match="only a score mod has a derivative"):
        derivative(parse_mod("mask_mod('return q_idx >= kv_idx')"))
