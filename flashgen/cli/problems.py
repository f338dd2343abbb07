"""The problems that a command line names."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

from flashgen.cli.output import note
from flashgen.errors import InputError
from flashgen.spec import PHASES, Phase, Problem, parse_problem
from flashgen.spec.text import split_words


def resolve_problems(
    model: Path | None, preset: str | None, shapes: Sequence[str] | None, *, phase: str | None, seqlens: str
) -> tuple[Problem, ...]:
    """Return the problems of a model, a preset and the shapes given, each once; what is skipped goes to stderr.

    Args:
        model: a model's config.json.
        preset: a name.
        shapes: problems as text.
        phase: the phases asked for, separated by commas; with both the forward writes lse, as training needs. A shape
            that names its phase keeps it. By default problems are what they say, and forward where they say nothing.
        seqlens: lengths for the model, separated by commas.

    Raises:
        InputError: if none is named, a text, file, phase or length is wrong, or a shape has no such phase.
    """
    from flashgen.integrations import preset as named_preset

    phases = None if phase is None else _read_phases(phase)
    listed: list[Problem] = []
    if model is not None:
        listed += _model_problems(model, _lengths(seqlens))
    if preset is not None:
        listed += named_preset(preset)
    problems = dict.fromkeys(found for problem in listed for found in _in_phases(problem, phases))
    problems |= dict.fromkeys(found for text in shapes or () for found in _shape_problems(text, phases))
    if not problems and listed:
        raise InputError(f"none of these problems has the phase {phase}")
    if not problems and model is None:
        raise InputError(
            "no problem named; give --preset quick, --model CONFIG.json, or "
            '--shape "b=4 hq=32 hkv=8 s=4096 d=128 causal bf16" (or, for causal, "sliding_window(127,0) softcap")'
        )
    if not problems:
        raise InputError(f"{model}: no attention of this model has a kernel in this version")
    return tuple(problems)


def training_steps(problems: Iterable[Problem]) -> Iterator[tuple[Problem, Problem]]:
    """Yield every (forward, backward) pair of one problem; whether its forward writes lse makes no difference."""
    known = list(problems)
    forwards = {_without_lse(problem): problem for problem in known if problem.spec.phase == "forward"}
    for problem in known:
        if problem.spec.phase == "backward":
            forward = forwards.get(_without_lse(Problem(spec=problem.spec.forward(), shape=problem.shape)))
            if forward is not None:
                yield forward, problem


def _without_lse(problem: Problem) -> Problem:
    return dataclasses.replace(problem, spec=dataclasses.replace(problem.spec, lse=False))


def _in_phases(problem: Problem, phases: tuple[Phase, ...] | None) -> Iterator[Problem]:
    """Yield a listed problem in each phase that it has; a phase that it has not goes to stderr."""
    if phases is None:
        yield problem
        return
    spec, shape = problem.spec, problem.shape
    for phase in phases:
        if phase == "forward":
            as_it_is = spec.phase == "forward" and len(phases) == 1
            yield problem if as_it_is else Problem(spec=spec.forward(), shape=shape)
            continue
        try:
            yield problem if spec.phase == "backward" else Problem(spec=spec.backward(), shape=shape)
        except InputError as error:
            note(f"skipped: {problem}: {error}")


# Of a text for both phases: what each is read without. The forward always gets lse.
_FOREIGN_WORDS: dict[Phase, frozenset[str]] = {
    "forward": frozenset({"deterministic", "dbias", "lse"}),
    "backward": frozenset({"lse"}),
}


def _shape_problems(text: str, phases: tuple[Phase, ...] | None) -> Iterator[Problem]:
    """Yield the problem of a text in each phase asked for, or in the one that the text names."""
    given = split_words(text)
    named = [word for word in given if word in PHASES]
    if phases is None or named:
        problem = parse_problem(text)
        if phases is not None and problem.spec.phase not in phases:
            raise InputError(f"--phase asks for {', '.join(phases)}, the shape {text!r} is {problem.spec.phase}")
        yield problem
    elif len(phases) == 1:
        yield parse_problem(f"{text} {phases[0]}")
    else:
        for phase in phases:
            kept = " ".join(word for word in given if word not in _FOREIGN_WORDS[phase])
            yield parse_problem(f"{kept} {phase}{' lse' if phase == 'forward' else ''}")


def _model_problems(path: Path, seqlens: tuple[int, ...]) -> tuple[Problem, ...]:
    from flashgen.integrations import problems_from_config, read_model_config

    found = problems_from_config(read_model_config(path), seqlens=seqlens)
    for reason in found.skipped:
        note(f"skipped in {found.model_type}: {reason}")
    return found.problems


def _read_phases(text: str) -> tuple[Phase, ...]:
    wrong = [word for word in words(text) if word not in PHASES]
    if wrong or not words(text):
        raise InputError(f"--phase takes {', '.join(PHASES)} or both, separated by a comma; got {text!r}")
    # In the order of a training step, whatever order they were named in.
    return tuple(phase for phase in PHASES if phase in words(text))


def _lengths(text: str) -> tuple[int, ...]:
    wrong = [word for word in words(text) if not word.isdecimal()]
    if wrong or not words(text):
        raise InputError(f"--seqlen takes whole numbers separated by commas, as in 512,4096; got {text!r}")
    return tuple(int(word) for word in words(text))


def words(text: str) -> tuple[str, ...]:
    """Return the parts of a list that is separated by commas, without blanks."""
    return tuple(word for part in text.split(",") if (word := part.strip()))
