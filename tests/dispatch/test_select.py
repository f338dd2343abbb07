"""The ladder from a problem to a config."""

from __future__ import annotations

import dataclasses
import itertools
import typing
from collections.abc import Callable

import pytest

from flashgen.codegen import HopperForwardConfig, KernelConfig, TritonBackwardConfig, TritonForwardConfig
from flashgen.codegen.constraints import check_config, interpreter_refusal
from flashgen.dispatch import RUNGS, is_stale, select
from flashgen.errors import ConfigError, NoKernelError
from flashgen.heuristics import default_configs, safe_configs
from flashgen.registry import Registry, RegistryEntry, RunnerUp
from flashgen.spec import AttentionSpec, parse_problem
from flashgen.target import Software, named_target

MakeEntry = Callable[..., RegistryEntry]
MakeRegistry = Callable[..., Registry]

PROBLEM = parse_problem("b=4 hq=32 hkv=8 s=4096 d=128 causal bf16")
H200 = named_target("H200")
EMPTY = Registry(())


def config(number: int) -> TritonForwardConfig:
    """A legal config that no heuristic gives, one for each number."""
    return TritonForwardConfig(block_m=128, block_n=32, num_warps=8, num_stages=1, head_group=1000 + number)


def at(seqlen: int) -> str:
    return f"b=4 hq=32 hkv=8 s={seqlen} d=128 causal bf16"


def spec_of(words: str) -> AttentionSpec:
    return parse_problem(f"h=8 s=4096 d=128 {words}").spec


def ladder(make_entry: MakeEntry) -> dict[str, RegistryEntry]:
    other = Software(flashgen="0.1.0", triton="3.8.0", torch="2.13.0", driver="580.1")
    return {
        "exact": make_entry(config=config(1)),
        "other software": make_entry(config=config(2), software=other),
        "nearest": make_entry(8192, config=config(3)),
        "other device": make_entry(config=config(4), device_name="NVIDIA H100 80GB HBM3"),
        "other features": make_entry(config=config(6), spec=spec_of("prefix_lm(64)")),
        "predicted": make_entry(config=config(5), origin="predicted"),
    }


def test_rungs_in_order(make_entry: MakeEntry, make_registry: MakeRegistry, software: Software) -> None:
    entries = ladder(make_entry)
    # Worst first in the search path: the rung decides, not the place.
    names = list(reversed(entries))
    assert list(RUNGS) == ["explicit", *entries, "heuristic", "safe default"]
    while names:
        registry = make_registry(*(entries[name] for name in names))
        selection = select(PROBLEM, H200, registry=registry, software=software)
        best = names.pop()
        assert selection.rung == best
        assert selection.config == entries[best].config
        assert selection.entry == entries[best]
        assert selection.origin == entries[best].origin
        assert selection.path is not None
        # What was not taken is listed all the same; entries for other specs are not looked at before they are needed.
        assert [refusal.reason.split(",")[0] for refusal in selection.refused] == [
            f"ranks lower: {name}" for name in reversed(names) if name != "other features"
        ]
    selection = select(PROBLEM, H200, registry=EMPTY, software=software)
    assert selection.rung == "heuristic"
    assert (selection.entry, selection.path, selection.origin) == (None, None, None)


def test_a_prediction_never_outranks_a_measurement(
    make_entry: MakeEntry, make_registry: MakeRegistry, software: Software
) -> None:
    predicted = make_entry(config=config(1), origin="predicted")
    far = make_entry(16384, batch=1, config=config(2), device_name="NVIDIA H100 80GB HBM3")
    selection = select(PROBLEM, H200, registry=make_registry(predicted, far), software=software)
    assert (selection.rung, selection.config) == ("other device", config(2))


@pytest.mark.parametrize(("name", "rung"), [("triton", "other software"), ("driver", "other software")])
def test_versions_that_move_a_measurement(
    make_entry: MakeEntry, make_registry: MakeRegistry, software: Software, name: str, rung: str
) -> None:
    changed = dataclasses.replace(software, **{name: "other"})
    assert select(PROBLEM, H200, registry=make_registry(make_entry()), software=changed).rung == rung


@pytest.mark.parametrize("name", ["flashgen", "torch"])
def test_versions_that_do_not(
    make_entry: MakeEntry, make_registry: MakeRegistry, software: Software, name: str
) -> None:
    changed = dataclasses.replace(software, **{name: "other"})
    assert select(PROBLEM, H200, registry=make_registry(make_entry()), software=changed).rung == "exact"


def test_lse_finds_the_entry_of_the_spec_without(
    make_entry: MakeEntry, make_registry: MakeRegistry, software: Software
) -> None:
    problem = parse_problem(at(4096) + " lse")
    selection = select(problem, H200, registry=make_registry(make_entry()), software=software)
    assert selection.rung == "exact"
    assert selection.problem.spec.lse


