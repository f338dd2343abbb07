from __future__ import annotations

import dataclasses
import itertools
import json
import typing

import hypothesis
import hypothesis.strategies
import pytest

from flashgen.codegen import TritonDecodeConfig
from flashgen.errors import InputError
from flashgen.registry import Interval, MeasuredRange, RegistryEntry, compare, merge
from flashgen.registry.codec import entry_from_dict
from flashgen.spec import AttentionSpec, DType, Problem, Shape, parse_mask
from flashgen.spec.mods import parse_mod
from flashgen.spec.rates import tbps


def test_range_covers_its_bounds_and_nothing_beyond() -> None:
    measured = MeasuredRange(
        batch=Interval(lo=1, hi=4),
        nheads_q=Interval(lo=32, hi=32),
        nheads_kv=Interval(lo=8, hi=32),
        seqlen_q=Interval(lo=1024, hi=4096),
        seqlen_k=Interval(lo=1024, hi=4096),
    )
    inside = Shape(batch=4, seqlen_q=1024, seqlen_k=4096, nheads_q=32, nheads_kv=8)
    assert measured.covers(inside)
    outside = {"batch": 5, "seqlen_q": 1023, "seqlen_k": 4097, "nheads_q": 64, "nheads_kv": 4}
    for name, size in outside.items():
        assert not measured.covers(dataclasses.replace(inside, **{name: size})), name
    assert MeasuredRange.of(inside).covers(inside)


def test_values_that_mean_nothing_are_refused(make_entry) -> None:
    entry = make_entry()
    with pytest.raises(InputError, match=r"\[5, 4\]"):
        Interval(lo=5, hi=4)
    with pytest.raises(InputError, match="tuning_key"):
        dataclasses.replace(entry, spec=dataclasses.replace(entry.spec, lse=True))
    with pytest.raises(InputError, match="median_us"):
        dataclasses.replace(entry.performance, median_us=float("nan"))
    for date in ("2026-11-22", "2026-11-22 07:00:00Z", "2026-11-22T07:00:00", "2026-13-22T07:00:00Z"):
        with pytest.raises(InputError, match="UTC"):
            dataclasses.replace(entry.provenance, date=date)


def test_numbers_are_rounded_where_they_are_made(make_entry) -> None:
    entry = make_entry(median_us=123.456)
    assert entry.performance.median_us == 123.5
    assert entry.accuracy.max_error == 1.235e-05
    assert entry.digest() == make_entry(median_us=123.45).digest()


def test_digest_changes_with_every_field(make_entry) -> None:
    entry = make_entry()
    changed = [
        dataclasses.replace(entry, device_name="NVIDIA H100"),
        dataclasses.replace(entry, origin="predicted"),
        dataclasses.replace(entry, runners_up=()),
        dataclasses.replace(entry, config=dataclasses.replace(entry.config, num_warps=4)),
        dataclasses.replace(entry, provenance=dataclasses.replace(entry.provenance, seed=1)),
    ]
    assert len({e.digest() for e in [entry, *changed]}) == 1 + len(changed)


def test_every_field_of_an_entry_survives_the_codec(make_entry) -> None:
    entry = make_entry()
    assert entry_from_dict(entry.as_dict()) == entry
    assert entry_from_dict(json.loads(json.dumps(entry.as_dict()))) == entry


@pytest.mark.parametrize("field", dataclasses.fields(AttentionSpec), ids=lambda field: field.name)
def test_every_field_of_a_spec_makes_another_entry(make_entry, field) -> None:
    # A field added to the spec must be written too, or two specs would share a winner.
    other = {
        "dtype": DType.TF32,
        "head_dim_qk": 96,
        "head_dim_v": 96,
        "mask": parse_mask("sliding_window(127,0)&document"),
        "score_mod": parse_mod("score_mod('return score * 0.5')"),
        "bias": "fp32",
    }
    entry = make_entry()
    if field.name == "deterministic":
        entry = dataclasses.replace(entry, spec=entry.spec.backward())
    if field.name in ("fp8_kv", "shared_kv"):
        spec = dataclasses.replace(entry.spec, phase="decode")
        config = TritonDecodeConfig(block_m=16, block_n=64, num_warps=4, num_stages=2)
        entry = dataclasses.replace(entry, spec=spec, config=config)
    dropped = ("phase", "lse", "sinks", "seqused", "descale", "bias_aligned", "dbias")
    of_decode = ("page_size", "append", "rotary", "rotary_fp32", "leftpad", "batch_idx")
    if field.name in (*dropped, *of_decode):
        assert field.name not in entry.as_dict()["spec"]
        return
    changed = dataclasses.replace(
        entry, spec=dataclasses.replace(entry.spec, **{field.name: other.get(field.name, True)})
    )
    assert changed.digest() != entry.digest()
    assert changed.key() != entry.key()
    assert entry_from_dict(json.loads(json.dumps(changed.as_dict()))) == changed


