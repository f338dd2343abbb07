"""What a mod being translated has assigned and captured so far, and the names it ends up with."""

from __future__ import annotations

import keyword
import re

from flashgen.spec.mods.expressions import FUNCTIONS, Body, Expr, Load, Name, map_children, walk

INPUTS = ("b", "h", "q_idx", "kv_idx")
MAX_NAME = 24

# Names that mean something in the language, in the rendered module, or to a linter (l, O and I look like digits).
_RESERVED = {*INPUTS, *FUNCTIONS, *keyword.kwlist, "score", "float", "tl", "triton", "floor_div", "floor_mod"} | {
    *"lOI"
}


class Scope:
    """Collects statements under temporary names, so that inlined functions cannot clash; `finish` gives final ones."""

    def __init__(self) -> None:
        self.nodes = 0
        self._statements: list[tuple[str, Expr]] = []
        self._hints: dict[str, str] = {}

    def bind(self, hint: str, value: Expr) -> Name:
        """Return a new local variable that holds `value`, named after `hint`."""
        name = self.new_name(hint)
        self._statements.append((name, value))
        return Name(name, value.type)

    def new_name(self, hint: str) -> str:
        """Return a temporary name that becomes `hint`, or something like it, at the end."""
        name = f"{hint}#{len(self._hints)}"
        self._hints[name] = hint
        return name

    def finish(self, result: Expr) -> tuple[Body, dict[str, str]]:
        """Return the body without dead assignments, and the final name of each capture, in order of first use."""
        live = _names(result)
        kept: list[tuple[str, Expr]] = []
        for name, value in reversed(self._statements):
            if name in live:
                kept.insert(0, (name, value))
                live |= _names(value)
        if kept and isinstance(result, Name) and result.name == kept[-1][0]:
            result = kept.pop()[1]
        body = Body(tuple(kept), result)
        captures = list(dict.fromkeys(node.capture for node in body.nodes() if isinstance(node, Load)))
        final: dict[str, str] = {}
        taken = set(_RESERVED)
        for name in (*captures, *(name for name, _ in kept)):
            final[name] = _free_name(self._hints[name], taken)
            taken.add(final[name])

        def rename(expr: Expr) -> Expr:
            expr = map_children(expr, rename)
            if isinstance(expr, Load):
                return Load(final[expr.capture], expr.indices, expr.type)
            return Name(final.get(expr.name, expr.name), expr.type) if isinstance(expr, Name) else expr

        renamed = Body(tuple((final[name], rename(value)) for name, value in kept), rename(result))
        return renamed, {name: final[name] for name in captures}


def _names(expr: Expr) -> set[str]:
    return {node.name for node in walk(expr) if isinstance(node, Name)}


def _free_name(hint: str, taken: set[str]) -> str:
    base = hint.lstrip("_")[:MAX_NAME]
    if not re.fullmatch(r"[A-Za-z_][A-Za-z0-9_]*", base):
        base = "x"
    name, number = base, 0
    while name in taken:
        number += 1
        name = f"{base[: MAX_NAME - 4]}_{number}"
    return name
