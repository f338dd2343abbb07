"""A `ModFunction` as Triton: the lines of its device function, and the arguments that its captured tensors take.

The device function has b and h (int32 scalars), q_idx ([BLOCK_M, 1] int32), kv_idx ([1, BLOCK_N] int32), a score mod
also score ([BLOCK_M, BLOCK_N] float32). Captured tensors are dense, row-major, and 0 outside.
"""

from __future__ import annotations

from flashgen.spec.mods import Capture, ModFunction
from flashgen.spec.mods.expressions import (
    UNARY_FUNCTIONS,
    Call,
    Constant,
    Expr,
    Load,
    Name,
    Type,
    children,
    map_children,
    walk,
    write,
)

# ruff's 88 less the indent of a function's body; also what fits is left alone by longer limits.
MAX_LINE = 84

_FLOAT_DTYPES = ("float16", "bfloat16")
_NARROW_DTYPES = ("uint8", "int8", "int16")
_FLOAT_ONLY = {*UNARY_FUNCTIONS} - {"abs"}
_HELPERS = ("floor_div", "floor_mod")


def mod_arguments(mod: ModFunction, prefix: str) -> tuple[str, ...]:
    """Return the kernel arguments of the captured tensors: per tensor `<prefix><name>_ptr`, then its sizes.

    Sizes are `<prefix><name>_size0` and so on, one per dimension.
    """
    names: list[str] = []
    for capture in mod.captures:
        names += [f"{prefix}{capture.name}_ptr", *_sizes(capture, prefix)]
    return tuple(names)


def mod_lines(mod: ModFunction, prefix: str) -> tuple[str, ...]:
    """Return the body of the device function without indent, the last line its return.

    A mask's result is boolean and broadcasts to the tile; a score's is float32 and has the tile's shape. Integer
    divisions that plain Triton would round the wrong way call `floor_div` and `floor_mod`.
    """
    return _Lowering(mod, prefix).lines()


def division_helpers(mod: ModFunction) -> frozenset[str]:
    """Return which of `floor_div` and `floor_mod`, files of `templates/mods`, the lines call."""
    return frozenset(helper for helper in _HELPERS if any(f"{helper}(" in line for line in mod_lines(mod, "")))


def _sizes(capture: Capture, prefix: str) -> tuple[str, ...]:
    return tuple(f"{prefix}{capture.name}_size{dimension}" for dimension in range(len(capture.axes)))


