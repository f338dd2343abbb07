"""Running rendered kernels: on a GPU around Triton's JIT, on a CPU through its interpreter."""

from flashgen.launch.backward import BackwardLaunch, bind_backward, layouts_of
from flashgen.launch.decode import DecodeLaunch, bind_decode, poison_scratch
from flashgen.launch.decode_grid import num_tiles
from flashgen.launch.decode_operands import DecodeOperands
from flashgen.launch.device import detect_target, software_versions
from flashgen.launch.forward import (
    ForwardLaunch,
    allocate_outputs,
    bind_forward,
    forward_table,
    grid_size,
)
from flashgen.launch.interpreter import fill_unseen, interpret_backward, interpret_decode, interpret_forward
from flashgen.launch.kernel import launch
from flashgen.launch.operands import Operands, readable
from flashgen.launch.side_tensors import SideTensors
from flashgen.launch.tile_counter import counters_astray, reset_tile_counters

__all__ = [
    "BackwardLaunch",
    "DecodeLaunch",
    "DecodeOperands",
    "ForwardLaunch",
    "Operands",
    "SideTensors",
    "allocate_outputs",
    "bind_backward",
    "bind_decode",
    "bind_forward",
    "counters_astray",
    "detect_target",
    "fill_unseen",
    "forward_table",
    "grid_size",
    "interpret_backward",
    "interpret_decode",
    "interpret_forward",
    "launch",
    "layouts_of",
    "num_tiles",
    "poison_scratch",
    "readable",
    "reset_tile_counters",
    "software_versions",
]
