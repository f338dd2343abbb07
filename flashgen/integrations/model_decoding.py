"""The problems of a model's next token: its heads, and those of tensor-parallel shards, over a cache."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

from flashgen.errors import InputError
from flashgen.integrations.model_config import ModelProblems
from flashgen.integrations.model_layers import AttentionLayer, attention_layers, dtype_of, text_part
from flashgen.spec import DType, Problem, Shape

BATCHES = (1, 16, 64)
SHARDS = (1, 2, 4, 8)

# Kernels divide the keys of a call on the device, so what wins at one length does well at lengths around it.
_SHORTEST_CACHE = 4096
_STEP = 8
_MOST_TOKENS = 2**20  # of a cache that problems are made for


def decoding_from_config(
    config: Mapping[str, object],
    *,
    seqlens: Sequence[int],
    batches: Sequence[int] = BATCHES,
    shards: Sequence[int] = SHARDS,
    dtype: DType | None = None,
) -> ModelProblems:
    """Return the problems of one query a sequence over its cache, for every kind of layer that decodes.

    Args:
        config: a parsed Hugging Face `config.json`.
        seqlens: tokens of a cache; each stands for the nearest of 4096 and its multiples by powers of 8.
        batches: sequences of one call, as far as their caches have a million tokens at most together.
        shards: over how many GPUs the heads are divided. Parts of them, with the shortest cache: what they change is
            how many heads there are to divide the keys of.
        dtype: element type; by default the checkpoint's own, bf16 where it names none.

    Raises:
        InputError: if the config does not describe a model whose attention is understood, or a size is out of range.
    """
    wrong = [size for size in (*seqlens, *batches, *shards) if size < 1]
    if not (seqlens and batches and shards) or wrong:
        raise InputError(f"seqlens, batches and shards must be at least 1, got {wrong or 'none'}")
    text = text_part(config)
    layers, skipped = attention_layers(text)
    element = dtype or dtype_of(text)
    lengths = cache_lengths(seqlens)
    problems: dict[tuple[object, ...], Problem] = {}
    for layer in layers:
        try:
            found = _problems_of(layer, element, lengths, batches, shards)
        except InputError as error:
            skipped.append(f"{layer.name}: {error}")
            continue
        beyond = [length for length in lengths if layer.reach is not None and length > layer.reach]
        if beyond:
            skipped.append(f"{layer.name} have no kernel in this version over caches of {', '.join(map(str, beyond))}")
        for problem in found:
            problems.setdefault(_same_work(problem), problem)
    return ModelProblems(
        model_type=str(text.get("model_type", "unknown")), problems=tuple(problems.values()), skipped=tuple(skipped)
    )


def cache_lengths(seqlens: Sequence[int]) -> tuple[int, ...]:
    """Return the lengths of caches that stand for these: 4096, and its multiples by powers of 8."""
    steps = {max(0, round(math.log(seqlen / _SHORTEST_CACHE, _STEP))) for seqlen in seqlens}
    return tuple(_SHORTEST_CACHE * _STEP**step for step in sorted(steps))


def _problems_of(
    layer: AttentionLayer, dtype: DType, lengths: Sequence[int], batches: Sequence[int], shards: Sequence[int]
) -> list[Problem]:
    spec = layer.decode_spec(dtype)
    found: list[Problem] = []
    seen = [length for length in lengths if layer.reach is None or length <= layer.reach]
    if layer.span is not None and layer.span < lengths[0]:
        # Of a longer cache a window shows no more.
        seen = seen[:1]
    for parts in dict.fromkeys(shards):
        heads = layer.shard(parts)
        if heads is None:
            continue
        shapes = (
            Shape(batch=batch, seqlen_q=1, seqlen_k=length, nheads_q=heads[0], nheads_kv=heads[1])
            for length in (seen[:1] if parts > 1 else seen)
            for batch in batches
            if batch * length <= _MOST_TOKENS
        )
        found += [Problem(spec=spec, shape=shape) for shape in shapes]
    return found


def _same_work(problem: Problem) -> tuple[object, ...]:
    """Return what problems share whose keys are divided alike: heads of a larger batch are as good as more heads."""
    shape = problem.shape
    return problem.spec, shape.seqlen_k, shape.group, shape.batch * shape.nheads_kv
