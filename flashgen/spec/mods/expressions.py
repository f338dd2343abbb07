"""Typed expressions that mods are made of, and the text that they are written as.

Three types, elementwise: bool, int, float. A bool counts as 0 or 1 in arithmetic; `/` and the functions below give
float; `//` and `%` round towards minus infinity, as in Python. What consists of literals alone is computed here.
"""

from __future__ import annotations

import dataclasses
import math
import typing
from collections.abc import Callable, Iterator

Type = typing.Literal["bool", "int", "float"]
Number = typing.Union[bool, int, float]  # noqa: UP007 - evaluated at run time, and Python 3.10 takes both

MAX_INT = 2**63 - 1


class ExpressionError(Exception):
    """An operation does not exist for its operands; the message says why."""


@dataclasses.dataclass(frozen=True)
class Constant:
    """A literal."""

    value: Number

    @property
    def type(self) -> Type:
        return "bool" if isinstance(self.value, bool) else "int" if isinstance(self.value, int) else "float"


@dataclasses.dataclass(frozen=True)
class Name:
    """An input or a local variable."""

    name: str
    type: Type


@dataclasses.dataclass(frozen=True)
class Load:
    """One element of the captured tensor `capture`; 0 where an index is out of range."""

    capture: str
    indices: tuple[Expr, ...]
    type: Type


@dataclasses.dataclass(frozen=True)
class Call:
    """An operator (`+`, `<`, `~`, ...; one argument: unary) or a function (`where`, ...) and its arguments."""

    op: str
    args: tuple[Expr, ...]
    type: Type


Expr = typing.Union[Constant, Name, Load, Call]  # noqa: UP007


@dataclasses.dataclass(frozen=True)
class Body:
    """Assignments, each name once, and the expression returned."""

    statements: tuple[tuple[str, Expr], ...]
    result: Expr

    def nodes(self) -> Iterator[Expr]:
        """Yield every expression of the body, in reading order."""
        for _, value in self.statements:
            yield from walk(value)
        yield from walk(self.result)


def walk(expr: Expr) -> Iterator[Expr]:
    """Yield `expr` and everything in it, in reading order."""
    yield expr
    for child in children(expr):
        yield from walk(child)


def depth(expr: Expr) -> int:
    """Return how many expressions stand inside one another at most."""
    return 1 + max(map(depth, children(expr)), default=0)


def children(expr: Expr) -> tuple[Expr, ...]:
    """Return the direct operands of `expr`."""
    if isinstance(expr, Load):
        return expr.indices
    return expr.args if isinstance(expr, Call) else ()


def map_children(expr: Expr, change: Callable[[Expr], Expr]) -> Expr:
    """Return `expr` with `change` applied to its direct operands."""
    if isinstance(expr, Load):
        return dataclasses.replace(expr, indices=tuple(map(change, expr.indices)))
    if isinstance(expr, Call):
        return dataclasses.replace(expr, args=tuple(map(change, expr.args)))
    return expr


def constant(value: Number) -> Constant:
    """Return a literal.

    Raises:
        ExpressionError: for an integer that no 64-bit tensor holds.
    """
    if isinstance(value, int) and abs(value) > MAX_INT:
        raise ExpressionError(f"the integer {value if abs(value) < 10**30 else 'literal'} does not fit 64 bits")
    return Constant(value)


def as_int(x: Expr) -> Expr:
    """Return `x` with a literal bool turned into 0 or 1, as arithmetic counts it."""
    return Constant(int(x.value)) if isinstance(x, Constant) and isinstance(x.value, bool) else x


_ARITHMETIC: dict[str, Callable[[typing.Any, typing.Any], Number]] = {
    "+": lambda a, b: a + b,
    "-": lambda a, b: a - b,
    "*": lambda a, b: a * b,
    "/": lambda a, b: a / b,
    "//": lambda a, b: a // b,
    "%": lambda a, b: a % b,
}


