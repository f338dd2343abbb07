"""Running rendered kernels: on a GPU around Triton's JIT, on a CPU through its interpreter."""

from flashgen.launch.device import detect_target, software_versions
from flashgen.launch.forward import (
    ForwardLaunch,
    allocate_outputs,
    bind_forward,
    grid_size,
    launch,
)
from flashgen.launch.interpreter import fill_unseen, interpret_forward
from flashgen.launch.operands import Operands, readable
from flashgen.launch.side_tensors import SideTensors
from flashgen.launch.tile_table import tile_table

__all__ = [
    "ForwardLaunch",
    "Operands",
    "SideTensors",
    "allocate_outputs",
    "bind_forward",
    "detect_target",
    "fill_unseen",
    "grid_size",
    "interpret_forward",
    "launch",
    "readable",
    "software_versions",
    "tile_table",
]
