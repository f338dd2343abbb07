"""The attention problems of a model, from the raw JSON of its Hugging Face `config.json`; imports no model library.

Only what this version computes exactly becomes a problem: self-attention of a prefill, full or causal, and of the token
after it, with sliding windows, chunks, softcapping, ALiBi and sinks. Everything else (relative position bias,
block-sparse attention, layers that are no attention, ...) is named in `ModelProblems.skipped`.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping, Sequence
from pathlib import Path

from flashgen.errors import InputError
from flashgen.integrations.model_layers import attention_layers, dtype_of, text_part
from flashgen.spec import DType, Problem, Shape


@dataclasses.dataclass(frozen=True, kw_only=True)
class ModelProblems:
    """What a model's attention asks for.

    Attributes:
        model_type: the family, as the file (of its text part) says it.
        problems: what can be computed exactly, each once.
        skipped: what was left out, one sentence each.
    """

    model_type: str
    problems: tuple[Problem, ...]
    skipped: tuple[str, ...]


def read_model_config(path: Path) -> Mapping[str, object]:
    """Return the parsed `config.json` at `path`, a file or the folder that holds it.

    Raises:
        InputError: if there is no such file, it is not JSON, or it does not describe a model whose attention
            `problems_from_config` understands; the message holds the path.
    """
    file = path / "config.json" if path.is_dir() else path
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise InputError(f"{file} does not exist; give a model's config.json or the folder that holds it") from None
    except OSError as error:
        raise InputError(f"cannot read {file}: {error}") from error
    except (ValueError, RecursionError) as error:
        raise InputError(f"{file} is not valid JSON: {error}") from error
    if not isinstance(content, dict):
        raise InputError(f"{file} must hold a JSON object, got {type(content).__name__}")
    try:
        attention_layers(text_part(content))
    except InputError as error:
        raise InputError(f"{file}: {error}") from error
    return content


def problems_from_config(
    config: Mapping[str, object],
    *,
    seqlens: Sequence[int],
    batch: int | None = None,
    tokens: int = 16384,
    dtype: DType | None = None,
) -> ModelProblems:
    """Return the self-attention problems of a prefill, for every kind of layer at every length.

    Args:
        config: a parsed Hugging Face `config.json`.
        seqlens: lengths of queries and keys alike.
        batch: sequences of one call; by default as many as make about `tokens` tokens, at least one.
        tokens: see `batch`.
        dtype: element type; by default the checkpoint's own, bf16 where it names none.

    Raises:
        InputError: if the config does not describe a model whose attention is understood, or a size is out of range.
    """
    wrong = [size for size in (*seqlens, tokens, 1 if batch is None else batch) if size < 1]
    if not seqlens or wrong:
        raise InputError(f"seqlens, batch and tokens must be at least 1, got {wrong or 'no seqlens'}")
    text = text_part(config)
    layers, skipped = attention_layers(text)
    element = dtype or dtype_of(text)
    problems: dict[Problem, None] = {}
    for layer in layers:
        try:
            specs = {seqlen: layer.spec(seqlen, element) for seqlen in seqlens}
        except InputError as error:
            skipped.append(f"{layer.name}: {error}")
            continue
        beyond = [s for s in seqlens if layer.reach is not None and s > layer.reach]
        if beyond:
            lengths = ", ".join(str(s) for s in dict.fromkeys(beyond))
            skipped.append(f"{layer.name} have no kernel in this version at sequence lengths {lengths}")
        for seqlen in seqlens:
            if seqlen not in beyond:
                shape = Shape(
                    batch=batch or max(1, tokens // seqlen),
                    seqlen_q=seqlen,
                    seqlen_k=seqlen,
                    nheads_q=layer.nheads_q,
                    nheads_kv=layer.nheads_kv,
                )
                problems[Problem(spec=specs[seqlen], shape=shape)] = None
    return ModelProblems(
        model_type=str(text.get("model_type", "unknown")), problems=tuple(problems), skipped=tuple(skipped)
    )