@pytest.mark.parametrize(
    "text",
    [
        *("d=64 causal bf16", "d=128 causal fp16", "d=128 causal fp32", "d=128 causal tf32", "d=128 causal fp8"),
        *("d=128 dv=64 causal", "d=128 causal varlen bf16", "d=128 full varlen bf16"),
    ],
)
def test_another_family_is_never_taken(
    make_entry: MakeEntry, make_registry: MakeRegistry, software: Software, text: str
) -> None:
    problem = parse_problem(f"b=4 hq=32 hkv=8 s=4096 {text}")
    assert select(problem, H200, registry=make_registry(make_entry()), software=software).entry is None


@pytest.mark.parametrize(("measured", "asked"), [("fp32", "tf32"), ("tf32", "fp32"), ("bf16", "fp8")])
def test_how_products_are_computed_is_never_shared(
    make_entry: MakeEntry, make_registry: MakeRegistry, software: Software, measured: str, asked: str
) -> None:
    registry = make_registry(make_entry(spec=spec_of(f"causal {measured}")))
    problem = parse_problem(f"b=4 hq=32 hkv=8 s=4096 d=128 causal {asked}")
    assert select(problem, H200, registry=registry, software=software).entry is None


def test_other_features_say_what_differs(
    make_entry: MakeEntry, make_registry: MakeRegistry, software: Software
) -> None:
    registry = make_registry(make_entry(8192, spec=spec_of("causal"), config=config(1)))
    problem = parse_problem(f"{at(4096)} lse".replace("causal", "prefix_lm(64)"))
    selection = select(problem, H200, registry=registry, software=software)
    assert (selection.rung, selection.config, selection.distance) == ("other features", config(1), 2.0)
    difference = "measured on mask causal, not prefix_lm(64)"
    assert selection.differences == (difference,)
    text = str(selection)
    for part in ("other features: measured on this device for another mask", f"differs   {difference}"):
        assert part in text
    exact = select(parse_problem(at(8192)), H200, registry=registry, software=software)
    assert (exact.rung, exact.differences) == ("exact", ())
    assert "differs" not in str(exact)


def test_the_likest_features_win_then_the_nearest_sizes(
    make_entry: MakeEntry, make_registry: MakeRegistry, software: Software
) -> None:
    words = ("causal", "sliding_window(1023,0)", "sliding_window(255,0)", "sliding_window(127,0) alibi")
    entries = [make_entry(config=config(number), spec=spec_of(text)) for number, text in enumerate(words)]
    far = make_entry(16384, config=config(9), spec=spec_of(words[2]))
    problem = parse_problem("b=4 hq=32 hkv=8 s=4096 d=128 sliding_window(127,0)")
    selection = select(problem, H200, registry=make_registry(far, *entries), software=software)
    assert selection.config == config(2)
    # With alibi it is another kernel, which says nothing of this one.
    assert [refusal.candidate.split(" for ")[1] for refusal in selection.refused] == [
        *("sliding_window(255,0)", "sliding_window(1023,0)", "causal"),
    ]
    assert all(refusal.reason.startswith("ranks lower: other features, ") for refusal in selection.refused)


@pytest.mark.parametrize(
    "change",
    [
        {"device_name": "NVIDIA H100 80GB HBM3"},
        {"arch": "sm_100", "device_name": "NVIDIA B200"},
        {"origin": "predicted"},
        {"seqlen": 512},
        {"seqlen_q": 1},
    ],
    ids=str,
)
def test_other_features_are_of_this_device_measured_and_of_this_regime(
    make_entry: MakeEntry, make_registry: MakeRegistry, software: Software, change: dict[str, typing.Any]
) -> None:
    registry = make_registry(make_entry(spec=spec_of("full"), **change))
    selection = select(PROBLEM, H200, registry=registry, software=software)
    assert (selection.rung, selection.refused) == ("heuristic", ())


def test_an_entry_for_other_features_is_held_to_its_own_code(
    make_entry: MakeEntry, make_registry: MakeRegistry, software: Software
) -> None:
    stale = make_entry(spec=spec_of("full"), digest="0123456789abcdef", config=config(1))
    fresh = make_entry(spec=spec_of("prefix_lm(64)"), config=config(2))
    selection = select(PROBLEM, H200, registry=make_registry(stale, fresh), software=software)
    assert (selection.rung, selection.config) == ("other features", config(2))
    (refusal,) = selection.refused
    assert "stale" in refusal.reason
    assert refusal.candidate.endswith("for full")


