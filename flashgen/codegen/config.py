"""How a kernel is built: one frozen dataclass of numbers per template; that of the Hopper family has its own file."""

from __future__ import annotations

import dataclasses
import functools
import typing

from flashgen.codegen import hopper_config
from flashgen.codegen.hopper_config import HopperDecodeConfig, HopperForwardConfig
from flashgen.codegen.kernel_config import KernelConfig, LaunchOptions, Loads, Loops, Scalar
from flashgen.errors import ConfigError
from flashgen.spec import Phase

QueryGradient = typing.Literal["kernel", "atomic", "ordered"]
Launch = typing.Literal["plain", "dependent"]
_CHOICES: dict[str, tuple[str, ...]] = {
    "loads": typing.get_args(Loads),
    "loops": typing.get_args(Loops),
    "dq": typing.get_args(QueryGradient),
    "queries": typing.get_args(hopper_config.Queries),
    "turns": typing.get_args(hopper_config.Turns),
    "convert": typing.get_args(hopper_config.Convert),
    "out_buffer": typing.get_args(hopper_config.OutBuffer),
    "diagonal": typing.get_args(hopper_config.Diagonal),
    "tiles": typing.get_args(hopper_config.Tiles),
    "pack": typing.get_args(hopper_config.Pack),
    "release": typing.get_args(hopper_config.Release),
    "launch": typing.get_args(Launch),
}


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
    at_rest: typing.ClassVar[typing.Mapping[str, Scalar]] = {"head_group": 1}

    block_m: int
    block_n: int
    loads: Loads = "pointer"
    head_group: int = 1
    head_tiles: int = 1
    loops: Loops = "split"

    @property
    def blocks(self) -> tuple[tuple[int, int], ...]:
        return ((self.block_m, self.block_n),)


@dataclasses.dataclass(frozen=True, kw_only=True, order=True)
class TritonBackwardConfig(KernelConfig):
    """Numbers of `templates/triton/backward.py.jinja`; num_warps, num_stages and maxnreg are those of dK and dV.

    Attributes:
        block_m1: query rows of one step of the kernel of dK and dV.
        block_n1: keys of one of its programs.
        dq: where dQ comes from. `kernel`: one of its own, which computes the scores again. `atomic`: the kernel of dK
            and dV adds to it in float32, in any order. `ordered`: the same, one key tile after the other.
        block_m2: query rows of one program of dQ's own kernel; 0, as the next three, where there is none.
        block_n2: keys of one step of its loop.
        num_warps2: its warps.
        num_stages2: depth of its pipeline.
        loads: `pointer` (any GPU, any strides, packed sequences) or `descriptor` (tensor descriptors).
        head_group: key/value heads whose tiles are launched together.
        loops: `split` walks tiles that the mask leaves whole in a loop without mask code, `single` masks every tile.
    """

    template: typing.ClassVar[str] = "triton/backward"
    phase: typing.ClassVar[Phase] = "backward"
    at_rest: typing.ClassVar[typing.Mapping[str, Scalar]] = {"head_group": 1}

    block_m1: int
    block_n1: int
    dq: QueryGradient = "kernel"
    block_m2: int = 0
    block_n2: int = 0
    num_warps2: int = 0
    num_stages2: int = 0
    loads: Loads = "pointer"
    head_group: int = 1
    loops: Loops = "split"

    @property
    def blocks(self) -> tuple[tuple[int, int], ...]:
        own = ((self.block_m2, self.block_n2),) if self.dq == "kernel" else ()
        return ((self.block_m1, self.block_n1), *own)

    def launch_options(self, entry_point: str) -> LaunchOptions:
        if entry_point == "attn_bwd_dq":
            return LaunchOptions(num_warps=self.num_warps2, num_stages=self.num_stages2, maxnreg=0)
        if entry_point == "attn_bwd_delta":
            # Moves memory and does little else.
            return LaunchOptions(num_warps=4, num_stages=1, maxnreg=0)
        return super().launch_options(entry_point)


@dataclasses.dataclass(frozen=True, kw_only=True, order=True)
class TritonDecodeConfig(KernelConfig):
    """Numbers of `templates/triton/decode.py.jinja`, whose rows are the queries of all heads of a group.

    Attributes:
        block_m: rows of one program: query i of head g of the group is row i * group + g.
        block_n: keys of one step of its loop.
        loads: `pointer` (any GPU, any strides, any pages) or `descriptor` (tensor descriptors: bulk copies on Hopper
            and later, of caches whose pages hold whole tiles).
        head_tiles: as of the forward kernel.
        programs: how many programs there are for each multiprocessor; like the next one, it costs no compile.
        min_blocks: key tiles that a part has at least.
        launch: `dependent` gets ready while what comes before it on the stream ends (programmatic dependent launch, of
            Hopper and later); `plain` starts after it.
        merge_parts: how many parts of a tile of rows are read together where they are merged.
        loops: `split` walks key tiles that every row sees in a loop without mask code, `single` masks every tile in one
            loop, which has one pipeline to fill.
    """

    template: typing.ClassVar[str] = "triton/decode"
    phase: typing.ClassVar[Phase] = "decode"
    at_rest: typing.ClassVar[typing.Mapping[str, Scalar]] = {"programs": 1, "min_blocks": 1}

    block_m: int
    block_n: int
    loads: Loads = "pointer"
    head_tiles: int = 1
    loops: Loops = "split"
    programs: int = 2
    min_blocks: int = 1
    launch: Launch = "plain"
    merge_parts: int = 16

    @property
    def blocks(self) -> tuple[tuple[int, int], ...]:
        return ((self.block_m, self.block_n),)


DecodeConfig = TritonDecodeConfig | HopperDecodeConfig
_CONFIG_TYPES: dict[str, type[KernelConfig]] = {
    config_type.template: config_type
    for config_type in (
        *(TritonForwardConfig, HopperForwardConfig, TritonBackwardConfig),
        *(TritonDecodeConfig, HopperDecodeConfig),
    )
}


def templates_of(phase: Phase) -> tuple[str, ...]:
    """Return the templates that have kernels of a phase, the portable one first."""
    return tuple(template for template, config_type in _CONFIG_TYPES.items() if config_type.phase == phase)


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
