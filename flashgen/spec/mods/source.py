"""The syntax of a Python function that is already running: its file, read again and found by line and name."""

from __future__ import annotations

import ast
import functools
import inspect
import types
import typing
from collections.abc import Iterator

from flashgen.errors import InputError

FunctionNode = typing.Union[ast.FunctionDef, ast.Lambda]  # noqa: UP007


class FunctionSource(typing.NamedTuple):
    """A function's syntax tree, and the file that it counts its lines in."""

    node: FunctionNode
    path: str
    lines: tuple[str, ...]

    @property
    def statements(self) -> list[ast.stmt]:
        """The body; that of a lambda is one `return`."""
        if isinstance(self.node, ast.Lambda):
            return [ast.copy_location(ast.Return(self.node.body), self.node.body)]
        return self.node.body


def find_source(function: types.FunctionType, title: str) -> FunctionSource:
    """Return the source of `function`; `title` begins the messages.

    Raises:
        InputError: if there is none, if it has changed since it was run, or if it may be one of several lambdas.
    """
    code = function.__code__
    instead = "Define it with `def` in a file or a notebook cell and pass it from there."
    try:
        lines = tuple(inspect.findsource(code)[0])
        text = "".join(lines)
        tree = _parse(text)
    except (OSError, TypeError, IndexError) as error:
        raise InputError(f"{title}: Python has no source of it ({error}), {code.co_filename}. {instead}") from None
    except (SyntaxError, ValueError) as error:
        raise InputError(f"{title}: {code.co_filename} does not parse ({error}). {instead}") from None
    parameters = code.co_varnames[: code.co_argcount + code.co_kwonlyargcount]
    place = f"{code.co_filename}:{code.co_firstlineno}"
    found = {ast.dump(node): node for node in _candidates(tree, code) if _parameters(node) == parameters}
    if not found or not _unchanged(text, code):
        raise InputError(f"{title}: {place} is not what was run; the file has changed since. Import it again.")
    if len(found) > 1:
        raise InputError(
            f"{title}: {len(found)} lambdas begin on line {place}. Give each a line of its own, or a `def`."
        )
    (node,) = found.values()
    return FunctionSource(node, code.co_filename, tuple(line.rstrip("\n") for line in lines))


def _candidates(tree: ast.Module, code: types.CodeType) -> Iterator[FunctionNode]:
    for node in ast.walk(tree):
        if isinstance(node, ast.FunctionDef) and node.name == code.co_name:
            # Python counts a function from its first decorator.
            if min([node.lineno, *(decorator.lineno for decorator in node.decorator_list)]) == code.co_firstlineno:
                yield node
        elif isinstance(node, ast.Lambda) and code.co_name == "<lambda>" and node.lineno == code.co_firstlineno:
            yield node


def _parameters(node: FunctionNode) -> tuple[str, ...]:
    arguments = node.args
    return tuple(a.arg for a in (*arguments.posonlyargs, *arguments.args, *arguments.kwonlyargs))


def _unchanged(text: str, code: types.CodeType) -> bool:
    # A file edited under a running process would give another mask than the function at hand, silently.
    known = _compiled(text).get((code.co_name, code.co_firstlineno), [])
    return not known or any(_instructions(code) == _instructions(other) for other in known)


def _instructions(code: types.CodeType) -> tuple[object, ...]:
    constants = [repr(value) for value in code.co_consts if not isinstance(value, types.CodeType)]
    return code.co_code, code.co_names, code.co_freevars, constants


@functools.lru_cache(maxsize=16)
def _parse(text: str) -> ast.Module:
    return ast.parse(text)


@functools.lru_cache(maxsize=16)
def _compiled(text: str) -> dict[tuple[str, int], list[types.CodeType]]:
    found: dict[tuple[str, int], list[types.CodeType]] = {}
    try:
        waiting = [compile(text, "<source>", "exec", dont_inherit=True)]
    except SyntaxError:
        # A notebook cell may await at its top level.
        return found
    while waiting:
        code = waiting.pop()
        found.setdefault((code.co_name, code.co_firstlineno), []).append(code)
        waiting += [value for value in code.co_consts if isinstance(value, types.CodeType)]
    return found
