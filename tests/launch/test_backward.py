"""What a backward launch is made of: every argument of every kernel in its place, and what is made meanwhile."""

from __future__ import annotations

import dataclasses
import math
import typing
from collections.abc import Callable

import pytest
import torch

from flashgen.codegen import KernelConfig, TritonBackwardConfig, TritonForwardConfig, render
from flashgen.compile import CompiledKernel
from flashgen.errors import ConfigError, InputError
from flashgen.launch import BackwardLaunch, bind_backward, interpret_backward, layouts_of
from flashgen.launch.backward import BackwardCall
from flashgen.measure import (
    poisoned_gradients,
    random_extras,
    random_inputs,
    random_lse_gradients,
    random_output_gradients,
)
from flashgen.measure.gradients import bias_sizes
from flashgen.spec import Extras, Problem, parse_problem

CONFIG = TritonBackwardConfig(
    block_m1=32, block_n1=64, num_warps=4, num_stages=2, head_group=3,
    block_m2=64, block_n2=32, num_warps2=4, num_stages2=2,
)  # fmt: skip
ADDED = dataclasses.replace(CONFIG, dq="atomic", block_m2=0, block_n2=0, num_warps2=0, num_stages2=0)
CONFIGS = {
    "kernel": CONFIG,
    "kernel descriptor": dataclasses.replace(CONFIG, loads="descriptor"),
    "atomic": ADDED,
    "atomic descriptor": dataclasses.replace(ADDED, loads="descriptor"),
    "ordered": dataclasses.replace(ADDED, dq="ordered"),
}
# One problem of each kind of argument that the kernels may take.
PROBLEMS = {
    "plain": "causal",
    "numbers": "sliding_window(9,3)&chunked(40)",
    "table": "causal&document(batched)",
    "captures": "mask_mod('return t[b,q_idx]<u[kv_idx]',t='float32[b,q_idx]',u='int64[kv_idx]')",
    "score_mod": "causal score_mod('return score*w[h]',w='float32[h]')",
    "bias": "full bias=input",
    "dbias": "full bias=fp32:unaligned dbias",
    "alibi_sinks_softcap": "full alibi sinks softcap",
    "dropout": "full dropout",
    "varlen": "causal varlen",
    "varlen_document": "document varlen seqused=qk",
    "seqused": "full seqused=qk",
    "dims": "causal d=96 dv=80",
}
Launched = list[tuple[object, int, list[typing.Any]]]
Fake = Callable[[Problem, KernelConfig], CompiledKernel]


def problem_of(words: str) -> Problem:
    sizes = "" if " d=" in words else "d=64 dv=40"
    return parse_problem(f"b=2 hq=6 hkv=2 sq=70 sk=77 {sizes} {words} fp16 backward")


def tensors_for(problem: Problem, extras: Extras) -> dict[str, torch.Tensor]:
    q, k, v = random_inputs(problem, device="cpu", seed=0, layout="bshd")
    do = random_output_gradients(problem, device="cpu", seed=0)
    dlse = random_lse_gradients(problem, device="cpu", seed=0)
    dq, dk, dv = poisoned_gradients(problem, device="cpu")
    given = {"q": q, "k": k, "v": v, "out": torch.zeros_like(do), "do": do, "lse": torch.zeros_like(dlse)}
    given |= {"dq": dq, "dk": dk, "dv": dv}
    if problem.spec.dbias:
        assert extras.bias is not None
        given["dbias"] = torch.empty(bias_sizes(extras.bias))
    return given


@pytest.mark.parametrize("words", PROBLEMS.values(), ids=PROBLEMS.keys())
@pytest.mark.parametrize("name", CONFIGS)
def test_bound_arguments_are_those_of_the_kernels(
    name: str, words: str, launched: Launched, fake_compiled: Fake
) -> None:
    problem, config = problem_of(words), CONFIGS[name]
    extras = random_extras(problem, device="cpu", seed=2)
    given = tensors_for(problem, extras)
    bind_backward(problem, config, fake_compiled(problem, config), extras, given)()
    call = BackwardCall(problem, config, extras, layouts_of(given))
    scratch = call.with_scratch(given, extras)
    entries = call.plan.entries
    assert [handle for handle, _, _ in launched] == [entry.name for entry in entries]
    for entry, (_, grid, arguments) in zip(entries, launched, strict=True):
        assert grid == call.grid(entry) > 0
        want = call.arguments(entry, scratch)
        assert list(want) == [*entry.arguments, *entry.constants]
        assert len(arguments) == len(want)
        for argument, got in zip(want, arguments, strict=True):
            _check_argument(argument, got, want[argument], given, own_dq=config.dq == "kernel")


