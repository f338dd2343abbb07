"""Launches on a GPU: other addresses, several streams and graphs at once, a second device."""

from __future__ import annotations

import dataclasses
import functools

import pytest
import torch

from flashgen.codegen import HopperForwardConfig, KernelConfig, TritonForwardConfig, render
from flashgen.compile import CompiledKernel, compile_kernel
from flashgen.launch import ForwardLaunch, Operands, bind_forward, detect_target
from flashgen.launch.tile_counter import _counters
from flashgen.measure import accuracy_error, poisoned_outputs, random_extras, random_inputs
from flashgen.spec import Extras, Problem, parse_problem

pytestmark = pytest.mark.gpu

POINTER = TritonForwardConfig(block_m=64, block_n=64, num_warps=4, num_stages=2)
CONFIGS: dict[str, KernelConfig] = {
    "pointer": POINTER,
    "descriptor": dataclasses.replace(POINTER, loads="descriptor"),
    "hopper": HopperForwardConfig(num_warps=4, num_stages=2, consumers=2, block_n=128, head_group=2),
}
TEXT = "b=2 hq=8 hkv=2 sq=700 sk=900 d=64 causal bf16 lse"


@pytest.fixture(params=CONFIGS)
def config(request: pytest.FixtureRequest) -> KernelConfig:
    chosen = CONFIGS[request.param]
    target = detect_target(_device())
    if isinstance(chosen, HopperForwardConfig) and not target.has_wgmma:
        pytest.skip(f"{chosen.template} needs an sm_90 GPU, this is {target}")
    return chosen


def _device() -> torch.device:
    return torch.device("cuda", torch.cuda.current_device())


@functools.cache
def _compiled(text: str, config: KernelConfig) -> CompiledKernel:
    spec = parse_problem(text).spec
    return compile_kernel(render(spec, config), spec.structure(), config, detect_target(_device()))


@dataclasses.dataclass
class Case:
    """One call's tensors, and the outputs to judge."""

    problem: Problem
    extras: Extras
    tensors: dict[str, torch.Tensor]

    def check(self) -> None:
        given = (self.tensors[name] for name in ("out", "lse", "q", "k", "v"))
        report = accuracy_error(*given, spec=self.problem.spec, extras=self.extras)
        assert report.ok, report.reason


def case(seed: int, text: str = TEXT) -> Case:
    problem = parse_problem(text)
    q, k, v = random_inputs(problem, device="cuda", seed=seed)
    out, lse = poisoned_outputs(problem, device="cuda")
    assert lse is not None
    return Case(
        problem=problem,
        extras=random_extras(problem, device="cuda", seed=0),
        tensors={"q": q, "k": k, "v": v, "out": out, "lse": lse},
    )


def bound(config: KernelConfig, first: Case, text: str = TEXT) -> ForwardLaunch:
    return ForwardLaunch(
        plan=render(first.problem.spec, config).plan,
        compiled=_compiled(text, config),
        problem=first.problem,
        config=config,
        operands=Operands.of(first.tensors),
        extras=first.extras,
        device=_device(),
    )


def test_other_addresses_in_every_launch(config: KernelConfig) -> None:
    cases = [case(seed) for seed in range(4)]
    launch = bound(config, cases[0])
    for each in cases:
        launch(*each.tensors.values())
    for each in cases:
        each.check()
    # The same addresses with other contents, and one of them moved.
    for each in cases:
        for name in ("q", "k", "v"):
            each.tensors[name].neg_()
        each.tensors["k"] = each.tensors["k"].clone()
        each.tensors["out"].fill_(float("nan"))
    for each in reversed(cases):
        launch(*each.tensors.values())
    for each in cases:
        each.check()


def test_the_short_way_is_known_here(config: KernelConfig) -> None:
    if torch.version.hip is not None:
        pytest.skip("the short way is one of CUDA's")
    given = case(0)
    launch = bound(config, given)
    for _ in range(2):
        launch(*given.tensors.values())
    assert launch.kernel._direct is not None


