"""What `flashgen doctor` looks at: each finding says what is there, and whether flashgen can do with it."""

from __future__ import annotations

import dataclasses
import importlib.metadata
import os
import platform
import re
import sys
import typing
from collections.abc import Iterator
from pathlib import Path

import flashgen
from flashgen import resources
from flashgen.errors import FlashgenError
from flashgen.registry import load, search_locations
from flashgen.spec import Extras, parse_problem
from flashgen.target import GpuTarget, named_target

State = typing.Literal["ok", "note", "missing"]

# Oldest versions that pyproject.toml allows.
_NEEDED = {"torch": (2, 11), "triton": (3, 6), "optuna": (4, 2), "numpy": (0,)}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Finding:
    """One thing that was looked at.

    Attributes:
        name: what it is.
        value: what was found.
        state: `missing` if flashgen needs something else, `note` if it only does less.
    """

    name: str
    value: str
    state: State = "ok"


def examine(registry: Path | None) -> Iterator[Finding]:
    """Yield every finding about this machine."""
    yield Finding(name="machine", value=f"{platform.system()} {platform.machine()}, {os.cpu_count()} cores")
    yield Finding(name="python", value=f"{platform.python_version()} at {sys.executable}")
    yield Finding(name="flashgen", value=f"{flashgen.__version__} at {Path(flashgen.__file__).parent}")
    packages = [_package(name, needed) for name, needed in _NEEDED.items()]
    yield from packages
    yield from (_folder(name, path) for name, path in _folders())
    yield from _registries(registry)
    if all(package.state == "ok" for package in packages):
        yield quarantine_finding()
        targets = []
        for finding, target in _gpus():
            yield finding
            targets += [target] if target else []
        yield _compiler(targets[0] if targets else named_target("sm_90"))
        yield interpreter_finding()


def _package(name: str, needed: tuple[int, ...]) -> Finding:
    # By the module's name: ROCm's Triton, for one, is a distribution of another.
    distributions = importlib.metadata.packages_distributions().get(name)
    if not distributions:
        return Finding(name=name, value=f"not installed; pip install {name}", state="missing")
    version = importlib.metadata.version(distributions[0])
    numbers = tuple(map(int, re.findall(r"\d+", version)[:2]))
    if numbers < needed:
        oldest = ".".join(map(str, needed))
        return Finding(name=name, value=f"{version}, needs {oldest}; pip install -U {name}", state="missing")
    return Finding(name=name, value=version)


def _folders() -> tuple[tuple[str, Path], ...]:
    return (("cache folder", resources.cache_dir()), ("user registry", resources.user_registry_dir()))


def _folder(name: str, path: Path) -> Finding:
    # Looking must not create it: its nearest ancestor says whether it could be.
    existing = next(parent for parent in (path, *path.parents) if parent.exists())
    if existing.is_dir() and os.access(existing, os.W_OK | os.X_OK):
        return Finding(name=name, value=str(path) + ("" if existing == path else " (not made yet)"))
    return Finding(name=name, value=f"{path} cannot be written (at {existing})", state="missing")


def _registries(explicit: Path | None) -> Iterator[Finding]:
    for location in search_locations(explicit):
        registry = load((location,))
        count = len(registry.entries())
        yield Finding(name=f"registry ({location.label})", value=f"{count} entries in {location.path}")
        for issue in registry.issues:
            yield Finding(name="skipped", value=str(issue), state="note")


def quarantine_finding() -> Finding:
    """Return how many kernels hung or killed a process, and where that is remembered."""
    from flashgen.tuning.quarantine import default_quarantine, read_offences

    path = default_quarantine()
    offences, issue = read_offences(path)
    if issue:
        return Finding(name="quarantine", value=issue, state="note")
    if not offences:
        return Finding(name="quarantine", value=f"no config hung or killed a process (it would be in {path})")
    value = f"{len(offences)} kernels hung or killed a process; remembered in {path}, remove it to try them again"
    return Finding(name="quarantine", value=value, state="note")


def _gpus() -> Iterator[tuple[Finding, GpuTarget | None]]:
    import torch

    from flashgen.launch import detect_target, software_versions

    if not torch.cuda.is_available():
        value = "none: tuning ranks candidates by a model, bench is not possible"
        yield Finding(name="GPU", value=value, state="note"), None
        return
    for index in range(torch.cuda.device_count()):
        try:
            target = detect_target(torch.device("cuda", index))
        except FlashgenError as error:
            yield Finding(name=f"cuda:{index}", value=str(error), state="missing"), None
            continue
        value = f"{target}, {target.num_sms} multiprocessors, {target.smem_bytes} bytes of shared memory"
        yield Finding(name=f"cuda:{index}", value=value), target
    yield Finding(name="driver", value=software_versions().driver or "unknown"), None
    if torch.version.hip is not None:
        value = f"{torch.version.hip}: pointer loads only; cuDNN and FlashAttention-3 are no peers here"
        yield Finding(name="ROCm", value=value, state="note"), None


def _compiler(target: GpuTarget) -> Finding:
    """Compile the safest kernel: Triton, its assembler and the cache folder all have to work."""
    from flashgen.codegen import render
    from flashgen.compile import compile_kernel
    from flashgen.heuristics.forward import safe_configs

    spec, config = parse_problem("h=1 s=16 d=16 fp16").spec, safe_configs()[-1]
    try:
        compile_kernel(render(spec, config), spec, config, target)
    except (FlashgenError, OSError) as error:
        return Finding(name="compiler", value=_first_line(error), state="missing")
    return Finding(name="compiler", value=f"works for {target.arch}")


def interpreter_finding() -> Finding:
    """Interpret the safest kernel; some pairs of Triton and NumPy cannot."""
    from flashgen.heuristics.forward import safe_configs
    from flashgen.launch import interpret_forward
    from flashgen.measure import random_inputs

    problem = parse_problem("h=1 s=32 d=16 fp16")
    q, k, v = random_inputs(problem, device="cpu", seed=0)
    try:
        interpret_forward(q, k, v, problem=problem, config=safe_configs()[-1], extras=Extras(softmax_scale=0.25))
    except (FlashgenError, OSError) as error:
        return Finding(name="interpreter", value=_first_line(error), state="note")
    return Finding(name="interpreter", value="works")


def _first_line(error: Exception) -> str:
    return next(iter(str(error).splitlines()), repr(error))
