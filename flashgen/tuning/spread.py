"""Points that fill the space of legal configs evenly, at any length of the sequence."""

from __future__ import annotations

import itertools
import random
import typing

from flashgen.tuning.config_space import ConfigSpace, Values

_MAX_BOX_DRAWS = 64  # for one legal point


def boxes_of(space: ConfigSpace, rng: random.Random) -> list[tuple[Values, ...]]:
    """Return the boxes of the space, shuffled, of each template in turn."""
    shuffled = [rng.sample(boxes, len(boxes)) for boxes in space.boxes]
    in_turn = itertools.chain.from_iterable(itertools.zip_longest(*shuffled))
    return [box for box in in_turn if box]


def spread_keys(
    boxes: typing.Sequence[typing.Sequence[Values]], shift: typing.Sequence[float], legal: typing.Container[Values]
) -> typing.Iterator[Values]:
    """Yield points that fill the boxes evenly, a legal one of each in turn, at any length of the sequence.

    Additive recurrence by powers of the generalised golden ratio, shifted at random (M. Roberts, "The unreasonable
    effectiveness of quasirandom sequences", 2018).
    """
    # An axis with one value needs no share of the dimensions: the more there are, the more even neighbours are alike.
    varied = [[axis for axis, values in enumerate(box) if len(values) > 1] for box in boxes]
    ratios = {len(axes): _golden_ratio(len(axes)) for axes in varied}
    steps = itertools.count(1)
    for box, axes in itertools.cycle(zip(boxes, varied, strict=True)):
        for step in itertools.islice(steps, _MAX_BOX_DRAWS):
            position = dict.fromkeys(range(len(box)), 0.0)
            position |= {
                axis: (shift[axis] + step * ratios[len(axes)] ** -power) % 1.0 for power, axis in enumerate(axes, 1)
            }
            key = tuple(values[int(position[axis] * len(values))] for axis, values in enumerate(box))
            if key in legal:
                break
        yield key


def _golden_ratio(dimensions: int) -> float:
    ratio = 2.0
    for _ in range(40):  # the root of x ** (d + 1) = x + 1 attracts
        ratio = (1.0 + ratio) ** (1.0 / (dimensions + 1))
    return ratio
