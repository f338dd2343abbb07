"""What the measuring process checks, with the interpreter in place of a GPU and faults planted after each launch."""

from __future__ import annotations

import dataclasses
import functools
import typing
from collections.abc import Callable

import pytest
import torch

from flashgen.codegen import KernelConfig, TritonBackwardConfig, TritonDecodeConfig, TritonForwardConfig
from flashgen.errors import FlashgenError
from flashgen.launch import interpret_backward, interpret_decode, interpret_forward
from flashgen.measure import (
    HostClock,
    Oracle,
    Rejected,
    awkward_decode_shapes,
    awkward_shapes,
    poisoned_outputs,
    random_extras,
    random_inputs,
)
from flashgen.measure.graph_clock import Rotation
from flashgen.measure.peer import Peer
from flashgen.spec import Problem, parse_problem
from flashgen.tuning import awkward, gpu_cases, gpu_jobs
from flashgen.tuning.gpu_cases import Case

FORWARD = TritonForwardConfig(block_m=16, block_n=16, num_warps=1, num_stages=1)
OWN_DQ = TritonBackwardConfig(
    block_m1=16, block_n1=32, num_warps=1, num_stages=1, block_m2=32, block_n2=16, num_warps2=1, num_stages2=1
)
ATOMIC = TritonBackwardConfig(block_m1=16, block_n1=16, num_warps=1, num_stages=1, dq="atomic")
ORDERED = TritonBackwardConfig(block_m1=16, block_n1=16, num_warps=1, num_stages=1, dq="ordered")

DECODE = TritonDecodeConfig(block_m=16, block_n=16, num_warps=1, num_stages=1, programs=1)

Plant = Callable[[dict[str, torch.Tensor]], object]


def problem(words: str, phase: str = "backward") -> Problem:
    return parse_problem(f"b=2 hq=2 hkv=2 s=40 d=16 {phase} {words}")


def interpreted(case: Case, config: KernelConfig) -> None:
    tensors = case.tensors
    if case.problem.spec.phase == "decode":
        interpret_decode(tensors, problem=case.problem, config=config, extras=case.extras)
        return
    if case.problem.spec.phase == "backward":
        read = {name: t for name, t in tensors.items() if name not in ("dq", "dk", "dv")}
        found = interpret_backward(read, problem=case.problem, config=config, extras=case.extras)
    else:
        q, k, v = (tensors[name] for name in "qkv")
        out, lse = interpret_forward(q, k, v, problem=case.problem, config=config, extras=case.extras)
        found = {"out": out} | ({"lse": lse} if lse is not None else {})
    for name in case.written:
        tensors[name].copy_(found[name])


@pytest.fixture
def plant(monkeypatch: pytest.MonkeyPatch) -> Callable[[Plant], None]:
    """Put the interpreter in the GPU's place; return a function that plants a fault after each launch."""

    def set_fault(fault: Plant) -> None:
        def bound(case: Case, config: KernelConfig) -> Callable[[], None]:
            def run() -> None:
                interpreted(case, config)
                fault(case.tensors)

            return run

        monkeypatch.setattr(gpu_jobs, "_bound", bound)

    # The cases of one test are not another's.
    for name in ("_own_case", "_small_case"):
        inner = getattr(gpu_jobs, name).__wrapped__
        monkeypatch.setattr(gpu_jobs, name, functools.lru_cache(maxsize=None)(inner))
    monkeypatch.setattr(gpu_jobs, "_device", lambda: torch.device("cpu"))
    # A kernel's own out and lse are made on a GPU alone.
    monkeypatch.setattr(gpu_cases, "_launched_forward", gpu_cases._exact_forward)
    # Lengths one off a tile, and rows that see nothing.
    monkeypatch.setattr(
        awkward, "awkward_shapes", lambda *args: [*awkward_shapes(*args)[1:3], awkward_shapes(*args)[5]]
    )
    # A batch of lengths of its own, and more rows than a tile has.
    monkeypatch.setattr(awkward, "awkward_decode_shapes", lambda *args: awkward_decode_shapes(*args)[1:6:4])
    # Many key tiles, for the few programs of the interpreter.
    monkeypatch.setattr(awkward, "_MANY_TILES", 2)
    monkeypatch.setattr(awkward, "_MANY_SEQUENCES", 2)
    set_fault(lambda tensors: None)
    return set_fault


