"""Ranks of a distributed job that are to run the same kernels: what each would choose from is compared once.

Two kernels for one call differ in the last bits of their results, and ranks that compile for different lengths of time
meet at collectives late or never. Ranks never tune; they compare.
"""

from __future__ import annotations

import dataclasses
import os
import typing
from collections.abc import Iterable, Sequence

import torch
import torch.distributed as dist

from flashgen.errors import FlashgenError
from flashgen.launch import detect_target, software_versions
from flashgen.ops.runtime import registry_for

_MAX_FILES_TOLD = 8

_Told = tuple[str, str, str]
"""A file as its digest, its path, and why it is searched."""
_Plain = tuple[dict[str, str], tuple[_Told, ...], str]
"""A state as it goes to the other ranks, where another version of flashgen may be."""


class RankMismatchError(FlashgenError, RuntimeError):
    """Ranks of a distributed job would not choose among the same kernels; the message says which differ in what."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class _State:
    """What the dispatcher of one rank would consult.

    Attributes:
        versions: of flashgen, Triton, PyTorch and the driver, and the device, by name.
        files: the registry files that hold entries, in search order.
        failure: why nothing is known of this rank, or nothing.
    """

    versions: dict[str, str] = dataclasses.field(default_factory=dict)
    files: tuple[_Told, ...] = ()
    failure: str = ""

    @property
    def order(self) -> tuple[str, ...]:
        return tuple(digest for digest, _, _ in self.files)


def check_ranks(group: dist.ProcessGroup | None = None, *, registry: str | os.PathLike[str] | None = None) -> None:
    """Compare what the ranks of a distributed job would choose kernels from; every rank calls it once, like a barrier.

    Compared are the entries of the registries on the search path and their order, wherever the files lie, the versions
    of flashgen, Triton, PyTorch and the driver, and the device. Call it after `flashgen.use`, with the device set
    (`torch.cuda.set_device`), before the first attention. Without an initialised process group, or with one rank, it
    returns at once. Any backend will do.

    Args:
        group: the ranks to compare; default: all. A rank outside it returns at once.
        registry: what the calls will give as `registry=`, if they do.

    Raises:
        RankMismatchError: on every rank, if any two differ; the message is the same on each.
    """
    if not dist.is_available() or not dist.is_initialized() or dist.get_rank(group) < 0:
        return
    ranks = dist.get_process_group_ranks(dist.group.WORLD if group is None else group)
    if len(ranks) == 1:
        return
    own = _own_state(registry)
    gathered: list[_Plain | None] = [None] * len(ranks)
    dist.all_gather_object(gathered, (own.versions, own.files, own.failure), group=group)
    states = (
        _State(versions=versions, files=files, failure=failure)
        for versions, files, failure in typing.cast("list[_Plain]", gathered)
    )
    differences = _differences(dict(zip(ranks, states, strict=True)))
    if differences:
        raise RankMismatchError(
            "the ranks of this job would not choose among the same kernels:\n  "
            + "\n  ".join(differences)
            + "\nInstall the same versions on every rank, on GPUs of one kind, and give every rank the same registry: "
            "name one folder that all of them see in FLASHGEN_REGISTRY, or copy the files (`flashgen registry merge` "
            "joins them)."
        )


def _own_state(registry: str | os.PathLike[str] | None) -> _State:
    # Whatever is wrong here is told to all: a rank that left before the collective would have the others wait for it.
    try:
        digests = registry_for("" if registry is None else os.fspath(registry)).file_digests()
        return _State(
            versions={**dataclasses.asdict(software_versions()), "device": _device()},
            files=tuple((each.digest, str(each.path), each.label) for each in digests),
        )
    except Exception as error:
        return _State(failure=f"{type(error).__name__}: {error}")


def _device() -> str:
    """Return the current device and the limits that decide which configs run on it."""
    if not torch.cuda.is_available():
        return "cpu"
    target = detect_target(torch.device("cuda", torch.cuda.current_device()))
    return f"{target}, {target.num_sms} multiprocessors, {target.smem_bytes} bytes of shared memory a block"


def _differences(states: dict[int, _State]) -> list[str]:
    """Return what differs among ranks, a phrase each; all ranks say the same in the same order."""
    failed = _grouped({rank: state.failure for rank, state in states.items()})
    failed.pop("", None)
    if failed:
        return [f"{_ranks(ranks)} cannot say what it would run: {failure}" for failure, ranks in failed.items()]
    found = []
    for name in dict.fromkeys(name for state in states.values() for name in state.versions):
        values = _grouped({rank: state.versions.get(name, "not told") for rank, state in states.items()})
        if len(values) > 1:
            told = "; ".join(f"{value} on {_ranks(ranks)}" for value, ranks in values.items())
            found.append(f"{name}: {told}")
    return found + _file_differences(states)


def _file_differences(states: dict[int, _State]) -> list[str]:
    if len({state.order for state in states.values()}) == 1:
        return []
    files = {digest: (path, label) for s in reversed(states.values()) for digest, path, label in s.files}
    holders = {digest: [rank for rank, s in states.items() if digest in s.order] for digest in files}
    partial = {digest: ranks for digest, ranks in holders.items() if len(ranks) < len(states)}
    if not partial:
        orders = _grouped({r: ", ".join(files[digest][0] for digest in s.order) for r, s in states.items()})
        return [
            "the same registry files in another order: " + "; ".join(f"{o} on {_ranks(r)}" for o, r in orders.items())
        ]
    told = [
        f"registry file {files[digest][0]} ({files[digest][1]}, digest {digest}): on {_ranks(ranks)} only"
        for digest, ranks in sorted(partial.items(), key=lambda item: (files[item[0]][0], item[1]))
    ]
    more = len(told) - _MAX_FILES_TOLD
    return told if more <= 0 else [*told[:_MAX_FILES_TOLD], f"and {more} more registry files"]


def _grouped(values: dict[int, str]) -> dict[str, list[int]]:
    """Return the ranks that share a value, by value."""
    found: dict[str, list[int]] = {}
    for rank, value in values.items():
        found.setdefault(value, []).append(rank)
    return found


def _ranks(ranks: Sequence[int]) -> str:
    """Return `rank 3`, or `ranks 0-5, 7`."""
    spans = ", ".join(f"{lo}" if lo == hi else f"{lo}-{hi}" for lo, hi in _spans(sorted(ranks)))
    return f"rank{'s' if len(ranks) > 1 else ''} {spans}"


def _spans(ranks: Iterable[int]) -> list[tuple[int, int]]:
    spans: list[tuple[int, int]] = []
    for rank in ranks:
        if spans and spans[-1][1] == rank - 1:
            spans[-1] = (spans[-1][0], rank)
        else:
            spans.append((rank, rank))
    return spans
