"""What `flashgen bench` makes of its readings."""

from __future__ import annotations

import dataclasses
import typing

import pytest
import torch

from flashgen.cli.bench import show_comparisons
from flashgen.cli.comparison import BEST, OURS, Comparison, compare, geometric_means
from flashgen.dispatch import Selection
from flashgen.measure import HostClock, Timing, attention_reference
from flashgen.measure.peers import Peer
from flashgen.spec import Extras, Problem, parse_problem

CAUSAL = parse_problem("b=1 h=2 s=128 d=64 causal fp16")


def timed(**median_us: float) -> Comparison:
    return Comparison(
        problem=CAUSAL,
        flops=CAUSAL.flops(),
        selection=typing.cast(Selection, None),
        timings={name: Timing(median_us=us, spread=0.01, samples=9) for name, us in median_us.items()},
        accuracy={},
        absent={},
        host_us={},
    )


def test_the_fastest_peer_is_never_flashgen() -> None:
    comparison = timed(flashgen=10, cudnn=12, fa3=11)
    assert comparison.best_peer == "fa3"
    assert comparison.speed_to("fa3") == pytest.approx(1.1)
    assert comparison.speed_to("gone") is None
    assert comparison.tflops(OURS) == pytest.approx(CAUSAL.flops() / 10e6)


def test_without_peers_or_flashgen_there_is_no_speed() -> None:
    assert timed(flashgen=10).best_peer is None
    assert timed(cudnn=10).speed_to("cudnn") is None
    assert geometric_means([timed(flashgen=10), timed(cudnn=10)]) == {}


def test_geometric_means_count_the_problems_that_a_peer_ran() -> None:
    means = geometric_means([timed(flashgen=10, cudnn=20, fa3=16), timed(flashgen=10, cudnn=5), timed(cudnn=7)])
    assert means["cudnn"] == (pytest.approx(1.0), 2)
    assert means["fa3"] == (pytest.approx(1.6), 1)
    assert means[BEST] == (pytest.approx((1.6 * 0.5) ** 0.5), 2)
    assert list(means)[-1] == BEST


def reference_peer() -> Peer:
    def make(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, problem: Problem, extras: Extras) -> typing.Any:
        return lambda: attention_reference(q, k, v, spec=problem.spec, extras=extras, precision="input")[:1]

    return Peer(name="reference", make=make)


def compared(text: str, *, host: bool = False) -> Comparison:
    problem, cpu = parse_problem(text), torch.device("cpu")
    return compare(problem, [reference_peer()], device=cpu, clock=HostClock(), target_ms=1, host=host)


@pytest.mark.parametrize(
    ("text", "pairs"),
    [
        # Rows of 1, 2, 3, ... 16 keys, then of 16 each.
        ("b=2 hq=4 hkv=2 s=96 d=64 sliding_window(15,0) fp16", 2 * 4 * (16 * 17 // 2 + 80 * 16)),
        # Two sequences, of 96 and 72 tokens.
        ("b=2 hq=4 hkv=2 s=96 d=64 causal varlen fp16", 4 * (96 * 97 // 2 + 72 * 73 // 2)),
    ],
)
def test_useful_work_is_that_of_the_keys_seen(text: str, pairs: int) -> None:
    result = compared(text)
    assert result.flops == pairs * 4 * 64
    assert set(result.timings) == {OURS, "reference"}
    assert result.host_us == {}


def test_a_call_of_more_than_q_k_v_and_a_mask_has_host_time_too() -> None:
    result = compared("b=2 hq=4 hkv=2 s=32 d=64 causal varlen fp16", host=True)
    assert set(result.host_us) == {OURS, "reference"}
    assert all(us > 0 for us in result.host_us.values())


def test_standings_are_a_line_a_problem_and_a_line_a_peer(capsys: pytest.CaptureFixture[str]) -> None:
    fixed = dataclasses.replace(compared(str(CAUSAL)), timings=timed(flashgen=10, reference=15).timings)
    show_comparisons([fixed, fixed])
    standings = capsys.readouterr().out.split("fastest peer")[1]
    per_problem, means = standings.split("geometric mean")
    assert sum("1.50x" in line for line in per_problem.splitlines()) == 2
    assert [line.split()[-2:] for line in means.splitlines() if "1.500x" in line] == [["1.500x", "2"]] * 2
