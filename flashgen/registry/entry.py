"""One tuned winner: what it computes, where and on which sizes it was measured, how fast, and how it came to be."""

from __future__ import annotations

import dataclasses
import datetime
import hashlib
import json
import math
import typing

from flashgen.codegen.kernel_config import KernelConfig
from flashgen.codegen.kernel_resources import KernelResources
from flashgen.errors import InputError
from flashgen.spec import AttentionSpec, Problem, Shape
from flashgen.spec.rates import tbps

Origin = typing.Literal["measured", "predicted"]
ORIGINS: tuple[Origin, ...] = typing.get_args(Origin)

SIGNIFICANT_DIGITS = 4
"""Digits kept of every measured number: more than timing can tell apart, few enough to review."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Interval:
    """The whole numbers from `lo` to `hi`, both included."""

    lo: int
    hi: int

    def __post_init__(self) -> None:
        if not 0 <= self.lo <= self.hi:
            raise InputError(f"an interval needs 0 <= lo <= hi, got [{self.lo}, {self.hi}]")

    def __contains__(self, value: int) -> bool:
        return self.lo <= value <= self.hi

    def __str__(self) -> str:
        return str(self.lo) if self.lo == self.hi else f"{self.lo}..{self.hi}"


@dataclasses.dataclass(frozen=True, kw_only=True)
class MeasuredRange:
    """The sizes an entry was measured on; outside them it is a neighbour, not a match."""

    batch: Interval
    nheads_q: Interval
    nheads_kv: Interval
    seqlen_q: Interval
    seqlen_k: Interval

    @classmethod
    def of(cls, shape: Shape) -> MeasuredRange:
        """Return the range that holds `shape` and nothing else."""
        sizes = {name: getattr(shape, name) for name in RANGE_AXES}
        return cls(**{name: Interval(lo=size, hi=size) for name, size in sizes.items()})

    def covers(self, shape: Shape) -> bool:
        """Return whether every size of `shape` lies inside."""
        return all(getattr(shape, name) in getattr(self, name) for name in RANGE_AXES)

    def smallest(self) -> Shape:
        """Return the shape of the smallest sizes, which stands for the range.

        Raises:
            InputError: if these are no shape.
        """
        sizes: dict[str, int] = {name: getattr(self, name).lo for name in RANGE_AXES}
        return Shape(**sizes)

    def only(self) -> Shape | None:
        """Return the one shape that the range holds, or None."""
        if any(lo != hi for lo, hi in self.bounds()):
            return None
        try:
            return self.smallest()
        except InputError:
            return None

    def bounds(self) -> tuple[tuple[int, int], ...]:
        """Return (lo, hi) of each axis, in the order of the fields; what ranges are sorted by."""
        return tuple((getattr(self, name).lo, getattr(self, name).hi) for name in RANGE_AXES)

    def __str__(self) -> str:
        return (
            f"b={self.batch} hq={self.nheads_q} hkv={self.nheads_kv} sq={self.seqlen_q} sk={self.seqlen_k}"  # as Shape
        )


RANGE_AXES: tuple[str, ...] = tuple(field.name for field in dataclasses.fields(MeasuredRange))


@dataclasses.dataclass(frozen=True, kw_only=True)
class Performance:
    """How fast; numbers are rounded to `SIGNIFICANT_DIGITS`.

    Attributes:
        median_us: median time of one launch; for a predicted entry, what the model expects.
        spread: interquartile range over the median.
        tflops: useful TFLOP/s at the median; at most, where only data can tell how many pairs a mask shows.
        baseline: what was timed beside it.
        baseline_us: its median, or None if nothing was.
        timing: how the clock was held, for example `cold-l2`.
    """

    median_us: float
    spread: float
    tflops: float
    baseline: str
    baseline_us: float | None
    timing: str

    def __post_init__(self) -> None:
        _round_fields(self, "median_us", "spread", "tflops", "baseline_us")

    @property
    def spread_us(self) -> float:
        """The interval that the middle half of the timings lies in, from end to end, in us; 0 if there was one only."""
        return float(f"{self.spread * self.median_us:.{SIGNIFICANT_DIGITS}g}")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Accuracy:
    """Largest error against the float64 reference, and the error that the rule allows; rounded."""

    max_error: float
    allowed_error: float

    def __post_init__(self) -> None:
        _round_fields(self, "max_error", "allowed_error")


@dataclasses.dataclass(frozen=True, kw_only=True)
class RunnerUp:
    """A config that came close: raced again before a new search is paid for."""

    config: KernelConfig
    median_us: float

    def __post_init__(self) -> None:
        _round_fields(self, "median_us")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Provenance:
    """How an entry came to be.

    Attributes:
        template_digest: digest of the template that was measured; another digest makes the entry stale.
        flashgen: version of flashgen.
        triton: version of Triton.
        torch: version of torch.
        driver: version of the GPU driver.
        date: UTC time to the second, `2026-11-22T07:00:00Z`; the later of two entries wins.
        trials: configs that were evaluated.
        seed: seed of the search.
    """

    template_digest: str
    flashgen: str
    triton: str
    torch: str
    driver: str
    date: str
    trials: int
    seed: int

    def __post_init__(self) -> None:
        try:
            parsed = datetime.datetime.fromisoformat(self.date.removesuffix("Z"))
        except ValueError:
            parsed = None
        # One spelling only, so that comparing the text compares the time.
        if parsed is None or parsed.isoformat(timespec="seconds") + "Z" != self.date:
            raise InputError(f"date must be UTC to the second, as in '2026-11-22T07:00:00Z', got {self.date!r}")


EntryKey = tuple[str, str, AttentionSpec, MeasuredRange]


@dataclasses.dataclass(frozen=True, kw_only=True)
class RegistryEntry:
    """A tuned winner.

    Attributes:
        device_name: GPU as the driver says it.
        arch: `sm_90`, ...
        spec: what it computes; always a `tuning_key()`.
        range: the sizes it was measured on.
        config: the winner.
        origin: `measured` on the device, or `predicted` by a model.
        resources: of the winner.
        performance: of the winner.
        accuracy: of the winner.
        runners_up: the next best configs, best first.
        provenance: versions, time and effort.
    """

    device_name: str
    arch: str
    spec: AttentionSpec
    range: MeasuredRange
    config: KernelConfig
    origin: Origin
    resources: KernelResources
    performance: Performance
    accuracy: Accuracy
    runners_up: tuple[RunnerUp, ...]
    provenance: Provenance

    def __post_init__(self) -> None:
        if self.spec != self.spec.tuning_key():
            raise InputError(f"an entry is kept under spec.tuning_key(), got {self.spec}")
        if self.origin not in ORIGINS:
            raise InputError(f"origin must be one of {', '.join(ORIGINS)}, got {self.origin!r}")

    def key(self) -> EntryKey:
        """Return what makes two entries the same: device, arch, spec and range."""
        return self.device_name, self.arch, self.spec, self.range

    @property
    def tflops_text(self) -> str:
        """TFLOP/s in words: at most so many where only data can tell how many pairs the mask shows."""
        return f"{'' if self.spec.mask.by_formula else 'at most '}{self.performance.tflops:g}"

    @property
    def tbps(self) -> float | None:
        """TB/s of decoding, which bytes bound, at the median; None of other phases, of several sizes and of no time."""
        shape, us = self.range.only(), self.performance.median_us
        if self.spec.phase != "decode" or shape is None or not us:
            return None
        return float(f"{tbps(Problem(spec=self.spec, shape=shape), us):.{SIGNIFICANT_DIGITS}g}")

    @property
    def tbps_text(self) -> str:
        """TB/s in words, or `-`."""
        return "-" if self.tbps is None else f"{self.tbps:.2f}"

    def as_dict(self) -> dict[str, object]:
        """Return the content as plain values, in the order they are written; `codec.entry_from_dict` reads it."""
        return {
            "device": self.device_name,
            "arch": self.arch,
            "phase": self.spec.phase,
            "spec": _spec_as_dict(self.spec),
            "range": {name: list(pair) for name, pair in zip(RANGE_AXES, self.range.bounds(), strict=True)},
            "origin": self.origin,
            "config": self.config.as_dict(),
            "performance": dataclasses.asdict(self.performance),
            "accuracy": dataclasses.asdict(self.accuracy),
            "resources": dataclasses.asdict(self.resources),
            "runners_up": [{"median_us": r.median_us, "config": r.config.as_dict()} for r in self.runners_up],
            "provenance": dataclasses.asdict(self.provenance),
        }

    def digest(self) -> str:
        """Return 16 hex digits that change with any part of the content."""
        return digest_of(self.as_dict())


def _spec_as_dict(spec: AttentionSpec) -> dict[str, object]:
    # What is absent has its default: entries older than a feature keep their digest.
    content: dict[str, object] = {
        "dtype": spec.dtype.value,
        "head_dim_qk": spec.head_dim_qk,
        "head_dim_v": spec.head_dim_v,
        "mask": str(spec.mask),
    }
    if spec.score_mod is not None:
        content["score_mod"] = str(spec.score_mod)
    if spec.features:
        content["features"] = list(spec.features)
    return content


def digest_of(content: typing.Mapping[str, object]) -> str:
    """Return the first 16 hex digits of the SHA-256 of `content` as canonical JSON."""
    text = json.dumps(content, sort_keys=True, separators=(",", ":"), allow_nan=False)
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def _round_fields(owner: Performance | Accuracy | RunnerUp, *names: str) -> None:
    for name in names:
        value = getattr(owner, name)
        if value is None:
            continue
        if not (math.isfinite(value) and value >= 0):
            raise InputError(f"{name} must be a finite number of at least 0, got {value!r}")
        # Rounded where the value is born: what is written and read back is then equal to what was made.
        object.__setattr__(owner, name, float(f"{value:.{SIGNIFICANT_DIGITS}g}"))
