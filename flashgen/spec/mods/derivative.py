"""The derivative of a score mod with respect to its score, as another score mod: what the backward kernels call.

Forward mode: every value that depends on the score has its slope, the derivative with respect to the score, beside it.
All are assigned to names of their own; in the end what the result does not need is dropped, and what is used once is
written in place.

Forward mode and reverse mode differ where a selection meets an infinite slope. For `where(score > 0, sqrt(score), 0)`
autograd's 0 * inf is NaN below 0, a slope chosen by `where` is 0; for `sqrt(maximum(score, 0))` it is the other way
round. Slopes that a selection makes 0 stay 0 here whatever they are multiplied with, so both give 0.
"""

from __future__ import annotations

import collections
import dataclasses
import functools
import math
from collections.abc import Callable, Iterable

from flashgen.errors import InputError
from flashgen.spec.mods.expressions import Body, Call, Constant, Expr, Name, depth, map_children, walk, write
from flashgen.spec.mods.function import ModFunction

_ZERO, _ONE = Constant(0.0), Constant(1.0)

# What is used once is still given a name if it is deeper than this, for everything that recurses over expressions.
_MAX_DEPTH = 20


def derivative(mod: ModFunction) -> ModFunction:
    """Return the score mod whose value is `mod`'s derivative with respect to `score`, at the same arguments.

    Its captures and tensors are those of `mod`, in the same order, even those that it does not use; so it is not to be
    written as text and read again. Its value broadcasts to the score's shape.

    Where there is no derivative it has the values of PyTorch's autograd: at a tie, `minimum` and `maximum` (so also
    `clamp`) take half of either side's; abs has 0 at 0; floor, `//` and every boolean and integer have 0. Conditions
    and indices have none.

    Raises:
        InputError: for a mask mod.
    """
    if mod.role != "score":
        raise InputError(f"only a score mod has a derivative with respect to its score, got {str(mod)[:120]}")
    return dataclasses.replace(_differentiated(mod.without_tensors()), tensors=mod.tensors)


@dataclasses.dataclass(frozen=True, kw_only=True)
class _Derivative(ModFunction):
    """A score mod that is not read from its source, so that it may have captures that it does not use."""

    expressions: Body = dataclasses.field(compare=False, repr=False)

    @property
    def body(self) -> Body:
        return self.expressions


@functools.lru_cache(maxsize=1024)
def _differentiated(mod: ModFunction) -> _Derivative:
    body = _Differentiation().body(mod.body, {capture.name for capture in mod.captures})
    statements = [f"{name} = {write(value)}" for name, value in body.statements]
    source = "; ".join([*statements, f"return {write(body.result)}"])
    return _Derivative(role="score", source=source, captures=mod.captures, expressions=body)


