"""What an entry says for other sizes, or another mask, than it was measured on.

Of a winner, the kernel carries over; the numbers of its launch say how many heads' keys and values share the L2 cache,
and so belong to the sizes. What an entry tells beyond that is whether the default was right where it was measured.
Where it was, the default for the problem that is asked for is the choice; and where the default for that is another
kernel than the one that was beaten, too: then the heuristics draw a line between both, and the entry says nothing of
the other side.
"""

from __future__ import annotations

import dataclasses
import math

from flashgen.codegen import HopperForwardConfig, KernelConfig, TritonBackwardConfig, TritonDecodeConfig
from flashgen.codegen.constraints import check_config, shape_refusal
from flashgen.errors import InputError
from flashgen.heuristics import default_configs
from flashgen.heuristics.decode import gathering
from flashgen.registry import RegistryEntry
from flashgen.spec import Problem, Shape
from flashgen.target import GpuTarget

# Keys of one query head's share, measured over asked, in powers of two: up to here launch numbers are those measured.
_SAME_SHARE = 1.0

_AS_DEFAULT = "the default for this problem, as the default for its own won there"
_OTHER_KIND = "the default for this problem, which is another kernel than the default that was beaten there"
_DISPUTED = "the default for this problem, whose kernel won at [{range}], on the other side"


@dataclasses.dataclass(frozen=True, kw_only=True)
class Carried:
    """A config for a problem, from an entry.

    Attributes:
        config: what to run.
        change: how it differs from the entry's own config, or empty.
    """

    config: KernelConfig
    change: str = ""


def carried(
    entry: RegistryEntry, problem: Problem, target: GpuTarget, opposite: RegistryEntry | None = None
) -> Carried:
    """Return what an entry says for a problem that it may not have been measured on.

    Args:
        entry: for the problem's spec, or one like it.
        problem: what is asked for.
        target: for which GPU.
        opposite: the next entry for the spec on the other side of the problem's lengths. Where the default's kernel
            won there, and another here, nobody knows which of them wins in between: then it is the default.
    """
    own = Carried(config=entry.config)
    if entry.spec == problem.spec.tuning_key() and entry.range.covers(problem.shape):
        return own
    measured, default = _measured(entry), _first_default(problem, target)
    if measured is None or default is None:
        return own
    default_there = _first_default(measured, target)
    if entry.config == default_there:
        return Carried(config=default, change=_AS_DEFAULT) if default != entry.config else own
    if not _same_kernel(default, default_there):
        return Carried(config=default, change=_OTHER_KIND)
    if opposite is not None and not _same_kernel(entry.config, default_there) and _is_default(opposite, target):
        return Carried(config=default, change=_DISPUTED.format(range=opposite.range))
    return _refitted(entry.config, measured, problem, target)


def by_pointers(config: KernelConfig, page_size: int) -> KernelConfig | None:
    """Return what an entry of decoding says where its descriptors cannot read the caches; None of other entries.

    Pages of less than a tile are such, whose keys are gathered one by one, and strides of no whole 16 bytes.
    """
    if not isinstance(config, TritonDecodeConfig) or config.loads != "descriptor":
        return None
    pointers = dataclasses.replace(config, loads="pointer")
    return gathering(pointers) if page_size % config.block_n else pointers


def _is_default(entry: RegistryEntry, target: GpuTarget) -> bool:
    measured = _measured(entry)
    return measured is not None and _same_kernel(entry.config, _first_default(measured, target))


def _measured(entry: RegistryEntry) -> Problem | None:
    try:
        return Problem(spec=entry.spec, shape=entry.range.smallest())
    except InputError:
        return None


def _same_kernel(config: KernelConfig, other: KernelConfig | None) -> bool:
    return other is not None and config.kernel() == other.kernel()


def _refitted(config: KernelConfig, measured: Problem, problem: Problem, target: GpuTarget) -> Carried:
    own = Carried(config=config)
    if not isinstance(config, HopperForwardConfig | TritonBackwardConfig):
        # No rule is known for the others: their defaults launch one head after the other, or divide keys on the device.
        return own
    apart = abs(math.log2(_share(measured.shape) / _share(problem.shape)))
    # Of gradients, the defaults launch as many heads together under every mask.
    other_mask = measured.spec.mask.structure() != problem.spec.mask.structure()
    if apart <= _SAME_SHARE and not (other_mask and isinstance(config, HopperForwardConfig)):
        return own
    like = next((c for c in default_configs(problem, target) if c.template == config.template), None)
    if like is None:
        return own
    names = [name for name in ("head_group", "tail_heads") if hasattr(config, name)]
    fitted = dataclasses.replace(config, **{name: getattr(like, name) for name in names})
    if fitted == config:
        return own
    numbers = ", ".join(f"{name} {getattr(fitted, name)} for {getattr(config, name)}" for name in names)
    return Carried(config=fitted, change=f"{numbers}: numbers of the launch that follow the sizes")


def _share(shape: Shape) -> float:
    return max(1, shape.seqlen_k) / shape.group


def _first_default(problem: Problem, target: GpuTarget) -> KernelConfig | None:
    for config in default_configs(problem, target):
        if not check_config(config, problem.spec, target) and not shape_refusal(config, problem.shape):
            return config
    return None
