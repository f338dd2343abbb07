"""The GPU a kernel is compiled for: limits that make a config legal, and rates that make it fast."""

from __future__ import annotations

import dataclasses
import typing

from flashgen.errors import InputError


@dataclasses.dataclass(frozen=True, kw_only=True)
class GpuTarget:
    """One GPU model.

    Attributes:
        arch: `sm_90`, `gfx942`, ...; what the compiler is told.
        device_name: as the driver says it (`NVIDIA H200`); the name that registry files carry.
        num_sms: multiprocessors (compute units on AMD).
        smem_bytes: shared memory that one block may use.
        smem_per_sm_bytes: shared memory of one multiprocessor.
        registers_per_sm: 32-bit registers of one multiprocessor.
        max_threads_per_sm: resident threads of one multiprocessor.
        warp_size: threads of a warp (wavefront).
        bandwidth_gbs: device-memory bandwidth by the datasheet, GB/s.
        tflops_16bit: dense bf16 matrix rate by the datasheet, TFLOP/s.
    """

    arch: str
    device_name: str
    num_sms: int
    smem_bytes: int
    smem_per_sm_bytes: int
    registers_per_sm: int
    max_threads_per_sm: int
    warp_size: int
    bandwidth_gbs: float
    tflops_16bit: float

    @property
    def backend(self) -> typing.Literal["cuda", "hip"]:
        """Triton's name of the backend."""
        return "hip" if self.arch.startswith("gfx") else "cuda"

    @property
    def capability(self) -> int:
        """Compute capability as one number (90 for sm_90); 0 on AMD."""
        return 0 if self.backend == "hip" else int(self.arch.removeprefix("sm_"))

    @property
    def has_tma(self) -> bool:
        """Whether tensor descriptors become hardware bulk copies."""
        return self.capability >= 90

    @property
    def has_wgmma(self) -> bool:
        """Whether the matrix unit takes warpgroup products from shared memory (Hopper only)."""
        return self.capability == 90

    def __str__(self) -> str:
        return f"{self.device_name} ({self.arch})"


def _nvidia(arch: str, name: str, sms: int, smem: int, threads: int, bandwidth: float, tflops: float) -> GpuTarget:
    return GpuTarget(
        arch=arch,
        device_name=name,
        num_sms=sms,
        smem_bytes=smem,
        smem_per_sm_bytes=smem + 1024,
        registers_per_sm=65536,
        max_threads_per_sm=threads,
        warp_size=32,
        bandwidth_gbs=bandwidth,
        tflops_16bit=tflops,
    )


def _amd(arch: str, name: str, units: int, lds: int, bandwidth: float, tflops: float) -> GpuTarget:
    return GpuTarget(
        arch=arch,
        device_name=name,
        num_sms=units,
        smem_bytes=lds,
        smem_per_sm_bytes=lds,
        # 512 vector registers of 64 lanes for each of 4 SIMDs, at most 8 waves on each.
        registers_per_sm=4 * 512 * 64,
        max_threads_per_sm=2048,
        warp_size=64,
        bandwidth_gbs=bandwidth,
        tflops_16bit=tflops,
    )


# Datasheet figures (dense, without sparsity), by the name that people use; the first of an architecture stands for it
# when only the arch is named.
_TARGETS: dict[str, GpuTarget] = {
    "A100": _nvidia("sm_80", "NVIDIA A100-SXM4-80GB", 108, 166912, 2048, 2039, 312),
    "H100": _nvidia("sm_90", "NVIDIA H100 80GB HBM3", 132, 232448, 2048, 3350, 989),
    "H200": _nvidia("sm_90", "NVIDIA H200", 132, 232448, 2048, 4800, 989),
    "B200": _nvidia("sm_100", "NVIDIA B200", 148, 232448, 2048, 8000, 2250),
    "RTX5090": _nvidia("sm_120", "NVIDIA GeForce RTX 5090", 170, 101376, 1536, 1792, 210),
    "MI300X": _amd("gfx942", "AMD Instinct MI300X", 304, 65536, 5300, 1307),
    "MI355X": _amd("gfx950", "AMD Instinct MI355X", 256, 163840, 8000, 2500),
}


def known_targets() -> tuple[GpuTarget, ...]:
    """Return every target that `named_target` knows."""
    return tuple(_TARGETS.values())


def named_target(name: str) -> GpuTarget:
    """Return the target called `name`: an arch (`sm_90`), a device name (`NVIDIA H200`) or its short form (`H200`).

    Raises:
        InputError: if nothing is called so; the message lists what is known.
    """
    wanted = name.strip().lower()
    for short, target in _TARGETS.items():
        if wanted in (target.arch, target.device_name.lower(), short.lower()):
            return target
    known = ", ".join(f"{short} ({target.device_name}, {target.arch})" for short, target in _TARGETS.items())
    raise InputError(f"unknown target {name!r}; known: {known}")
