"""Untrusted YAML text to a small tree that knows its lines, under limits: nothing is expanded, nothing is constructed.

The tree is built from the parser's events: those are lazy, so the first offence ends the work, and they need no
recursion. Aliases can expand without end, so there are none.
"""

from __future__ import annotations

import functools
import re
import typing

import yaml

from flashgen.registry.contents import shortened
from flashgen.registry.schema import MAX_CODE, MAX_ENTRIES

MAX_DEPTH = 8
MAX_ITEMS = 64
# The largest file that flashgen would write has about 1.2 million events; more only makes the reader work.
MAX_EVENTS = 1_500_000
# Beyond any number of a field, and short enough that reading one takes no time.
MAX_NUMBER = 40

STR_TAG = "tag:yaml.org,2002:str"
_VALUE_TAGS = frozenset(f"tag:yaml.org,2002:{kind}" for kind in ("int", "float", "bool", "null"))

# libyaml where PyYAML was built with it: ten times faster, the same text.
if typing.TYPE_CHECKING:
    from yaml import SafeLoader as _Loader
else:
    _Loader = getattr(yaml, "CSafeLoader", yaml.SafeLoader)

_SCALARS = yaml.constructor.SafeConstructor()
# PyYAML's line breaks. Directives are refused before any parser sees them: libyaml takes quadratic time over many.
_BREAK = re.compile("\r\n|[\r\n\x85\u2028\u2029]")
_DIRECTIVE = re.compile("(?:\\A\ufeff?|[\r\n\x85\u2028\u2029])%")


class Scalar(typing.NamedTuple):
    """A single value, or a collection with a tag, which no file has."""

    tag: str
    text: str
    line: int


class Sequence(typing.NamedTuple):
    """A list."""

    items: list[Node]
    line: int


class Mapping(typing.NamedTuple):
    """Pairs in the order of the text, not yet known to have names, each once."""

    pairs: list[tuple[Node, Node]]
    line: int


Node = Scalar | Sequence | Mapping


class TreeError(Exception):
    """What is wrong with a text or a part of it.

    Attributes:
        line: counted from 1.
        reason: what was got and what is allowed.
    """

    def __init__(self, line: int, reason: str) -> None:
        super().__init__(f"line {line}: {reason}")
        self.line = line
        self.reason = reason


def read_tree(text: str) -> Node | None:
    """Return the one document of `text`, or None if there is none.

    Raises:
        TreeError: beyond a limit, or for anchors, aliases, directives and second documents.
        yaml.YAMLError: if it is no YAML.
    """
    directive = _DIRECTIVE.search(text)
    if directive is not None:
        raise TreeError(_breaks(text[: directive.end()]) + 1, "directives are not allowed")
    builder = _Builder()
    for count, event in enumerate(yaml.parse(text, Loader=_Loader)):
        if count >= MAX_EVENTS:
            raise TreeError(_line(event), f"more than {MAX_EVENTS} values")
        builder.take(event)
    return builder.root


class _Builder:
    def __init__(self) -> None:
        self.root: Node | None = None
        self._documents = 0
        # Where the nodes of each open collection go: of a mapping, names and values in turn.
        self._open: list[tuple[yaml.Event, list[Node]]] = []

    def take(self, event: yaml.Event) -> None:
        if isinstance(event, yaml.ScalarEvent):
            _refuse_anchor(event)
            self._add(_scalar(event), event)
        elif isinstance(event, yaml.CollectionStartEvent):
            _refuse_anchor(event)
            self._open.append((event, []))
            if len(self._open) > MAX_DEPTH:
                raise TreeError(_line(event), f"nested deeper than {MAX_DEPTH} levels")
        elif isinstance(event, yaml.CollectionEndEvent):
            start, nodes = self._open.pop()
            self._add(_collection(start, nodes), start)
        elif isinstance(event, yaml.AliasEvent):
            _refuse_anchor(event)
        elif isinstance(event, yaml.DocumentStartEvent):
            self._documents += 1
            if self._documents > 1:
                raise TreeError(_line(event), "another document begins: a file is a single document")

    def _add(self, node: Node, event: yaml.Event) -> None:
        if not self._open:
            self.root = node
            return
        parent, nodes = self._open[-1]
        nodes.append(node)
        names = isinstance(parent, yaml.MappingStartEvent)
        # Right below the top stands the list of entries; every other one is short.
        limit = MAX_ENTRIES if len(self._open) <= 2 and not names else MAX_ITEMS
        if len(nodes) > (2 * limit if names else limit):
            raise TreeError(_line(event), f"more than {limit} {'fields' if names else 'items'} in one place")