def test_other_features_do_not_flood(make_entry: MakeEntry, make_registry: MakeRegistry, software: Software) -> None:
    prefixes = [make_entry(spec=spec_of(f"prefix_lm({2**i})"), config=config(i)) for i in range(5, 13)]
    own = make_entry(config=config(1), device_name="NVIDIA H100 80GB HBM3", origin="predicted")
    registry = make_registry(*prefixes, own)
    selection = select(PROBLEM, H200, registry=registry, software=software)
    assert selection.rung == "other features"
    assert len(selection.refused) == 5 + 1 + 1
    assert str(selection.refused[5]) == "and 2 more: entries for other features"
    assert selection.refused[6].reason.startswith("ranks lower: predicted")
    many = make_registry(*(make_entry(512 + i, spec=spec_of("full"), config=config(i)) for i in range(1, 41)))
    asked: list[KernelConfig] = []
    with pytest.raises(NoKernelError, match="and 11 more: entries for other features"):
        select(PROBLEM, H200, registry=many, software=software, usable=lambda c: asked.append(c) or "strides")
    assert len([c for c in asked if c.head_group >= 1000]) == 16
    untuned = default_configs(PROBLEM, H200)
    selection = select(
        PROBLEM, H200, registry=registry, software=software, usable=lambda c: None if c in untuned else "strides"
    )
    assert selection.rung == "heuristic"
    assert [refusal.reason for refusal in selection.refused].count("strides") == 5 + 1
    assert str(selection.refused[5]) == "and 3 more: entries for other features"


def test_a_stale_entry_is_refused(make_entry: MakeEntry, make_registry: MakeRegistry, software: Software) -> None:
    stale = make_entry(digest="0123456789abcdef", config=config(1))
    fresh = make_entry(8192, config=config(2))
    assert is_stale(fresh) is None
    assert "0123456789abcdef" in (is_stale(stale) or "")
    selection = select(PROBLEM, H200, registry=make_registry(stale, fresh), software=software)
    assert (selection.rung, selection.config) == ("nearest", config(2))
    (refusal,) = selection.refused
    assert "stale" in refusal.reason
    assert "0123456789abcdef" in refusal.reason


def test_another_architecture_is_refused(
    make_entry: MakeEntry, make_registry: MakeRegistry, software: Software
) -> None:
    foreign = make_entry(arch="sm_100", device_name="NVIDIA B200")
    selection = select(PROBLEM, H200, registry=make_registry(foreign), software=software)
    assert selection.rung == "heuristic"
    (refusal,) = selection.refused
    assert refusal.reason == "compiled for sm_100, not sm_90"


@pytest.mark.parametrize(
    ("measured", "asked"),
    [
        ({"seqlen": 4096, "seqlen_q": 1}, "sq=4096 sk=4096"),
        ({"seqlen": 4096}, "sq=1 sk=4096"),
        ({"seqlen": 4096}, "sq=16 sk=4096"),
        ({"seqlen": 4096}, "sq=512 sk=512"),
        ({"seqlen": 512}, "sq=513 sk=513"),
        ({"seqlen": 256, "seqlen_q": 8}, "sq=256 sk=256"),
    ],
)
def test_regimes_never_cross(
    make_entry: MakeEntry, make_registry: MakeRegistry, software: Software, measured: dict[str, int], asked: str
) -> None:
    problem = parse_problem(f"b=4 hq=32 hkv=8 {asked} d=128 causal bf16")
    selection = select(problem, H200, registry=make_registry(make_entry(**measured)), software=software)
    assert selection.entry is None
    assert "another regime" in selection.refused[0].reason


@pytest.mark.parametrize(
    ("measured", "asked"),
    [
        ({"seqlen": 4096, "seqlen_q": 1}, "b=4 sq=16 sk=100"),
        ({"seqlen": 4096}, "b=8 sq=17 sk=513"),
        ({"seqlen": 512}, "b=8 sq=17 sk=17"),
        # A range over two regimes speaks for both.
        ({"seqlen": (256, 4096)}, "b=4 sq=200 sk=200"),
        ({"seqlen": (256, 4096)}, "b=4 sq=8192 sk=8192"),
    ],
)
def test_regimes_are_not_smaller_than_they_should_be(
    make_entry: MakeEntry,
    make_registry: MakeRegistry,
    software: Software,
    measured: dict[str, int | tuple[int, int]],
    asked: str,
) -> None:
    problem = parse_problem(f"hq=32 hkv=8 {asked} d=128 causal bf16")
    selection = select(problem, H200, registry=make_registry(make_entry(**measured)), software=software)
    assert selection.rung == "nearest"
    assert selection.distance > 0


def test_a_length_between_the_ends_of_a_range_is_in_its_regime(
    make_entry: MakeEntry, make_registry: MakeRegistry, software: Software
) -> None:
    # Measured from decode to long: 256 lies within, and batch 8 alone makes it a neighbour.
    registry = make_registry(make_entry((1, 4096)))
    problem = parse_problem("b=8 hq=32 hkv=8 s=256 d=128 causal bf16")
    assert select(problem, H200, registry=registry, software=software).rung == "nearest"


@pytest.mark.parametrize("seqlen", [1024, 2048, 4096])
def test_inside_a_measured_range(
    make_entry: MakeEntry, make_registry: MakeRegistry, software: Software, seqlen: int
) -> None:
    registry = make_registry(make_entry((1024, 4096)))
    selection = select(parse_problem(at(seqlen)), H200, registry=registry, software=software)
    assert (selection.rung, selection.distance) == ("exact", 0)


