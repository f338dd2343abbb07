"""The GPU at hand as a target, from what PyTorch says of it."""

from __future__ import annotations

import types
from collections.abc import Callable, Iterator

import pytest
import torch
import triton

import flashgen
from flashgen.errors import InputError
from flashgen.launch import detect_target, software_versions
from flashgen.target import named_target

DEVICE = torch.device("cuda", 0)


@pytest.fixture
def device_is(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[..., None]]:
    """A function that makes PyTorch describe a device."""

    def describe(name: str, major: int = 9, minor: int = 0, hip: str | None = None, **properties: object) -> None:
        detect_target.cache_clear()
        values = {"name": name, "major": major, "minor": minor, "multi_processor_count": 120}
        values |= {"max_threads_per_multi_processor": 2048, **properties}
        monkeypatch.setattr(torch.version, "hip", hip)
        monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: types.SimpleNamespace(**values))

    detect_target.cache_clear()
    yield describe
    detect_target.cache_clear()


def test_a_known_device_keeps_its_rates_and_has_its_own_limits(device_is: Callable[..., None]) -> None:
    device_is("NVIDIA H200", shared_memory_per_block_optin=200_000, regs_per_multiprocessor=65536)
    target = detect_target(DEVICE)
    known = named_target("H200")
    assert (target.device_name, target.arch) == ("NVIDIA H200", "sm_90")
    assert (target.bandwidth_gbs, target.tflops_16bit) == (known.bandwidth_gbs, known.tflops_16bit)
    assert (target.num_sms, target.smem_bytes) == (120, 200_000)


def test_an_unknown_device_of_a_known_architecture(device_is: Callable[..., None]) -> None:
    device_is("NVIDIA H20", multi_processor_count=78)
    target = detect_target(DEVICE)
    assert (target.device_name, target.arch, target.num_sms) == ("NVIDIA H20", "sm_90", 78)
    assert target.smem_bytes == named_target("sm_90").smem_bytes


def test_amd(device_is: Callable[..., None]) -> None:
    device_is("AMD Instinct MI300X", hip="6.4", gcnArchName="gfx942:sramecc+:xnack-")
    assert detect_target(DEVICE).arch == "gfx942"


def test_an_unknown_architecture(device_is: Callable[..., None]) -> None:
    device_is("Tesla T4", 7, 5)
    with pytest.raises(InputError, match="unknown target 'sm_75'; known: A100"):
        detect_target(DEVICE)


def test_a_cpu_is_no_gpu() -> None:
    with pytest.raises(InputError, match=r"cpu is not a GPU; name a target instead"):
        detect_target(torch.device("cpu"))


def test_versions() -> None:
    versions = software_versions()
    assert (versions.flashgen, versions.triton, versions.torch) == (
        flashgen.__version__,
        triton.__version__,
        torch.__version__,
    )
    assert (versions.driver != "none") == torch.cuda.is_available()