def corner(tensor: torch.Tensor) -> tuple[int, ...]:
    """Return the index of the last element of any tensor: what kernels write has gaps in memory."""
    return (-1,) * tensor.dim()


def last_element(name: str) -> Plant:
    def spoil(tensors: dict[str, torch.Tensor]) -> None:
        tensors[name][corner(tensors[name])] = 30.0

    return spoil


@pytest.mark.parametrize("name", ["dq", "dk", "dv"])
@pytest.mark.parametrize("config", [OWN_DQ, ATOMIC], ids=str)
def test_a_fault_in_any_gradient_is_caught(plant, config, name):
    plant(last_element(name))
    for check in (gpu_jobs.check_awkward, gpu_jobs._check_own_shape):
        rejected = check(problem("causal fp16"), config)
        assert isinstance(rejected, Rejected)
        assert rejected.stage == "accuracy"
        assert rejected.reason.startswith("at b=2 ")
        assert f": {name}[" in rejected.reason


@pytest.mark.parametrize("name", ["dq", "dk", "dv", "dbias"])
def test_what_is_not_written_is_caught(plant, name):
    plant(lambda tensors: tensors[name][corner(tensors[name])].fill_(torch.nan))
    rejected = gpu_jobs.confirm(problem("causal bias=fp32 fp16"), OWN_DQ)
    assert isinstance(rejected, Rejected)
    assert f": {name}[" in rejected.reason
    assert "is nan" in rejected.reason


def test_the_gradient_of_a_bias_is_confirmed_where_there_is_one(plant):
    plant(lambda tensors: tensors["dbias"].mul_(1.1) if "dbias" in tensors else None)
    with_bias = problem("causal bias=input fp16")
    assert gpu_jobs.check_awkward(with_bias, OWN_DQ) is None
    rejected = gpu_jobs.confirm(with_bias, OWN_DQ)
    assert isinstance(rejected, Rejected)
    assert "dbias" in rejected.reason
    plant(lambda tensors: pytest.fail("nothing more is written without a bias of numbers"))
    assert gpu_jobs.confirm(problem("causal fp16"), OWN_DQ) is None
    assert gpu_jobs.confirm(problem("causal bias=bool fp16"), OWN_DQ) is None


def test_lse_is_confirmed(plant):
    plant(lambda tensors: tensors["lse"][corner(tensors["lse"])].add_(1.0) if "lse" in tensors else None)
    plain = problem("full fp16", "forward")
    assert gpu_jobs.check_awkward(plain, FORWARD) is None
    rejected = gpu_jobs.confirm(plain, FORWARD)
    assert isinstance(rejected, Rejected)
    assert "lse[" in rejected.reason


@pytest.mark.parametrize("name", ["dq", "dk", "dv"])
def test_bits_that_change_are_caught_but_of_atomic_sums(plant, name):
    runs = iter(range(100))

    def tremble(tensors: dict[str, torch.Tensor]) -> None:
        tensors[name][corner(tensors[name])] *= 1 + next(runs) % 2 * 2.0**-10

    plant(tremble)
    what = problem("full fp16")
    for config in (OWN_DQ, ORDERED):
        rejected = gpu_jobs._check_own_shape(what, config)
        assert isinstance(rejected, Rejected)
        assert rejected.reason.endswith("two runs differ in their bits")
    assert not isinstance(gpu_jobs._check_own_shape(what, ATOMIC), Rejected)


def test_each_kernel_of_a_config_has_its_awkward_shapes():
    what = problem("causal fp16")
    shapes = awkward.awkward_for(what, OWN_DQ)
    for tile in ((16, 32), (32, 16)):
        assert {shape for shape in awkward_shapes(what, *tile) if shape.seqlen_k} <= set(shapes)
    assert len(set(shapes)) == len(shapes)
    assert awkward.awkward_for(what, ATOMIC) == tuple(s for s in awkward_shapes(what, 16, 16) if s.seqlen_k)


