"""What differs between two sets of entries."""

from __future__ import annotations

import dataclasses
import typing

from flashgen.registry.entry import RegistryEntry
from flashgen.registry.merging import merge

Kind = typing.Literal["added", "removed", "changed"]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Difference:
    """An entry that is in one set only, or another one in each.

    Attributes:
        old: None where it was added.
        new: None where it was removed.
    """

    old: RegistryEntry | None
    new: RegistryEntry | None

    @property
    def kind(self) -> Kind:
        if self.old is None:
            return "added"
        return "removed" if self.new is None else "changed"

    @property
    def either(self) -> RegistryEntry:
        """The entry, of both the new one: they share device, spec and range."""
        found = self.new or self.old
        assert found is not None
        return found


def compare(old: typing.Iterable[RegistryEntry], new: typing.Iterable[RegistryEntry]) -> tuple[Difference, ...]:
    """Return what `new` has that `old` has not, and the reverse, in the order of a registry file."""
    before = {entry.key(): entry for entry in merge(old, ())}
    after = {entry.key(): entry for entry in merge(new, ())}
    keys = dict.fromkeys(entry.key() for entry in merge(before.values(), after.values()))
    pairs = ((before.get(key), after.get(key)) for key in keys)
    return tuple(Difference(old=a, new=b) for a, b in pairs if a is None or b is None or a.digest() != b.digest())
