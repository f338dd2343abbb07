"""The ladder from a problem to a config: a pure function, so that it can be tested and explained without a GPU."""

from __future__ import annotations

import collections.abc
import dataclasses
from pathlib import Path

from flashgen.codegen import KernelConfig, is_current
from flashgen.codegen.constraints import check_config, shape_refusal
from flashgen.dispatch.carrying import by_pointers, carried
from flashgen.dispatch.distance import regimes, same_occupancy, same_regime, shape_distance
from flashgen.dispatch.features import OTHER_KERNEL, feature_gap, shown_spec
from flashgen.dispatch.selection import RUNGS, Refusal, Rung, Selection
from flashgen.errors import ConfigError, NoKernelError
from flashgen.heuristics import default_configs, safe_configs
from flashgen.registry import Located, Registry, RegistryEntry, shown_path
from flashgen.spec import Problem
from flashgen.target import GpuTarget, Software

Usable = collections.abc.Callable[[KernelConfig], "str | None"]

# There may be hundreds of entries for other features, and none speaks of the very problem. Trying one renders its code.
_MAX_RELATED_TRIED = 16
_MAX_RELATED_LISTED = 5
_BY_POINTERS = "loads pointer for descriptor, which cannot read these caches"


@dataclasses.dataclass(frozen=True, kw_only=True)
class _Candidate:
    rung: Rung
    distance: float
    config: KernelConfig
    label: str
    entry: RegistryEntry | None = None
    path: Path | None = None
    differences: tuple[str, ...] = ()
    change: str = ""


def select(
    problem: Problem,
    target: GpuTarget,
    *,
    registry: Registry,
    software: Software,
    config: KernelConfig | None = None,
    usable: Usable = lambda config: None,
) -> Selection:
    """Return the config to run: explicit, exact, other software, nearest, other device, other features, predicted, ...

    After these come heuristics and a safe default; `RUNGS` lists them all. Within a rung the nearer entry wins, then
    the earlier in the search path. Entries for another mask or other features come after those of another device,
    which ran the very code that is asked for under the same limits of registers and shared memory, and before
    predictions, which ran nowhere. Of an entry for other sizes or features runs what `carrying` makes of it.

    Args:
        software: versions at hand; entries measured under others rank lower.
        config: the caller's own choice; taken if legal, and nothing else then.
        usable: returns why a config cannot run this very call (strides, compile errors), or None.

    Raises:
        ConfigError: if the caller's config is illegal or cannot run; the message lists every reason.
        NoKernelError: if no candidate is left; the message lists why each was refused.
    """
    if config is not None:
        reasons = check_config(config, problem.spec, target)
        reasons = reasons or tuple(filter(None, [shape_refusal(config, problem.shape) or usable(config)]))
        if reasons:
            raise ConfigError(f"config {config} cannot run {problem} on {target}: {'; '.join(reasons)}")
        return Selection(problem=problem, target=target, config=config, rung="explicit")
    ladder = _Ladder(problem=problem, target=target, usable=usable)
    own = _own_candidates(problem, target, registry, software, ladder.refused)
    measured = [candidate for candidate in own if candidate.rung != "predicted"]
    predicted = own[len(measured) :]
    selection = (
        ladder.first_of(measured, below=predicted)
        or ladder.first_of(_related_candidates(problem, target, registry), below=predicted, listed=_MAX_RELATED_LISTED)
        or ladder.first_of([*predicted, *_untuned_candidates(problem, target)])
    )
    if selection is None:
        listing = "\n  ".join(map(str, ladder.refused))
        raise NoKernelError(f"no kernel can run {problem} on {target}; refused:\n  {listing}")
    return selection


@dataclasses.dataclass(kw_only=True)
class _Ladder:
    """One walk down the rungs, and what was refused on the way."""

    problem: Problem
    target: GpuTarget
    usable: Usable
    refused: list[Refusal] = dataclasses.field(default_factory=list)

    def first_of(
        self,
        candidates: collections.abc.Sequence[_Candidate],
        below: collections.abc.Sequence[_Candidate] = (),
        listed: int | None = None,
    ) -> Selection | None:
        """Return the first candidate that can run, or None.

        Args:
            candidates: best first.
            below: entries that rank lower still.
            listed: how many refusals of `candidates` are told at most.
        """
        refused: list[Refusal] = []
        for rank, candidate in enumerate(candidates):
            reason = None
            for reading in self._readings(candidate, candidates):
                reason = self._refusal(reading)
                if reason is None:
                    refused += [_ranks_lower(other) for other in candidates[rank + 1 :] if other.entry]
                    return self._selection(reading, (*_shortened(refused, listed), *map(_ranks_lower, below)))
            assert reason is not None
            refused.append(Refusal(candidate=candidate.label, reason=reason))
        self.refused += _shortened(refused, listed)
        return None

    def _selection(self, candidate: _Candidate, refused: tuple[Refusal, ...]) -> Selection:
        return Selection(
            problem=self.problem,
            target=self.target,
            config=candidate.config,
            rung=candidate.rung,
            entry=candidate.entry,
            path=candidate.path,
            distance=candidate.distance,
            differences=candidate.differences,
            change=candidate.change,
            refused=(*self.refused, *refused),
        )

    def _readings(
        self, candidate: _Candidate, candidates: collections.abc.Sequence[_Candidate]
    ) -> collections.abc.Iterator[_Candidate]:
        """Yield what the candidate says for the problem, then its config as it is, where that differs.

        An entry whose config cannot compute the problem says nothing, but for caches that its descriptors cannot read.
        """
        config = candidate.config
        if candidate.entry is not None and not self._illegal(candidate.config):
            opposite = _opposite(candidate, candidates, self.problem)
            found = carried(candidate.entry, self.problem, self.target, opposite)
            config = found.config
            if config != candidate.config:
                yield dataclasses.replace(candidate, config=found.config, change=found.change)
        yield candidate
        pointers = by_pointers(config, self.problem.spec.page_size) if candidate.entry is not None else None
        if pointers is not None:
            yield dataclasses.replace(candidate, config=pointers, change=_BY_POINTERS)

    def _illegal(self, config: KernelConfig) -> str | None:
        reasons = check_config(config, self.problem.spec, self.target)
        return _first(reasons) or shape_refusal(config, self.problem.shape)

    def _refusal(self, candidate: _Candidate) -> str | None:
        # Whether an entry for another spec is current is asked last of all: that renders the code of its spec.
        stale = is_stale(candidate.entry) if candidate.entry and candidate.rung == "other features" else None
        return stale or self._illegal(candidate.config) or self.usable(candidate.config)


