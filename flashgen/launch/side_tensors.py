"""The tensors of a call besides Q, K, V, out and lse: which ones a kernel takes, and where a call holds them."""

from __future__ import annotations

import operator
import typing

import torch

from flashgen.codegen import ForwardPlan, argument_kind, capture_pointers
from flashgen.errors import InputError
from flashgen.launch.operands import as_read
from flashgen.launch.tile_table import TileTable
from flashgen.spec import Extras

TENSOR_NAMES = ("q", "k", "v", "out", "lse")

# Where the names in a kernel are others than in `Extras`.
_FIELDS = {"alibi": "alibi_slopes", "rng": "rng_state"}
_TABLE = ("tile_start", "tile_full", "tile_index")


class SideTensors:
    """Collects the side tensors of a kernel from the extras of a call; made once, as every call pays for it.

    Attributes:
        names: the tensors by their names in the kernel, without `_ptr`, in the order that calls give them.
    """

    def __init__(self, plan: ForwardPlan) -> None:
        pointers = [name.removesuffix("_ptr") for name in plan.arguments if argument_kind(name) == "pointer"]
        captures = tuple(name.removesuffix("_ptr") for name in capture_pointers(plan.spec))
        own = [name for name in pointers if name not in TENSOR_NAMES and name not in captures and name not in _TABLE]
        self._fields = tuple(_FIELDS.get(name, name) for name in own)
        self._table = plan.mask.table
        self.names: tuple[str, ...] = (*own, *(_TABLE if self._table else ()), *captures)
        self._of_extras = operator.attrgetter(*self._fields) if self._fields else None

    def __call__(self, extras: Extras, table: TileTable | None) -> tuple[torch.Tensor, ...]:
        """Return the tensors of one call in the order of `names`.

        Raises:
            InputError: if the call lacks one of them.
        """
        found: tuple[torch.Tensor | None, ...] = ()
        if self._of_extras is not None:
            # Of one field it gives the value, of several a tuple.
            found = self._of_extras(extras) if len(self._fields) > 1 else (self._of_extras(extras),)
        tiles = (table.start, table.full, table.index) if table is not None else ()
        tensors = (*found, *tiles, *map(as_read, extras.captures))
        if len(tensors) != len(self.names) or any(tensor is None for tensor in found):
            missing = [name for name in self._fields if getattr(extras, name) is None]
            missing += ["the table of tiles"] if self._table and table is None else []
            raise InputError(
                f"the call needs tensors that were not given: {', '.join(missing) or 'what its functions capture'}"
            )
        return typing.cast("tuple[torch.Tensor, ...]", tensors)
