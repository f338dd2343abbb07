"""What a mod may not say: the error, with a caret under the part, and what to write instead."""

from __future__ import annotations

import ast
from collections.abc import Sequence

from flashgen.spec.mods.expressions import FUNCTIONS


class Refused(Exception):
    """A part of a mod is outside the language: which, why, and what to write instead.

    Whoever knows the source makes an InputError of it.
    """

    def __init__(self, node: ast.AST, what: str, instead: str = "") -> None:
        super().__init__(what)
        self.node = node
        self.what = what
        self.instead = instead

    def message(self, title: str, location: str, lines: Sequence[str]) -> str:
        """Return the whole message, with the source line and a caret below; `location` ends in front of its line."""
        row = getattr(self.node, "lineno", 1)
        line = lines[row - 1].rstrip() if row <= len(lines) else ""
        # Offsets count UTF-8 bytes.
        start = len(line.encode()[: getattr(self.node, "col_offset", 0)].decode(errors="ignore"))
        end = len(line.encode()[: getattr(self.node, "end_col_offset", 0)].decode(errors="ignore"))
        if getattr(self.node, "end_lineno", row) != row:
            end = len(line)
        if isinstance(self.node, ast.stmt) and hasattr(self.node, "body"):
            end = start + 1
        # A line may be thousands of characters: what is shown begins at the indent, or shortly before the caret.
        first = max(len(line) - len(line.lstrip()), start - 100)
        shown = line[first : first + 200]
        caret = " " * (start - first) + "^" * min(max(end - start, 1), 200 - (start - first))
        after = f"\n{self.instead}" if self.instead else ""
        return f"{title}, {location}{row}: {self.what}\n    {shown}\n    {caret}{after}"


_WHERE = "Use torch.where(condition, a, b) or `a if condition else b` instead."
STATEMENTS = "A mod is assignments to single names and one `return expression` at its end."
_INSTEAD: dict[type[ast.AST], tuple[str, str]] = {
    ast.If: ("an `if` statement", _WHERE),
    ast.Match: ("a `match` statement", _WHERE),
    ast.For: ("a loop", "A mod is about one query and one key: write its terms out, or index a captured tensor."),
    ast.While: ("a loop", "A mod is about one query and one key: write its terms out, or index a captured tensor."),
    ast.FunctionDef: ("a function defined inside", "Define it outside; a mod may call plain Python functions."),
    ast.Lambda: ("a function defined inside", "Define it outside; a mod may call plain Python functions."),
    ast.Pow: ("the operator `**`", "Write x * x, or torch.exp2(y * torch.log2(x))."),
    ast.LShift: ("the operator `<<`", "Multiply by the power of two."),
    ast.RShift: ("the operator `>>`", "Use // with the power of two."),
    ast.MatMult: ("the operator `@`", "A mod is about one query and one key; it has no matrices."),
    ast.In: ("`in`", "Compare with == and join with |, or index a captured table."),
    ast.NotIn: ("`not in`", "Compare with != and join with &, or index a captured table."),
    ast.Is: ("`is`", "Compare with ==."),
    ast.IsNot: ("`is not`", "Compare with !=."),
    ast.Slice: ("a slice", "Index a captured tensor with one integer per dimension: table[b, q_idx]."),
    ast.Starred: ("a starred argument", "Write the arguments out."),
    ast.NamedExpr: ("the operator `:=`", STATEMENTS),
}


def refusal(node: ast.AST, at: ast.AST | None = None) -> Refused:
    """Return the refusal of a kind of syntax that the language does not have."""
    known = ", ".join(name for name in FUNCTIONS)
    what, instead = _INSTEAD.get(
        type(node),
        (f"{type(node).__name__} is not part of the language of mods", f"{STATEMENTS} Functions: {known}."),
    )
    return Refused(at or node, what, instead)
