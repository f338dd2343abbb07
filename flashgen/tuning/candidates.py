"""Configs that compiled: which spill too much, and which are one binary, so that each is evaluated once."""

from __future__ import annotations

import dataclasses
import typing

from flashgen.codegen import KernelConfig, KernelResources
from flashgen.compile import CompileReport
from flashgen.tuning.tried import Tried

# A few spilled registers outside the loop over visible tiles cost nothing (the winner at D=128 has some); more of them
# stand inside it. Where everything spills (float32 at D=128), the least spilling are tried.
SPILL_LIMIT_BYTES = 256

_BinaryKey = tuple[str, KernelResources, KernelConfig]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Candidate:
    """A config that compiled.

    Attributes:
        number: of its trial.
        config: what was compiled.
        report: what the compiler said.
    """

    number: int
    config: KernelConfig
    report: CompileReport


class Binaries:
    """What became of each binary, and which are being evaluated."""

    def __init__(self, tried: typing.Iterable[Tried]) -> None:
        """Begin with what is known of finished trials."""
        # Being measured: the trial that is, by number, and all those with its binary.
        self._measuring: dict[int, _BinaryKey] = {}
        self._same: dict[_BinaryKey, list[Candidate]] = {}
        self._known: dict[_BinaryKey, Tried] = {}
        for one in tried:
            self.know(one)

    @property
    def measuring(self) -> int:
        """How many binaries are being measured."""
        return len(self._measuring)

    @property
    def waiting(self) -> list[Candidate]:
        """The candidates that wait for one of them."""
        return [candidate for same in self._same.values() for candidate in same]

    def know(self, tried: Tried) -> None:
        """Remember what became of a binary, unless that is known."""
        if tried.binary_hash and tried.record.resources:
            key = _binary_key(tried.binary_hash, tried.record.resources, tried.config)
            self._known.setdefault(key, tried)

    def known(self, candidate: Candidate) -> Tried | None:
        """Return what became of a candidate's binary, or None."""
        return self._known.get(_key(candidate))

    def begin(self, candidate: Candidate) -> bool:
        """Return whether a candidate is to be measured; else another with its binary is, and it waits for that."""
        key = _key(candidate)
        if key in self._same:
            self._same[key].append(candidate)
            return False
        self._same[key] = [candidate]
        self._measuring[candidate.number] = key
        return True

    def end(self, number: int) -> list[Candidate]:
        """Return the candidates that waited for a trial, its own first."""
        return self._same.pop(self._measuring.pop(number))

    def measured(self, candidate: Candidate, tried: Tried) -> None:
        """Remember what became of a candidate, whatever other machines said of its binary meanwhile."""
        self._known[_key(candidate)] = tried

    def drop(self) -> None:
        """Forget what is being measured."""
        self._measuring.clear()
        self._same.clear()


def spills_much(resources: KernelResources) -> bool:
    """Return whether a kernel spills more than it may beside others."""
    return resources.spills > SPILL_LIMIT_BYTES


def _key(candidate: Candidate) -> _BinaryKey:
    return _binary_key(candidate.report.binary_hash, candidate.report.resources, candidate.config)


def _binary_key(binary_hash: str, resources: KernelResources, config: KernelConfig) -> _BinaryKey:
    # These leave no trace but in the code; the other numbers also shape the grid and the launch.
    traceless = [name for name in config.as_dict() if name in ("num_stages", "num_stages2", "maxnreg")]
    return binary_hash, resources, dataclasses.replace(config, **dict.fromkeys(traceless, 0))