def _refuse_anchor(event: yaml.NodeEvent) -> None:
    if event.anchor is not None:
        raise TreeError(_line(event), f"anchors and aliases are not allowed, got {shortened(event.anchor)}")


def _scalar(event: yaml.ScalarEvent) -> Scalar:
    if len(event.value) > MAX_CODE:
        raise TreeError(_line(event), f"a value is longer than {MAX_CODE} characters")
    tag = event.tag
    if tag is None or tag == "!":
        tag = _implicit_tag(event.value) if event.implicit[0] else STR_TAG
    return Scalar(tag, event.value, _line(event))


def _implicit_tag(text: str) -> str:
    return _resolved(text) if len(text) <= MAX_NUMBER else _resolved.__wrapped__(text)


@functools.lru_cache(maxsize=4096)
def _resolved(text: str) -> str:
    # What PyYAML does for a value without quotes; by the base class, which no other package adds kinds to.
    for tag, pattern in yaml.resolver.Resolver.yaml_implicit_resolvers.get(text[:1], []):
        if pattern.match(text):
            return str(tag)
    return STR_TAG


def _collection(start: yaml.Event, nodes: list[Node]) -> Node:
    tag = typing.cast("yaml.CollectionStartEvent", start).tag
    if tag is not None and tag != "!":
        return Scalar(f"collection of tag {tag}", "{...}", _line(start))
    if isinstance(start, yaml.SequenceStartEvent):
        return Sequence(nodes, _line(start))
    return Mapping(list(zip(nodes[::2], nodes[1::2], strict=True)), _line(start))


def _line(event: yaml.Event) -> int:
    return int(typing.cast("yaml.Mark", event.start_mark).line) + 1


def _breaks(text: str) -> int:
    return len(_BREAK.findall(text))


def fields_of(node: Node) -> dict[str, Node]:
    """Return the fields of a mapping by name.

    Raises:
        TreeError: if it is none, or a name is no text, or is there twice.
    """
    if not isinstance(node, Mapping):
        raise TreeError(node.line, "must be a mapping")
    fields: dict[str, Node] = {}
    for key, value in node.pairs:
        if not isinstance(key, Scalar) or key.tag != STR_TAG:
            raise TreeError(key.line, "every name must be plain text")
        if key.text in fields:
            raise TreeError(key.line, f"{shortened(key.text)} is given twice")
        fields[key.text] = value
    return fields


def plain(node: Node) -> object:
    """Return a node as dictionaries, lists, text, numbers, booleans and None.

    Raises:
        TreeError: for what `fields_of` refuses, and for values of any other kind (dates, tags).
    """
    if isinstance(node, Mapping):
        return {name: plain(value) for name, value in fields_of(node).items()}
    if isinstance(node, Sequence):
        return [plain(value) for value in node.items]
    if node.tag == STR_TAG:
        return node.text
    if node.tag not in _VALUE_TAGS:
        kind = shortened(node.tag.removeprefix("tag:yaml.org,2002:"))
        raise TreeError(
            node.line, f"{shortened(node.text)} reads as {kind}, which no field takes; quote it if it is text"
        )
    if len(node.text) > MAX_NUMBER:
        raise TreeError(
            node.line, f"{shortened(node.text)} is longer than {MAX_NUMBER} characters: no field is so large"
        )
    try:
        return _SCALARS.yaml_constructors[node.tag](_SCALARS, yaml.ScalarNode(node.tag, node.text))
    except (ValueError, KeyError, IndexError) as error:
        raise TreeError(node.line, f"{shortened(node.text)} is no number: {error}") from error


def find(node: Node, where: tuple[int | str, ...]) -> Node:
    """Return the deepest node on the way: a missing field is reported at the mapping that lacks it."""
    for step in where:
        children: dict[int | str, Node]
        if isinstance(node, Mapping):
            children = {key.text: value for key, value in node.pairs if isinstance(key, Scalar)}
        elif isinstance(node, Sequence):
            children = dict(enumerate(node.items))
        else:
            return node
        if step not in children:
            return node
        node = children[step]
    return node