@pytest.mark.parametrize(("seqlen", "nearest"), [(1500, 2048), (2500, 2048), (6000, 8192), (32768, 8192)])
def test_the_nearer_entry_wins(
    make_entry: MakeEntry, make_registry: MakeRegistry, software: Software, seqlen: int, nearest: int
) -> None:
    # Farther first in the search path.
    entries = {2048: make_entry(2048, config=config(1)), 8192: make_entry(8192, config=config(2))}
    order = sorted(entries, key=lambda size: size == nearest)
    registry = make_registry(*(entries[size] for size in order))
    selection = select(parse_problem(at(seqlen)), H200, registry=registry, software=software)
    assert (selection.rung, selection.config) == ("nearest", entries[nearest].config)


def test_lengths_count_more_than_heads(make_entry: MakeEntry, make_registry: MakeRegistry, software: Software) -> None:
    twice_as_long = make_entry(8192, config=config(1))
    twice_the_batch = make_entry(4096, batch=8, config=config(2))
    registry = make_registry(twice_as_long, twice_the_batch)
    assert select(PROBLEM, H200, registry=registry, software=software).config == config(2)


def test_ties_go_to_the_first_in_the_search_path(
    make_entry: MakeEntry, make_registry: MakeRegistry, software: Software
) -> None:
    first, second = make_entry(config=config(1)), make_entry(config=config(2))
    for entries in ((first, second), (second, first)):
        selection = select(PROBLEM, H200, registry=make_registry(*entries), software=software)
        assert selection.config == entries[0].config


def test_an_entry_that_does_not_fit_the_device_at_hand_is_refused(
    make_entry: MakeEntry, make_registry: MakeRegistry, software: Software
) -> None:
    large = TritonForwardConfig(block_m=128, block_n=128, num_warps=8, num_stages=2)
    small_device = dataclasses.replace(H200, device_name="NVIDIA H20 lite", smem_bytes=101376)
    registry = make_registry(make_entry(config=large))
    assert select(PROBLEM, H200, registry=registry, software=software).config == large
    selection = select(PROBLEM, small_device, registry=registry, software=software)
    assert selection.config != large
    assert any("shared memory" in refusal.reason for refusal in selection.refused)
    assert check_config(selection.config, PROBLEM.spec, small_device) == ()


def test_explicit_config_runs_whatever_the_registry_says(
    make_entry: MakeEntry, make_registry: MakeRegistry, software: Software
) -> None:
    selection = select(PROBLEM, H200, registry=make_registry(make_entry()), software=software, config=config(7))
    assert (selection.rung, selection.config, selection.entry) == ("explicit", config(7), None)


def test_explicit_config_that_is_illegal(software: Software) -> None:
    illegal = TritonForwardConfig(block_m=48, block_n=24, num_warps=3, num_stages=0, maxnreg=7)
    with pytest.raises(ConfigError) as caught:
        select(PROBLEM, H200, registry=EMPTY, software=software, config=illegal)
    reasons = check_config(illegal, PROBLEM.spec, H200)
    assert len(reasons) >= 3
    for text in (*reasons, "block_m=48", "num_warps=3", "maxnreg=7", str(illegal), str(PROBLEM), str(H200)):
        assert text in str(caught.value)


def test_explicit_config_that_cannot_run_this_call(software: Software) -> None:
    with pytest.raises(ConfigError, match="needs contiguous rows"):
        select(
            PROBLEM,
            H200,
            registry=EMPTY,
            software=software,
            config=config(1),
            usable=lambda candidate: "needs contiguous rows",
        )


def test_what_is_not_usable_is_refused_and_the_next_is_taken(
    make_entry: MakeEntry, make_registry: MakeRegistry, software: Software
) -> None:
    entries = ladder(make_entry)
    registry = make_registry(*entries.values())
    unusable = {entries["exact"].config: "does not compile", entries["other software"].config: "strides of 3"}
    asked: list[KernelConfig] = []

    def usable(candidate: KernelConfig) -> str | None:
        asked.append(candidate)
        return unusable.get(candidate)

    selection = select(PROBLEM, H200, registry=registry, software=software, usable=usable)
    assert (selection.rung, selection.config) == ("nearest", entries["nearest"].config)
    reasons = [refusal.reason for refusal in selection.refused]
    assert reasons[:2] == ["does not compile", "strides of 3"]
    assert [reason.split(",")[0] for reason in reasons[2:]] == ["ranks lower: other device", "ranks lower: predicted"]
    # Asking may compile: no candidate below the one that is taken is asked.
    assert asked == [entries[name].config for name in ("exact", "other software", "nearest")]


def test_safe_default_is_the_last_rung(software: Software) -> None:
    safe = safe_configs()
    selection = select(
        PROBLEM,
        H200,
        registry=EMPTY,
        software=software,
        usable=lambda candidate: None if candidate in safe else "no",
    )
    assert selection.rung == "safe default"
    assert selection.config in safe
    assert len(selection.refused) == len([c for c in default_configs(PROBLEM, H200) if c not in safe])


