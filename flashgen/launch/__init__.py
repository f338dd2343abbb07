"""Running rendered kernels: on a GPU around Triton's JIT, on a CPU through its interpreter."""

from flashgen.launch.device import detect_target, software_versions
from flashgen.launch.forward import (
    ForwardLaunch,
    Operands,
    allocate_outputs,
    bind_forward,
    grid_size,
    launch,
    readable,
)
from flashgen.launch.interpreter import fill_unseen, interpret_forward

__all__ = [
    "ForwardLaunch",
    "Operands",
    "allocate_outputs",
    "bind_forward",
    "detect_target",
    "fill_unseen",
    "grid_size",
    "interpret_forward",
    "launch",
    "readable",
    "software_versions",
]
