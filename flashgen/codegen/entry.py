"""One kernel of a rendered module, as the compiler and the launcher see it."""

from __future__ import annotations

import dataclasses
import typing

Language = typing.Literal["triton", "gluon"]


@dataclasses.dataclass(frozen=True, kw_only=True)
class EntryPlan:
    """A function of the module that is launched.

    Attributes:
        name: of the function.
        arguments: run-time arguments, in order; `flashgen.codegen.arguments` says what each is.
        constants: compile-time arguments, after them.
        pointer_types: element types behind pointers whose elements are not those of Q, in Triton's words.
        boxes: the tile that each tensor descriptor moves: the constants that say its rows and its columns.
        ragged: the descriptors that end a sequence at its own last row, which takes one more dimension.
        language: what the function is written in.
    """

    name: str
    arguments: tuple[str, ...]
    constants: tuple[str, ...]
    pointer_types: tuple[tuple[str, str], ...]
    boxes: tuple[tuple[str, tuple[str, str]], ...] = ()
    ragged: frozenset[str] = frozenset()
    language: Language = "triton"

    def box(self, descriptor: str, constants: dict[str, int]) -> tuple[int, ...]:
        """Return the tile that a descriptor moves, over [batch, heads, seqlen, head_dim] or its ragged likeness."""
        rows, columns = dict(self.boxes)[descriptor]
        outer = (1, 1, 1) if descriptor in self.ragged else (1, 1)
        return (*outer, constants[rows], constants[columns])
