"""The form of a search-space file, and its strict reading: data only, every mistake named with its place."""

from __future__ import annotations

import typing
from pathlib import Path

import pydantic
import yaml

from flashgen.codegen.kernel_config import Scalar
from flashgen.errors import ConfigError

_MAX_BYTES = 256 * 1024

_Value = pydantic.StrictInt | pydantic.StrictStr


def _no_duplicates(values: tuple[Scalar, ...]) -> tuple[Scalar, ...]:
    repeated = sorted({str(value) for value in values if values.count(value) > 1})
    if repeated:
        raise ValueError(f"given twice: {', '.join(repeated)}")
    return values


Values = typing.Annotated[
    tuple[_Value, ...], pydantic.Field(min_length=1, max_length=64), pydantic.AfterValidator(_no_duplicates)
]
Parameters = dict[str, Values]
Alternatives = tuple[Parameters, ...]
Seeds = tuple[dict[str, _Value], ...]


class _Model(pydantic.BaseModel):
    model_config = pydantic.ConfigDict(extra="forbid", frozen=True)


class TargetOverride(_Model):
    """What one architecture searches instead; a list replaces the general one, None keeps it."""

    parameters: Parameters = {}
    alternatives: Alternatives | None = None
    seeds: Seeds | None = None


class SpaceFile(_Model):
    """One `search_spaces/<backend>/<phase>.yaml`.

    Attributes:
        format: of the file.
        template: whose configs they are.
        parameters: the values of each number.
        alternatives: numbers that go together: each item's lists are tried with those of `parameters`, and with no
            other item's.
        constraints: names of predicates.
        seeds: configs that are tried first.
        targets: what architectures search instead.
    """

    format: typing.Literal[1]
    template: str
    parameters: Parameters
    alternatives: Alternatives = ()
    constraints: typing.Annotated[tuple[str, ...], pydantic.AfterValidator(_no_duplicates)]
    seeds: Seeds = ()
    targets: dict[str, TargetOverride] = {}


def read_space_file(path: Path) -> SpaceFile:
    """Return the file's content, checked against the schema.

    Raises:
        ConfigError: if it cannot be read, is no YAML, or has a wrong, missing or unknown field; with path and place.
    """
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path}: cannot read the search space: {error}") from error
    if len(text) > _MAX_BYTES:
        raise ConfigError(f"{path}: {len(text)} characters, a search space has at most {_MAX_BYTES}")
    try:
        content = yaml.safe_load(text)
    except yaml.YAMLError as error:
        place = getattr(error, "problem_mark", None)
        line = f" in line {place.line + 1}" if place else ""
        raise ConfigError(f"{path}: not valid YAML{line}: {getattr(error, 'problem', error)}") from error
    try:
        return SpaceFile.model_validate(content)
    except pydantic.ValidationError as error:
        problems = "; ".join(
            f"{'.'.join(map(str, problem['loc'])) or 'file'}: {problem['msg']}" for problem in error.errors()
        )
        raise ConfigError(f"{path}: {problems}") from error