class _Differentiation:
    """Assigns values and slopes to names; a slope is a float, and like a value a name, a literal or an element."""

    def __init__(self) -> None:
        self._assigned: dict[str, Expr] = {}
        self._named: dict[str, Name] = {}
        # Slopes of the mod's own names; what slopes consist of; those that are 0 where a selection says so.
        self._slopes: dict[str, Expr] = {"score": _ONE}
        self._shapes: dict[str, Call] = {}
        self._vanishing: set[str] = set()
        self._hint = ""

    def body(self, body: Body, taken: Iterable[str]) -> Body:
        """Return the derivative of `body`; no name that it makes is in `taken`."""
        for name, value in body.statements:
            self._hint = f"d_{name}"
            _, self._slopes[name] = self._dual(value, name)
        self._hint = "d_score"
        _, result = self._dual(body.result)
        return _tidied(self._assigned, result, {*taken, *(name for name, _ in body.statements)})

    def _dual(self, expr: Expr, target: str = "") -> tuple[Expr, Expr]:
        """Return the value, under the name `target` if there is one, and the slope of an expression of the mod."""
        if isinstance(expr, Name):
            return expr, self._slopes.get(expr.name, _ZERO)
        if not isinstance(expr, Call) or expr.type != "float":
            return self._value(expr, target), _ZERO
        pairs = [self._dual(argument) for argument in expr.args]
        values, slopes = tuple(value for value, _ in pairs), tuple(slope for _, slope in pairs)
        if all(slope == _ZERO for slope in slopes):
            return self._value(expr, target), _ZERO
        value = self._value(Call(expr.op, values, "float"), target)
        if expr.op == "where":
            return value, self._select(values[0], slopes[1], slopes[2])
        if len(values) == 1:
            return value, self._slope_of_function(expr.op, value, values[0], slopes[0])
        return value, self._slope_of_operator(expr.op, value, values, slopes)

    def _slope_of_operator(self, op: str, y: Expr, x: tuple[Expr, ...], slopes: tuple[Expr, ...]) -> Expr:
        (a, b), (da, db) = x, slopes
        match op:
            case "+":
                return self._sum(da, db)
            case "-":
                return self._sum(da, self._scaled(-1.0, db))
            case "*":
                return self._sum(self._times(b, da), self._times(a, db))
            case "/":
                return self._over(self._sum(da, self._scaled(-1.0, self._times(y, db))), b)
            case "//":
                return _ZERO
            case "%":
                quotient = self._value(_float("//", a, b))
                return self._sum(da, self._scaled(-1.0, self._times(quotient, db)))
            case "minimum" | "maximum":
                wins, loses = "<>" if op == "minimum" else "><"
                tied, half = self._value(_bool("==", a, b)), self._scaled(0.5, self._sum(da, db))
                if db == _ZERO:
                    return self._select(self._value(_bool(loses, a, b)), _ZERO, self._select(tied, half, da))
                return self._select(self._value(_bool(wins, a, b)), da, self._select(tied, half, db))
        raise NotImplementedError(f"the derivative of {op}")

    def _slope_of_function(self, name: str, y: Expr, x: Expr, slope: Expr) -> Expr:
        match name:
            case "-":
                return self._scaled(-1.0, slope)
            case "floor":
                return _ZERO
            case "abs":
                above, zero = self._value(_bool(">", x, Constant(0))), self._value(_bool("==", x, Constant(0)))
                return self._select(zero, _ZERO, self._select(above, slope, self._scaled(-1.0, slope)))
            case "exp":
                return self._times(y, slope)
            case "exp2":
                return self._scaled(math.log(2), self._times(y, slope))
            case "log":
                return self._over(slope, x)
            case "log2":
                return self._over(self._scaled(1 / math.log(2), slope), x)
            case "tanh":
                return self._times(self._value(_float("-", _ONE, _float("*", y, y))), slope)
            case "sigmoid":
                return self._times(self._value(_float("*", y, _float("-", _ONE, y))), slope)
            case "sqrt":
                return self._over(self._scaled(0.5, slope), y)
            case "rsqrt":
                return self._scaled(-0.5, self._times(self._value(_float("*", _float("*", y, y), y)), slope))
        raise NotImplementedError(f"the derivative of {name}")

    def _value(self, expr: Expr, target: str = "") -> Expr:
        """Return `expr` itself if it is a literal or an element, else a name for it."""
        if not target and not isinstance(expr, Call):
            return expr
        text = write(expr)
        if not target and text in self._named:
            return self._named[text]
        hint = "chosen" if expr.type == "bool" else "value"
        name = Name(target or f"{hint}#{len(self._assigned)}", expr.type)
        self._assigned[name.name] = expr
        self._named.setdefault(text, name)
        return name

    def _slope(self, op: str, *args: Expr) -> Name:
        """Return a name for a slope, which keeps what it consists of for the rules below."""
        expr = _float(op, *args)
        text = write(expr)
        if text not in self._named:
            self._named[text] = Name(f"{self._hint}#{len(self._assigned)}", "float")
            self._assigned[self._named[text].name] = expr
        name = self._named[text]
        self._shapes[name.name] = expr
        if op == "where":
            vanishes = any(map(self._vanishes, args[1:]))
        else:
            # A sum is 0 where both sides are; the slope in a product stands last, and in a quotient never vanishes.
            vanishes = op in ("+", "-", "*") and all(map(self._vanishes, args[1:] if op == "*" else args))
        if vanishes:
            self._vanishing.add(name.name)
        return name

    def _vanishes(self, slope: Expr) -> bool:
        return slope == _ZERO or (isinstance(slope, Name) and slope.name in self._vanishing)

    def _sum(self, a: Expr, b: Expr) -> Expr:
        if _ZERO in (a, b):
            return a if b == _ZERO else b
        if isinstance(a, Constant) and isinstance(b, Constant):
            return Constant(float(a.value + b.value))
        if a == b:
            return self._scaled(2.0, a)
        factor, rest = self._factor(b)
        return self._slope("-", a, rest) if factor == -1 else self._slope("+", a, b)

    def _factor(self, slope: Expr) -> tuple[float, Expr]:
        """Return a slope as a literal times something else."""
        shape = self._shapes.get(slope.name) if isinstance(slope, Name) else None
        if shape is not None and shape.op == "*" and isinstance(shape.args[0], Constant):
            return float(shape.args[0].value), shape.args[1]
        if shape is not None and shape.op == "-" and len(shape.args) == 1:
            return -1.0, shape.args[0]
        return 1.0, slope

    def _scaled(self, factor: float, x: Expr) -> Expr:
        """Return a literal times a slope, or times a value of any type."""
        if factor == 0:
            return _ZERO
        if isinstance(x, Constant):
            return Constant(factor * float(x.value))
        shape = self._shapes.get(x.name) if isinstance(x, Name) else None
        if shape is not None and shape.op == "where":
            branches = shape.args[1:]
            if _ZERO in branches or all(isinstance(branch, Constant) for branch in branches):
                return self._select(shape.args[0], *(self._scaled(factor, branch) for branch in branches))
        inner, rest = self._factor(x)
        factor *= inner
        if abs(factor) == 1 and rest.type == "float":
            return rest if factor == 1 else self._slope("-", rest)
        return self._slope("*", Constant(factor), rest)

    def _select(self, condition: Expr, a: Expr, b: Expr) -> Expr:
        return a if a == b else self._slope("where", condition, a, b)

    def _times(self, value: Expr, slope: Expr) -> Expr:
        if isinstance(value, Constant):
            return self._scaled(float(value.value), slope)

        def product(slope: Expr) -> Expr:
            if isinstance(slope, Constant):
                return self._scaled(float(slope.value), value)
            factor, rest = self._factor(slope)
            if "float" not in (value.type, rest.type):
                # Two integers: their product may not fit 32 bits.
                factor, rest = 1.0, slope
            return self._scaled(factor, self._slope("*", value, rest))

        return self._linear(slope, product)

    def _over(self, slope: Expr, value: Expr) -> Expr:
        if isinstance(value, Constant):
            return self._scaled(1 / float(value.value), slope)
        return self._linear(slope, lambda slope: self._slope("/", slope, value))

    def _linear(self, slope: Expr, apply: Callable[[Expr], Expr]) -> Expr:
        """Return `apply(slope)`, but 0 where a selection makes the slope 0: what it is applied to may be infinite."""
        if not self._vanishes(slope):
            return apply(slope)
        if not isinstance(slope, Name):
            return _ZERO
        shape = self._shapes[slope.name]
        if shape.op == "where" and not any(self._vanishes(x) and x != _ZERO for x in shape.args[1:]):
            return self._select(shape.args[0], *(self._linear(branch, apply) for branch in shape.args[1:]))
        chosen = self._value(_bool("!=", slope, Constant(0)))
        return self._select(chosen, apply(slope), _ZERO)


