"""The GPU at hand as a `GpuTarget`, and the software that drives it."""

from __future__ import annotations

import dataclasses
import functools

import torch
import triton

import flashgen
from flashgen.errors import InputError
from flashgen.target import GpuTarget, Software, known_targets, named_target


@functools.lru_cache(maxsize=64)
def detect_target(device: torch.device) -> GpuTarget:
    """Return the target of a CUDA or ROCm device: the table's entry of that name, with the device's own limits.

    Raises:
        InputError: for a CPU device, or a GPU of an architecture that no entry describes.
    """
    if device.type != "cuda":
        raise InputError(f"{device} is not a GPU; name a target instead, for example named_target('sm_90')")
    properties = torch.cuda.get_device_properties(device)
    if torch.version.hip is not None:
        arch = properties.gcnArchName.split(":")[0]
    else:
        arch = f"sm_{properties.major}{properties.minor}"
    same_name = [t for t in known_targets() if t.device_name == properties.name]
    base = same_name[0] if same_name else named_target(arch)
    return dataclasses.replace(
        base,
        arch=arch,
        device_name=properties.name,
        num_sms=properties.multi_processor_count,
        smem_bytes=getattr(properties, "shared_memory_per_block_optin", base.smem_bytes),
        smem_per_sm_bytes=getattr(properties, "shared_memory_per_multiprocessor", base.smem_per_sm_bytes),
        registers_per_sm=getattr(properties, "regs_per_multiprocessor", base.registers_per_sm),
        max_threads_per_sm=properties.max_threads_per_multi_processor,
    )


@functools.lru_cache(maxsize=1)
def software_versions() -> Software:
    """Return the versions of flashgen, Triton, PyTorch and, where a GPU is, its driver."""
    return Software(
        flashgen=flashgen.__version__,
        triton=triton.__version__,
        torch=str(torch.__version__),
        driver=_driver_version(),
    )


def _driver_version() -> str:
    if not torch.cuda.is_available():
        return "none"
    # The kernel module's own file first: NVML says the same, and starting it takes the first call milliseconds.
    return _driver_file_version() or _nvml_version() or "unknown"


def _nvml_version() -> str | None:
    # NVML's version string ("580.159.04") names the driver; the CUDA API number does not.
    try:
        import pynvml
    except ImportError:
        return None
    try:
        pynvml.nvmlInit()
        version = pynvml.nvmlSystemGetDriverVersion()
    except pynvml.NVMLError:
        return None
    return version if isinstance(version, str) else version.decode()


def _driver_file_version() -> str | None:
    for path in ("/proc/driver/nvidia/version", "/sys/module/nvidia/version", "/sys/module/amdgpu/version"):
        try:
            with open(path, encoding="utf-8") as file:
                words = file.readline().split()
        except OSError:
            continue
        numbers = [word for word in words if word.replace(".", "").isdigit() and "." in word]
        if numbers:
            return numbers[0]
    return None
