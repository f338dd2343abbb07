"""Where a kernel runs: `GpuTarget`, by name; `flashgen.launch.detect_target` reads it from a device."""

from flashgen.target.gpu import GpuTarget, known_targets, named_target
from flashgen.target.occupancy import resident_blocks
from flashgen.target.software import Software

__all__ = ["GpuTarget", "Software", "known_targets", "named_target", "resident_blocks"]
