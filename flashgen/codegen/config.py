"""How a kernel is built: one frozen dataclass of numbers per template."""

from __future__ import annotations

import dataclasses
import functools
import typing

from flashgen.errors import ConfigError
from flashgen.spec import Phase

ROWS_OF_CONSUMER = 64
"""Query rows of one warpgroup: what its matrix instructions compute at once."""

_REGISTERS_OF_HOPPER = 65536  # of a multiprocessor
_PRODUCER_REGISTERS = 24  # of a thread: what setmaxnreg allows at least
_MAX_CONSUMER_REGISTERS = 240
THREADS_OF_WARPGROUP = 128

Scalar = int | str
Loads = typing.Literal["pointer", "descriptor"]
Loops = typing.Literal["split", "single"]
QueryGradient = typing.Literal["kernel", "atomic", "ordered"]
Queries = typing.Literal["shared", "registers"]
Turns = typing.Literal["free", "alternate"]
Convert = typing.Literal["early", "late", "held"]
OutBuffer = typing.Literal["own", "half", "queries"]
Diagonal = typing.Literal["whole", "half"]
Tiles = typing.Literal["apart", "overlap"]
Pack = typing.Literal["rows", "heads"]
Release = typing.Literal["mbarrier", "named"]
Launch = typing.Literal["plain", "dependent"]
_CHOICES: dict[str, tuple[str, ...]] = {
    "loads": typing.get_args(Loads),
    "loops": typing.get_args(Loops),
    "dq": typing.get_args(QueryGradient),
    "queries": typing.get_args(Queries),
    "turns": typing.get_args(Turns),
    "convert": typing.get_args(Convert),
    "out_buffer": typing.get_args(OutBuffer),
    "diagonal": typing.get_args(Diagonal),
    "tiles": typing.get_args(Tiles),
    "pack": typing.get_args(Pack),
    "release": typing.get_args(Release),
    "launch": typing.get_args(Launch),
}


# Numbers of the launch alone.
_AT_REST: dict[str, dict[str, Scalar]] = {
    "triton/forward": {"head_group": 1},
    "gluon/hopper_forward": {"head_group": 1, "tail_heads": 0},
    "triton/backward": {"head_group": 1},
    "triton/decode": {"programs": 1, "min_blocks": 1},
}
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

    def launch_options(self, entry_point: str) -> LaunchOptions:
        """Return the launch options of one kernel of the rendered module."""
        return LaunchOptions(num_warps=self.num_warps, num_stages=self.num_stages, maxnreg=self.maxnreg)

    def kernel(self: Config) -> Config:
        """Return the config with what only a launch reads at rest: configs equal in it share machine code."""
        numbers: dict[str, typing.Any] = {**_AT_REST[self.template]}
        return dataclasses.replace(self, **numbers)

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

    @property
    def blocks(self) -> tuple[tuple[int, int], ...]:
        return ((self.block_m, self.block_n),)


@dataclasses.dataclass(frozen=True, kw_only=True, order=True)
class HopperForwardConfig(KernelConfig):
    """Numbers of `templates/gluon/hopper_forward.py.jinja`, whose programs stay and take tile after tile.

    One warp, the producer, copies Q, K and V; warpgroups of 4 warps, the consumers, compute 64 query rows each.
    num_warps is 4, the warps of one consumer; num_stages counts the tiles of K, and those of V, in flight.

    Attributes:
        consumers: warpgroups that compute: 64 query rows each, on the same keys.
        block_n: keys of one step.
        pack: what the consumers of a tile have, on the same keys: other `rows` of one head, or the same rows of other
            query `heads` of one group.
        programs: how many programs share a multiprocessor, its registers and its shared memory.
        queries: where products read Q: `shared` memory, or `registers`, which frees Q's buffer at once.
        turns: `free`, or `alternate`: consumers issue their products one after the other, so that one's softmax runs
            beside the other's products.
        convert: whether probabilities are converted before (`early`) or after (`late`) the wait for the product of
            the step before; `held` is late, and keeps the assembler from moving that wait before the exponentials.
        rescale: powers of two by which a row's maximum must grow before its output is rescaled; 0 rescales always.
            The maximum that was used stays the one used: results are exact to rounding.
        out_buffer: shared memory through which the output leaves: its `own`, one of `half` a tile, in two rounds, or
            that of the `queries`.
        diagonal: `half` skips the right half of the first key tile where no row of a consumer sees it.
        tiles: `overlap` computes the first scores of the next tile beside the last product of this one; `apart` does
            not.
        loops: `split` walks key tiles that every row sees in a loop without mask code, `single` all of them in one
            loop with a branch, which is less code: for windows of few tiles.
        release: how consumers give back buffers of K and V: by an `mbarrier`, at which one thread arrives once the
            warps of its consumer have met, or by a `named` barrier of the hardware, at which each warp arrives alone.
        head_group: heads whose tiles are handed out together, so that their K and V share the L2 cache; like the next,
            a run-time number that costs no compile.
        tail_heads: heads at the end that form one group, so that their longest tiles do not come last.
    """

    template: typing.ClassVar[str] = "gluon/hopper_forward"

    consumers: int
    block_n: int
    pack: Pack = "rows"
    programs: int = 1
    queries: Queries = "shared"
    turns: Turns = "free"
    convert: Convert = "early"
    rescale: int = 0
    out_buffer: OutBuffer = "own"
    diagonal: Diagonal = "whole"
    tiles: Tiles = "apart"
    loops: Loops = "split"
    release: Release = "mbarrier"
    head_group: int = 1
    tail_heads: int = 0

    @property
    def block_m(self) -> int:
        """Query rows of one program's tile, in each of its heads."""
        return ROWS_OF_CONSUMER * self.consumers // self.heads_of_tile

    @property
    def heads_of_tile(self) -> int:
        return self.consumers if self.pack == "heads" else 1

    @property
    def blocks(self) -> tuple[tuple[int, int], ...]:
        return ((self.block_m, self.block_n),)

    def launch_options(self, entry_point: str) -> LaunchOptions:
        # The registers that every thread starts with; consumers then take what the producer gives up.
        return LaunchOptions(num_warps=self.num_warps, num_stages=self.num_stages, maxnreg=self._registers_at_start)

    @property
    def _registers_at_start(self) -> int:
        # The producer, one warp, takes a warpgroup's share.
        threads = self.programs * (self.consumers + 1) * THREADS_OF_WARPGROUP
        return min(_REGISTERS_OF_HOPPER // threads // 8 * 8, _MAX_CONSUMER_REGISTERS)

    @property
    def role_registers(self) -> tuple[int, int]:
        """Registers of a thread of a consumer, and of the producer."""
        shared = self._registers_at_start * (self.consumers + 1) - _PRODUCER_REGISTERS
        return min(shared // self.consumers // 8 * 8, _MAX_CONSUMER_REGISTERS), _PRODUCER_REGISTERS


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


_CONFIG_TYPES: dict[str, type[KernelConfig]] = {
    config_type.template: config_type
    for config_type in (TritonForwardConfig, HopperForwardConfig, TritonBackwardConfig, TritonDecodeConfig)
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
