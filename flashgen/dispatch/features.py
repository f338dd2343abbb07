"""How far the meaning of an entry's kernel is from the one that is asked for."""

from __future__ import annotations

import dataclasses
import math

from flashgen.spec import AttentionSpec, Mask

# What the asked kernel has and the measured one had not is work and registers that nobody measured: the worst.
# What only the measured one had leaves room to spare.
_MISSING, _SURPLUS, _OTHER_KIND = 4.0, 3.0, 1.0
# `deterministic` changes no kernel, only which are allowed: what won without it, if allowed, would have won with it.
_FREER, _STRICTER = 0.125, 0.5
# From here on it is another kernel, of which the entry says nothing: with entries held out, the defaults lose 0 to 19%
# there, and what was measured without a softcap, or without a table of tiles, 6 to 20%.
OTHER_KERNEL = 3.0
_OTHER_LOOP = 2.0
_MAX_SHOWN = 80


@dataclasses.dataclass(frozen=True, kw_only=True)
class Gap:
    """The difference of two specs of one dtype and head dimensions.

    Attributes:
        differences: what differs, a phrase each.
        cost: what entries are ranked by: below 1 for other numbers of the same mask, from 1 on for another mask, from
            `OTHER_KERNEL` on for other features and for a table of tiles in place of a formula; asking for the same
            bits every time adds little.
    """

    differences: tuple[str, ...]
    cost: float


def feature_gap(measured: AttentionSpec, asked: AttentionSpec) -> Gap:
    """Return how a spec that was measured differs from the one that is asked for, as far as tuning keys tell."""
    measured, asked = measured.tuning_key(), asked.tuning_key()
    gaps = [_mask_gap(measured.mask, asked.mask)]
    had, wanted = _features(measured), _features(asked)
    gaps += [_feature_gap(name, had.get(name), wanted.get(name)) for name in dict.fromkeys([*wanted, *had])]
    return Gap(
        differences=tuple(text for text, _ in gaps if text),
        cost=sum(cost for _, cost in gaps),
    )


def _features(spec: AttentionSpec) -> dict[str, str]:
    words = {word.partition("=")[0]: word for word in spec.features}
    return words if spec.score_mod is None else {"score_mod": str(spec.score_mod), **words}


def _feature_gap(name: str, had: str | None, wanted: str | None) -> tuple[str, float]:
    if had == wanted:
        return "", 0.0
    if name == "deterministic":
        return (f"measured without {wanted}", _FREER) if wanted else (f"measured with {had}", _STRICTER)
    if had is None:
        return f"measured without {_shown(wanted)}", _MISSING
    if wanted is None:
        return f"measured with {_shown(had)}", _SURPLUS
    return f"measured with {_shown(had)}, not {_shown(wanted)}", _SURPLUS


def _mask_gap(measured: Mask, asked: Mask) -> tuple[str, float]:
    if measured == asked:
        return "", 0.0
    text = f"measured on mask {_shown(str(measured))}, not {_shown(str(asked))}"
    if measured.structure() == asked.structure():
        ratio = sum(abs(math.log2((a + 1) / (b + 1))) for a, b in zip(*map(_numbers, (measured, asked)), strict=True))
        return text, ratio / (1 + ratio)
    kinds = [_kinds(mask) for mask in (measured, asked)]
    # The share of kinds that only one of them has; a table of tiles makes another loop than a formula does.
    apart = len(kinds[0] ^ kinds[1]) / max(1, len(kinds[0] | kinds[1]))
    return text, _OTHER_KIND + 0.5 * apart + _OTHER_LOOP * (measured.by_formula != asked.by_formula)


def _numbers(mask: Mask) -> tuple[int, ...]:
    return tuple(value for leaf in mask.leaves for _, value in leaf.parameters)


def _kinds(mask: Mask) -> frozenset[str]:
    """Return what the mask is composed of, functions by their text; a full mask hides nothing and is none."""
    return frozenset(str(leaf) if leaf.kind == "function" else leaf.kind for leaf in mask.leaves if leaf.kind != "full")


def _shown(text: str | None) -> str:
    text = str(text)
    return text if len(text) <= _MAX_SHOWN else f"{text[: _MAX_SHOWN - 3]}..."


def shown_spec(spec: AttentionSpec) -> str:
    """Return the mask and the features of a spec, for a line of a listing."""
    return " ".join(map(_shown, (str(spec.mask), *_features(spec).values())))