def arithmetic(op: str, a: Expr, b: Expr) -> Expr:
    """Return `a op b` for one of + - * / // %.

    Raises:
        ExpressionError: for a division by a literal zero.
    """
    a, b = as_int(a), as_int(b)
    if op in ("/", "//", "%") and isinstance(b, Constant) and b.value == 0:
        raise ExpressionError("division by zero")
    if isinstance(a, Constant) and isinstance(b, Constant):
        return constant(_ARITHMETIC[op](a.value, b.value))
    return Call(op, (a, b), "float" if op == "/" or "float" in (a.type, b.type) else "int")


_COMPARISONS: dict[str, Callable[[typing.Any, typing.Any], bool]] = {
    "==": lambda a, b: bool(a == b),
    "!=": lambda a, b: bool(a != b),
    "<": lambda a, b: bool(a < b),
    "<=": lambda a, b: bool(a <= b),
    ">": lambda a, b: bool(a > b),
    ">=": lambda a, b: bool(a >= b),
}


def compare(op: str, a: Expr, b: Expr) -> Expr:
    """Return `a op b` for one of the six comparisons."""
    if isinstance(a, Constant) and isinstance(b, Constant):
        return Constant(_COMPARISONS[op](a.value, b.value))
    if a == b and a.type == b.type != "float":
        return Constant(op in ("==", "<=", ">="))
    for x, y in ((a, b), (b, a)):
        if op in ("==", "!=") and x.type == "bool" and isinstance(y, Constant) and y.type == "bool":
            return x if y.value is (op == "==") else invert(x)
    return Call(op, (as_int(a), as_int(b)), "bool")


def bitwise(op: str, a: Expr, b: Expr) -> Expr:
    """Return `a op b` for one of & | ^: logical on two bools, bit by bit on integers.

    Raises:
        ExpressionError: for a float.
    """
    if "float" in (a.type, b.type):
        raise ExpressionError(f"`{op}` needs booleans or integers, got {a.type} and {b.type}")
    if a.type == b.type == "bool":
        for x, y in ((a, b), (b, a)):
            if isinstance(x, Constant):
                if op == "^":
                    return invert(y) if x.value else y
                return y if x.value is (op == "&") else x
        return Call(op, (a, b), "bool")
    a, b = as_int(a), as_int(b)
    if isinstance(a, Constant) and isinstance(b, Constant):
        left, right = int(a.value), int(b.value)
        return Constant({"&": left & right, "|": left | right, "^": left ^ right}[op])
    return Call(op, (a, b), "int")


def invert(x: Expr) -> Expr:
    """Return `~x`: not, of a bool; every bit, of an integer.

    Raises:
        ExpressionError: for a float.
    """
    if x.type == "float":
        raise ExpressionError("`~` needs a boolean or an integer, got float")
    if isinstance(x, Constant):
        return Constant(not x.value) if x.type == "bool" else constant(~int(x.value))
    if isinstance(x, Call) and x.op == "~":
        return x.args[0]
    return Call("~", (x,), x.type)


def negative(x: Expr) -> Expr:
    """Return `-x`."""
    x = as_int(x)
    if isinstance(x, Constant):
        return constant(-x.value)
    if isinstance(x, Call) and x.op == "-" and len(x.args) == 1 and x.args[0].type != "bool":
        return x.args[0]
    return Call("-", (x,), "float" if x.type == "float" else "int")


def positive(x: Expr) -> Expr:
    """Return `+x`: `x` itself, a bool as a number."""
    return arithmetic("+", x, Constant(0)) if x.type == "bool" else x


def truth(x: Expr) -> Expr:
    """Return whether `x` is true, as `and`, `or`, `not` and conditions see it."""
    return x if x.type == "bool" else compare("!=", x, Constant(0))


def where(condition: Expr, a: Expr, b: Expr) -> Expr:
    """Return `a` where `condition` holds, else `b`."""
    condition = truth(condition)
    if isinstance(condition, Constant):
        return a if condition.value else b
    if a.type == b.type == "bool":
        # Triton selects between literals of a type, and has none for bool.
        if isinstance(a, Constant):
            return bitwise("|", condition, b) if a.value else bitwise("&", invert(condition), b)
        if isinstance(b, Constant):
            return bitwise("|", invert(condition), a) if b.value else bitwise("&", condition, a)
        return Call("where", (condition, a, b), "bool")
    kind: Type = "float" if "float" in (a.type, b.type) else "int"
    return Call("where", (condition, as_int(a), as_int(b)), kind)