def _check_argument(
    name: str, got: typing.Any, want: typing.Any, given: dict[str, torch.Tensor], *, own_dq: bool
) -> None:
    operand = name.removesuffix("_ptr").removesuffix("_desc")
    # dQ is summed up in float32 where it has no kernel of its own.
    mine = operand in given and (operand != "dq" or own_dq)
    if name.endswith("_ptr"):
        assert isinstance(got, torch.Tensor), name
        assert (got.shape, got.dtype) == (want.shape, want.dtype), name
        assert not mine or got is given[operand], name
    elif name.endswith("_desc"):
        assert not mine or got.base is given[operand], name
        fields = [{key: value for key, value in d.__dict__.items() if key != "base"} for d in (got, want)]
        assert fields[0] == fields[1], name
    else:
        assert type(got) in (int, float), name
        assert got == want, name


def test_numbers() -> None:
    problem = problem_of("causal bias=fp32:unaligned dbias")
    extras = dataclasses.replace(
        random_extras(problem, device="cpu", seed=0, softmax_scale=0.3),
        bias=torch.zeros(1, 6, 70, 1).expand(2, 6, 70, 77),
    )
    given = tensors_for(problem, extras)
    call = BackwardCall(problem, CONFIG, extras, layouts_of(given))
    numbers = {entry.name: call.values(entry) for entry in call.plan.entries}
    dkdv, dq, dbias = (numbers[f"attn_bwd_{name}"] for name in ("dkdv", "dq", "dbias"))
    assert dkdv["qk_scale"] == pytest.approx(0.3 * math.log2(math.e))
    assert dkdv["softmax_scale"] == 0.3
    # Programs of dK and dV are counted in key/value heads, those of dQ in query heads.
    assert (dkdv["num_heads_total"], dq["num_heads_total"]) == (2 * 2, 2 * 6)
    assert [dkdv[name] for name in ("nheads_q", "nheads_kv", "group", "head_group")] == [6, 2, 3, 3]
    assert [dbias[f"bias_{name}"] for name in ("batch", "heads", "rows", "keys")] == [1, 6, 70, 1]
    # Queries are transposed views, their gradients are not.
    assert [dq[f"stride_q{axis}"] for axis in "zhm"] == [70 * 6 * 64, 64, 6 * 64]
    assert [dq[f"stride_dq{axis}"] for axis in "zhm"] == [6 * 70 * 64, 70 * 64, 64]
    assert [dkdv[f"stride_dv{axis}"] for axis in "zhn"] == [2 * 77 * 40, 77 * 40, 40]


@pytest.mark.parametrize(
    ("sizes", "grids"),
    [
        ("b=2 hq=6 hkv=2 sq=130 sk=77", {"dkdv": 2 * 4, "dq": 3 * 12}),
        ("b=2 hq=6 hkv=2 sq=128 sk=128", {"dkdv": 2 * 4, "dq": 2 * 12}),
        ("b=1 hq=1 hkv=1 sq=1 sk=1", {"dkdv": 1, "dq": 1}),
        ("b=1 hq=1 hkv=1 sq=0 sk=65", {"dkdv": 2, "dq": 0, "delta": 0}),
        ("b=1 hq=1 hkv=1 sq=65 sk=0", {"dkdv": 0, "dq": 2}),
    ],
)
def test_grids(sizes: str, grids: dict[str, int], launched: Launched, fake_compiled: Fake) -> None:
    problem = parse_problem(f"{sizes} d=64 fp16 backward")
    extras = random_extras(problem, device="cpu", seed=0)
    given = tensors_for(problem, extras)
    call = BackwardCall(problem, CONFIG, extras, layouts_of(given))
    found = {entry.name.removeprefix("attn_bwd_"): call.grid(entry) for entry in call.plan.entries}
    assert grids.items() <= found.items()
    # Every row has its program.
    assert found["delta"] * call.constants["BLOCK_ROWS"] >= problem.shape.seqlen_q * problem.shape.nheads_q
    bind_backward(problem, CONFIG, fake_compiled(problem, CONFIG), extras, given)()
    assert {str(handle).removeprefix("attn_bwd_"): grid for handle, grid, _ in launched} == {
        name: grid for name, grid in found.items() if grid
    }


@pytest.mark.parametrize("sizes", ["b=1 h=1 sq=1 sk=2147483648", "b=67108864 h=1 sq=1 sk=4096"])
def test_sizes_past_32_bits(sizes: str) -> None:
    problem = parse_problem(f"{sizes} d=16 fp16 backward")
    small = parse_problem("b=1 h=1 s=1 d=16 fp16 backward")
    extras = Extras(softmax_scale=1.0)
    call = BackwardCall(problem, CONFIG, extras, layouts_of(tensors_for(small, extras)))
    dkdv = next(entry for entry in call.plan.entries if entry.name == "attn_bwd_dkdv")
    with pytest.raises(InputError, match=r"below 2\*\*31; split the batch"):
        call.grid(dkdv)


