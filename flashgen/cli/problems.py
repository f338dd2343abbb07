"""The problems that a command line names."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from flashgen.cli.output import note
from flashgen.errors import InputError
from flashgen.spec import PHASES, Problem, parse_problem


def resolve_problems(
    model: Path | None, preset: str | None, shapes: Sequence[str] | None, *, phase: str, seqlens: str
) -> tuple[Problem, ...]:
    """Return the problems of a model, a preset and the shapes given, each once; what a model skips goes to stderr.

    Raises:
        InputError: if none is named, or a text, file, phase or length is wrong.
    """
    from flashgen.integrations import preset as named_preset

    _check_phases(phase)
    problems: dict[Problem, None] = {}
    if model is not None:
        problems |= dict.fromkeys(_model_problems(model, _lengths(seqlens)))
    if preset is not None:
        problems |= dict.fromkeys(named_preset(preset))
    problems |= dict.fromkeys(parse_problem(text) for text in shapes or ())
    if not problems and model is None:
        raise InputError(
            "no problem named; give --preset quick, --model CONFIG.json, or "
            '--shape "b=4 hq=32 hkv=8 s=4096 d=128 causal bf16" (or, for causal, "sliding_window(127,0) softcap")'
        )
    if not problems:
        raise InputError(f"{model}: no attention of this model has a kernel in this version")
    return tuple(problems)


def _model_problems(path: Path, seqlens: tuple[int, ...]) -> tuple[Problem, ...]:
    from flashgen.integrations import problems_from_config, read_model_config

    found = problems_from_config(read_model_config(path), seqlens=seqlens)
    for reason in found.skipped:
        note(f"skipped in {found.model_type}: {reason}")
    return found.problems


def _check_phases(text: str) -> None:
    for phase in words(text):
        if phase not in PHASES:
            raise InputError(f"--phase {phase!r} does not exist in this version; allowed: {', '.join(PHASES)}")


def _lengths(text: str) -> tuple[int, ...]:
    wrong = [word for word in words(text) if not word.isdecimal()]
    if wrong or not words(text):
        raise InputError(f"--seqlen takes whole numbers separated by commas, as in 512,4096; got {text!r}")
    return tuple(int(word) for word in words(text))


def words(text: str) -> tuple[str, ...]:
    """Return the parts of a list that is separated by commas, without blanks."""
    return tuple(word for part in text.split(",") if (word := part.strip()))
