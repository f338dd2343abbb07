"""A user's own `mask_mod` and `score_mod` as plain values: one line of a small language, and what it captures.

The signatures are FlexAttention's: `mask_mod(b, h, q_idx, kv_idx)` gives a boolean, `score_mod(score, b, h, q_idx,
kv_idx)` a number. Functions are read by `reader.read_mod`; `str` and `parse_mod` take a mod to text and back.
"""

from __future__ import annotations

import ast
import dataclasses
import functools
import re
import typing
from collections.abc import Sequence

from flashgen.errors import InputError
from flashgen.spec.mods.evaluate import TensorLike as TensorLike
from flashgen.spec.mods.evaluate import evaluate_body
from flashgen.spec.mods.expressions import FUNCTIONS, Body, Expr, ExpressionError, Load, Name, Type, depth, write
from flashgen.spec.mods.refused import Refused
from flashgen.spec.mods.scope import INPUTS, Scope
from flashgen.spec.mods.translate import MAX_DEPTH, Known, Resolve, Tensor, Translator, Value

Role = typing.Literal["mask", "score"]

CAPTURE_TYPES: dict[str, Type] = {
    "bool": "bool",
    **dict.fromkeys(("uint8", "int8", "int16", "int32", "int64"), "int"),
    **dict.fromkeys(("float16", "bfloat16", "float32"), "float"),
}
MAX_SOURCE = 6000
MAX_TEXT = 8000
MAX_CAPTURES = 32
MAX_CAPTURE_DIMS = 8


@dataclasses.dataclass(frozen=True, kw_only=True)
class Capture:
    """A captured tensor's place in a mod.

    Attributes:
        name: what the source calls it.
        dtype: torch's name, one of `CAPTURE_TYPES`.
        axes: one per dimension: `b`, `h`, `q_idx` or `kv_idx` where that alone is the index in every place, else
            `any`; empty for a tensor without dimensions.

    Raises:
        InputError: for anything else.
    """

    name: str
    dtype: str
    axes: tuple[str, ...]

    def __post_init__(self) -> None:
        if not re.fullmatch(r"[A-Za-z_][A-Za-z0-9_]*", self.name):
            raise InputError(f"a captured tensor's name must be an identifier, got {self.name!r:.60}")
        if self.dtype not in CAPTURE_TYPES:
            known = ", ".join(CAPTURE_TYPES)
            raise InputError(f"captured tensor {self.name!r} has dtype {self.dtype!r:.40}; allowed: {known}")
        if len(self.axes) > MAX_CAPTURE_DIMS or not {*self.axes} <= {*INPUTS, "any"}:
            allowed = f"at most {MAX_CAPTURE_DIMS} of {', '.join(INPUTS)}, any"
            raise InputError(f"captured tensor {self.name!r} has axes {self.axes!r:.80}; allowed: {allowed}")

    def __str__(self) -> str:
        return f"{self.dtype}[{','.join(self.axes)}]"