def test_nothing_left_lists_everything(make_entry: MakeEntry, make_registry: MakeRegistry, software: Software) -> None:
    registry = make_registry(make_entry(), make_entry(arch="sm_100", device_name="NVIDIA B200"))
    with pytest.raises(NoKernelError) as caught:
        select(PROBLEM, H200, registry=registry, software=software, usable=lambda candidate: "it is Sunday")
    message = str(caught.value)
    assert "compiled for sm_100, not sm_90" in message
    assert "nvidia_h200.forward.yaml" in message
    configs = default_configs(PROBLEM, H200)
    legal = [config for config in configs if not check_config(config, PROBLEM.spec, H200)]
    assert message.count("it is Sunday") >= len(legal) + 1
    assert all(str(candidate) in message for candidate in configs)


def test_selection_explains_itself(make_entry: MakeEntry, make_registry: MakeRegistry, software: Software) -> None:
    registry = make_registry(make_entry(8192), make_entry(arch="sm_100", device_name="NVIDIA B200"))
    selection = select(PROBLEM, H200, registry=registry, software=software)
    text = str(selection)
    for part in (
        str(PROBLEM), str(H200), str(selection.config), "nearest: ", str(selection.path), "500 us", "600 TFLOP/s",
        "cudnn 550 us", "distance 2.00", "sq=8192", "compiled for sm_100",
    ):  # fmt: skip
        assert part in text


def test_selection_says_how_sure_the_winner_is_and_what_came_second(
    make_entry: MakeEntry, make_registry: MakeRegistry, software: Software
) -> None:
    second = config(1)
    runners_up = tuple(
        RunnerUp(config=dataclasses.replace(second, num_warps=w), median_us=u) for w, u in ((8, 506), (4, 530))
    )
    selection = select(
        PROBLEM,
        H200,
        registry=make_registry(dataclasses.replace(make_entry(), runners_up=runners_up)),
        software=software,
    )
    assert selection.runner_up == runners_up[0]
    assert selection.runner_up_ratio == pytest.approx(1.012)
    lines = str(selection).splitlines()
    assert "timed     500 us, middle half within 5 us (1%), 600 TFLOP/s (cudnn 550 us beside it)" in lines
    assert f"runner-up {second}: 506 us, 1.012x the time" in lines


def test_an_entry_without_runners_up_and_spread_claims_neither(
    make_entry: MakeEntry, make_registry: MakeRegistry, software: Software
) -> None:
    entry = make_entry()
    entry = dataclasses.replace(entry, performance=dataclasses.replace(entry.performance, spread=0.0))
    selection = select(PROBLEM, H200, registry=make_registry(entry), software=software)
    assert (selection.entry, selection.runner_up, selection.runner_up_ratio) == (entry, None, None)
    assert "timed     500 us, 600 TFLOP/s" in str(selection)
    assert "runner-up" not in str(selection)
    untuned = select(PROBLEM, H200, registry=EMPTY, software=software)
    assert (untuned.runner_up, untuned.runner_up_ratio) == (None, None)


def test_the_same_question_has_the_same_answer(
    make_entry: MakeEntry, make_registry: MakeRegistry, software: Software
) -> None:
    registry = make_registry(*ladder(make_entry).values())
    answers = {str(select(PROBLEM, H200, registry=registry, software=software)) for _ in range(3)}
    assert len(answers) == 1


ARCHES = ("sm_80", "sm_90", "sm_100", "sm_120", "gfx942", "gfx950")


@pytest.mark.parametrize("dtype", ["fp16", "bf16", "fp32"])
@pytest.mark.parametrize("arch", ARCHES)
def test_every_problem_has_a_legal_config(arch: str, dtype: str, software: Software) -> None:
    target = named_target(arch)
    dims = [(d, d) for d in range(16, 257, 8)] + [(192, 128), (16, 256), (256, 16), (72, 40)]
    for (d, dv), seqlen_q in itertools.product(dims, (1, 64, 4096)):
        problem = parse_problem(f"b=2 hq=8 hkv=2 sq={seqlen_q} sk=4096 d={d} dv={dv} causal {dtype}")
        selection = select(problem, target, registry=EMPTY, software=software)
        assert selection.rung in ("heuristic", "safe default")
        assert check_config(selection.config, problem.spec, target) == ()


@pytest.mark.parametrize("arch", ARCHES)
def test_usual_problems_get_more_than_the_last_resort(arch: str, software: Software) -> None:
    target = named_target(arch)
    for d, seqlen_q, dtype in itertools.product((64, 80, 96, 128, 192), (1, 64, 4096), ("fp16", "bf16")):
        problem = parse_problem(f"b=2 hq=8 hkv=2 sq={seqlen_q} sk=4096 d={d} causal {dtype}")
        selection = select(problem, target, registry=EMPTY, software=software)
        assert selection.rung == "heuristic", f"{problem} on {target}: {selection}"