def test_streams_at_once(config: KernelConfig) -> None:
    cases = [case(seed) for seed in range(2)]
    launch = bound(config, cases[0])
    want = []
    for each in cases:
        launch(*each.tensors.values())
        want.append(each.tensors["out"].clone())
    torch.cuda.synchronize()
    streams = [torch.cuda.Stream() for _ in cases]
    for _ in range(100):
        for stream, each in zip(streams, cases, strict=True):
            with torch.cuda.stream(stream):
                each.tensors["out"].fill_(float("nan"))
                launch(*each.tensors.values())
    torch.cuda.synchronize()
    for each, expected in zip(cases, want, strict=True):
        assert torch.equal(each.tensors["out"], expected)
    assert not any(counter.any() for counter in _counters.values())


def test_graphs_replayed_at_once_beside_a_launch(config: KernelConfig) -> None:
    cases = [case(seed) for seed in range(3)]
    launch = bound(config, cases[0])
    for each in cases:
        launch(*each.tensors.values())
    want = [each.tensors["out"].clone() for each in cases]
    torch.cuda.synchronize()
    graphs = [torch.cuda.CUDAGraph() for _ in cases[:2]]
    # Captured on one stream, one after the other; later launches get what memory the graphs do not hold.
    for graph, each in zip(graphs, cases, strict=False):
        with torch.cuda.graph(graph):
            for _ in range(3):
                each.tensors["out"].fill_(float("nan"))
                launch(*each.tensors.values())
    streams = [torch.cuda.Stream() for _ in cases]
    for _ in range(30):
        for graph, stream in zip(graphs, streams, strict=False):
            with torch.cuda.stream(stream):
                graph.replay()
        with torch.cuda.stream(streams[2]):
            cases[2].tensors["out"].fill_(float("nan"))
            launch(*cases[2].tensors.values())
    torch.cuda.synchronize()
    for each, expected in zip(cases, want, strict=True):
        assert torch.equal(each.tensors["out"], expected)
    assert not any(counter.any() for counter in _counters.values())


@pytest.mark.parametrize("head_dim", [64, 96])
def test_rows_of_no_sequence_stay_as_they_are(config: KernelConfig, head_dim: int) -> None:
    text = f"b=5 hq=4 hkv=2 sq=300 sk=400 d={head_dim} causal varlen bf16 lse"
    given = case(0, text)
    owned = given.tensors["q"].shape[0]
    for name in ("q", "k", "v", "out"):
        tensor = given.tensors[name]
        given.tensors[name] = torch.cat([tensor, torch.full_like(tensor[:70], float("nan"))])
    given.tensors["lse"] = torch.full((4, owned + 70), float("nan"), device="cuda")
    bind_forward(given.problem, config, _compiled(text, config), given.extras, given.tensors)()
    assert bool(given.tensors["out"][owned:].isnan().all())
    assert bool(given.tensors["lse"][:, owned:].isnan().all())
    for name, rows in (("q", owned), ("out", owned), ("k", -70), ("v", -70)):
        given.tensors[name] = given.tensors[name][:rows]
    given.tensors["lse"] = given.tensors["lse"][:, :owned].contiguous()
    given.check()


def test_a_second_device(config: KernelConfig) -> None:
    if torch.cuda.device_count() < 2:
        pytest.skip(f"needs two GPUs, there is {torch.cuda.device_count()}")
    for index in (0, 1, 0):
        with torch.cuda.device(index):
            given = case(index)
            for _ in range(2):
                given.tensors["out"].fill_(float("nan"))
                bind_forward(given.problem, config, _compiled(TEXT, config), given.extras, given.tensors)()
            given.check()


def test_tables_of_tiles(config: KernelConfig) -> None:
    text = "b=2 hq=4 hkv=2 sq=700 sk=700 d=64 causal&document(batched) bf16 lse"
    given = case(0, text)
    bind_forward(given.problem, config, _compiled(text, config), given.extras, given.tensors)()
    given.check()
