"""Templates to source: `render(spec, config)` gives a module of plain Triton, the same bytes every time."""

from __future__ import annotations

import ast
import dataclasses
import functools
import hashlib
import os
import sys

import jinja2

from flashgen.codegen.kernel_config import KernelConfig
from flashgen.codegen.kernel_plan import KernelPlan
from flashgen.codegen.plan import make_plan
from flashgen.resources import module_source, resource_dir
from flashgen.spec import AttentionSpec
from flashgen.storage import is_still, keep, own_folders, read_kept, tree_stamp

_DIGITS = 16
_FOLDER = "rendered"
_JINJA = os.path.dirname(jinja2.__file__)


@dataclasses.dataclass(frozen=True, kw_only=True)
class RenderedKernel:
    """A rendered module.

    Attributes:
        source: the whole module, formatted.
        entry_point: name of the kernel in it.
        digest: hash of the code, without comments and docstrings, and of what it imports from flashgen; what keys tuned
            entries and cached files.
        plan: the structure that the source has.
    """

    source: str
    entry_point: str
    digest: str
    plan: KernelPlan


def render(spec: AttentionSpec, config: KernelConfig) -> RenderedKernel:
    """Return the module for a spec and the structure of a config; numbers of neither change the source.

    Raises:
        ConfigError: if no template has the config's name.
    """
    return _render(make_plan(spec, config))


def is_current(spec: AttentionSpec, config: KernelConfig, digest: str) -> bool:
    """Return whether `digest` is that of the code which `spec` and `config` render to today."""
    return render(spec, config).digest == digest


@functools.lru_cache(maxsize=256)
def _render(plan: KernelPlan) -> RenderedKernel:
    # Reading templates and hashing code takes tens of milliseconds: the first process that does it keeps the result.
    made_of = (*own_folders(), _JINJA)
    stamp = tree_stamp(*made_of)
    key = f"{stamp} {sys.version_info[:2]} {plan!r}"
    text = read_kept(_FOLDER, key) if stamp else None
    if text is None:
        source = _environment().get_template(f"{plan.template}.py.jinja").render(spec=plan.spec, plan=plan)
        text = code_digest(source) + source
        if stamp and is_still(stamp, *made_of):
            keep(_FOLDER, key, text)
    digest, source = text[:_DIGITS], text[_DIGITS:]
    return RenderedKernel(source=source, entry_point=plan.entry_point, digest=digest, plan=plan)


@functools.lru_cache(maxsize=1)
def _environment() -> jinja2.Environment:
    return jinja2.Environment(
        loader=jinja2.FileSystemLoader(resource_dir("templates")),
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
        autoescape=False,
    )


def code_digest(source: str) -> str:
    """Return 16 hex digits that change when the code changes, not when a comment or docstring does.

    The modules of flashgen that the code imports are part of it.
    """
    tree = ast.parse(source)
    imported = sorted(
        node.module
        for node in tree.body
        if isinstance(node, ast.ImportFrom) and node.module and node.module.startswith("flashgen.")
    )
    text = "".join([_canonical(tree), *map(_canonical_module, imported)])
    return hashlib.sha256(text.encode()).hexdigest()[:_DIGITS]


@functools.cache
def _canonical_module(name: str) -> str:
    return _canonical(ast.parse(module_source(name)))


def _canonical(node: object) -> str:
    """Return a syntax tree as text, without docstrings, those of constants included."""
    # Not ast.dump: its text differs between Python versions, and digests are compared across them.
    if isinstance(node, ast.AST):
        fields: list[str] = []
        for name in node._fields:
            value = getattr(node, name, None)
            if name == "body" and isinstance(node, (ast.Module, ast.FunctionDef)):
                value = [statement for statement in node.body if not _is_text(statement)]
            if value is not None and value != []:
                fields.append(f"{name}={_canonical(value)}")
        return f"{type(node).__name__}({','.join(fields)})"
    if isinstance(node, list):
        return f"[{','.join(map(_canonical, node))}]"
    return repr(node)


def _is_text(statement: ast.stmt) -> bool:
    return (
        isinstance(statement, ast.Expr)
        and isinstance(statement.value, ast.Constant)
        and isinstance(statement.value.value, str)
    )