@pytest.mark.parametrize("words", ["causal", "causal varlen seqused=q"])
@pytest.mark.parametrize("name", CONFIGS)
def test_what_is_made_meanwhile_is_linear_in_the_lengths(name: str, words: str) -> None:
    made = {}
    for length in (128, 256):
        problem = parse_problem(f"b=2 hq=6 hkv=2 s={length} d=64 dv=40 fp16 {words} backward")
        extras = random_extras(problem, device="cpu", seed=0)
        given = tensors_for(problem, extras)
        call = BackwardCall(problem, CONFIGS[name], extras, layouts_of(given))
        scratch = call.with_scratch(given, extras)
        own = {id(t) for t in (*given.values(), *vars(extras).values())}
        made[length] = sum(t.numel() for t in scratch.values() if id(t) not in own)
        # dQ is summed up in float32 unless it has a kernel of its own, and the sums start at 0.
        summed = CONFIGS[name].dq != "kernel"
        assert (scratch["dq"].dtype == torch.float32) == summed
        assert not summed or (scratch["dq_out"] is given["dq"] and not scratch["dq"].any())
        assert ("turn" in scratch) == (name == "ordered")
        assert "turn" not in scratch or not scratch["turn"].any()
    assert made[256] <= 2 * made[128]


def test_a_bound_launch_takes_other_tensors_each_time(launched: Launched, fake_compiled: Fake) -> None:
    problem, config = problem_of("causal alibi"), CONFIGS["atomic descriptor"]
    extras = [random_extras(problem, device="cpu", seed=seed) for seed in (0, 2)]
    calls = [tensors_for(problem, own) for own in extras]
    bound = BackwardLaunch(
        problem=problem,
        config=config,
        compiled=fake_compiled(problem, config),
        extras=extras[0],
        layouts=layouts_of(calls[0]),
    )
    for given, own in zip(calls, extras, strict=True):
        bound(given, own)
    names = [*bound_entry(problem, config).arguments]
    first, second = (arguments for handle, _, arguments in launched if handle == "attn_bwd_dkdv")
    for arguments, given, own in zip((first, second), calls, extras, strict=True):
        at = dict(zip(names, arguments, strict=False))
        assert all(at[f"{name}_desc"].base is given[name] for name in ("q", "k", "v", "do"))
        assert all(at[f"d{name}_ptr"] is given[f"d{name}"] for name in "kv")
        assert at["alibi_ptr"] is own.alibi_slopes
    # Sums of one call are not those of the next.
    scratch = [dict(zip(names, arguments, strict=False)) for arguments in (first, second)]
    assert scratch[0]["dq_desc"].base is not scratch[1]["dq_desc"].base
    assert scratch[0]["delta_ptr"] is not scratch[1]["delta_ptr"]


def bound_entry(problem: Problem, config: TritonBackwardConfig) -> typing.Any:
    return next(entry for entry in render(problem.spec, config).plan.entries if entry.name == "attn_bwd_dkdv")


def test_a_tensor_that_the_call_lacks_is_named() -> None:
    problem = problem_of("causal alibi")
    extras = Extras(softmax_scale=1.0)
    given = tensors_for(problem, extras)
    call = BackwardCall(problem, CONFIG, dataclasses.replace(extras, alibi_slopes=torch.zeros(6)), layouts_of(given))
    with pytest.raises(InputError, match="not given: alibi_slopes"):
        call.with_scratch(given, extras)


def test_a_config_of_another_phase_is_refused(fake_compiled: Fake) -> None:
    problem = problem_of("causal")
    extras = random_extras(problem, device="cpu", seed=0)
    forward = TritonForwardConfig(block_m=64, block_n=32, num_warps=4, num_stages=2)
    with pytest.raises(ConfigError, match="'triton/forward' has no backward kernels"):
        bind_backward(problem, forward, fake_compiled(problem, CONFIG), extras, tensors_for(problem, extras))


def test_tensors_are_left_as_they_are() -> None:
    problem = problem_of("causal bias=input dbias")
    extras = random_extras(problem, device="cpu", seed=0)
    given = tensors_for(problem, extras)
    inputs = {name: given[name] for name in ("q", "k", "v", "out", "do", "lse", "dbias")}
    before = {name: t.clone() for name, t in inputs.items()}
    interpret_backward(inputs, problem=problem, config=CONFIG, extras=extras)
    assert all(torch.equal(inputs[name], before[name]) for name in inputs if name != "dbias")