def _float(op: str, *args: Expr) -> Call:
    return Call(op, args, "float")


def _bool(op: str, *args: Expr) -> Call:
    return Call(op, args, "bool")


def _names(expr: Expr) -> list[str]:
    return [node.name for node in walk(expr) if isinstance(node, Name)]


def _tidied(assigned: dict[str, Expr], result: Expr, taken: set[str]) -> Body:
    """Return the assignments that `result` needs; those under temporary names (`hint#1`) get a name or are inlined."""
    uses = collections.Counter(_names(result))
    live: list[str] = []
    for name in reversed(assigned):
        if uses[name]:
            live.append(name)
            uses.update(_names(assigned[name]))
    meaning: dict[str, Expr] = {}

    def replaced(expr: Expr) -> Expr:
        return meaning.get(expr.name, expr) if isinstance(expr, Name) else map_children(expr, replaced)

    statements: list[tuple[str, Expr]] = []
    for name in reversed(live):
        value = replaced(assigned[name])
        if "#" not in name:
            statements.append((name, value))
        elif uses[name] == 1 and depth(value) <= _MAX_DEPTH:
            meaning[name] = value
        else:
            final = _free_name(name.partition("#")[0], taken)
            taken.add(final)
            meaning[name] = Name(final, value.type)
            statements.append((final, value))
    return Body(tuple(statements), replaced(result))


def _free_name(hint: str, taken: set[str]) -> str:
    name, number = hint, 0
    while name in taken:
        number += 1
        name = f"{hint}_{number}"
    return name