def extremum(name: str, a: Expr, b: Expr) -> Expr:
    """Return the `minimum` or the `maximum` of `a` and `b`."""
    a, b = as_int(a), as_int(b)
    if isinstance(a, Constant) and isinstance(b, Constant):
        return Constant(min(a.value, b.value) if name == "minimum" else max(a.value, b.value))
    return Call(name, (a, b), "float" if "float" in (a.type, b.type) else "int")


_FLOAT_FUNCTIONS: dict[str, Callable[[float], float]] = {
    "exp": math.exp,
    "exp2": lambda x: 2.0**x,
    "log": math.log,
    "log2": math.log2,
    "tanh": math.tanh,
    "sqrt": math.sqrt,
    "rsqrt": lambda x: 1 / math.sqrt(x),
    "sigmoid": lambda x: 1 / (1 + math.exp(-x)),
}
UNARY_FUNCTIONS = ("abs", "floor", *_FLOAT_FUNCTIONS)
FUNCTIONS = ("where", "minimum", "maximum", *UNARY_FUNCTIONS)


def unary_function(name: str, x: Expr) -> Expr:
    """Return `name(x)` for one of `UNARY_FUNCTIONS`; abs keeps an integer one, floor leaves it as it is.

    Raises:
        ExpressionError: for a literal outside the function's domain.
    """
    x = as_int(x)
    if name == "floor" and x.type != "float":
        return positive(x)
    if isinstance(x, Constant):
        try:
            if name == "abs":
                return constant(abs(x.value))
            if name == "floor":
                return Constant(float(math.floor(x.value)) if math.isfinite(x.value) else x.value)
            return Constant(_FLOAT_FUNCTIONS[name](float(x.value)))
        except (ArithmeticError, ValueError) as error:
            raise ExpressionError(f"{name}({write(x)}) does not exist: {error}") from None
    return Call(name, (x,), "int" if name == "abs" and x.type != "float" else "float")


# How tightly an operator binds in Python, and so in Triton.
_PRECEDENCE = dict.fromkeys(_COMPARISONS, 1) | {"|": 2, "^": 3, "&": 4, "+": 5, "-": 5}
_PRECEDENCE |= dict.fromkeys(("*", "/", "//", "%"), 6)
_UNARY, _ATOM = 7, 8


def write(expr: Expr) -> str:
    """Return `expr` as Python, with no more parentheses than it needs; `.name(...)` calls are methods."""
    return _write(expr)[0]


def _write(expr: Expr) -> tuple[str, int]:
    if isinstance(expr, Constant):
        text = _literal(expr.value)
        return text, _UNARY if text.startswith("-") else _ATOM
    if isinstance(expr, Name):
        return expr.name, _ATOM
    if isinstance(expr, Load):
        indices = ", ".join(map(write, expr.indices))
        return f"{expr.capture}[{indices}]" if indices else expr.capture, _ATOM
    own = _PRECEDENCE.get(expr.op, _ATOM)
    if len(expr.args) == 2 and own < _ATOM:
        # Operators group from the left; comparisons would chain, so both sides need more.
        left = _inside(expr.args[0], own + (own == 1))
        return f"{left} {expr.op} {_inside(expr.args[1], own + 1)}", own
    if expr.op in ("-", "~"):
        return expr.op + _inside(expr.args[0], _UNARY), _UNARY
    if expr.op.startswith("."):
        return _inside(expr.args[0], _ATOM) + expr.op, _ATOM
    return f"{expr.op}({', '.join(map(write, expr.args))})", _ATOM


def _inside(expr: Expr, least: int) -> str:
    text, own = _write(expr)
    return text if own >= least else f"({text})"


def _literal(value: Number) -> str:
    if isinstance(value, float) and not math.isfinite(value):
        return f'float("{value}")'
    return repr(value)