class _Lowering:
    """Writes one mod; `Call.op` holds what Triton calls things, `.to(...)` being a method."""

    def __init__(self, mod: ModFunction, prefix: str) -> None:
        self._role = mod.role
        self._body = mod.body
        self._prefix = prefix
        self._captures = {capture.name: capture for capture in mod.captures}
        self._lines: list[str] = []
        self._taken = {*mod_arguments(mod, prefix), *(name for name, _ in self._body.statements), "tl", *_HELPERS}
        self._taken |= {"score", "b", "h", "q_idx", "kv_idx"}
        self._inside = self._new_name("inside")
        self._offset = self._new_name("offset")
        arguments = {*mod_arguments(mod, prefix)}
        # A user's variable may be called what an argument is called.
        self._renamed = {name: self._new_name(name) for name, _ in self._body.statements if name in arguments}
        self._loaded: dict[str, Name] = {}
        # Of the names assigned so far: which are never negative, and over which of q_idx and kv_idx they run.
        self._non_negative = {"b", "h", "q_idx", "kv_idx"}
        self._axes = {"q_idx": {"q"}, "kv_idx": {"kv"}, "score": {"q", "kv"}}

    def lines(self) -> tuple[str, ...]:
        for name, value in self._body.statements:
            written = self._renamed.get(name, name)
            self._assign(written, self._load(value, written) if isinstance(value, Load) else self._lower(value))
            self._note(name, value)
        result = self._lower(self._body.result)
        if self._role == "score":
            result = self._score(result)
        elif isinstance(result, Constant):
            result = Name(f"tl.full([1, 1], {result.value}, tl.int1)", "bool")
        elif not self._axes_of(self._body.result):
            result = _select("&", result, Call(">=", (Name("kv_idx", "int"), Constant(0)), "bool"))
        self._write("return", result)
        return tuple(self._lines)

    def _score(self, result: Expr) -> Expr:
        axes = self._axes_of(self._body.result)
        if isinstance(result, Constant):
            return Name(f"tl.full(score.shape, {write(result)}, tl.float32)", "float")
        result = _as_float(result)
        return result if len(axes) == 2 else Call("tl.broadcast_to", (result, Name("score.shape", "float")), "float")

    def _note(self, name: str, value: Expr) -> None:
        if self._is_non_negative(value):
            self._non_negative.add(name)
        self._axes[name] = self._axes_of(value)

    def _axes_of(self, expr: Expr) -> set[str]:
        names = (node.name for node in walk(expr) if isinstance(node, Name))
        return set().union(*(self._axes.get(name, set()) for name in names))

    def _has_axes(self, expr: Expr) -> bool:
        return bool(self._axes_of(expr))

    def _is_non_negative(self, expr: Expr) -> bool:
        if isinstance(expr, Constant):
            return expr.value >= 0
        if isinstance(expr, Name):
            return expr.name in self._non_negative
        if isinstance(expr, Load):
            return self._captures[expr.capture].dtype in ("bool", "uint8")
        if expr.type == "bool" or expr.op == "abs":
            return True
        signs = [self._is_non_negative(argument) for argument in expr.args]
        if expr.op in ("maximum", "&"):
            return any(signs)
        if expr.op == "where":
            return all(signs[1:])
        if expr.op == "%":
            return signs[1]
        return expr.op in ("+", "*", "//", "minimum", "|", "^") and len(signs) == 2 and all(signs)

    def _lower(self, expr: Expr) -> Expr:
        if isinstance(expr, Load):
            return self._load(expr, "")
        if isinstance(expr, Name):
            return Name(self._renamed.get(expr.name, expr.name), expr.type)
        if isinstance(expr, Constant):
            return expr
        if expr.op == "where" and expr.type == "bool" and not all(map(self._axes_of, expr.args[1:])):
            condition, a, b = expr.args
            parts = (Call("&", (condition, a), "bool"), Call("&", (Call("~", (condition,), "bool"), b), "bool"))
            return self._lower(Call("|", parts, "bool"))
        args = [self._lower(argument) for argument in expr.args]
        if expr.op in ("&", "|", "^") and expr.type == "bool":
            per_tile, per_element = sorted(zip(map(self._has_axes, expr.args), args, strict=True), key=lambda x: x[0])
            if per_tile[0] != per_element[0]:
                return _select(expr.op, per_tile[1], per_element[1])
        if expr.op in ("&", "|", "^", "~"):
            return Call(expr.op, tuple(args if expr.type == "bool" else map(_as_number, args)), expr.type)
        if expr.op == "where":
            values = args[1:] if expr.type == "bool" else map(_as_number, args[1:])
            return Call("tl.where", (args[0], *values), expr.type)
        if expr.op in ("==", "!=") and all(argument.type == "bool" for argument in args):
            return Call(expr.op, tuple(args), "bool")
        numbers = tuple(map(_as_number, args))
        if expr.op in ("//", "%"):
            return self._divide(expr, numbers)
        if expr.op == "tanh":
            return _tanh(_as_float(numbers[0]))
        if expr.op in _FLOAT_ONLY:
            return Call(f"tl.{expr.op}", (_as_float(numbers[0]),), "float")
        op = f"tl.{expr.op}" if expr.op.isalpha() else expr.op
        return Call(op, numbers, expr.type)

    def _divide(self, expr: Call, args: tuple[Expr, ...]) -> Expr:
        if expr.type == "float":
            # Not `/`: it is off by a unit in the last place, which may take it to the other side of an integer.
            a, b = (self._named(_as_float(argument)) for argument in args)
            quotient = Call("tl.floor", (Call("tl.div_rn", (a, b), "float"),), "float")
            return quotient if expr.op == "//" else Call("-", (a, Call("*", (quotient, b), "float")), "float")
        if all(map(self._is_non_negative, expr.args)):
            return Call(expr.op, args, "int")
        return Call("floor_div" if expr.op == "//" else "floor_mod", args, "int")

    def _load(self, expr: Load, name: str) -> Expr:
        capture = self._captures[expr.capture]
        key = write(expr)
        if key in self._loaded:
            return self._loaded[key]
        indices = [self._lower(index) for index in expr.indices]
        sizes = [Name(size, "int") for size in _sizes(capture, self._prefix)]
        pointer = Name(f"{self._prefix}{capture.name}_ptr", "int")
        arguments: tuple[Expr, ...] = (pointer,)
        if indices:
            checks: dict[bool, list[Expr]] = {False: [], True: []}
            for position, index in enumerate(indices):
                index = indices[position] = self._named(index)
                found = checks[self._has_axes(expr.indices[position])]
                if not self._is_non_negative(expr.indices[position]):
                    found.append(Call(">=", (index, Constant(0)), "bool"))
                if isinstance(index, Constant):
                    found.append(Call(">", (sizes[position], index), "bool"))
                else:
                    found.append(Call("<", (index, sizes[position]), "bool"))
            joined = [_joined("&", found) for found in checks.values() if found]
            self._assign(self._inside, joined[0] if len(joined) == 1 else _select("&", *joined))
            offset = _offset(indices, sizes)
            if len(indices) > 1:
                self._assign(self._offset, offset)
                offset = Name(self._offset, "int")
            zero = "0.0" if expr.type == "float" else "0"
            arguments = (
                Call("+", (pointer, offset), "int"),
                Name(f"mask={self._inside}", "bool"),
                Name(f"other={zero}", "int"),
            )
        loaded: Expr = Call("tl.load", arguments, expr.type)
        if capture.dtype == "bool":
            loaded = Call("!=", (loaded, Constant(0)), "bool")
        elif capture.dtype in _FLOAT_DTYPES:
            loaded = Call(".to(tl.float32)", (loaded,), "float")
        elif capture.dtype in _NARROW_DTYPES:
            loaded = Call(".to(tl.int32)", (loaded,), "int")
        if not name:
            last = indices[-1] if indices else None
            name = self._new_name(f"{capture.name}_{last.name if isinstance(last, Name) else 'value'}")
            self._assign(name, loaded)
            loaded = Name(name, expr.type)
            self._note(name, expr)
        self._loaded[key] = Name(name, expr.type)
        return loaded

    def _named(self, expr: Expr) -> Expr:
        """Return `expr`, under a name if it is more than one: it is about to be used twice."""
        if isinstance(expr, (Constant, Name)):
            return expr
        name = self._new_name("index" if expr.type == "int" else "value")
        self._assign(name, expr)
        return Name(name, expr.type)

    def _new_name(self, hint: str) -> str:
        name, number = hint, 1
        while name in self._taken:
            number += 1
            name = f"{hint}{number}"
        self._taken.add(name)
        return name

    def _assign(self, name: str, value: Expr) -> None:
        self._write(f"{name} =", value)

    def _write(self, start: str, value: Expr) -> None:
        while len(f"{start} {write(value)}") > MAX_LINE:
            value = self._shortened(value)
        self._lines.append(f"{start} {write(value)}")

    def _shortened(self, expr: Expr) -> Expr:
        """Return `expr` with its longest operand moved to a line of its own."""
        parts = children(expr)
        longest = max(range(len(parts)), key=lambda position: len(write(parts[position])))
        part = parts[longest]
        hints: dict[Type, str] = {"bool": "seen" if self._role == "mask" else "chosen", "int": "part", "float": "term"}
        while len(f"{hints[part.type]}99 = {write(part)}") > MAX_LINE:
            part = self._shortened(part)
        name = self._new_name(hints[part.type])
        self._assign(name, part)
        position = iter(range(len(parts)))
        return map_children(expr, lambda child: Name(name, part.type) if next(position) == longest else child)


