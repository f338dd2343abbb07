"""A mask as device functions: its leaves, each with its numbers and tensors, and how they are joined."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Iterator

from flashgen.codegen.mods import division_helpers, mod_arguments, mod_lines
from flashgen.spec.masks import (
    Causal,
    Complement,
    Document,
    Full,
    FunctionMask,
    Intersection,
    Mask,
    SlidingWindow,
    Union,
)


@dataclasses.dataclass(frozen=True, kw_only=True)
class LeafPlan:
    """One leaf of a mask: a device function that says which keys are seen, and one that bounds them for a tile.

    Attributes:
        mask: the leaf, with neutral numbers.
        function: name of its device function.
        bounds: name of the one that bounds the keys of a tile of queries.
        rows: name of the one that bounds the queries of a tile of keys.
        name: what its result is called.
        numbers: its run-time numbers, by the names they have in the kernel.
        arguments: everything its function takes beyond positions and lengths.
        lines: body of a function that a user wrote; empty for the others.
    """

    mask: Mask
    function: str
    bounds: str
    rows: str
    name: str
    numbers: tuple[str, ...]
    arguments: tuple[str, ...]
    lines: tuple[str, ...]

    @property
    def meaning(self) -> str:
        """What a function mask is, for its docstring."""
        return "both of one document" if isinstance(self.mask, Document) else "the caller's own rule"

    def results(self, single_loop: bool) -> str:
        """What the function that bounds the keys of a tile returns; `_` before what one loop has no use for."""
        unused = "_" * single_loop
        edges = ("first", f"{unused}all_first") if self.left_edge else ()
        return ", ".join((*edges, f"{unused}all_last", "last"))

    @property
    def left_edge(self) -> bool:
        """Whether the first key that a tile sees may be another than key 0."""
        if isinstance(self.mask, SlidingWindow):
            return self.mask.left >= 0
        return self.mask.kind in ("chunked", "dilated_window")


@dataclasses.dataclass(frozen=True, kw_only=True)
class MaskPlan:
    """A mask as device functions.

    Attributes:
        title: the mask in words, without its numbers.
        leaves: its leaves in order; one leaf is `mask_mod` itself.
        statements: lines that join the results of several leaves, the last one without `return`.
        table: the tiles that a tile of queries sees come from a table, not from a formula.
        table_axes: which of `b` and `h` the table depends on.
        division_helpers: what its functions call for Python's meaning of // and %.
    """

    title: str
    leaves: tuple[LeafPlan, ...]
    statements: tuple[str, ...]
    table: bool
    table_axes: frozenset[str]
    division_helpers: frozenset[str]

    @property
    def arguments(self) -> tuple[str, ...]:
        """What `mask_mod` takes beyond positions and lengths."""
        return tuple(name for leaf in self.leaves for name in leaf.arguments)

    @property
    def bounds_arguments(self) -> tuple[str, ...]:
        """What `kv_bounds` takes beyond lengths and block sizes."""
        return tuple(name for leaf in self.leaves for name in leaf.numbers)

    @property
    def left_edge(self) -> bool:
        """Whether the first key that a tile sees may be another than key 0."""
        return any(leaf.left_edge for leaf in self.leaves)

    @property
    def two_edges(self) -> bool:
        """Whether a formula gives the keys of a tile a first and a last one: three loops, or a single one."""
        return self.left_edge and not self.table

    @property
    def guards_keys(self) -> bool:
        """Whether `mask_mod` by itself is False past the last key, for every query row that exists."""
        return not self.statements and self.leaves[0].mask in (Causal(), Full())

    @property
    def window(self) -> tuple[str, ...]:
        """The numbers of a mask that is one window with a left edge: how far it goes to the left, and to the right."""
        leaf, *others = self.leaves
        alone = not others and not self.statements and isinstance(leaf.mask, SlidingWindow) and leaf.left_edge
        return leaf.numbers if alone else ()

    @property
    def result(self) -> str:
        """The name of what the statements compute."""
        return self.statements[-1].split(" = ")[0]


@functools.lru_cache(maxsize=256)
def plan_mask(mask: Mask) -> MaskPlan:
    """Return the device functions of a mask with neutral numbers (see `Mask.structure`)."""
    leaves = tuple(_leaves(mask))
    statements: list[str] = []
    names = iter(leaves)
    if len(leaves) > 1 or isinstance(mask, Complement):
        _join(mask, names, statements)
    functions = [leaf.mask.function for leaf in leaves if isinstance(leaf.mask, FunctionMask)]
    return MaskPlan(
        title=_title(mask, iter(leaves)),
        leaves=leaves,
        statements=tuple(statements),
        table=not mask.by_formula,
        table_axes=mask.uses,
        division_helpers=frozenset().union(*map(division_helpers, functions)),
    )


def mask_numbers(mask: Mask) -> dict[str, int]:
    """Return the value of every run-time number of a mask, by its name in the kernel."""
    return {
        name: value
        for leaf, planned in zip(mask.leaves, _leaves(mask.structure()), strict=True)
        for name, (_, value) in zip(planned.numbers, leaf.parameters, strict=True)
    }


def capture_names(mask: Mask) -> tuple[str, ...]:
    """Return the name in the kernel of each tensor that a mask captures, without `_ptr`, in the order of the mask's."""
    names: list[str] = []
    for index, leaf in enumerate(mask.leaves):
        names += [f"{_prefix(index)}{capture.name}" for capture in leaf.captures]
    return tuple(names)


