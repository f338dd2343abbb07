"""From Python syntax to the expressions of `expressions`: the whitelist of what a mod may say.

Whatever a name stands for comes from a `Resolve` function, so a user's function and the text of a registry file go
through the same checks. Nothing is ever evaluated.
"""

from __future__ import annotations

import ast
import dataclasses
import typing
from collections.abc import Callable, Sequence

from flashgen.spec.mods import expressions as ex
from flashgen.spec.mods.expressions import Call, Constant, Expr, ExpressionError, Load, Name, Type
from flashgen.spec.mods.refused import STATEMENTS, Refused, refusal
from flashgen.spec.mods.scope import Scope

MAX_DEPTH = 100
MAX_NODES = 20_000

# What torch, math and Python's builtins call the functions that a mod may call; tensors have them as methods too.
KNOWN_FUNCTIONS = (
    *ex.FUNCTIONS,
    "clamp",
    "clip",
    "logical_and",
    "logical_or",
    "logical_not",
    "min",
    "max",
    "float",
)
_METHODS = (*ex.UNARY_FUNCTIONS, "minimum", "maximum", "clamp", "clip", "logical_and", "logical_or", "logical_not")


@dataclasses.dataclass(frozen=True)
class Known:
    """One of `KNOWN_FUNCTIONS`."""

    name: str


@dataclasses.dataclass(frozen=True)
class Tensor:
    """A captured tensor with as many of its indices as have been given."""

    capture: str
    type: Type
    ndim: int
    indices: tuple[Expr, ...] = ()

    def element(self) -> Load:
        """Return the element that a full set of indices names."""
        return Load(self.capture, self.indices, self.type)


@dataclasses.dataclass(frozen=True)
class Inlined:
    """Another plain Python function: `call(arguments)` is its result, its statements put before the current one."""

    call: Callable[[tuple[Value, ...]], Value]


@dataclasses.dataclass(frozen=True)
class Namespace:
    """A module; `attribute(name)` raises ExpressionError for what a mod cannot use."""

    attribute: Callable[[str], Value]


Value = typing.Union[Constant, Name, Load, Call, Known, Tensor, Inlined, Namespace]  # noqa: UP007
Resolve = Callable[[str], Value]

_OPERATORS: dict[type[ast.AST], str] = {
    ast.Add: "+",
    ast.Sub: "-",
    ast.Mult: "*",
    ast.Div: "/",
    ast.FloorDiv: "//",
    ast.Mod: "%",
    ast.BitAnd: "&",
    ast.BitOr: "|",
    ast.BitXor: "^",
    ast.Eq: "==",
    ast.NotEq: "!=",
    ast.Lt: "<",
    ast.LtE: "<=",
    ast.Gt: ">",
    ast.GtE: ">=",
}