def test_default_meaning_is_not_written(make_entry) -> None:
    assert [*make_entry().as_dict()["spec"]] == ["dtype", "head_dim_qk", "head_dim_v", "mask"]


def test_merge_prefers_measured_then_later_then_smaller_digest(make_entry) -> None:
    old = make_entry(date="2026-11-22T07:00:00Z", median_us=10)
    later = make_entry(date="2026-11-22T07:00:01Z", median_us=20)
    predicted = make_entry(date="2027-01-01T00:00:00Z", median_us=1, origin="predicted")
    assert merge([old], [later]) == (later,)
    assert merge([later], [predicted]) == (later,)
    twin = make_entry(date="2026-11-22T07:00:00Z", median_us=11)
    assert merge([old], [twin]) == (min(old, twin, key=RegistryEntry.digest),)


@hypothesis.settings(
    deadline=None,
    database=None,
    max_examples=100,
    suppress_health_check=[hypothesis.HealthCheck.function_scoped_fixture],
)
@hypothesis.given(rng=hypothesis.strategies.randoms(use_true_random=False))
def test_merge_is_a_semilattice_that_loses_no_key(random_entries, rng) -> None:
    a, b, c = (random_entries(rng, rng.randrange(8)) for _ in range(3))
    merged = merge(a, b)
    assert merged == merge(b, a)
    assert merge(merged, c) == merge(a, merge(b, c))
    assert merge(merged, merged) == merged == merge(merged, a)
    assert {e.key() for e in merged} == {e.key() for e in itertools.chain(a, b)}
    # Of each key the best of all that were given, whatever was merged in between.
    everything = merge(merged, c)
    for entry in (*a, *b, *c):
        (kept,) = (e for e in everything if e.key() == entry.key())
        assert (kept.origin == "measured", kept.provenance.date) >= (entry.origin == "measured", entry.provenance.date)
    # Nothing differs from itself, and what differs is what merging changes.
    assert compare(everything, everything) == ()
    assert {d.kind for d in compare(a, everything)} <= {"added", "changed"}


def test_tflops_that_count_every_pair_say_so(make_entry: typing.Callable[..., RegistryEntry]) -> None:
    entry = make_entry()
    assert entry.tflops_text == f"{entry.performance.tflops:g}"
    documents = dataclasses.replace(entry, spec=dataclasses.replace(entry.spec, mask=parse_mask("causal&document")))
    assert documents.tflops_text == f"at most {entry.performance.tflops:g}"


def decoding(entry: RegistryEntry, mask: str = "full", **sizes: Interval) -> RegistryEntry:
    return dataclasses.replace(
        entry,
        spec=dataclasses.replace(entry.spec, phase="decode", mask=parse_mask(mask)),
        range=dataclasses.replace(entry.range, seqlen_q=Interval(lo=1, hi=1), **sizes),
        config=TritonDecodeConfig(block_m=16, block_n=64, num_warps=4, num_stages=2),
    )


def test_rates_of_decoding_are_in_bytes_too(make_entry: typing.Callable[..., RegistryEntry]) -> None:
    entry = decoding(make_entry(median_us=20.0))
    read, written = 2 * 4 * 4096 * 8 * 128 * 2 + 4 * 32 * 128 * 2, 4 * 32 * 128 * 2
    assert entry.tbps == pytest.approx((read + written) / 20e6, rel=1e-3)
    assert entry.tbps == pytest.approx(tbps(Problem(spec=entry.spec, shape=entry.range.smallest()), 20.0), rel=1e-3)
    assert entry.tbps_text == "3.36"
    # Only the keys inside the window are read.
    assert decoding(entry, "sliding_window(1023,0)").tbps_text == "0.84"
    assert "tbps" not in entry.as_dict()["performance"]


def test_no_bytes_are_told_of_other_phases_several_sizes_or_no_shape(
    make_entry: typing.Callable[..., RegistryEntry],
) -> None:
    entry = make_entry()
    for other in (
        entry,
        decoding(entry, seqlen_k=Interval(lo=1024, hi=4096)),
        decoding(entry, nheads_kv=Interval(lo=5, hi=5)),
        decoding(make_entry(median_us=0.0)),
    ):
        assert other.tbps is None
        assert other.tbps_text == "-"