def test_a_config_that_reads_any_strides_is_always_among_the_candidates() -> None:
    for arch in ARCHES:
        target = named_target(arch)
        legal = [c for c in default_configs(PROBLEM, target) if not check_config(c, PROBLEM.spec, target)]
        assert any(isinstance(c, TritonForwardConfig) and c.loads == "pointer" for c in legal)


GRADIENTS = parse_problem("b=4 hq=32 hkv=8 s=4096 d=128 causal bf16 backward")


def gradient_config(number: int, dq: typing.Literal["kernel", "atomic", "ordered"] = "kernel") -> TritonBackwardConfig:
    """A legal config that no heuristic gives, one for each number."""
    tile, warps = (64, 4) if dq == "kernel" else (0, 0)
    return TritonBackwardConfig(
        block_m1=32, block_n1=64, num_warps=8, num_stages=1, dq=dq, block_m2=tile, block_n2=tile, num_warps2=warps,
        num_stages2=int(dq == "kernel"), head_group=1000 + number,
    )  # fmt: skip


def test_gradients_climb_the_same_ladder(
    make_entry: MakeEntry, make_registry: MakeRegistry, software: Software
) -> None:
    spec = GRADIENTS.spec
    other = Software(flashgen="0.1.0", triton="3.8.0", torch="2.13.0", driver="580.1")
    entries = {
        "exact": make_entry(spec=spec, config=gradient_config(1)),
        "other software": make_entry(spec=spec, config=gradient_config(2, "atomic"), software=other),
        "nearest": make_entry(8192, spec=spec, config=gradient_config(3)),
        "other device": make_entry(spec=spec, config=gradient_config(4), device_name="NVIDIA H100 80GB HBM3"),
        "other features": make_entry(spec=spec_of("full backward"), config=gradient_config(5)),
        "predicted": make_entry(spec=spec, config=gradient_config(6), origin="predicted"),
    }
    names = list(reversed(entries))
    while names:
        # An entry of the other phase is never looked at.
        registry = make_registry(make_entry(), *(entries[name] for name in names))
        selection = select(GRADIENTS, H200, registry=registry, software=software)
        best = names.pop()
        assert (selection.rung, selection.config) == (best, entries[best].config)
        assert all("forward" not in str(refusal) for refusal in selection.refused)
    selection = select(GRADIENTS, H200, registry=make_registry(make_entry()), software=software)
    assert (selection.rung, selection.refused) == ("heuristic", ())
    forward = select(PROBLEM, H200, registry=make_registry(*entries.values()), software=software)
    assert (forward.rung, forward.refused) == ("heuristic", ())


def test_the_gradient_of_a_bias_has_the_entry_of_the_spec_without(
    make_entry: MakeEntry, make_registry: MakeRegistry, software: Software
) -> None:
    with_bias = parse_problem("b=4 hq=32 hkv=8 s=4096 d=128 causal bias=input bf16 backward")
    asked = dataclasses.replace(with_bias, spec=dataclasses.replace(with_bias.spec, dbias=True))
    registry = make_registry(make_entry(spec=with_bias.spec, config=gradient_config(1)))
    assert select(asked, H200, registry=registry, software=software).rung == "exact"


def test_deterministic_calls_take_what_keeps_its_order(
    make_entry: MakeEntry, make_registry: MakeRegistry, software: Software
) -> None:
    strict = parse_problem("b=4 hq=32 hkv=8 s=4096 d=128 causal deterministic bf16 backward")
    free = GRADIENTS.spec
    atomic = make_entry(spec=free, config=gradient_config(1, "atomic"))
    own = make_entry(8192, spec=free, config=gradient_config(2))
    full = make_entry(spec=spec_of("full deterministic backward"), config=gradient_config(3))
    selection = select(strict, H200, registry=make_registry(atomic, full, own), software=software)
    # Nearer than the same demand under another mask: the very kernels that are asked for.
    assert (selection.rung, selection.config) == ("other features", gradient_config(2))
    assert selection.differences == ("measured without deterministic",)
    assert any("adds in any order" in refusal.reason for refusal in selection.refused)
    entry = make_entry(spec=strict.spec, config=gradient_config(4, "ordered"))
    exact = select(strict, H200, registry=make_registry(atomic, own, entry), software=software)
    assert (exact.rung, exact.config) == ("exact", gradient_config(4, "ordered"))
    # And a call that asks for nothing may have what was measured under the demand.
    loose = select(GRADIENTS, H200, registry=make_registry(full, entry), software=software)
    assert (loose.rung, loose.config) == ("other features", gradient_config(4, "ordered"))
    assert loose.differences == ("measured with deterministic",)
    only_atomic = select(strict, H200, registry=make_registry(atomic), software=software)
    assert only_atomic.rung == "heuristic"


