"""A recorded table: the time of every legal config of one problem, as it was measured once on a GPU."""

from __future__ import annotations

import dataclasses
import json
import lzma
import math
from pathlib import Path

from flashgen.codegen import KernelConfig, config_from_dict
from flashgen.errors import InputError
from flashgen.spec import Problem, parse_problem

FORMAT = 1


@dataclasses.dataclass(frozen=True, kw_only=True)
class Row:
    """What became of one config.

    Attributes:
        us: median device time in microseconds; None where it failed.
        failure: why it failed, or empty.
        compile_s: what its binary took to compile, on one core; shared by configs that differ in launch numbers alone.
        measure_s: what checking and timing it took.
        spills: bytes of registers spilled.
    """

    us: float | None
    failure: str
    compile_s: float
    measure_s: float
    spills: int


@dataclasses.dataclass(frozen=True, kw_only=True)
class Table:
    """All configs of one problem on one GPU.

    Attributes:
        problem: what was timed.
        device: the GPU's name.
        software: versions, and when it was recorded.
        rows: by config, in the order of the search space.
    """

    problem: Problem
    device: str
    software: dict[str, str]
    rows: dict[KernelConfig, Row]

    @property
    def best_us(self) -> float:
        """The least time of all; infinite if every config failed."""
        return min((row.us for row in self.rows.values() if row.us is not None), default=math.inf)

    def save(self, path: Path) -> None:
        """Write the table as compressed JSON: of each template its names once, then the values of each config."""
        templates: dict[str, dict[str, object]] = {}
        for config, row in self.rows.items():
            values = config.as_dict()
            told = templates.setdefault(config.template, {"names": list(values), "rows": []})
            assert told["names"] == list(values)
            rows = told["rows"]
            assert isinstance(rows, list)
            rows.append([list(values.values()), *dataclasses.astuple(row)])
        document = {
            "format": FORMAT,
            "problem": str(self.problem),
            "device": self.device,
            "software": self.software,
            "templates": templates,
        }
        path.write_bytes(lzma.compress(json.dumps(document).encode(), preset=9 | lzma.PRESET_EXTREME))


def load_table(path: Path) -> Table:
    """Return the table in a file.

    Raises:
        InputError: if it is of another format.
    """
    document = json.loads(lzma.decompress(path.read_bytes()))
    if document.get("format") != FORMAT:
        raise InputError(f"{path}: format {document.get('format')!r}, this version reads {FORMAT}; record it again")
    rows = {
        config_from_dict(dict(zip(told["names"], values, strict=True))): Row(
            us=us, failure=failure, compile_s=compile_s, measure_s=measure_s, spills=spills
        )
        for told in document["templates"].values()
        for values, us, failure, compile_s, measure_s, spills in told["rows"]
    }
    return Table(
        problem=parse_problem(document["problem"]), device=document["device"], software=document["software"], rows=rows
    )