class Translator:
    """Translates one function's body; what it assigns goes to `scope`, which functions inlined in it share."""

    def __init__(self, scope: Scope, names: dict[str, Value], resolve: Resolve) -> None:
        self._scope = scope
        self._names = names
        self._resolve = resolve
        self._assigned: set[str] = set()
        self._depth = 0

    def run(self, statements: Sequence[ast.stmt]) -> ast.expr:
        """Translate all statements, and return what the last returns, for `value` or `expression`."""
        first = statements[0]
        if isinstance(first, ast.Expr) and isinstance(first.value, ast.Constant) and isinstance(first.value.value, str):
            statements = statements[1:]
        self._assigned = {
            node.id
            for statement in statements
            for node in ast.walk(statement)
            if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store)
        }
        for statement in statements[:-1]:
            self._statement(statement)
        last = statements[-1] if statements else first
        if not isinstance(last, ast.Return) or last.value is None:
            if isinstance(last, (ast.Assign, ast.AugAssign, ast.AnnAssign, ast.Return, ast.Expr, ast.Pass)):
                raise Refused(last, "a mod must end in `return expression`", STATEMENTS)
            raise refusal(last)
        return last.value

    def _statement(self, node: ast.stmt) -> None:
        if isinstance(node, ast.Assign) and len(node.targets) == 1:
            self._assign(node.targets[0], node.value)
        elif isinstance(node, ast.AnnAssign) and node.value is not None:
            self._assign(node.target, node.value)
        elif isinstance(node, ast.AugAssign) and isinstance(node.target, ast.Name):
            current = ast.copy_location(ast.Name(node.target.id, ast.Load()), node.target)
            self._set(node.target.id, self._binary(node, current, node.op, node.value))
        elif isinstance(node, ast.Return):
            raise Refused(node, "`return` before the end of a mod", STATEMENTS)
        elif isinstance(node, (ast.Assign, ast.AnnAssign, ast.AugAssign)):
            raise Refused(node, "an assignment to anything but one name", STATEMENTS)
        elif isinstance(node, ast.Expr):
            raise Refused(node, "an expression whose value is dropped", STATEMENTS)
        else:
            raise refusal(node)

    def _assign(self, target: ast.expr, value: ast.expr) -> None:
        if not isinstance(target, ast.Name):
            raise Refused(target, "an assignment to anything but one name", STATEMENTS)
        self._set(target.id, self.value(value))

    def _set(self, name: str, value: Value) -> None:
        # A number, another name or a row of a tensor needs no statement of its own.
        if isinstance(value, Tensor) and value.ndim == len(value.indices):
            value = value.element()
        self._names[name] = self._scope.bind(name, value) if isinstance(value, (Load, Call)) else value

    def expression(self, node: ast.expr) -> Expr:
        """Return the number or boolean that `node` stands for."""
        value = self.value(node)
        if isinstance(value, Tensor):
            if value.ndim == len(value.indices):
                return value.element()
            what = f"a tensor of {value.ndim} dimensions with {len(value.indices)} indices"
            raise Refused(node, what, "Index it with one integer per dimension, as in table[b, q_idx].")
        if isinstance(value, (Known, Inlined, Namespace)):
            raise Refused(node, "a function or a module used as a value", "Call it.")
        return value

    def value(self, node: ast.expr) -> Value:
        """Return what `node` stands for."""
        translate = _TRANSLATIONS.get(type(node))
        if translate is None:
            raise refusal(node)
        self._scope.nodes += 1
        if self._depth >= MAX_DEPTH or self._scope.nodes > MAX_NODES:
            raise Refused(node, "an expression too deep or a mod too long", "Name parts of it, or capture a table.")
        self._depth += 1
        try:
            return translate(self, node)
        except ExpressionError as error:
            raise Refused(node, str(error)) from None
        finally:
            self._depth -= 1

    def _constant(self, node: ast.Constant) -> Value:
        if isinstance(node.value, (bool, int, float)):
            return ex.constant(node.value)
        raise Refused(node, f"the literal {node.value!r:.40}", "A mod has integers, floats, True and False.")

    def _name(self, node: ast.Name) -> Value:
        if node.id in self._names:
            return self._names[node.id]
        if node.id in self._assigned:
            raise Refused(node, f"{node.id!r} is used before it is assigned")
        return self._resolve(node.id)

    def _attribute(self, node: ast.Attribute) -> Value:
        base = self.value(node.value)
        if isinstance(base, Namespace):
            return base.attribute(node.attr)
        instead = "Read it outside the mod and capture the value: `size = table.shape[0]`."
        raise Refused(node, f"the attribute `.{node.attr}`", instead)

    def _unary(self, node: ast.UnaryOp) -> Value:
        x = self.expression(node.operand)
        if isinstance(node.op, ast.Not):
            return ex.invert(ex.truth(x))
        if isinstance(node.op, ast.Invert):
            return ex.invert(x)
        return ex.negative(x) if isinstance(node.op, ast.USub) else ex.positive(x)

    def _binop(self, node: ast.BinOp) -> Value:
        return self._binary(node, node.left, node.op, node.right)

    def _binary(self, node: ast.AST, left: ast.expr, operator: ast.operator, right: ast.expr) -> Value:
        op = _OPERATORS.get(type(operator))
        if op is None:
            raise refusal(operator, node)
        a, b = self.expression(left), self.expression(right)
        try:
            return ex.bitwise(op, a, b) if op in ("&", "|", "^") else ex.arithmetic(op, a, b)
        except ExpressionError as error:
            raise Refused(node, str(error)) from None

    def _boolop(self, node: ast.BoolOp) -> Value:
        result = ex.truth(self.expression(node.values[0]))
        for value in node.values[1:]:
            joined = "&" if isinstance(node.op, ast.And) else "|"
            result = ex.bitwise(joined, result, ex.truth(self.expression(value)))
        return result

    def _compare(self, node: ast.Compare) -> Value:
        result: Expr | None = None
        left = self.expression(node.left)
        for position, (operator, right_node) in enumerate(zip(node.ops, node.comparators, strict=True)):
            op = _OPERATORS.get(type(operator))
            if op is None:
                raise refusal(operator, node)
            right = self.expression(right_node)
            if position < len(node.ops) - 1 and isinstance(right, (Load, Call)):
                # It stands on both sides of a chain: computed, and written, once.
                right = self._scope.bind("middle", right)
            part = ex.compare(op, left, right)
            result = part if result is None else ex.bitwise("&", result, part)
            left = right
        assert result is not None
        return result

    def _ternary(self, node: ast.IfExp) -> Value:
        return ex.where(self.expression(node.test), self.expression(node.body), self.expression(node.orelse))

    def _subscript(self, node: ast.Subscript) -> Value:
        base = self.value(node.value)
        if not isinstance(base, Tensor):
            raise Refused(node, "indexing something that is not a captured tensor", "Capture it as a torch tensor.")
        indices = node.slice.elts if isinstance(node.slice, ast.Tuple) else [node.slice]
        found = []
        for index in indices:
            expr = self.expression(index)
            if expr.type != "int":
                raise Refused(index, f"an index of type {expr.type}", "Indices are integers.")
            found.append(expr)
        if len(base.indices) + len(found) > base.ndim:
            raise Refused(node, f"too many indices for a tensor of {base.ndim} dimensions")
        return dataclasses.replace(base, indices=(*base.indices, *found))

    def _call(self, node: ast.Call) -> Value:
        function = node.func
        if isinstance(function, ast.Attribute):
            base = self.value(function.value)
            if isinstance(base, Namespace):
                return self._call_value(node, base.attribute(function.attr))
            if isinstance(base, (Constant, Name, Load, Call, Tensor)) and function.attr in _METHODS:
                return self._known(node, function.attr, [function.value, *node.args])
            instead = f"Methods: {', '.join(f'.{name}()' for name in _METHODS)}. Types need no conversion."
            raise Refused(node, f"the method `.{function.attr}()`", instead)
        return self._call_value(node, self.value(function))

    def _call_value(self, node: ast.Call, target: Value) -> Value:
        if isinstance(target, Known):
            return self._known(node, target.name, node.args)
        if isinstance(target, Inlined):
            if node.keywords:
                raise Refused(node, "keyword arguments", "Pass them by position.")
            for argument in node.args:
                if isinstance(argument, ast.Starred):
                    raise refusal(argument)
            return target.call(tuple(self.value(argument) for argument in node.args))
        raise Refused(node, "a call of something that is not a function")

    def _known(self, node: ast.Call, name: str, nodes: Sequence[ast.expr]) -> Value:
        if name in ("clamp", "clip"):
            return self._clamp(node, nodes)
        if node.keywords:
            raise Refused(node, f"keyword arguments of {name}", "Pass them by position.")
        if name == "float":
            return self._float(node)
        counts = {"where": 3, "minimum": 2, "maximum": 2, "logical_and": 2, "logical_or": 2}
        wanted = max(len(nodes), 2) if name in ("min", "max") else counts.get(name, 1)
        if len(nodes) != wanted:
            raise Refused(node, f"{name} with {len(nodes)} arguments; it takes {wanted} here")
        args = [self.expression(argument) for argument in nodes]
        if name == "where":
            return ex.where(*args)
        if name in ("min", "max", "minimum", "maximum"):
            result = args[0]
            for argument in args[1:]:
                result = ex.extremum(f"{name[:3]}imum", result, argument)
            return result
        if name.startswith("logical_"):
            truths = [ex.truth(argument) for argument in args]
            return ex.invert(*truths) if name == "logical_not" else ex.bitwise("&" if "and" in name else "|", *truths)
        return ex.unary_function(name, *args)

    def _clamp(self, node: ast.Call, nodes: Sequence[ast.expr]) -> Value:
        bounds: dict[str | None, ast.expr] = dict(zip(("min", "max"), nodes[1:], strict=False))
        bounds |= {keyword.arg: keyword.value for keyword in node.keywords}
        if not 1 <= len(nodes) <= 3 or not bounds or not bounds.keys() <= {"min", "max"}:
            raise Refused(node, "clamp without its bounds", "Write torch.clamp(x, low, high), or min=low or max=high.")
        result = self.expression(nodes[0])
        for bound, function in (("min", "maximum"), ("max", "minimum")):
            limit = bounds.get(bound)
            if limit is not None and not (isinstance(limit, ast.Constant) and limit.value is None):
                result = ex.extremum(function, result, self.expression(limit))
        return result

    def _float(self, node: ast.Call) -> Value:
        argument = node.args[0] if len(node.args) == 1 else None
        if isinstance(argument, ast.Constant) and argument.value in ("inf", "-inf", "nan"):
            return Constant(float(str(argument.value)))
        raise Refused(node, "float() of anything but 'inf', '-inf' or 'nan'", "Integers become floats where needed.")


# The visitor's table; a node's class is all that decides.
_TRANSLATIONS: dict[type[ast.AST], Callable[[Translator, typing.Any], Value]] = {
    ast.Constant: Translator._constant,
    ast.Name: Translator._name,
    ast.Attribute: Translator._attribute,
    ast.UnaryOp: Translator._unary,
    ast.BinOp: Translator._binop,
    ast.BoolOp: Translator._boolop,
    ast.Compare: Translator._compare,
    ast.IfExp: Translator._ternary,
    ast.Subscript: Translator._subscript,
    ast.Call: Translator._call,
}
