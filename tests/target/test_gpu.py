"""GPUs by name."""

from __future__ import annotations

import dataclasses

import pytest

from flashgen.errors import InputError
from flashgen.target import known_targets, named_target


@pytest.mark.parametrize(
    ("name", "arch", "device_name"),
    [
        ("sm_80", "sm_80", "NVIDIA A100-SXM4-80GB"),
        ("sm_90", "sm_90", "NVIDIA H100 80GB HBM3"),
        ("H100", "sm_90", "NVIDIA H100 80GB HBM3"),
        ("H200", "sm_90", "NVIDIA H200"),
        ("nvidia h200", "sm_90", "NVIDIA H200"),
        (" h200 ", "sm_90", "NVIDIA H200"),
        ("A100", "sm_80", "NVIDIA A100-SXM4-80GB"),
        ("sm_100", "sm_100", "NVIDIA B200"),
        ("B200", "sm_100", "NVIDIA B200"),
        ("sm_120", "sm_120", "NVIDIA GeForce RTX 5090"),
        ("gfx942", "gfx942", "AMD Instinct MI300X"),
        ("MI300X", "gfx942", "AMD Instinct MI300X"),
        ("gfx950", "gfx950", "AMD Instinct MI355X"),
    ],
)
def test_named_targets(name: str, arch: str, device_name: str) -> None:
    target = named_target(name)
    assert (target.arch, target.device_name) == (arch, device_name)


def test_every_known_target_answers_to_its_own_name() -> None:
    for target in known_targets():
        assert named_target(target.device_name) is target
        assert named_target(target.arch).arch == target.arch


@pytest.mark.parametrize("name", ["sm_75", "sm_9", "H20", "", "00"])
def test_unknown_name_lists_all_that_are_known(name: str) -> None:
    with pytest.raises(InputError) as caught:
        named_target(name)
    message = str(caught.value)
    assert f"unknown target {name!r}" in message
    assert all(target.arch in message and target.device_name in message for target in known_targets())


@pytest.mark.parametrize(
    ("arch", "backend", "capability", "has_tma", "has_wgmma", "warp_size"),
    [
        ("sm_80", "cuda", 80, False, False, 32),
        ("sm_90", "cuda", 90, True, True, 32),
        ("sm_100", "cuda", 100, True, False, 32),
        ("sm_120", "cuda", 120, True, False, 32),
        ("gfx942", "hip", 0, False, False, 64),
        ("gfx950", "hip", 0, False, False, 64),
    ],
)
def test_features(arch: str, backend: str, capability: int, has_tma: bool, has_wgmma: bool, warp_size: int) -> None:
    target = named_target(arch)
    assert (target.backend, target.capability) == (backend, capability)
    assert (target.has_tma, target.has_wgmma, target.warp_size) == (has_tma, has_wgmma, warp_size)


def test_limits_are_those_of_the_vendors() -> None:
    # CUDA programming guide, technical specifications per compute capability: opt-in shared memory of a block.
    smem = {"sm_80": 163 * 1024, "sm_90": 227 * 1024, "sm_100": 227 * 1024, "sm_120": 99 * 1024}
    # CDNA 3 and CDNA 4 instruction set guides: LDS of a compute unit.
    smem |= {"gfx942": 64 * 1024, "gfx950": 160 * 1024}
    assert {t.arch: t.smem_bytes for t in known_targets()} == smem


def test_targets_are_values() -> None:
    target = named_target("H200")
    assert target == dataclasses.replace(target)
    assert str(target) == "NVIDIA H200 (sm_90)"
