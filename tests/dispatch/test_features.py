"""How far the meaning of an entry is from what is asked for."""

from __future__ import annotations

import itertools

import pytest

from flashgen.dispatch.features import feature_gap, shown_spec
from flashgen.spec import AttentionSpec, parse_problem


def spec(words: str) -> AttentionSpec:
    return parse_problem(f"h=8 s=4096 d=128 {words}").spec


SPECS = (
    *("causal", "full", "sliding_window(127,0)", "sliding_window(1023,0)", "causal&document", "causal softcap"),
    *("causal alibi softcap", "causal bias=fp32", "score_mod('return score * 0.5')", "prefix_lm(64) dropout"),
)


def test_nothing_differs_from_itself() -> None:
    for words in SPECS:
        gap = feature_gap(spec(words), spec(f"{words} lse sinks"))
        assert (gap.differences, gap.cost) == ((), 0.0)


def test_what_differs_is_said_and_costs() -> None:
    for a, b in itertools.permutations(SPECS, 2):
        gap = feature_gap(spec(a), spec(b))
        assert gap.differences
        assert gap.cost > 0
        assert all(len(difference) < 250 for difference in gap.differences)


@pytest.mark.parametrize(
    ("measured", "asked", "differences"),
    [
        (
            "sliding_window(1023,0)",
            "sliding_window(127,0)",
            ("measured on mask sliding_window(1023,0), not sliding_window(127,0)",),
        ),
        ("causal", "causal softcap", ("measured without softcap",)),
        ("causal alibi", "causal", ("measured with alibi",)),
        ("causal bias=fp32", "causal bias=input", ("measured with bias=fp32, not bias=input",)),
        ("full dropout", "causal softcap", (
            "measured on mask full, not causal", "measured without softcap", "measured with dropout",
        )),
        ("full", "score_mod('return score * 0.5')", ("measured without score_mod('return score * 0.5')",)),
    ],
)  # fmt: skip
def test_differences_in_words(measured: str, asked: str, differences: tuple[str, ...]) -> None:
    assert feature_gap(spec(measured), spec(asked)).differences == differences


# What is asked for, then what was measured, the likest first.
@pytest.mark.parametrize(
    ("asked", "measured"),
    [
        # Other numbers before another mask, the nearer number first; a missing feature is worst.
        (
            "sliding_window(127,0) softcap",
            [
                *("sliding_window(255,0) softcap", "sliding_window(1023,0) softcap", "causal softcap"),
                *("sliding_window(127,0) softcap alibi", "sliding_window(127,0)", "causal", "causal alibi"),
            ],
        ),
        # Masks that share more of what they are composed of are nearer, and so are those that need a table alike.
        ("causal&document", ["document", "causal&document softcap", "causal", "full"]),
        ("causal", ["causal(align=top_left)", "full", "causal&document"]),
        ("causal&chunked(1024)", ["causal&chunked(8192)", "chunked(1024)", "sliding_window(3,0)"]),
        ("full alibi softcap", ["causal alibi softcap", "full softcap", "full"]),
    ],
)
def test_the_likest_costs_least(asked: str, measured: list[str]) -> None:
    costs = [feature_gap(spec(words), spec(asked)).cost for words in measured]
    assert costs == sorted(costs)
    assert len(set(costs)) == len(costs)


def test_a_spec_in_a_listing() -> None:
    assert shown_spec(spec("causal&document alibi softcap")) == "causal&document softcap alibi"
    long = " + ".join(f"q_idx * {i} % 7" for i in range(20))
    assert len(shown_spec(spec(f"mask_mod('return {long} > 3') softcap"))) < 100


def test_the_demand_for_equal_bits_is_little_beside_anything_else() -> None:
    def cost(measured: str, asked: str) -> float:
        return feature_gap(spec(f"{measured} backward"), spec(f"{asked} backward")).cost

    freer, stricter = cost("causal", "causal deterministic"), cost("causal deterministic", "causal")
    assert 0 < freer < stricter < cost("full", "causal")
    assert cost("causal softcap", "causal deterministic") > cost("full", "causal deterministic")