def _leaves(mask: Mask) -> Iterator[LeafPlan]:
    leaves = mask.leaves
    alone = len(leaves) == 1 and not isinstance(mask, Complement)
    kinds = [leaf.kind for leaf in leaves]
    for index, leaf in enumerate(leaves):
        suffix = f"_{kinds[:index].count(leaf.kind)}" if kinds.count(leaf.kind) > 1 else ""
        numbers = tuple(f"{name}{suffix}" for name, _ in leaf.parameters)
        captured = mod_arguments(leaf.function, _prefix(index)) if isinstance(leaf, FunctionMask) else ()
        yield LeafPlan(
            mask=leaf.structure(),
            function="mask_mod" if alone else f"mask_{leaf.kind}{suffix}",
            bounds=f"bounds_{leaf.kind}{suffix}",
            rows=f"rows_{leaf.kind}{suffix}",
            name=f"{leaf.kind}{suffix}",
            numbers=numbers,
            arguments=(*numbers, *captured),
            lines=mod_lines(leaf.function, _prefix(index)) if isinstance(leaf, FunctionMask) else (),
        )


def _prefix(index: int) -> str:
    return f"mask{index}_"


def _join(mask: Mask, leaves: Iterator[LeafPlan], statements: list[str]) -> str:
    """Append statements that compute `mask` from the results of its leaves; return the name of the result."""
    if isinstance(mask, Complement):
        name = f"not_{_join(mask.operand, leaves, statements)}"
        statements.append(f"{name} = ~{name.removeprefix('not_')}")
        return name
    if isinstance(mask, Intersection | Union):
        names = [_join(operand, leaves, statements) for operand in mask.operands]
        name = f"seen_{len(statements)}"
        # One operator a line: short whatever the number of operands.
        statements.append(f"{name} = {names[0]} {mask.operator} {names[1]}")
        statements.extend(f"{name} = {name} {mask.operator} {other}" for other in names[2:])
        return name
    return next(leaves).name


def _title(mask: Mask, leaves: Iterator[LeafPlan]) -> str:
    if isinstance(mask, Complement):
        return f"~({_title(mask.operand, leaves)})"
    if isinstance(mask, Intersection | Union):
        return f" {mask.operator} ".join(f"({_title(operand, leaves)})" for operand in mask.operands)
    leaf = next(leaves)
    if isinstance(mask, FunctionMask):
        return "document" if isinstance(mask, Document) else "mask_mod"
    return f"{mask.kind}({', '.join(leaf.numbers)})" if leaf.numbers else str(mask)