@dataclasses.dataclass(frozen=True, kw_only=True)
class ModFunction:
    """A mask_mod or score_mod: equal, hashed and written by what it says, whatever tensors it has captured.

    Attributes:
        role: `mask` gives booleans, `score` numbers.
        source: the body in one line, canonical: `d = q_idx - kv_idx; return (d >= 0) & (d < 128)`.
        captures: the tensors that the source indexes, in order of first use.
        tensors: those tensors, one per capture; empty for a mod read from text.
    """

    role: Role
    source: str
    captures: tuple[Capture, ...] = ()
    tensors: tuple[TensorLike, ...] = dataclasses.field(default=(), compare=False, repr=False)

    def __post_init__(self) -> None:
        if self.role not in typing.get_args(Role):
            raise InputError(f"a mod's role must be 'mask' or 'score', got {self.role!r:.40}")
        if len(self.tensors) not in (0, len(self.captures)):
            raise InputError(f"{len(self.captures)} captures need as many tensors or none, got {len(self.tensors)}")

    @property
    def body(self) -> Body:
        """The source as expressions.

        Raises:
            InputError: if the source is outside the language.
        """
        return _checked(self.role, self.source, self.captures)[1]

    @property
    def uses(self) -> frozenset[str]:
        """Which of b, h, q_idx and kv_idx the source uses."""
        return frozenset(node.name for node in self.body.nodes() if isinstance(node, Name)) & {*INPUTS}

    def without_tensors(self) -> ModFunction:
        """Return the same mod, keeping no tensor alive."""
        return dataclasses.replace(self, tensors=())

    def evaluate(
        self,
        ops: typing.Any,
        *,
        score: object = None,
        b: object,
        h: object,
        q_idx: object,
        kv_idx: object,
        tensors: Sequence[TensorLike] | None = None,
    ) -> typing.Any:
        """Return the mod's value, elementwise: what a rendered kernel computes, in plain tensor operations.

        A captured tensor is 0 wherever an index is negative or past its end.

        Args:
            ops: the torch module.
            score: floating tensor, for a score mod; all is computed in float64 if it is that, else in float32.
            b, h, q_idx, kv_idx: integer tensors (or integers) that broadcast together and with `score`.
            tensors: the captured tensors, one per capture; by default the mod's own.

        Raises:
            InputError: if the captured tensors are missing.
        """
        tensors = self.tensors if tensors is None else tensors
        if len(tensors) != len(self.captures):
            names = ", ".join(capture.name for capture in self.captures)
            raise InputError(f"{self} needs its captured tensors ({names}), got {len(tensors)}; pass tensors=")
        if (score is None) == (self.role == "score"):
            raise InputError(
                f"a score goes to a score mod and only there: role {self.role}, score {type(score).__name__}"
            )
        inputs = {"b": b, "h": h, "q_idx": q_idx, "kv_idx": kv_idx}
        captured = dict(zip((capture.name for capture in self.captures), tensors, strict=True))
        return evaluate_body(self.body, ops, score, inputs, captured)

    def __str__(self) -> str:
        arguments = [repr(self.source), *(f"{c.name}={str(c)!r}" for c in self.captures)]
        return f"{self.role}_mod({', '.join(arguments)})"


def parse_mod(text: str) -> ModFunction:
    """Return the mod that `str(mod)` wrote as `text`, without tensors; safe for text that is not trusted.

    Raises:
        InputError: if the text is too long, or says anything outside the language.
    """
    if len(text) > MAX_TEXT:
        raise InputError(f"a mod's text has at most {MAX_TEXT} characters, got {len(text)}: {text[:60]!r}...")
    try:
        call = ast.parse(text.strip(), mode="eval").body
    except (SyntaxError, ValueError, RecursionError, MemoryError) as error:
        raise InputError(f"{_WRITTEN}, got {text[:80]!r} ({error})") from None
    if not isinstance(call, ast.Call) or not isinstance(call.func, ast.Name) or len(call.args) != 1:
        raise InputError(f"{_WRITTEN}, got {text[:80]!r}")
    values = [node.value if isinstance(node, ast.Constant) else None for node in call.args]
    values += [word.value.value if isinstance(word.value, ast.Constant) else None for word in call.keywords]
    names = [word.arg for word in call.keywords]
    strings = [value for value in values if isinstance(value, str)]
    named = [name for name in names if name is not None]
    role = _ROLES.get(call.func.id)
    if role is None or len(strings) != len(values) or len(named) != len(names) or len(names) > MAX_CAPTURES:
        raise InputError(f"{_WRITTEN}, got {text[:80]!r}")
    captures = tuple(_parse_capture(name, value) for name, value in zip(named, strings[1:], strict=True))
    return _checked(role, strings[0], captures)[0]


_ROLES: dict[str, Role] = {"mask_mod": "mask", "score_mod": "score"}
_WRITTEN = "a mod is written as mask_mod('<body>', name='dtype[axes]', ...) or score_mod(...)"


def _parse_capture(name: str, text: str) -> Capture:
    found = re.fullmatch(r"(\w+)\[([\w,]*)\]", text)
    if found is None:
        raise InputError(f"a captured tensor is written as name='int32[b,any]', got {name}={text[:60]!r}")
    return Capture(name=name, dtype=found[1], axes=tuple(found[2].split(",")) if found[2] else ())


