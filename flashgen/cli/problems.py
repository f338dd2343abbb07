"""The problems that a command line names."""

from __future__ import annotations

import dataclasses
import typing
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

from flashgen.cli.output import note
from flashgen.errors import InputError
from flashgen.spec import PHASES, Causal, Full, Phase, Problem, parse_problem
from flashgen.spec.text import split_words

if typing.TYPE_CHECKING:
    from flashgen.integrations import ModelProblems


def resolve_problems(
    model: Path | None, preset: str | None, shapes: Sequence[str] | None, *, phase: str | None, seqlens: str
) -> tuple[Problem, ...]:
    """Return the problems of a model, a preset and the shapes given, each once; what is skipped goes to stderr.

    Args:
        model: a model's config.json.
        preset: a name.
        shapes: problems as text.
        phase: the phases asked for, separated by commas; beside backward the forward writes lse, as training needs. A
            shape that names its phase keeps it. By default problems are what they say, and forward where they say
            nothing; a model then has those of prefill and of decoding.
        seqlens: lengths for the model, separated by commas.

    Raises:
        InputError: if none is named, a text, file, phase or length is wrong, or a shape has no such phase.
    """
    from flashgen.integrations import preset as named_preset

    phases = None if phase is None else _read_phases(phase)
    listed: list[Problem] = []
    if model is not None:
        listed += _model_problems(model, _lengths(seqlens), phases)
    if preset is not None:
        listed += [found for problem in named_preset(preset) for found in _in_phases(problem, phases)]
    problems = dict.fromkeys(listed)
    problems |= dict.fromkeys(found for text in shapes or () for found in _shape_problems(text, phases))
    if not problems and preset is not None:
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
    for phase in phases:
        try:
            yield _in_phase(problem, phase, training="backward" in phases)
        except InputError as error:
            note(f"skipped: {problem}: {error}")


def _in_phase(problem: Problem, phase: Phase, *, training: bool) -> Problem:
    spec, shape = problem.spec, problem.shape
    if "decode" in (phase, spec.phase) and phase != spec.phase:
        if spec.phase != "forward":
            raise InputError(f"{spec.phase} problems have no {phase} phase")
        return _decoding(problem)
    if phase == "decode" or (phase == spec.phase and (phase == "backward" or not training)):
        return problem
    return Problem(spec=spec.forward() if phase == "forward" else spec.backward(), shape=shape)


def _decoding(prefill: Problem) -> Problem:
    """Return the problem of the next token: one query over the keys of a prefill, of which a causal mask hides none."""
    mask = Full() if isinstance(prefill.spec.mask, Causal) else prefill.spec.mask
    spec = dataclasses.replace(prefill.spec, phase="decode", mask=mask, lse=False)
    return Problem(spec=spec, shape=dataclasses.replace(prefill.shape, seqlen_q=1))


# Of a text for several phases: what each is read without. Beside backward the forward always gets lse.
_FOREIGN_WORDS: dict[Phase, frozenset[str]] = {
    "forward": frozenset({"deterministic", "dbias"}),
    "backward": frozenset({"lse"}),
    "decode": frozenset({"deterministic", "dbias"}),
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
        return
    for phase in phases:
        kept = given if len(phases) == 1 else [word for word in given if word not in _FOREIGN_WORDS[phase]]
        if phase == "decode" and not any(word.startswith("sq=") for word in given):
            # A text that says how long sequences are, and not how many of their tokens are queries.
            yield _decoding(parse_problem(" ".join(word for word in kept if word not in _FOREIGN_WORDS[phase])))
            continue
        lse = ["lse"] if phase == "forward" and "backward" in phases and "lse" not in kept else []
        yield parse_problem(" ".join([*kept, phase, *lse]))


def _model_problems(path: Path, seqlens: tuple[int, ...], phases: tuple[Phase, ...] | None) -> Iterator[Problem]:
    from flashgen.integrations import decoding_from_config, problems_from_config, read_model_config

    config = read_model_config(path)
    wanted = ("forward", "decode") if phases is None else phases
    of_prefill = tuple(phase for phase in wanted if phase != "decode")
    if of_prefill:
        prefill = problems_from_config(config, seqlens=seqlens)
        _note_skipped(prefill)
        for problem in prefill.problems:
            yield from _in_phases(problem, of_prefill)
    if "decode" in wanted:
        decoding = decoding_from_config(config, seqlens=seqlens)
        _note_skipped(decoding)
        yield from decoding.problems


def _note_skipped(found: ModelProblems) -> None:
    for reason in found.skipped:
        note(f"skipped in {found.model_type}: {reason}")


def _read_phases(text: str) -> tuple[Phase, ...]:
    wrong = [word for word in words(text) if word not in PHASES]
    if wrong or not words(text):
        raise InputError(f"--phase takes {', '.join(PHASES)} or several, separated by commas; got {text!r}")
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
