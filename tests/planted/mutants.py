"""Kernels with a bug planted into them: into their rendered source, their arguments, or their launches.

An edit that finds nothing to replace is an error: a template that changes must not leave the suite testing nothing.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import re
import typing
from collections.abc import Callable, Iterator

import pytest
import torch

from flashgen.codegen import KernelConfig, RenderedKernel, render
from flashgen.codegen.render import code_digest
from flashgen.launch import backward, forward
from flashgen.measure import Rejected
from flashgen.spec import AttentionSpec, Problem, parse_problem
from flashgen.tuning import gpu_jobs
from flashgen.tuning.gpu_cases import Case

Launch = Callable[[int, Callable[[], None], dict[str, torch.Tensor]], None]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Mutant:
    """One bug.

    Attributes:
        problem: text of what is tuned.
        config: the config that has the bug.
        says: pattern of the reason that the gate must give.
        edits: function, text in it, and what replaces it there; in all functions whose names so begin.
        numbers: changes the numbers that kernels are launched with.
        launch: is given the number of the launch of a problem, from 0, what launches, and the tensors.
        host: changes what the host does besides.
    """

    problem: str
    config: KernelConfig
    says: str
    edits: tuple[tuple[str, str, str], ...] = ()
    numbers: Callable[[dict[str, int | float]], None] | None = None
    launch: Launch | None = None
    host: Callable[[pytest.MonkeyPatch], None] | None = None

    def parsed(self) -> Problem:
        return parse_problem(self.problem)


def outcome_of(problem: Problem, config: KernelConfig) -> Rejected | None:
    """Return why the tuner would not let a config win, or None: all that it runs of one, but the final race."""
    # So far behind that three launches time it.
    outcome = gpu_jobs.evaluate(problem, config, 1e-9)
    return outcome if isinstance(outcome, Rejected) else gpu_jobs.confirm(problem, config)


@contextlib.contextmanager
def planted(mutant: Mutant) -> Iterator[None]:
    """Plant the bug while the block runs.

    Raises:
        AssertionError: at the end, if an edit found nothing to replace.
    """
    unused = set(mutant.edits)

    # Once for all shapes: hashing code takes a tenth of a second.
    @functools.cache
    def mutated(spec: AttentionSpec, config: KernelConfig) -> RenderedKernel:
        rendered = render(spec, config)
        source = rendered.source
        for edit in mutant.edits:
            edited = replace_in_function(source, *edit)
            if edited != source:
                unused.discard(edit)
            source = edited
        return dataclasses.replace(rendered, source=source, digest=code_digest(source))

    with pytest.MonkeyPatch.context() as patch:
        gpu_jobs._compiled.cache_clear()
        patch.setattr(gpu_jobs, "render", mutated)
        if mutant.numbers:
            _change_numbers(patch, mutant.numbers)
        if mutant.launch:
            _change_launches(patch, mutant.launch)
        if mutant.host:
            mutant.host(patch)
        try:
            yield
        finally:
            gpu_jobs._compiled.cache_clear()
    assert not unused, f"nothing to replace in the rendered source: {sorted(unused)}"


def replace_in_function(source: str, function: str, old: str, new: str) -> str:
    """Return the source with `old` replaced in the functions whose names begin with `function`."""
    parts = re.split(r"(?m)^(?=@)", source)
    return "".join(part.replace(old, new) if f"def {function}" in part else part for part in parts)


def _change_numbers(patch: pytest.MonkeyPatch, change: Callable[[dict[str, int | float]], None]) -> None:
    right = forward.launch_values

    def changed(*args: typing.Any) -> dict[str, int | float]:
        values = right(*args)
        change(values)
        return values

    patch.setattr(forward, "launch_values", changed)
    patch.setattr(backward, "launch_values", changed)


def _change_launches(patch: pytest.MonkeyPatch, launch: Launch) -> None:
    right = gpu_jobs._bound
    launches: dict[Problem, int] = {}

    def bound(case: Case, config: KernelConfig) -> Callable[[], None]:
        run = right(case, config)

        def changed() -> None:
            number = launches.get(case.problem, 0)
            launches[case.problem] = number + 1
            launch(number, run, case.tensors)

        return changed

    patch.setattr(gpu_jobs, "_bound", bound)
