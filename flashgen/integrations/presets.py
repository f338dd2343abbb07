"""Named lists of problems, kept as text in `search_spaces/presets.yaml`."""

from __future__ import annotations

import yaml

from flashgen.errors import InputError
from flashgen.resources import resource_dir
from flashgen.spec import Problem, parse_problem


def load_presets() -> dict[str, tuple[Problem, ...]]:
    """Return every preset by name, in the order of the file.

    Raises:
        InputError: if the file is damaged or holds text that is no problem; the message names file and preset.
    """
    path = resource_dir("search_spaces") / "presets.yaml"
    try:
        content = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise InputError(f"cannot read the presets in {path}: {error}") from error
    if not isinstance(content, dict):
        raise InputError(f"{path} must map names to lists of problems, got {type(content).__name__}")
    presets: dict[str, tuple[Problem, ...]] = {}
    for name, lines in content.items():
        if not isinstance(name, str) or not isinstance(lines, list) or not all(isinstance(s, str) for s in lines):
            raise InputError(f"{path}: {name!r} must be a name with a list of lines such as 'b=1 h=32 s=4096 d=128'")
        try:
            presets[name] = tuple(parse_problem(line) for line in lines)
        except InputError as error:
            raise InputError(f"{path}: preset {name!r}: {error}") from error
    return presets


def preset(name: str) -> tuple[Problem, ...]:
    """Return the problems of the preset called `name`.

    Raises:
        InputError: if there is none; the message lists those there are.
    """
    presets = load_presets()
    try:
        return presets[name]
    except KeyError:
        raise InputError(f"unknown preset {name!r}; known: {', '.join(presets)}") from None
