"""The value of a mod in plain tensor operations; the torch module is passed in, as `spec` imports none."""

from __future__ import annotations

import typing
from collections.abc import Callable, Mapping

from flashgen.spec.mods.expressions import Body, Call, Constant, Expr, Load, Name, Type


class TensorLike(typing.Protocol):
    """What a captured tensor shows of itself; torch's tensors do."""

    @property
    def shape(self) -> typing.Sequence[int]:
        """Size of each dimension."""

    @property
    def dtype(self) -> object:
        """Written `torch.int32` and the like."""

    @property
    def ndim(self) -> int:
        """Number of dimensions."""


# torch's tensors, of which this module knows no type.
_Tensor = typing.Any

_OPERATORS: dict[str, Callable[[_Tensor, _Tensor], _Tensor]] = {
    "+": lambda a, b: a + b,
    "-": lambda a, b: a - b,
    "*": lambda a, b: a * b,
    "/": lambda a, b: a / b,
    "==": lambda a, b: a == b,
    "!=": lambda a, b: a != b,
    "<": lambda a, b: a < b,
    "<=": lambda a, b: a <= b,
    ">": lambda a, b: a > b,
    ">=": lambda a, b: a >= b,
    "&": lambda a, b: a & b,
    "|": lambda a, b: a | b,
    "^": lambda a, b: a ^ b,
}


def evaluate_body(
    body: Body, ops: typing.Any, score: object, inputs: Mapping[str, object], captured: Mapping[str, TensorLike]
) -> _Tensor:
    """Return what `body` returns; see `ModFunction.evaluate`."""
    evaluation = _Evaluation(ops, score, inputs, captured)
    for name, value in body.statements:
        evaluation.names[name] = evaluation.value(value)
    return evaluation.result(body.result)


class _Evaluation:
    def __init__(
        self, ops: typing.Any, score: object, inputs: Mapping[str, object], captured: Mapping[str, TensorLike]
    ) -> None:
        self._ops = ops
        self._captured = captured
        self.names: dict[str, _Tensor] = {}
        tensors = [x for x in (score, *inputs.values(), *captured.values()) if isinstance(x, ops.Tensor)]
        self._device = tensors[0].device if tensors else None
        self._float = ops.float64 if getattr(score, "dtype", None) is ops.float64 else ops.float32
        for name, value in inputs.items():
            self.names[name] = ops.as_tensor(value, device=self._device)
        if score is not None:
            self.names["score"] = ops.as_tensor(score, device=self._device).to(self._float)

    def result(self, expr: Expr) -> _Tensor:
        value = self.value(expr)
        return value if "score" not in self.names else value.to(self._float)

    def value(self, expr: Expr) -> _Tensor:
        if isinstance(expr, Constant):
            dtypes = {"bool": self._ops.bool, "int": self._ops.int64, "float": self._float}
            return self._ops.tensor(expr.value, dtype=dtypes[expr.type], device=self._device)
        if isinstance(expr, Name):
            return self.names[expr.name]
        return self._load(expr) if isinstance(expr, Load) else self._call(expr)

    def _load(self, expr: Load) -> _Tensor:
        ops = self._ops
        tensor = typing.cast("_Tensor", self._captured[expr.capture])
        inside, offset = ops.tensor(True, device=self._device), ops.tensor(0, device=self._device)
        for size, index_expr in zip(tensor.shape, expr.indices, strict=True):
            index = self.value(index_expr).to(ops.int64)
            inside = inside & (index >= 0) & (index < size)
            offset = offset * size + index
        if tensor.numel() == 0:
            element = ops.zeros(offset.shape, dtype=tensor.dtype, device=self._device)
        else:
            element = tensor.reshape(-1)[ops.where(inside, offset, 0)]
            element = ops.where(inside, element, ops.zeros((), dtype=tensor.dtype, device=self._device))
        if expr.type == "float":
            return element.to(self._float)
        # As in the kernel: the narrow integers are widened, so that no sum or difference of them wraps around.
        return element if element.dtype in (ops.bool, ops.int64) else element.to(ops.int32)

    def _call(self, expr: Call) -> _Tensor:
        ops = self._ops
        args = [self.value(argument) for argument in expr.args]
        if expr.op == "where":
            condition, a, b = args[0], *self._alike(expr.args[1:], args[1:], expr.type)
            return ops.where(condition, a, b)
        if expr.op == "~":
            return ~args[0]
        args = self._alike(expr.args, args, expr.type)
        if expr.op in ("//", "%"):
            return self._floor(expr, *args)
        if expr.op in _OPERATORS:
            return -args[0] if len(args) == 1 else _OPERATORS[expr.op](*args)
        return getattr(ops, expr.op)(*args)

    def _alike(self, exprs: tuple[Expr, ...], values: list[_Tensor], result: Type) -> list[_Tensor]:
        # The widest type for all operands: never left to torch, whose float may be another, and whose bools add up to
        # one.
        kinds = {result, *(expr.type for expr in exprs)}
        if "float" in kinds:
            return [value.to(self._float) for value in values]
        return [value.to(self._ops.int64) for value in values] if "int" in kinds else values

    def _floor(self, expr: Call, a: _Tensor, b: _Tensor) -> _Tensor:
        if expr.type == "float":
            quotient = self._ops.floor(a / b)
            return quotient if expr.op == "//" else a - quotient * b
        # A division by zero has no value, but torch would stop at it, even where a mask hides it.
        b = self._ops.where(b == 0, 1, b)
        return a // b if expr.op == "//" else a % b