def test_an_explicit_config_of_the_other_phase_is_illegal(software: Software) -> None:
    with pytest.raises(ConfigError, match="triton/forward has no kernels of the backward phase"):
        select(GRADIENTS, H200, registry=EMPTY, software=software, config=config(1))
    with pytest.raises(ConfigError, match="triton/backward has no kernels of the forward phase"):
        select(PROBLEM, H200, registry=EMPTY, software=software, config=gradient_config(1))


def test_safe_gradients_are_the_last_rung(software: Software) -> None:
    safe = safe_configs("backward")
    selection = select(
        GRADIENTS, H200, registry=EMPTY, software=software, usable=lambda c: None if c in safe else "strides"
    )
    assert selection.rung == "safe default"
    assert isinstance(selection.config, TritonBackwardConfig)
    assert (selection.config.loads, selection.config.dq) == ("pointer", "kernel")


@pytest.mark.parametrize("words", ["causal", "full fp32", "document varlen", "causal tf32", "full bias=bool dropout"])
@pytest.mark.parametrize("arch", ARCHES)
def test_every_gradient_has_a_legal_config_that_keeps_its_order(arch: str, words: str, software: Software) -> None:
    target = named_target(arch)
    for d, dv in ((16, 16), (64, 64), (80, 80), (128, 128), (192, 128), (256, 256), (16, 256), (256, 16)):
        problem = parse_problem(f"b=2 hq=8 hkv=2 s=4096 d={d} dv={dv} {words} deterministic backward")
        selection = select(problem, target, registry=EMPTY, software=software)
        assert check_config(selection.config, problem.spec, target) == ()
        if max(d, dv) <= 128 and problem.spec.dtype.itemsize == 2:
            assert selection.rung == "heuristic", str(selection)
        configs = default_configs(problem, target)
        assert all(isinstance(c, TritonBackwardConfig) and c.dq == "kernel" for c in configs)
        assert any(c.loads == "pointer" for c in configs if not check_config(c, problem.spec, target))


HOPPER = HopperForwardConfig(
    consumers=2, block_n=128, num_warps=4, num_stages=2, queries="registers", diagonal="half", head_group=1000
)


def test_an_entry_of_the_family_for_hopper_is_chosen_like_any_other(
    make_entry: MakeEntry, make_registry: MakeRegistry, software: Software
) -> None:
    registry = make_registry(make_entry(8192, config=config(1)), make_entry(config=HOPPER))
    selection = select(PROBLEM, H200, registry=registry, software=software)
    assert (selection.rung, selection.config) == ("exact", HOPPER)
    assert "kernel    gluon/hopper_forward block_n=128 consumers=2" in str(selection)
    far = select(parse_problem(at(8192)), H200, registry=registry, software=software)
    assert (far.rung, far.config) == ("exact", config(1))
    explicit = select(PROBLEM, H200, registry=EMPTY, software=software, config=HOPPER)
    assert (explicit.rung, explicit.config) == ("explicit", HOPPER)


def test_an_entry_that_cannot_read_the_call_falls_to_the_portable_family_visibly(
    make_entry: MakeEntry, make_registry: MakeRegistry, software: Software
) -> None:
    def usable(candidate: KernelConfig) -> str | None:
        return "strides of 24 bytes" if isinstance(candidate, HopperForwardConfig) else None

    registry = make_registry(make_entry(config=HOPPER), make_entry(8192, config=config(1)))
    selection = select(PROBLEM, H200, registry=registry, software=software, usable=usable)
    assert (selection.rung, selection.config) == ("nearest", config(1))
    assert [refusal.reason for refusal in selection.refused] == ["strides of 24 bytes"]
    untuned = select(PROBLEM, H200, registry=EMPTY, software=software, usable=usable)
    assert (untuned.rung, untuned.config.template) == ("heuristic", "triton/forward")
    own = [config for config in default_configs(PROBLEM, H200) if isinstance(config, HopperForwardConfig)]
    assert [refusal.candidate for refusal in untuned.refused] == [f"heuristic {config}" for config in own]


def test_entries_of_another_mask_may_be_of_the_family_for_hopper(
    make_entry: MakeEntry, make_registry: MakeRegistry, software: Software
) -> None:
    whole = dataclasses.replace(HOPPER, diagonal="whole")
    registry = make_registry(make_entry(config=HOPPER), make_entry(8192, config=whole))
    prefix = parse_problem(at(4096).replace("causal", "prefix_lm(64)"))
    selection = select(prefix, H200, registry=registry, software=software)
    assert selection.entry is not None
    assert (selection.rung, selection.entry.config, selection.config.kernel()) == (
        *("other features", HOPPER),
        HOPPER.kernel(),
    )
    # Half a diagonal that the mask does not have is refused, and the next entry taken, for which another default holds.
    full = parse_problem(at(4096).replace("causal", "full"))
    selection = select(full, H200, registry=registry, software=software)
    assert selection.entry is not None
    assert (selection.rung, selection.entry.config) == ("other features", whole)
    assert selection.config == default_configs(full, H200)[0]
    (refusal,) = selection.refused
    assert "diagonal=half needs a causal or prefix mask by formula, got full" in refusal.reason


