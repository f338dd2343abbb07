"""How a kernel is built: one frozen dataclass of numbers per template."""

from __future__ import annotations

import dataclasses
import functools
import typing

from flashgen.errors import ConfigError

Scalar = int | str
Loads = typing.Literal["pointer", "descriptor"]
Loops = typing.Literal["split", "single"]
_CHOICES: dict[str, tuple[str, ...]] = {"loads": typing.get_args(Loads), "loops": typing.get_args(Loops)}


@dataclasses.dataclass(frozen=True, kw_only=True, order=True)
class KernelConfig:
    """Launch options that every template has; subclasses add the numbers of theirs.

    Attributes:
        num_warps: warps of one program.
        num_stages: depth of the software pipeline over key tiles.
        maxnreg: register limit of one thread; 0 leaves it to the compiler.
    """

    template: typing.ClassVar[str]

    num_warps: int
    num_stages: int
    maxnreg: int = 0

    def as_dict(self) -> dict[str, Scalar]:
        """Return the template name and every number, in the order they are written to YAML."""
        numbers = {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}
        return {"template": self.template, **dict(sorted(numbers.items()))}

    def __str__(self) -> str:
        return " ".join(f"{k}={v}" if k != "template" else str(v) for k, v in self.as_dict().items())


@dataclasses.dataclass(frozen=True, kw_only=True, order=True)
class TritonForwardConfig(KernelConfig):
    """Numbers of `templates/triton/forward.py.jinja`.

    Attributes:
        block_m: query rows of one program.
        block_n: keys of one step of its loop.
        loads: `pointer` (any GPU, any strides) or `descriptor` (tensor descriptors: bulk copies on Hopper and later).
        head_group: heads whose tiles are launched together, so that their K and V share the L2 cache; a run-time
            number that costs no compile.
        head_tiles: how many tiles a head dimension may be cut into: 1 takes the next power of two, 2 composes 96 as
            64 + 32.
        loops: `split` walks key tiles that every row sees in a loop without mask code; `single` masks every tile in one
            loop, which has one pipeline to fill: for windows of few tiles.
    """

    template: typing.ClassVar[str] = "triton/forward"

    block_m: int
    block_n: int
    loads: Loads = "pointer"
    head_group: int = 1
    head_tiles: int = 1
    loops: Loops = "split"


_CONFIG_TYPES: dict[str, type[KernelConfig]] = {TritonForwardConfig.template: TritonForwardConfig}


@functools.cache
def _field_names(template: str) -> tuple[frozenset[str], frozenset[str]]:
    fields = dataclasses.fields(_CONFIG_TYPES[template])
    required = frozenset(field.name for field in fields if field.default is dataclasses.MISSING)
    return frozenset(field.name for field in fields), required


def config_from_dict(values: typing.Mapping[str, object]) -> KernelConfig:
    """Return the config that `KernelConfig.as_dict` wrote.

    Raises:
        ConfigError: for an unknown template, an unknown, missing or wrongly typed field.
    """
    template = values.get("template")
    config_type = _CONFIG_TYPES.get(template) if isinstance(template, str) else None
    if config_type is None:
        raise ConfigError(f"unknown template {template!r}; known: {', '.join(_CONFIG_TYPES)}")
    fields, required = _field_names(config_type.template)
    unknown = sorted(map(str, values.keys() - fields - {"template"}))
    missing = sorted(required - values.keys())
    if unknown or missing:
        raise ConfigError(
            f"config of {template}: unknown fields {unknown or 'none'}, missing fields {missing or 'none'}; "
            f"its fields are {', '.join(sorted(fields))}"
        )
    numbers = {name: value for name, value in values.items() if name != "template"}
    for name, value in numbers.items():
        if name in _CHOICES:
            if value not in _CHOICES[name]:
                raise ConfigError(f"{name} must be one of {', '.join(_CHOICES[name])}, got {value!r}")
        elif not isinstance(value, int) or isinstance(value, bool) or value < 0:
            raise ConfigError(f"{name} must be a whole number of at least 0, got {value!r}")
    make: typing.Callable[..., KernelConfig] = config_type
    return make(**numbers)
