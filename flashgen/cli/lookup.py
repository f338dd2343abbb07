"""What the dispatcher answers for the problems of a command line."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from flashgen.cli.output import note
from flashgen.codegen import KernelConfig
from flashgen.dispatch import Selection, select
from flashgen.registry import Registry, load, search_locations
from flashgen.spec import Problem
from flashgen.target import GpuTarget, Software


def load_registry(path: Path | None) -> Registry:
    """Return the registry of the search path, `path` first; what was skipped goes to stderr."""
    registry = load(search_locations(path))
    for issue in registry.issues:
        note(f"skipped in the registry: {issue}")
    return registry


def select_all(
    problems: Sequence[Problem],
    target: GpuTarget,
    registry: Registry,
    config: KernelConfig | None = None,
    software: Software | None = None,
) -> tuple[Selection, ...]:
    """Return the selection for each problem of dense tensors, by default for the software at hand.

    Raises:
        ConfigError: if `config` is illegal for one of them.
        NoKernelError: if nothing can run one of them.
    """
    if software is None:
        from flashgen.launch import software_versions

        software = software_versions()
    return tuple(select(problem, target, registry=registry, software=software, config=config) for problem in problems)


def is_tuned(selection: Selection) -> bool:
    """Return whether a choice is founded on a registry entry for the problem's spec, or is the caller's own."""
    return selection.rung not in ("other features", "heuristic", "safe default")


def selection_document(selection: Selection) -> dict[str, object]:
    """Return a selection as plain values for JSON."""
    return {
        "problem": str(selection.problem),
        "device": selection.target.device_name,
        "arch": selection.target.arch,
        "config": selection.config.as_dict(),
        "rung": selection.rung,
        "origin": selection.origin,
        "distance": selection.distance,
        "differences": list(selection.differences),
        "change": selection.change,
        "file": str(selection.path) if selection.path else None,
        "entry": selection.entry.as_dict() if selection.entry else None,
        "spread_us": selection.entry.performance.spread_us if selection.entry else None,
        "runner_up": _runner_up_document(selection),
        "refused": [{"candidate": r.candidate, "reason": r.reason} for r in selection.refused],
    }


def _runner_up_document(selection: Selection) -> dict[str, object] | None:
    second = selection.runner_up
    if second is None:
        return None
    return {"config": second.config.as_dict(), "median_us": second.median_us, "ratio": selection.runner_up_ratio}
