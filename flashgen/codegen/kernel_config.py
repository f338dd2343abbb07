"""What the configs of all templates have in common: frozen dataclasses of numbers."""

from __future__ import annotations

import dataclasses
import typing

from flashgen.spec import Phase

Scalar = int | str
Loads = typing.Literal["pointer", "descriptor"]
Loops = typing.Literal["split", "single"]
Config = typing.TypeVar("Config", bound="KernelConfig")


@dataclasses.dataclass(frozen=True, kw_only=True)
class LaunchOptions:
    """What Triton is told of one kernel beside its arguments; see `KernelConfig`."""

    num_warps: int
    num_stages: int
    maxnreg: int


@dataclasses.dataclass(frozen=True, kw_only=True, order=True)
class KernelConfig:
    """Launch options that every template has; subclasses add the numbers of theirs.

    Attributes:
        num_warps: warps of one program.
        num_stages: depth of the software pipeline over key tiles.
        maxnreg: register limit of one thread; 0 leaves it to the compiler.
    """

    template: typing.ClassVar[str]
    phase: typing.ClassVar[Phase] = "forward"
    at_rest: typing.ClassVar[typing.Mapping[str, Scalar]]
    """What numbers of the launch alone are, where there is none."""

    num_warps: int
    num_stages: int
    maxnreg: int = 0

    @property
    def blocks(self) -> tuple[tuple[int, int], ...]:
        """The tiles of scores, query rows and keys, that the kernels of the config work in."""
        raise NotImplementedError

    @property
    def heads_of_tile(self) -> int:
        """Query heads, all of one group, that one program works on together."""
        return 1

    @property
    def warps_of_program(self) -> int:
        """Warps that one program has on its multiprocessor."""
        return self.num_warps

    def launch_options(self, entry_point: str) -> LaunchOptions:
        """Return the launch options of one kernel of the rendered module."""
        return LaunchOptions(num_warps=self.num_warps, num_stages=self.num_stages, maxnreg=self.maxnreg)

    def kernel(self: Config) -> Config:
        """Return the config with what only a launch reads at rest: configs equal in it share machine code."""
        numbers: dict[str, typing.Any] = {**self.at_rest}
        return dataclasses.replace(self, **numbers)

    def as_dict(self) -> dict[str, Scalar]:
        """Return the template name and every number, in the order they are written to YAML."""
        numbers = {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}
        return {"template": self.template, **dict(sorted(numbers.items()))}

    def __str__(self) -> str:
        return " ".join(f"{k}={v}" if k != "template" else str(v) for k, v in self.as_dict().items())
