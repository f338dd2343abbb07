"""From a plain Python function to a `ModFunction`: `read_mod`."""

from __future__ import annotations

import builtins
import math
import numbers
import sys
import types
import typing

from flashgen.errors import InputError
from flashgen.spec.mods import expressions as ex
from flashgen.spec.mods.expressions import Call, Constant, Expr, ExpressionError, Load, Name
from flashgen.spec.mods.function import (
    CAPTURE_TYPES,
    ModFunction,
    Role,
    TensorLike,
    check_result,
    input_names,
    make_mod,
)
from flashgen.spec.mods.refused import Refused
from flashgen.spec.mods.scope import Scope
from flashgen.spec.mods.source import FunctionNode, find_source
from flashgen.spec.mods.translate import (
    KNOWN_FUNCTIONS,
    Inlined,
    Known,
    Namespace,
    Resolve,
    Tensor,
    Translator,
    Value,
)

MAX_CALLS = 30

_FLEX = "torch.nn.attention.flex_attention"
_FLEX_COMBINATIONS = {"and_masks.<locals>.and_mask": "&", "or_masks.<locals>.or_mask": "|", "noop_mask": "&"}


def read_mod(function: object, role: Role) -> ModFunction:
    """Return the mod that a plain Python function says, with the values that its outer variables have now.

    The function is read, never called. Parameters may have any names; further ones need defaults. Its body is
    assignments to single names and one `return`, made of

    - parameters, int, float and bool literals, and captured (closure, global or default) ints, floats and bools;
    - `+ - * / // %`, comparisons, `& | ^ ~`, `and or not`, `a if c else b`;
    - torch's where, minimum, maximum, clamp, abs, floor, exp, exp2, log, log2, tanh, sqrt, rsqrt, sigmoid, logical_and,
      logical_or, logical_not, as functions or methods; math's of the same names; Python's abs, min and max;
    - elements of captured tensors, one integer index per dimension: `table[b, q_idx]`;
    - calls of other such functions, FlexAttention's `and_masks` and `or_masks` among them.

    Args:
        function: `mask_mod(b, h, q_idx, kv_idx)` or `score_mod(score, b, h, q_idx, kv_idx)`.
        role: which of the two.

    Raises:
        InputError: for anything else, with the file, the line and a caret below the part that cannot be read.
    """
    if not isinstance(function, types.FunctionType):
        got = f"{type(function).__name__} {function!r:.80}"
        instead = "Wrap it: `def mod(...): return ...`, with what it needs as outer variables."
        raise InputError(f"a {role}_mod must be a plain Python function, got {got}. {instead}")
    reader = _Reader(role, _name(function))
    try:
        result = reader.call(function, tuple(input_names(role).values()), outermost=True)
    except RecursionError:
        raise InputError(f"{role}_mod {_name(function)} cannot be read: it is nested too deep") from None
    return make_mod(role, reader.scope, typing.cast("Expr", result), reader.captured, reader.tensors)[0]


def _name(function: types.FunctionType) -> str:
    return "lambda" if function.__name__ == "<lambda>" else repr(function.__name__)