def forward_of(what: Problem) -> tuple[Problem, dict[str, torch.Tensor], typing.Any]:
    forward = Problem(spec=what.spec.forward(), shape=what.shape)
    inputs = dict(zip("qkv", random_inputs(what, device="cpu", seed=0), strict=True))
    return forward, inputs, random_extras(what, device="cpu", seed=0)


def test_the_forward_pass_behind_gradients_is_checked(monkeypatch):
    forward, inputs, extras = forward_of(problem("causal softcap fp16"))
    launched: list[KernelConfig] = []

    def bind(problem, config, compiled, extras, tensors):
        def run() -> None:
            launched.append(config)
            out, lse = interpret_forward(*(tensors[x] for x in "qkv"), problem=problem, config=config, extras=extras)
            tensors["out"].copy_(out)
            # The first kernel is wrong.
            tensors["lse"].copy_(lse + (len(launched) == 1))

        return run

    safe = TritonForwardConfig(block_m=32, block_n=16, num_warps=1, num_stages=1)
    monkeypatch.setattr(gpu_cases, "default_configs", lambda *args: (FORWARD, safe))
    monkeypatch.setattr(gpu_cases, "detect_target", lambda device: None)
    monkeypatch.setattr(gpu_cases, "check_config", lambda *args: ())
    monkeypatch.setattr(gpu_cases, "compile_kernel", lambda *args: None)
    monkeypatch.setattr(gpu_cases, "bind_forward", bind)
    out, lse = gpu_cases._launched_forward(forward, inputs, extras)
    assert launched == [FORWARD, safe]
    assert Oracle(*inputs.values(), spec=forward.spec, extras=extras).judge(out, lse).ok
    launched.clear()
    monkeypatch.setattr(gpu_cases, "default_configs", lambda *args: (FORWARD,))
    with pytest.raises(FlashgenError, match=r"which no default config computes: .*block_m=16.*lse"):
        gpu_cases._launched_forward(forward, inputs, extras)


def test_exact_forward_is_of_the_types_that_kernels_read():
    forward, inputs, extras = forward_of(problem("causal bf16"))
    out, lse = gpu_cases._exact_forward(forward, inputs, extras)
    poisoned = poisoned_outputs(forward, device="cpu")
    assert [(t.shape, t.dtype, t.stride()) for t in (out, lse)] == [(t.shape, t.dtype, t.stride()) for t in poisoned]


def test_finalists_are_raced_beside_a_baseline(plant, monkeypatch):
    plant(lambda tensors: None)
    monkeypatch.setattr(gpu_jobs, "_clock", HostClock)
    monkeypatch.setattr(gpu_jobs, "_FINAL_ROUNDS", 2)
    planted = Peer(name="planted", make=lambda q, k, v, problem, extras: lambda: q)
    refusing = Peer(name="refusing", make=lambda q, k, v, problem, extras: "no")
    monkeypatch.setattr(gpu_jobs, "default_baselines", lambda device: (planted, refusing))
    found = gpu_jobs.race(problem("causal fp16", "forward"), [FORWARD, FORWARD], 1.0, 0, True)
    assert list(found.timings) == ["0", "1", "planted"]
    assert found.at_least.keys() == {"0", "1"}
    assert 1.0 in found.at_least.values()
    assert found.timings["planted"].median_us < found.timings["0"].median_us
    alone = gpu_jobs.race(problem("causal fp16", "forward"), [FORWARD], 1.0, 0, False)
    assert (list(alone.timings), alone.at_least) == (["0"], {"0": 1.0})


def decode(words: str = "", sizes: str = "b=2 hq=4 hkv=2 sq=2 sk=40") -> Problem:
    return parse_problem(f"{sizes} d=16 decode fp16 {words}")


@pytest.mark.parametrize(
    "words",
    [
        "causal",
        "sliding_window(9,0) page=4 leftpad sinks",
        "causal append rotary=halves batch_idx softcap",
        "append rotary=pairs page=16 lse alibi",
        "shared_kv",
        "fp8_kv descale page=8",
    ],
)
def test_a_right_kernel_of_decoding_passes(plant, words):
    config = DECODE if "fp8" not in words else TritonDecodeConfig(block_m=16, block_n=32, num_warps=1, num_stages=1)
    assert gpu_jobs.check_awkward(decode(words), config) is None
    error, allowed = gpu_jobs._check_own_shape(decode(words), config)
    assert error <= allowed