def make_mod(
    role: Role,
    scope: Scope,
    result: Expr,
    captured: typing.Mapping[str, tuple[str, int]],
    tensors: typing.Mapping[str, TensorLike],
) -> tuple[ModFunction, Body]:
    """Return the mod that a translation found, and its body.

    Args:
        scope: what the translation assigned.
        result: what it returned.
        captured: dtype and dimensions of the captured tensors, by temporary name.
        tensors: the tensors themselves, where there are any.

    Raises:
        InputError: if the mod is too long or captures too much.
    """
    body, names = scope.finish(result)
    values = [value for _, value in body.statements] + [body.result]
    if max(map(depth, values)) > MAX_DEPTH - 2:
        raise InputError(f"a {role}_mod has an expression more than {MAX_DEPTH - 2} deep; assign parts of it to names")
    source = "; ".join(
        [*(f"{name} = {write(value)}" for name, value in body.statements), f"return {write(body.result)}"]
    )
    captures = tuple(
        Capture(name=name, dtype=captured[temporary][0], axes=_axes(body, name, captured[temporary][1]))
        for temporary, name in names.items()
    )
    if len(source) > MAX_SOURCE or len(captures) > MAX_CAPTURES:
        got = f"{len(source)} characters and {len(captures)} tensors"
        raise InputError(f"a mod has at most {MAX_SOURCE} characters and {MAX_CAPTURES} captured tensors, got {got}")
    found = tuple(tensors[temporary] for temporary in names) if tensors else ()
    return ModFunction(role=role, source=source, captures=captures, tensors=found), body


def _axes(body: Body, capture: str, ndim: int) -> tuple[str, ...]:
    loads = [node for node in body.nodes() if isinstance(node, Load) and node.capture == capture]
    axes = []
    for dimension in range(ndim):
        found = {write(load.indices[dimension]) for load in loads}
        axes.append(found.pop() if len(found) == 1 and found <= {*INPUTS} else "any")
    return tuple(axes)


def input_names(role: Role) -> dict[str, Value]:
    """Return what the parameters of a mod are, by their canonical names, in order."""
    names: dict[str, Value] = {"score": Name("score", "float")} if role == "score" else {}
    return names | {name: Name(name, "int") for name in INPUTS}


def check_result(role: Role, node: ast.AST, result: Expr) -> None:
    """Check that a mask gives a boolean and a score mod a number.

    Raises:
        Refused: otherwise, at `node`.
    """
    if role == "mask" and result.type != "bool":
        instead = "Compare, as in `kv_idx <= q_idx`; `x != 0` makes a number a boolean."
        raise Refused(node, f"a mask_mod must return a boolean, this is {result.type}", instead)
    if role == "score" and result.type == "bool":
        instead = "Return the new score, as in `torch.where(condition, score, -float('inf'))`."
        raise Refused(node, "a score_mod must return a number, this is a boolean", instead)


@functools.lru_cache(maxsize=1024)
def _checked(role: Role, source: str, captures: tuple[Capture, ...]) -> tuple[ModFunction, Body]:
    """Return the mod of a source that may be anything, in canonical form, and its body."""
    if len(source) > MAX_SOURCE:
        raise InputError(f"a mod's body has at most {MAX_SOURCE} characters, got {len(source)}: {source[:60]!r}...")
    if len({capture.name for capture in captures}) != len(captures):
        raise InputError(f"two captured tensors of one name: {', '.join(capture.name for capture in captures)}")
    scope = Scope()
    temporary = {capture.name: scope.new_name(capture.name) for capture in captures}
    known: dict[str, Value] = {name: Known(name) for name in (*FUNCTIONS, "float")}
    for capture in captures:
        known[capture.name] = Tensor(temporary[capture.name], CAPTURE_TYPES[capture.dtype], len(capture.axes))
    title = f"{role}_mod cannot be read"
    try:
        statements = ast.parse(source).body
    except (SyntaxError, ValueError, RecursionError, MemoryError) as error:
        raise InputError(f"{title}: {error}, in {source[:80]!r}") from None
    if not statements:
        raise InputError(f"{title}: it is empty; a body ends in `return expression`")
    try:
        translator = Translator(scope, input_names(role), _resolver(known))
        returned = translator.run(statements)
        result = translator.expression(returned)
        check_result(role, returned, result)
    except Refused as refused:
        raise InputError(refused.message(title, "line ", source.split("\n"))) from None
    except RecursionError:
        raise InputError(f"{title}: it is nested too deep: {source[:80]!r}") from None
    dtypes = {temporary[c.name]: (c.dtype, len(c.axes)) for c in captures}
    mod, body = make_mod(role, scope, result, dtypes, {})
    unusable = {capture.name for capture in captures} - {capture.name for capture in mod.captures}
    if unusable:
        raise InputError(f"{title}: it does not use, or has its own meaning for, {', '.join(sorted(unusable))}")
    return mod, body


def _resolver(known: typing.Mapping[str, Value]) -> Resolve:
    def resolve(name: str) -> Value:
        if name not in known:
            raise ExpressionError(f"the unknown name {name!r:.60}")
        return known[name]

    return resolve
