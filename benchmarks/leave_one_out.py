"""How far the ladder is from the best for shapes that were never tuned: each registry entry in turn is held out.

    python benchmarks/leave_one_out.py                          # what entries' own runners-up tell; needs no GPU
    python benchmarks/leave_one_out.py --record races.jsonl     # time on this GPU what is not in the file yet
    python benchmarks/leave_one_out.py --results races.jsonl    # the table from recorded times; needs no GPU

For each entry the registry is asked for the entry's own problem without the entry, and without any other that covers
it. The regret is the time of what was chosen over that of the entry's own config, less one, both timed in interleaved
rounds; in the mean, one below 0 counts as 0. Beside it the regret of what would run untuned. A run that was cut short
goes on where it stopped. With `--all`, every config of a like entry is raced too: other ladders can then be judged by
the same file.
"""

from __future__ import annotations

import argparse
import dataclasses
import math
import os
import statistics
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

from flashgen.cli.output import print_json, print_table
from flashgen.codegen import KernelConfig
from flashgen.codegen.constraints import check_config, shape_refusal
from flashgen.dispatch import Selection, select
from flashgen.dispatch.carrying import carried
from flashgen.registry import FileContents, IndexedFile, Location, Registry, RegistryEntry, load
from flashgen.resources import shipped_registry_dir
from flashgen.spec import PHASES, Problem
from flashgen.target import GpuTarget, Software, named_target

# Below this, one time is as good as the other.
_NOISE = 0.02

Ratio = Callable[[Problem, KernelConfig, KernelConfig], "float | None"]
"""Returns the time of a config over that of another, if it is known."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class HeldOut:
    """An entry, and what would run for its problem if it were not there.

    Attributes:
        problem: the entry's own, at the sizes it was measured at.
        entry: what was held out.
        chosen: the answer of the ladder.
        default: what would run without any entry.
        others: the configs of like entries, as they are and as they carry over, that are legal for the problem.
    """

    problem: Problem
    entry: RegistryEntry
    chosen: Selection
    default: KernelConfig
    others: tuple[KernelConfig, ...]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Row:
    """The regrets of one entry, signed; None where a time is not known."""

    held: HeldOut
    regret: float | None
    default_regret: float | None

    @property
    def loses_to_default(self) -> bool:
        """Return whether what was chosen is slower than the default, beyond noise."""
        if self.regret is None or self.default_regret is None:
            return False
        return (1 + self.regret) / (1 + self.default_regret) > 1 + _NOISE


def main() -> None:
    """Run the command."""
    options = _options()
    target = named_target(options.gpu) if options.record is None else _gpu()
    entries = [located.entry for located in load(_locations(options)).entries()]
    held = list(hold_out(entries, target, options.phase, options.match))
    if not held:
        raise SystemExit(f"no entry of {target} matches; there are {len(entries)} of all GPUs and phases")
    ratio = known_ratio(held)
    if options.record is not None:
        ratio = _record(held, target, options)
    elif options.results is not None:
        from races import Record

        ratio = Record(options.results).ratio
    rows = [row_of(one, ratio) for one in held]
    summary = summary_of(rows)
    if options.json:
        print_json({"entries": [_document(row) for row in rows], "summary": summary})
        return
    print_table(_COLUMNS, map(_cells, rows), numeric=("distance", "regret", "default"))
    print("\n".join(f"{name}: {_shown(value)}" for name, value in summary.items()))


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    where = parser.add_mutually_exclusive_group()
    where.add_argument("--record", type=Path, metavar="FILE", help="time on this GPU, and add the times to FILE")
    where.add_argument("--results", type=Path, metavar="FILE", help="take the times from FILE")
    parser.add_argument("--registry", type=Path, help="folder of the entries; those that ship by default")
    parser.add_argument("--gpu", default="H200", help="whose entries, where none is at hand")
    parser.add_argument("--phase", choices=PHASES, help="of this phase only")
    parser.add_argument("--match", default="", metavar="TEXT", help="problems whose text holds this only")
    parser.add_argument("--all", action="store_true", help="race the configs of all like entries")
    parser.add_argument("--target-ms", type=float, default=25.0, help="time to spend on each config")
    parser.add_argument("--workers", type=int, default=max(1, (os.cpu_count() or 2) - 1), help="compiling processes")
    parser.add_argument("--json", action="store_true")
    return parser.parse_args()


def _locations(options: argparse.Namespace) -> list[Location]:
    if options.registry is None:
        return [Location(path=shipped_registry_dir(), label="shipped")]
    return [Location(path=options.registry, label="argument")]


def hold_out(
    entries: Sequence[RegistryEntry], target: GpuTarget, phase: str | None = None, match: str = ""
) -> Iterator[HeldOut]:
    """Yield the entries of a GPU, each with the ladder's answer in its absence."""
    for entry in entries:
        problem = Problem(spec=entry.spec, shape=entry.range.smallest())
        wanted = entry.spec.phase == phase or phase is None
        if entry.device_name != target.device_name or not wanted or match not in str(problem):
            continue
        registry = registry_without(entries, problem)
        made = entry.provenance
        software = Software(flashgen=made.flashgen, triton=made.triton, torch=made.torch, driver=made.driver)
        yield HeldOut(
            problem=problem,
            entry=entry,
            chosen=select(problem, target, registry=registry, software=software),
            default=select(problem, target, registry=Registry(()), software=software).config,
            others=_others(problem, target, registry),
        )