class _Reader:
    """What reading one mod shares with reading the functions that it calls."""

    def __init__(self, role: Role, name: str) -> None:
        self.scope = Scope()
        self.captured: dict[str, tuple[str, int]] = {}
        self.tensors: dict[str, TensorLike] = {}
        self._role: Role = role
        self._name = name
        self._active: list[types.FunctionType] = []

    def call(self, function: types.FunctionType, arguments: tuple[Value, ...], *, outermost: bool = False) -> Value:
        """Return what `function` returns; what it assigns goes to the scope.

        Raises:
            InputError: if it cannot be read.
        """
        combination = _FLEX_COMBINATIONS.get(function.__qualname__) if function.__module__ == _FLEX else None
        if combination is not None:
            return self._combine(combination, function, arguments)
        title = f"{self._role}_mod {self._name} cannot be read"
        if not outermost:
            title += f" in {_name(function)}, which it calls"
        if function in self._active or len(self._active) >= MAX_CALLS:
            raise InputError(f"{title}: recursion, or calls more than {MAX_CALLS} deep; write the terms out")
        source = find_source(function, title)
        self._active.append(function)
        try:
            names = self._bind(function, source.node, arguments, outermost)
            translator = Translator(self.scope, names, self._resolver(function))
            returned = translator.run(source.statements)
            if not outermost:
                return translator.value(returned)
            result = translator.expression(returned)
            check_result(self._role, returned, result)
            return result
        except Refused as refused:
            raise InputError(refused.message(title, f"{source.path}:", source.lines)) from None
        finally:
            self._active.pop()

    def _combine(self, op: str, function: types.FunctionType, arguments: tuple[Value, ...]) -> Value:
        # FlexAttention's and_masks and or_masks loop over the masks that they were given.
        result: Expr = Constant(op == "&")
        cells = function.__closure__ or ()
        for mask in cells[0].cell_contents if cells else ():
            if not isinstance(mask, types.FunctionType):
                raise InputError(f"{function.__name__} joins plain Python functions, got {type(mask).__name__}")
            value = self.call(mask, arguments)
            if not isinstance(value, (Constant, Name, Load, Call)) or value.type != "bool":
                raise InputError(f"{function.__name__} joins masks, and {_name(mask)} does not return a boolean")
            result = ex.bitwise(op, result, value)
        return result

    def _bind(
        self, function: types.FunctionType, node: FunctionNode, arguments: tuple[Value, ...], outermost: bool
    ) -> dict[str, Value]:
        if node.args.vararg or node.args.kwarg:
            raise Refused(node.args.vararg or node.args.kwarg or node, "starred parameters", "Name the parameters.")
        positional = [argument.arg for argument in (*node.args.posonlyargs, *node.args.args)]
        defaults = dict(zip(reversed(positional), reversed(function.__defaults__ or ()), strict=False))
        defaults |= function.__kwdefaults__ or {}
        names: dict[str, Value] = {}
        for name, value in zip(positional, arguments, strict=False):
            # What is computed is computed once, however often the function uses it.
            names[name] = self.scope.bind(name, value) if isinstance(value, Call) and not outermost else value
        missing = [n for n in (*positional, *(a.arg for a in node.args.kwonlyargs)) if n not in names]
        without_default = [name for name in missing if name not in defaults]
        if len(arguments) > len(positional) or without_default:
            signature = ", ".join(input_names(self._role)) if outermost else f"{len(arguments)} arguments"
            what = f"{len(positional)} parameters where it is called with {len(arguments)}"
            raise Refused(node, what, f"It is called with {signature}; further parameters need defaults.")
        for name in missing:
            try:
                names[name] = self._wrap(name, defaults[name])
            except ExpressionError as error:
                raise Refused(node, str(error)) from None
        return names

    def _resolver(self, function: types.FunctionType) -> Resolve:
        cells = dict(zip(function.__code__.co_freevars, function.__closure__ or (), strict=True))

        def resolve(name: str) -> Value:
            if name in cells:
                try:
                    return self._wrap(name, cells[name].cell_contents)
                except ValueError:
                    raise ExpressionError(f"{name!r} has no value yet") from None
            for namespace in (function.__globals__, vars(builtins)):
                if name in namespace:
                    return self._wrap(name, namespace[name])
            raise ExpressionError(f"the unknown name {name!r}")

        return resolve

    def _wrap(self, name: str, value: object) -> Value:
        """Return what an object of the outer program is in the language."""
        if isinstance(value, bool):
            return Constant(value)
        if isinstance(value, numbers.Integral):
            return ex.constant(int(value))
        if isinstance(value, numbers.Real):
            return Constant(float(value))
        dtype = str(getattr(value, "dtype", ""))
        if dtype.startswith("torch.") and hasattr(value, "shape"):
            return self._capture(name, dtype.removeprefix("torch."), typing.cast("TensorLike", value))
        if isinstance(value, types.ModuleType):
            return Namespace(lambda attribute: self._attribute(value, attribute))
        known = _known_function(value)
        if known is not None:
            return known
        if isinstance(value, types.FunctionType):
            return Inlined(lambda arguments: self.call(value, arguments))
        instead = f"a mod can use int, float, bool, torch tensors, plain functions and {', '.join(KNOWN_FUNCTIONS)}"
        raise ExpressionError(f"{name!r} is a {type(value).__name__}; {instead}")

    def _attribute(self, module: types.ModuleType, name: str) -> Value:
        if not hasattr(module, name):
            raise ExpressionError(f"{module.__name__} has no {name!r}")
        return self._wrap(f"{module.__name__}.{name}", getattr(module, name))

    def _capture(self, name: str, dtype: str, tensor: TensorLike) -> Tensor:
        if dtype not in CAPTURE_TYPES:
            raise ExpressionError(
                f"the captured tensor {name!r} has dtype {dtype}; allowed: {', '.join(CAPTURE_TYPES)}"
            )
        for temporary, known in self.tensors.items():
            if known is tensor:
                return Tensor(temporary, CAPTURE_TYPES[dtype], tensor.ndim)
        temporary = self.scope.new_name(name.rpartition(".")[2])
        self.captured[temporary] = (dtype, tensor.ndim)
        self.tensors[temporary] = tensor
        return Tensor(temporary, CAPTURE_TYPES[dtype], tensor.ndim)


def _known_function(value: object) -> Known | None:
    name = getattr(value, "__name__", None)
    if name not in KNOWN_FUNCTIONS:
        return None
    # torch is not imported for this: a function of torch's is only met where torch is.
    homes = (builtins, math, sys.modules.get("torch"))
    return Known(name) if any(getattr(home, name, None) is value for home in homes) else None
