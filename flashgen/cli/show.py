"""`flashgen show`."""

from __future__ import annotations

from flashgen.cli import options
from flashgen.cli.configs import short_config
from flashgen.cli.output import note, print_json, print_table, ratio
from flashgen.codegen import is_current
from flashgen.registry import FileIssue, Located, RegistryEntry, load, search_locations

EXAMPLE = "flashgen show --registry tuned/"


def show(registry: options.Registry = None, as_json: options.Json = False) -> None:
    """List what is in the registries.

    Each entry with its file, how fast it was, and whether it is stale: measured on a template that has changed since.
    """
    locations = search_locations(registry)
    loaded = load(locations)
    # Entries first: a damaged index is found out, and its file's issues with it, while they are decoded.
    entries, issues = loaded.entries(), loaded.issues
    if as_json:
        print_json(
            {
                "searched": [{"label": location.label, "path": str(location.path)} for location in locations],
                "entries": [_entry_document(located) for located in entries],
                "skipped": [issue_document(issue) for issue in issues],
            }
        )
        return
    if entries:
        in_bytes = any(located.entry.spec.phase == "decode" for located in entries)
        numeric = ("us", "TFLOP/s", *(("TB/s",) if in_bytes else ()), "vs baseline")
        columns = ("from", "file", "device", "spec", "measured at", "config", *numeric, "origin", "state")
        print_table(columns, [_row(located, in_bytes) for located in entries], numeric=numeric)
    else:
        searched = ", ".join(f"{location.path} ({location.label})" for location in locations)
        note(f"no entries; searched {searched}; `flashgen tune` makes some")
    for issue in issues:
        note(f"skipped: {issue}")


def _row(located: Located, in_bytes: bool) -> tuple[str, ...]:
    entry = located.entry
    performance = entry.performance
    beside = ratio(performance.baseline_us, performance.median_us)
    return (
        located.location.label,
        located.path.name,
        f"{entry.device_name} ({entry.arch})",
        str(entry.spec),
        str(entry.range),
        short_config(entry.config),
        f"{performance.median_us:g}",
        entry.tflops_text,
        *((entry.tbps_text,) if in_bytes else ()),
        f"{beside} {performance.baseline}" if performance.baseline_us else beside,
        entry.origin,
        _state(entry),
    )


def is_stale(entry: RegistryEntry) -> bool:
    """Return whether an entry was measured on a template that has changed since."""
    return not is_current(entry.spec, entry.config, entry.provenance.template_digest)


def _state(entry: RegistryEntry) -> str:
    return "stale" if is_stale(entry) else "current"


def _entry_document(located: Located) -> dict[str, object]:
    entry = located.entry
    place = {"from": located.location.label, "file": str(located.path), "state": _state(entry)}
    return {**place, "tbps": entry.tbps, **entry.as_dict()}


def issue_document(issue: FileIssue) -> dict[str, object]:
    """Return what a JSON document says of a part that was skipped."""
    return {"file": str(issue.path), "line": issue.line, "reason": issue.reason}
