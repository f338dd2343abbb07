"""How a kernel of the Hopper family is built."""

from __future__ import annotations

import dataclasses
import typing

from flashgen.codegen.kernel_config import KernelConfig, LaunchOptions, Loops, Scalar
from flashgen.spec import Phase

ROWS_OF_CONSUMER = 64
"""Query rows of one warpgroup: what its matrix instructions compute at once."""

APPEND_ROWS = "append_rows"
"""The kernel that writes what a call appends into the caches, before chunks are decoded."""

_REGISTERS_OF_HOPPER = 65536  # of a multiprocessor
_PRODUCER_REGISTERS = 24  # of a thread: what setmaxnreg allows at least
_MAX_CONSUMER_REGISTERS = 240
THREADS_OF_WARPGROUP = 128

Queries = typing.Literal["shared", "registers"]
Turns = typing.Literal["free", "alternate"]
Convert = typing.Literal["early", "late", "held"]
OutBuffer = typing.Literal["own", "half", "queries"]
Diagonal = typing.Literal["whole", "half"]
Tiles = typing.Literal["apart", "overlap"]
Walk = Tiles | typing.Literal["parts"]
Pack = typing.Literal["rows", "heads"]
Release = typing.Literal["mbarrier", "named"]


class HopperConfig(KernelConfig):
    """What the configs of this family have in common: warps with roles, which share out a program's registers.

    One warp, the producer, copies Q, K and V; warpgroups of 4 warps, the consumers, compute 64 query rows each.
    num_warps is 4, the warps of one consumer; num_stages counts the tiles of K, and those of V, in flight.
    """

    # Fields of each config, which is sorted by their order there.
    consumers: int
    block_n: int
    pack: Pack
    programs: int
    queries: Queries
    turns: Turns
    convert: Convert
    rescale: int
    loops: Loops
    release: Release

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

    @property
    def warps_of_program(self) -> int:
        # The producer, one warp, takes the place of a consumer.
        return self.num_warps * (self.consumers + 1)

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
class HopperForwardConfig(HopperConfig):
    """Numbers of `templates/gluon/hopper_forward.py.jinja`, whose programs stay and take tile after tile.

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
    at_rest: typing.ClassVar[typing.Mapping[str, Scalar]] = {"head_group": 1, "tail_heads": 0}

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


@dataclasses.dataclass(frozen=True, kw_only=True, order=True)
class HopperDecodeConfig(HopperConfig):
    """Numbers of `templates/gluon/hopper_decode.py.jinja`, for many queries of a sequence: a prefill in chunks.

    Attributes:
        min_blocks: key tiles that a part has at least, a run-time number that costs no compile.

    The others are those of the forward kernel.
    """

    template: typing.ClassVar[str] = "gluon/hopper_decode"
    phase: typing.ClassVar[Phase] = "decode"
    at_rest: typing.ClassVar[typing.Mapping[str, Scalar]] = {"min_blocks": 1}

    consumers: int
    block_n: int
    pack: Pack = "rows"
    programs: int = 1
    queries: Queries = "shared"
    turns: Turns = "free"
    convert: Convert = "early"
    rescale: int = 0
    loops: Loops = "split"
    release: Release = "mbarrier"
    min_blocks: int = 1

    def launch_options(self, entry_point: str) -> LaunchOptions:
        if entry_point == APPEND_ROWS:
            # Moves memory and does little else.
            return LaunchOptions(num_warps=4, num_stages=1, maxnreg=0)
        return super().launch_options(entry_point)