def registry_without(entries: Sequence[RegistryEntry], problem: Problem) -> Registry:
    """Return a registry of the entries that were not measured on `problem`."""
    rest = tuple(e for e in entries if not (e.spec == problem.spec.tuning_key() and e.range.covers(problem.shape)))
    path = Path("held_out.yaml")
    return Registry([(Location(path=path, label="argument"), IndexedFile(path, FileContents(entries=rest), {}))])


def _others(problem: Problem, target: GpuTarget, registry: Registry) -> tuple[KernelConfig, ...]:
    like = [located.entry for located in (*registry.candidates(problem.spec), *registry.related(problem.spec))]
    configs = dict.fromkeys(config for e in like for config in (e.config, carried(e, problem, target).config))
    return tuple(
        config
        for config in configs
        if not check_config(config, problem.spec, target) and not shape_refusal(config, problem.shape)
    )


def known_ratio(held: Sequence[HeldOut]) -> Ratio:
    """Return what the entries themselves tell: the times of their config and of their runners-up."""
    entries = {one.problem: one.entry for one in held}

    def ratio(problem: Problem, config: KernelConfig, winner: KernelConfig) -> float | None:
        entry = entries[problem]
        times = {runner_up.config: runner_up.median_us for runner_up in entry.runners_up}
        times[entry.config] = entry.performance.median_us
        return times[config] / times[winner] if config in times else None

    return ratio


def row_of(held: HeldOut, ratio: Ratio) -> Row:
    """Return the regrets of one entry, by the times that `ratio` knows."""
    winner = held.entry.config
    found = [ratio(held.problem, config, winner) for config in (held.chosen.config, held.default)]
    regret, default_regret = (None if value is None else value - 1 for value in found)
    return Row(held=held, regret=regret, default_regret=default_regret)


def summary_of(rows: Sequence[Row]) -> dict[str, float | int | None]:
    """Return the figures over all rows whose regret is known."""
    known = [row.regret for row in rows if row.regret is not None]
    counted = sorted(max(0.0, regret) for regret in known)
    defaults = sorted(max(0.0, row.default_regret) for row in rows if row.default_regret is not None)
    return {
        "entries": len(rows),
        "timed": len(known),
        "mean regret": statistics.fmean(counted) if counted else None,
        "p95 regret": percentile(counted, 0.95) if counted else None,
        "worst regret": counted[-1] if counted else None,
        "mean regret, signed": statistics.fmean(known) if known else None,
        "mean regret of the default": statistics.fmean(defaults) if defaults else None,
        "p95 regret of the default": percentile(defaults, 0.95) if defaults else None,
        "slower than the default": sum(row.loses_to_default for row in rows),
    }


def percentile(ordered: Sequence[float], share: float) -> float:
    """Return the least of ascending values that `share` of them do not exceed."""
    return ordered[max(0, math.ceil(share * len(ordered)) - 1)]


def _gpu() -> GpuTarget:
    import torch

    from flashgen.launch import detect_target

    return detect_target(torch.device("cuda", torch.cuda.current_device()))


def _record(held: Sequence[HeldOut], target: GpuTarget, options: argparse.Namespace) -> Ratio:
    # Torch and the measuring side are needed for nothing else.
    import torch
    from races import GpuCalls, Record, compiled_first, run_races

    from flashgen.launch import software_versions
    from flashgen.measure import CudaClock

    device = torch.device("cuda", torch.cuda.current_device())
    record = Record(options.record)
    run_races(
        compiled_first(missing_races(held, record.tried, everything=options.all), target, options.workers),
        record,
        target,
        software_versions(),
        clock=CudaClock(device),
        calls_of=GpuCalls(device, target),
        target_ms=options.target_ms,
    )
    return record.ratio


def missing_races(
    held: Sequence[HeldOut], tried: Callable[[Problem], frozenset[KernelConfig]], *, everything: bool
) -> dict[Problem, list[KernelConfig]]:
    """Return what is to be raced yet: of each problem the entry's own config, then what is not known beside it."""
    races = {}
    for one in held:
        wanted = (one.chosen.config, one.default, *(one.others if everything else ()))
        own = one.entry.config
        new = [config for config in dict.fromkeys(wanted) if config != own and config not in tried(one.problem)]
        if new:
            races[one.problem] = [own, *new]
    return races


_COLUMNS = ("problem", "rung", "distance", "from", "regret", "default")


def _cells(row: Row) -> tuple[str, ...]:
    chosen = row.held.chosen
    source = "" if chosen.entry is None else f"{chosen.entry.spec.mask} {chosen.entry.range}"
    return (
        str(row.held.problem),
        chosen.rung + (" (adapted)" if chosen.change else ""),
        f"{chosen.distance:.2f}",
        source,
        _shown(row.regret),
        _shown(row.default_regret) + (" faster" if row.loses_to_default else ""),
    )


def _shown(value: float | int | None) -> str:
    if value is None:
        return "not timed"
    return str(value) if isinstance(value, int) else f"{100 * value:.1f}%"


def _document(row: Row) -> dict[str, object]:
    held = row.held
    return {
        "problem": str(held.problem),
        "winner": held.entry.config.as_dict(),
        "rung": held.chosen.rung,
        "distance": held.chosen.distance,
        "from": f"{held.chosen.entry.spec} {held.chosen.entry.range}" if held.chosen.entry else None,
        "chosen": held.chosen.config.as_dict(),
        "default": held.default.as_dict(),
        "regret": row.regret,
        "default_regret": row.default_regret,
        "slower_than_default": row.loses_to_default,
    }


if __name__ == "__main__":
    main()