def _joined(op: str, parts: list[Expr]) -> Expr:
    result = parts[0]
    for part in parts[1:]:
        result = Call(op, (result, part), part.type)
    return result


def _select(op: str, per_tile: Expr, per_element: Expr) -> Expr:
    """Return `per_tile op per_element` on booleans, of which the first is one for the whole tile.

    Triton's interpreter makes an integer of a lone boolean that it broadcasts, of which `~` is never false.
    """
    inverted = Call("~", (per_element,), "bool")
    chosen = {
        "&": (per_element, Constant(False)),
        "|": (Constant(True), per_element),
        "^": (inverted, per_element),
    }
    return Call("tl.where", (per_tile, *chosen[op]), "bool")


def _offset(indices: list[Expr], sizes: list[Name]) -> Expr:
    """Return where an element of a dense tensor lies; in 64 bits if there is more than one dimension."""
    if len(indices) == 1:
        return indices[0]
    result: Expr | None = None
    for size, index in zip(sizes, indices, strict=True):
        if result is not None:
            result = Call("+", (Call("*", (result, size), "int"), index), "int")
        elif not isinstance(index, Constant):
            result = Call(".to(tl.int64)", (index,), "int")
        elif index.value != 0:
            result = Call("tl.cast", (index, Name("tl.int64", "int")), "int")
    return result if result is not None else Constant(0)


def _as_number(expr: Expr) -> Expr:
    return Call(".to(tl.int32)", (expr,), "int") if expr.type == "bool" and not isinstance(expr, Constant) else expr


def _as_float(expr: Expr) -> Expr:
    if expr.type == "float":
        return expr
    if isinstance(expr, Constant):
        return Constant(float(expr.value))
    return Call(".to(tl.float32)", (_as_number(expr),), "float")


def _tanh(x: Expr) -> Expr:
    # Triton has no tanh that needs no device library.
    sigmoid = Call("tl.sigmoid", (Call("*", (Constant(2), x), "float"),), "float")
    return Call("-", (Call("*", (Constant(2), sigmoid), "float"), Constant(1)), "float")
