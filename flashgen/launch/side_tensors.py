"""The tensors of a call besides Q, K, V, out, lse, gradients: which a kernel takes, and where a call holds them."""

from __future__ import annotations

import operator
import typing

import torch

from flashgen.codegen import KernelPlan, argument_kind, capture_pointers
from flashgen.errors import InputError
from flashgen.launch.operands import as_read
from flashgen.launch.tile_table import TileTable

TENSOR_NAMES = ("q", "k", "v", "out", "lse")

# Where the names in a kernel are others than in `Extras`.
_FIELDS = {"alibi": "alibi_slopes", "rng": "rng_state"}
_TABLE = ("tile_start", "tile_full", "tile_index")
_TURNED_TABLE = ("row_start", "row_full", "row_index")
# Made by whoever launches.
_MADE = ("tile_counter", "partial", "arrivals", "lengths", "q_turned")
_OF_BACKWARD = ("do", "lse2", "delta", "dq", "dk", "dv", "dbias", "turn")


class SideHolder(typing.Protocol):
    """What holds side tensors by their names in `Extras`: such a value, or what costs less to make in every call."""

    @property
    def captures(self) -> tuple[torch.Tensor, ...]:
        """Of the mask's functions and then score_mod."""
        ...


class SideTensors:
    """Collects the side tensors of a kernel from the extras of a call; made once, as every call pays for it.

    Attributes:
        names: the tensors by their names in the kernel, without `_ptr`, in the order that calls give them.
    """

    def __init__(self, plan: KernelPlan) -> None:
        arguments = dict.fromkeys(name for entry in plan.entries for name in entry.arguments)
        pointers = [name.removesuffix("_ptr") for name in arguments if argument_kind(name) == "pointer"]
        captures = tuple(name.removesuffix("_ptr") for name in capture_pointers(plan.spec))
        others = {*TENSOR_NAMES, *_MADE, *_OF_BACKWARD, *captures, *_TABLE, *_TURNED_TABLE}
        own = [name for name in pointers if name not in others]
        self._fields = tuple(_FIELDS.get(name, name) for name in own)
        tables = tuple(name for name in (*_TABLE, *_TURNED_TABLE) if name in pointers)
        self._table = bool(tables)
        self.names: tuple[str, ...] = (*own, *tables, *captures)
        self._of_extras = operator.attrgetter(*self._fields) if self._fields else None

    def __call__(
        self, extras: SideHolder, table: TileTable | None, turned: TileTable | None = None
    ) -> tuple[torch.Tensor, ...]:
        """Return the tensors of one call in the order of `names`; `turned` is the table of a key tile's query tiles.

        Raises:
            InputError: if the call lacks one of them.
        """
        found: tuple[torch.Tensor | None, ...] = ()
        if self._of_extras is not None:
            # Of one field it gives the value, of several a tuple.
            found = self._of_extras(extras) if len(self._fields) > 1 else (self._of_extras(extras),)
        tiles = [tensor for t in (table, turned) if t is not None for tensor in (t.start, t.full, t.index)]
        tensors = (*found, *tiles, *map(as_read, extras.captures))
        if len(tensors) != len(self.names) or any(tensor is None for tensor in found):
            missing = [name for name in self._fields if getattr(extras, name) is None]
            missing += ["the table of tiles"] if self._table and table is None and turned is None else []
            raise InputError(
                f"the call needs tensors that were not given: {', '.join(missing) or 'what its functions capture'}"
            )
        return typing.cast("tuple[torch.Tensor, ...]", tensors)