def _own_candidates(
    problem: Problem, target: GpuTarget, registry: Registry, software: Software, refused: list[Refusal]
) -> list[_Candidate]:
    """Return the entries for the spec, best first; those that do not fit go to `refused`."""
    found: list[_Candidate] = []
    for located in registry.candidates(problem.spec):
        entry = located.entry
        reason = _mismatch(entry, problem, target) or is_stale(entry)
        if reason:
            refused.append(Refusal(candidate=_label(located), reason=reason))
            continue
        found.append(
            _Candidate(
                rung=_rung(entry, problem, target, software),
                distance=shape_distance(entry, problem.shape),
                config=entry.config,
                label=_label(located),
                entry=entry,
                path=located.path,
            )
        )
    # A stable sort: equals stay in the order of the search path.
    found.sort(key=lambda c: (RUNGS.index(c.rung), c.distance))
    return found


def _opposite(
    candidate: _Candidate, ordered: collections.abc.Sequence[_Candidate], problem: Problem
) -> RegistryEntry | None:
    """Return the entry that is nearest on the other side of the problem's lengths than a neighbour, if there is one."""
    side = _side(candidate, problem)
    if candidate.rung != "nearest" or not side:
        return None
    found = (other.entry for other in ordered if other.rung == "nearest" and _side(other, problem) == -side)
    return next(found, None)


def _side(candidate: _Candidate, problem: Problem) -> int:
    """Return -1 for an entry of fewer keys than the problem's, 1 for one of more, 0 else."""
    assert candidate.entry is not None
    keys = candidate.entry.range.seqlen_k
    return (keys.lo > problem.shape.seqlen_k) - (keys.hi < problem.shape.seqlen_k)


def _related_candidates(problem: Problem, target: GpuTarget, registry: Registry) -> list[_Candidate]:
    """Return what was measured on this device for other masks or features, the likest first, then the nearest."""
    found: list[tuple[float, _Candidate]] = []
    for located in registry.related(problem.spec):
        entry = located.entry
        on_device = entry.device_name == target.device_name and entry.origin == "measured"
        if not on_device or _mismatch(entry, problem, target):
            continue
        gap = feature_gap(entry.spec, problem.spec)
        if gap.cost >= OTHER_KERNEL:
            continue
        candidate = _Candidate(
            rung="other features",
            distance=shape_distance(entry, problem.shape),
            config=entry.config,
            label=f"{_label(located)} for {shown_spec(entry.spec)}",
            entry=entry,
            path=located.path,
            differences=gap.differences,
        )
        found.append((gap.cost, candidate))
    likest = sorted(found, key=lambda pair: (pair[0], pair[1].distance))[:_MAX_RELATED_TRIED]
    return [candidate for _, candidate in likest]


def _shortened(refused: list[Refusal], limit: int | None) -> list[Refusal]:
    if limit is None or len(refused) <= limit:
        return refused
    more = Refusal(candidate=f"and {len(refused) - limit} more", reason="entries for other features")
    return [*refused[:limit], more]


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
        return f"measured in another regime ({', '.join(regimes(entry.spec.phase))})"
    if not entry.range.covers(problem.shape) and not same_occupancy(entry, problem.shape, target.num_sms):
        return f"measured on a grid that fills {target.num_sms} multiprocessors otherwise than this one"
    return None


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
    safe = safe_configs(problem.spec.phase)
    configs = default_configs(problem, target)
    rungs: list[Rung] = ["safe default" if config in safe else "heuristic" for config in configs]
    return [
        _Candidate(rung=rung, distance=0, config=config, label=f"{rung} {config}")
        for rung, config in zip(rungs, configs, strict=True)
    ]


def _label(located: Located) -> str:
    return f"{shown_path(Path(located.path.name))} [{located.entry.range}, {located.entry.device_name}]"


def _first(reasons: tuple[str, ...]) -> str | None:
    return reasons[0] if reasons else None
