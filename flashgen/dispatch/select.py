"""The ladder from a problem to a config: a pure function, so that it can be tested and explained without a GPU."""

from __future__ import annotations

import collections.abc
import dataclasses
from pathlib import Path

from flashgen.codegen import KernelConfig, is_current
from flashgen.codegen.constraints import check_config
from flashgen.dispatch.distance import same_regime, shape_distance
from flashgen.dispatch.selection import RUNGS, Refusal, Rung, Selection
from flashgen.errors import ConfigError, NoKernelError
from flashgen.heuristics import default_configs, safe_configs
from flashgen.registry import Located, Registry, RegistryEntry
from flashgen.spec import Problem
from flashgen.target import GpuTarget, Software

Usable = collections.abc.Callable[[KernelConfig], "str | None"]


@dataclasses.dataclass(frozen=True, kw_only=True)
class _Candidate:
    rung: Rung
    distance: float
    config: KernelConfig
    label: str
    entry: RegistryEntry | None = None
    path: Path | None = None


def select(
    problem: Problem,
    target: GpuTarget,
    *,
    registry: Registry,
    software: Software,
    config: KernelConfig | None = None,
    usable: Usable = lambda config: None,
) -> Selection:
    """Return the config to run: explicit, exact, other software, nearest, other device, predicted, heuristic, safe.

    Within a rung the nearer entry wins, then the earlier in the search path.

    Args:
        software: versions at hand; entries measured under others rank lower.
        config: the caller's own choice; taken if legal, and nothing else then.
        usable: returns why a config cannot run this very call (strides, compile errors), or None.

    Raises:
        ConfigError: if the caller's config is illegal or cannot run; the message lists every reason.
        NoKernelError: if no candidate is left; the message lists why each was refused.
    """
    if config is not None:
        reasons = check_config(config, problem.spec, target) or tuple(filter(None, [usable(config)]))
        if reasons:
            raise ConfigError(f"config {config} cannot run {problem} on {target}: {'; '.join(reasons)}")
        return Selection(problem=problem, target=target, config=config, rung="explicit")
    refused: list[Refusal] = []
    tuned = _registry_candidates(problem, target, registry, software, refused)
    for rank, candidate in enumerate([*tuned, *_untuned_candidates(problem, target)]):
        reason = _first(check_config(candidate.config, problem.spec, target)) or usable(candidate.config)
        if reason is None:
            return Selection(
                problem=problem,
                target=target,
                config=candidate.config,
                rung=candidate.rung,
                entry=candidate.entry,
                path=candidate.path,
                distance=candidate.distance,
                refused=(*refused, *map(_ranks_lower, tuned[rank + 1 :])),
            )
        refused.append(Refusal(candidate=candidate.label, reason=reason))
    listing = "\n  ".join(map(str, refused))
    raise NoKernelError(f"no kernel can run {problem} on {target}; refused:\n  {listing}")


def _registry_candidates(
    problem: Problem, target: GpuTarget, registry: Registry, software: Software, refused: list[Refusal]
) -> list[_Candidate]:
    found: list[_Candidate] = []
    for located in registry.candidates(problem.spec):
        entry = located.entry
        reason = _mismatch(entry, problem, target)
        if reason:
            refused.append(Refusal(candidate=_label(located), reason=reason))
            continue
        distance = shape_distance(entry, problem.shape)
        found.append(
            _Candidate(
                rung=_rung(entry, problem, target, software),
                distance=distance,
                config=entry.config,
                label=_label(located),
                entry=entry,
                path=located.path,
            )
        )
    # A stable sort: equals stay in the order of the search path.
    return sorted(found, key=lambda c: (RUNGS.index(c.rung), c.distance))


def is_stale(entry: RegistryEntry) -> str | None:
    """Return why an entry no longer speaks of the code it was measured on, or None."""
    digest = entry.provenance.template_digest
    if is_current(entry.spec, entry.config, digest):
        return None
    return f"stale: measured on code of digest {digest}, which its template no longer renders to; tune again"


def _mismatch(entry: RegistryEntry, problem: Problem, target: GpuTarget) -> str | None:
    if entry.arch != target.arch:
        return f"compiled for {entry.arch}, not {target.arch}"
    if not entry.range.covers(problem.shape) and not same_regime(entry, problem.shape):
        return "measured in another regime (decode, short, long)"
    return is_stale(entry)


def _rung(entry: RegistryEntry, problem: Problem, target: GpuTarget, software: Software) -> Rung:
    if entry.origin == "predicted":
        return "predicted"
    if entry.device_name != target.device_name:
        return "other device"
    if not entry.range.covers(problem.shape):
        return "nearest"
    measured = (entry.provenance.triton, entry.provenance.driver)
    return "exact" if measured == (software.triton, software.driver) else "other software"


def _ranks_lower(candidate: _Candidate) -> Refusal:
    return Refusal(
        candidate=candidate.label, reason=f"ranks lower: {candidate.rung}, distance {candidate.distance:.2f}"
    )


def _untuned_candidates(problem: Problem, target: GpuTarget) -> list[_Candidate]:
    safe = safe_configs()
    configs = default_configs(problem, target)
    rungs: list[Rung] = ["safe default" if config in safe else "heuristic" for config in configs]
    return [
        _Candidate(rung=rung, distance=0, config=config, label=f"{rung} {config}")
        for rung, config in zip(rungs, configs, strict=True)
    ]


def _label(located: Located) -> str:
    return f"{located.path.name} [{located.entry.range}, {located.entry.device_name}]"


def _first(reasons: tuple[str, ...]) -> str | None:
    return reasons[0] if reasons else None