@pytest.mark.parametrize("words", ["softcap", "alibi", "bias=input", "dropout", "varlen"])
def test_an_entry_says_nothing_of_what_its_kernel_has_not(
    make_entry: MakeEntry, make_registry: MakeRegistry, software: Software, words: str
) -> None:
    registry = make_registry(make_entry(config=HOPPER), make_entry(config=config(1), spec=spec_of("causal&document")))
    problem = parse_problem(f"{at(4096)} {words}")
    selection = select(problem, H200, registry=registry, software=software)
    default = select(problem, H200, registry=make_registry(), software=software)
    assert (selection.rung, selection.config, selection.refused) == ("heuristic", default.config, ())


PACKED = HopperForwardConfig(
    consumers=2, block_n=64, num_warps=4, num_stages=3, pack="heads", queries="registers", head_group=1000
)
ODD_GROUP = "a tile has 2 query heads of one group, which a group of 3 does not divide into"


@pytest.mark.parametrize("words", ["causal", "sliding_window(127,0)"])
def test_an_entry_that_packs_heads_falls_visibly_where_the_group_does_not_divide(
    make_entry: MakeEntry, make_registry: MakeRegistry, software: Software, words: str
) -> None:
    spec = spec_of(words)
    assert check_config(PACKED, spec, H200) == ()
    # One range covers both numbers of heads.
    packed = make_entry(spec=spec, config=PACKED, nheads_q=(24, 32))
    registry = make_registry(packed, make_entry(8192, spec=spec, config=config(1), nheads_q=24))
    even, odd = (parse_problem(f"b=4 hq={hq} hkv=8 s=4096 d=128 {words} bf16") for hq in (32, 24))
    selection = select(even, H200, registry=registry, software=software)
    assert (selection.rung, selection.config) == ("exact", PACKED)
    selection = select(odd, H200, registry=registry, software=software)
    assert (selection.rung, selection.config) == ("nearest", config(1))
    (refusal,) = selection.refused
    assert refusal.reason == ODD_GROUP
    assert "hq=24..32" in refusal.candidate
    assert ODD_GROUP in str(selection)
    untuned = select(odd, H200, registry=make_registry(packed), software=software)
    assert (untuned.rung, untuned.config.template) == ("heuristic", "gluon/hopper_forward")
    assert untuned.config.heads_of_tile == 1
    assert [refusal.reason for refusal in untuned.refused] == [ODD_GROUP]


def test_a_nearest_entry_that_packs_heads_needs_a_group_that_divides(
    make_entry: MakeEntry, make_registry: MakeRegistry, software: Software
) -> None:
    registry = make_registry(make_entry(config=PACKED))
    for heads, rung in (("hq=24 hkv=8", "heuristic"), ("hq=8 hkv=8", "heuristic"), ("hq=48 hkv=8", "nearest")):
        problem = parse_problem(f"b=4 {heads} s=4096 d=128 causal bf16")
        selection = select(problem, H200, registry=registry, software=software)
        assert selection.rung == rung
        assert (selection.config == PACKED) is (rung == "nearest")


def test_an_explicit_config_that_packs_heads_needs_a_group_that_divides(software: Software) -> None:
    odd = parse_problem("b=4 hq=24 hkv=8 s=4096 d=128 causal bf16")
    with pytest.raises(ConfigError, match=ODD_GROUP):
        select(odd, H200, registry=EMPTY, software=software, config=PACKED)
    assert select(PROBLEM, H200, registry=EMPTY, software=software, config=PACKED).config == PACKED


def test_untuned_hopper_gets_its_own_family_and_other_gpus_do_not(software: Software) -> None:
    for name in ("H100", "H200"):
        selection = select(PROBLEM, named_target(name), registry=EMPTY, software=software)
        assert (selection.rung, selection.config.template) == ("heuristic", "gluon/hopper_forward")
    for name in ("A100", "B200", "RTX5090", "MI300X"):
        selection = select(PROBLEM, named_target(name), registry=EMPTY, software=software)
        assert selection.config.template == "triton/forward"
    with pytest.raises(ConfigError, match=r"cannot run .* on NVIDIA B200.*written for sm_90"):
        select(PROBLEM, named_target("B200"), registry=EMPTY, software=software, config=HOPPER)


def test_on_cpu_tensors_no_kernel_in_gluon_is_left(
    make_entry: MakeEntry, make_registry: MakeRegistry, software: Software
) -> None:
    registry = make_registry(make_entry(config=HOPPER), make_entry(8192, config=HOPPER))
    for words in ("causal", "full softcap"):
        problem = parse_problem(at(4096).replace("causal", words))
        selection = select(problem, H200, registry=registry, software=software, usable=interpreter_refusal)
        assert (selection.rung, selection.config.template) == ("heuristic", "triton/forward")
        assert any("written in Gluon" in refusal.reason for refusal in selection.refused)