@pytest.mark.parametrize("name", ["out", "lse"])
def test_a_fault_in_decoding_is_caught(plant, name):
    plant(last_element(name))
    for check in (gpu_jobs.check_awkward, gpu_jobs._check_own_shape):
        rejected = check(decode("causal lse"), DECODE)
        assert isinstance(rejected, Rejected)
        assert f": {name}[" in rejected.reason


def test_what_is_appended_is_checked_and_nothing_else_may_change(plant):
    def never_appended(tensors: dict[str, torch.Tensor]) -> None:
        tensors["v"].fill_(torch.nan)

    appending = decode("causal append")
    for fault in (never_appended, last_element("k"), last_element("v")):
        plant(fault)
        rejected = gpu_jobs.check_awkward(appending, DECODE)
        assert isinstance(rejected, Rejected)
        assert "after the call and should be" in rejected.reason
        # What was written beside the rows is not the next config's.
        plant(lambda tensors: None)
        assert gpu_jobs.check_awkward(appending, DECODE) is None
    plant(last_element("k"))
    rejected = gpu_jobs.check_awkward(decode("causal"), DECODE)
    assert isinstance(rejected, Rejected)
    assert rejected.reason.endswith("an input was written")


def test_rows_that_a_kernel_forgets_to_append_are_those_of_the_run_before(plant, monkeypatch):
    case = gpu_cases.make_case(decode("causal append"), device=torch.device("cpu"), seed=0, whole=False)
    interpreted(case, DECODE)
    assert case.judge().ok
    # Only what was spoiled shows that nothing is written.
    case.poison()
    assert not case.judge().ok
    last = case.calls[0].k[0, :, 39]
    assert last.isnan().all()


def test_pages_and_appended_keys_are_confirmed(plant):
    appended = []
    plant(lambda tensors: appended.append(tensors["k"].shape[2]))
    assert gpu_jobs.confirm(decode("causal"), DECODE) is None
    # The rows of one page each.
    assert set(appended) == {256}
    plant(lambda tensors: tensors["lse"][corner(tensors["lse"])].add_(1.0))
    for words in ("causal", "shared_kv"):
        rejected = gpu_jobs.confirm(decode(words), DECODE)
        assert isinstance(rejected, Rejected)
        assert "lse[" in rejected.reason


def test_calls_of_decoding_take_turns(plant, monkeypatch):
    monkeypatch.setattr(gpu_cases, "rotation_size", lambda call_bytes, device: 3)
    call = gpu_cases.make_case(decode("shared_kv"), device=torch.device("cpu"), seed=0, whole=False).calls[0]
    own = gpu_jobs._own_case(decode("shared_kv"))
    monkeypatch.setattr(gpu_jobs, "_own_case", lambda problem: dataclasses.replace(own, calls=call.copies(3)))
    case = gpu_jobs._own_case(decode("shared_kv"))
    turns = case.in_turn()
    assert len({turn.tensors["k"].data_ptr() for turn in turns}) == 3
    assert all(turn.tensors["v"].data_ptr() == turn.tensors["k"].data_ptr() for turn in turns)
    assert {turn.tensors["out"].data_ptr() for turn in turns} == {case.tensors["out"].data_ptr()}
    rotation = gpu_jobs._timed(case, DECODE)
    assert isinstance(rotation, Rotation)
    assert len(rotation.calls) == 3


def test_decoding_is_raced_beside_what_decodes(plant, monkeypatch):
    monkeypatch.setattr(gpu_jobs, "_clock_of", lambda problem: HostClock())
    monkeypatch.setattr(gpu_jobs, "_FINAL_ROUNDS", 2)
    planted = Peer(
        name="planted", make=lambda *args: "no", make_decode=lambda calls: tuple(lambda: None for _ in calls)
    )
    refusing = Peer(name="refusing", make=lambda *args: lambda: None, make_decode=lambda calls: "no")
    monkeypatch.setattr(gpu_jobs, "default_baselines", lambda device: (planted, refusing))
    found = gpu_jobs.race(decode("causal"), [DECODE], 1.0, 0, True)
    assert list(found.timings) == ["0", "planted"]
