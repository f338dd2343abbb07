"""What a launch is made of: strides that can be read, the grid, and every argument in its place."""

from __future__ import annotations

import dataclasses
import math
import typing
from collections.abc import Callable

import pytest
import torch

from flashgen.codegen import KernelConfig, KernelPlan, TritonForwardConfig, render
from flashgen.compile import CompiledKernel
from flashgen.errors import InputError
from flashgen.launch import (
    ForwardLaunch,
    Operands,
    SideTensors,
    allocate_outputs,
    forward_table,
    grid_size,
    readable,
)
from flashgen.launch.forward import launch_values
from flashgen.launch.operands import Layout4D
from flashgen.measure import poisoned_outputs, random_extras, random_inputs
from flashgen.spec import DType, Extras, Problem, Shape, parse_problem

CONFIG = TritonForwardConfig(block_m=64, block_n=32, num_warps=4, num_stages=2, head_group=3)
DESCRIPTOR = dataclasses.replace(CONFIG, loads="descriptor")
PROBLEM = parse_problem("b=2 hq=6 hkv=2 sq=130 sk=77 d=64 dv=40 causal fp16 lse")
EXTRAS = Extras(softmax_scale=0.3)
Launched = list[tuple[object, int, list[typing.Any]]]
Fake = Callable[[Problem, KernelConfig], CompiledKernel]
Bound = Callable[[Problem, KernelConfig], tuple[int, dict[str, typing.Any]]]
# One problem of each kind of argument that a kernel may take.
PROBLEMS = {
    "plain": "causal",
    "numbers": "sliding_window(9,3)&chunked(40)",
    "table": "causal&document(batched)",
    "captures": "mask_mod('return t[b,q_idx]<u[kv_idx]',t='float32[b,q_idx]',u='int64[kv_idx]')",
    "score_mod": "causal score_mod('return score*w[h]',w='bfloat16[h]')",
    "bias": "full bias=input",
    "bias_unaligned": "full bias=bool:unaligned",
    "alibi_sinks_softcap": "full alibi sinks softcap",
    "dropout": "full dropout",
    "varlen": "causal varlen",
    "varlen_document": "document varlen seqused=qk",
    "seqused": "full seqused=qk",
    "head_tiles": "causal d=96 dv=80",
    "fp8": "causal d=64 dv=64 fp8 descale",
}


def tensors_for(problem: Problem) -> dict[str, torch.Tensor]:
    spec, shape = problem.spec, problem.shape
    dtype = getattr(torch, spec.dtype.torch_name)
    q = torch.zeros(shape.batch, shape.seqlen_q, shape.nheads_q, spec.head_dim_qk, dtype=dtype).transpose(1, 2)
    k = torch.zeros(shape.batch, shape.nheads_kv, shape.seqlen_k, spec.head_dim_qk, dtype=dtype)
    v = torch.zeros(shape.batch, shape.nheads_kv, shape.seqlen_k, spec.head_dim_v, dtype=dtype)
    out, lse = allocate_outputs(q, spec)
    return {"q": q, "k": k, "v": v, "out": out} | ({"lse": lse} if lse is not None else {})


def test_outputs() -> None:
    tensors = tensors_for(PROBLEM)
    assert (tensors["out"].shape, tensors["out"].dtype) == ((2, 6, 130, 40), torch.float16)
    assert (tensors["lse"].shape, tensors["lse"].dtype) == ((2, 6, 130), torch.float32)
    without = dataclasses.replace(PROBLEM.spec, lse=False)
    assert allocate_outputs(tensors["q"], without)[1] is None


@pytest.mark.parametrize(
    ("text", "block_m", "grid"),
    [
        ("b=2 hq=6 hkv=2 sq=130 sk=77 d=64", 64, 3 * 12),
        ("b=2 hq=6 hkv=2 sq=128 sk=77 d=64", 64, 2 * 12),
        ("b=1 hq=1 hkv=1 sq=1 sk=1 d=64", 128, 1),
        ("b=1 hq=1 hkv=1 sq=0 sk=1 d=64", 128, 0),
    ],
)
def test_grid(text: str, block_m: int, grid: int) -> None:
    assert grid_size(parse_problem(text).shape, dataclasses.replace(CONFIG, block_m=block_m)) == grid


@pytest.mark.parametrize(
    ("batch", "seqlen_q", "seqlen_k"), [(1, 2**31, 1), (1, 1, 2**31), (1, 2**31 - 64, 1), (2**26, 2**12, 1)]
)
def test_sizes_past_32_bits(batch: int, seqlen_q: int, seqlen_k: int) -> None:
    shape = Shape(batch=batch, seqlen_q=seqlen_q, seqlen_k=seqlen_k, nheads_q=1, nheads_kv=1)
    with pytest.raises(InputError, match=r"below 2\*\*31; split the batch"):
        grid_size(shape, CONFIG)


def test_scalars() -> None:
    tensors = tensors_for(PROBLEM)
    values = launch_values(PROBLEM, CONFIG, Operands.of(tensors), EXTRAS)
    assert values.pop("qk_scale") == pytest.approx(0.3 * math.log2(math.e))
    plan = render(PROBLEM.spec, CONFIG).plan
    assert {name: value for name, value in values.items() if name in plan.entries[0].arguments} == {
        "num_heads_total": 12, "nheads_q": 6, "group": 3, "SEQLEN_Q": 130, "SEQLEN_K": 77, "head_group": 3,
        # bshd queries; dense keys and values; out like q.
        "stride_qz": 130 * 6 * 64, "stride_qh": 64, "stride_qm": 6 * 64,
        "stride_kz": 2 * 77 * 64, "stride_kh": 77 * 64, "stride_kn": 64,
        "stride_vz": 2 * 77 * 40, "stride_vh": 77 * 40, "stride_vn": 40,
        "stride_oz": tensors["out"].stride(0), "stride_oh": tensors["out"].stride(1),
        "stride_om": tensors["out"].stride(2),
    }  # fmt: skip


def numbers_of(text: str) -> dict[str, float]:
    """The scalar arguments of a small problem with these words, at softmax_scale 0.5."""
    problem = parse_problem(f"b=2 hq=6 hkv=2 sq=13 sk=7 d=64 fp16 {text}")
    q, k, v = random_inputs(problem, device="cpu", seed=0)
    out, _ = poisoned_outputs(problem, device="cpu")
    operands = Operands.of({"q": q, "k": k, "v": v, "out": out})
    extras = random_extras(problem, device="cpu", seed=2, softmax_scale=0.5)
    values = launch_values(problem, CONFIG, operands, extras)
    return {name: values[name] for name in render(problem.spec, CONFIG).plan.entries[0].arguments if name in values}


def test_numbers_of_a_mask() -> None:
    values = numbers_of("sliding_window(9,3)&chunked(40)")
    assert {name: values[name] for name in ("window_left", "window_right", "chunk_size")} == {
        "window_left": 9, "window_right": 3, "chunk_size": 40,
    }  # fmt: skip
    # Two windows that are no one window.
    values = numbers_of("sliding_window(9,3)|sliding_window(1,7)")
    assert sorted(value for name, value in values.items() if name.startswith("window")) == [1, 3, 7, 9]


def test_numbers_of_scores() -> None:
    log2e = math.log2(math.e)
    assert numbers_of("")["qk_scale"] == pytest.approx(0.5 * log2e)
    # A score_mod takes scores in natural units.
    mod = "score_mod('return score+1.0')"
    assert numbers_of(mod)["qk_scale"] == pytest.approx(0.5)
    # A capped score is c - 2 c / (1 + 2 ** (2 log2(e) score / c)).
    problem = parse_problem("b=1 h=1 s=3 d=16 fp16 softcap")
    cap = random_extras(problem, device="cpu", seed=0).softcap
    for words, base in (("softcap", log2e), (f"softcap {mod}", 1.0)):
        values = numbers_of(words)
        assert values["qk_scale"] == pytest.approx(0.5 * 2.0 * log2e / cap)
        assert values["softcap"] == pytest.approx(cap * base)


def test_numbers_of_dropout() -> None:
    problem = dataclasses.replace(PROBLEM, spec=dataclasses.replace(PROBLEM.spec, dropout=True))
    operands = Operands.of(tensors_for(PROBLEM))
    for share, threshold in ((0.25, 2**30), (0.0, 0), (0.999999999999, 2**32 - 1)):
        extras = Extras(softmax_scale=1.0, dropout_p=share)
        values = launch_values(problem, CONFIG, operands, extras)
        assert values["dropout_threshold"] == threshold
        assert values["dropout_scale"] == pytest.approx(1.0 / (1.0 - share))


def test_steps_of_broadcast_tensors_are_zero() -> None:
    problem = parse_problem("b=2 hq=6 hkv=2 sq=13 sk=7 d=64 fp16 bias=fp32:unaligned alibi")
    operands = Operands.of(tensors_for(parse_problem("b=2 hq=6 hkv=2 sq=13 sk=7 d=64 fp16")))
    # A size of 1 is broadcast whatever its stride.
    bias = torch.zeros(2, 1, 13, 7)
    extras = Extras(softmax_scale=1.0, bias=bias, alibi_slopes=torch.zeros(6))
    values = launch_values(problem, CONFIG, operands, extras)
    steps = ("step_bz", "step_bh", "step_bm", "step_bn", "step_alibi_z")
    assert [values[name] for name in steps] == [13 * 7, 0, 7, 1, 0]
    extras = dataclasses.replace(extras, bias=bias.expand(2, 6, 13, 7), alibi_slopes=torch.zeros(2, 6))
    values = launch_values(problem, CONFIG, operands, extras)
    assert [values[name] for name in steps] == [13 * 7, 0, 7, 1, 6]


@pytest.mark.parametrize("words", PROBLEMS.values(), ids=PROBLEMS.keys())
@pytest.mark.parametrize("config", [CONFIG, DESCRIPTOR], ids=["pointer", "descriptor"])
@pytest.mark.parametrize("lse", [False, True])
def test_bound_arguments_are_those_of_the_kernel(
    config: TritonForwardConfig, lse: bool, words: str, bound_arguments: Bound
) -> None:
    sizes = "" if " d=" in words else "d=64 dv=40"
    problem = parse_problem(f"b=2 hq=6 hkv=2 sq=70 sk=77 {sizes} {'lse' * lse} {words}")
    assert bound_arguments(problem, dataclasses.replace(config, head_tiles=2))[0] == 24


def test_each_tensor_of_a_call_is_bound_in_its_place() -> None:
    words = (
        "varlen seqused=qk alibi sinks dropout bias=fp32 score_mod('return score*w[h]',w='bfloat16[h]')"
        " mask_mod('return t[b,q_idx]<u[kv_idx]',t='float32[b,q_idx]',u='int64[kv_idx]')"
    )
    problem = parse_problem(f"b=2 hq=6 hkv=2 sq=70 sk=77 d=64 fp16 {words}")
    extras = random_extras(problem, device="cpu", seed=0)
    plan = render(problem.spec, CONFIG).plan
    table = forward_table(problem, CONFIG, extras, torch.device("cpu"))
    assert table is not None
    side = SideTensors(plan)
    pointers = {n.removesuffix("_ptr") for n in plan.entries[0].arguments if n.endswith("_ptr")}
    assert set(side.names) == pointers - {"q", "k", "v", "out", "lse"}
    found = dict(zip(side.names, side(extras, table), strict=True))
    t, u, w = extras.captures
    want = {
        "bias": extras.bias, "alibi": extras.alibi_slopes, "sinks": extras.sinks, "rng": extras.rng_state,
        "cu_seqlens_q": extras.cu_seqlens_q, "cu_seqlens_k": extras.cu_seqlens_k,
        "seqused_q": extras.seqused_q, "seqused_k": extras.seqused_k,
        "tile_start": table.start, "tile_full": table.full, "tile_index": table.index,
        "mask0_t": t, "mask0_u": u, "score_w": w,
    }  # fmt: skip
    assert found.keys() == want.keys()
    assert all(found[name] is want[name] for name in want)


def test_a_tensor_that_the_call_lacks_is_named() -> None:
    problem = parse_problem("b=2 hq=6 hkv=2 sq=70 sk=77 d=64 fp16 alibi sinks")
    with pytest.raises(InputError, match="not given: alibi_slopes, sinks"):
        SideTensors(render(problem.spec, CONFIG).plan)(EXTRAS, None)


def test_a_bound_launch_takes_other_tensors_each_time(launched: Launched, fake_compiled: Fake) -> None:
    problem = parse_problem("b=2 hq=6 hkv=2 sq=130 sk=77 d=64 dv=40 causal fp16 lse sinks")
    plan: KernelPlan = render(problem.spec, DESCRIPTOR).plan
    bound = ForwardLaunch(
        plan=plan,
        compiled=fake_compiled(problem, DESCRIPTOR),
        problem=problem,
        config=DESCRIPTOR,
        operands=Operands.of(tensors_for(problem)),
        extras=EXTRAS,
        device=torch.device("cpu"),
    )
    calls = [[*tensors_for(problem).values(), torch.zeros(6)] for _ in range(2)]
    for call in calls:
        bound(*call)
    # Made anew each time: a launch that is still queued keeps its own.
    for (_, _, arguments), call in zip(launched, calls, strict=True):
        assert all(arguments[i].base is call[i] for i in range(4))
        assert arguments[plan.entries[0].arguments.index("lse_ptr")] is call[4]
        assert arguments[plan.entries[0].arguments.index("sinks_ptr")] is call[5]


def test_readable() -> None:
    t = torch.zeros(2, 3, 10, 16)
    assert readable(t)
    assert readable(t.transpose(1, 2))
    assert readable(t[:, :1].expand(-1, 3, -1, -1))
    assert readable(torch.zeros(2, 3, 10, 40)[..., :16])
    assert not readable(t.transpose(2, 3))
    assert not readable(torch.zeros(2, 3, 10, 17)[..., :16])
    assert not readable(torch.zeros(2, 3, 10, 32)[..., ::2])
    assert not readable(torch.zeros(2, 3, 10, 1).expand(-1, -1, -1, 16))
    # A stride that is never walked does not matter.
    assert readable(torch.as_strided(t, (1, 1, 10, 16), (3, 5, 16, 1)))


def layout(*stride: int) -> Layout4D:
    return Layout4D(size=(2, 3, 4, 16), stride=stride)


def test_descriptors_refuse_strides_that_hardware_cannot_walk() -> None:
    operands = Operands.of(tensors_for(PROBLEM))
    spec = PROBLEM.spec
    assert operands.refusal(DESCRIPTOR, spec) is None
    for strides in ((0, 128, 64, 1), (128, 0, 64, 1), (1024, 128, 0, 1), (1024, 128, 68, 1), (1024, -128, 64, 1)):
        for name in ("q", "k", "v", "out"):
            odd = dataclasses.replace(operands, **{name: layout(*strides)})
            assert odd.refusal(CONFIG, spec) is None
            reason = odd.refusal(DESCRIPTOR, spec)
            assert reason is not None
            assert f"{name} has {list(strides)}" in reason
    odd = layout(1024, 128, 68, 1)
    # 68 float32 are 17 times 16 bytes.
    single = dataclasses.replace(spec, dtype=DType.FP32)
    assert dataclasses.replace(operands, q=odd).refusal(DESCRIPTOR, single) is None
    # 72 are 16-byte rows in bfloat16, which fp8 writes, and not in fp8.
    byte = dataclasses.replace(spec, dtype=DType.FP8, head_dim_v=64)
    rows = layout(1024, 128, 72, 1)
    fp8 = Operands(q=layout(1024, 128, 64, 1), k=layout(1024, 128, 64, 1), v=layout(1024, 128, 64, 1), out=rows)
    assert fp8.refusal(DESCRIPTOR, byte) is None
    assert dataclasses.replace(fp8, v=rows).refusal(DESCRIPTOR, byte) is not None
    # Packed outputs are written through pointers.
    packed = dataclasses.replace(spec, varlen=True)
    assert dataclasses.replace(operands, out=odd).refusal(DESCRIPTOR, packed) is None
    assert dataclasses.replace(operands, k=odd).refusal(DESCRIPTOR, packed) is not None


def test_packed_tensors_are_seen_as_one_batch_entry() -> None:
    seen = Layout4D.of(torch.zeros(30, 4, 16))
    assert (seen.size, seen.stride) == ((1, 4, 30, 16), (16, 16, 64, 1))
    seen = Layout4D.of(torch.zeros(4, 30, 16).transpose(0, 1))
    assert (seen.size, seen.stride) == ((1, 4, 30, 16), (16, 480, 16, 1))


def test_strides_of_single_elements_are_made_harmless() -> None:
    q = torch.as_strided(torch.zeros(160), (1, 1, 10, 16), (3, 0, 16, 1))
    k = torch.as_strided(torch.zeros(160), (1, 1, 1, 16), (0, 0, 0, 1))
    operands = Operands.of({"q": q, "k": k, "v": k, "out": q})
    assert all(getattr(operands, name).stride == (16, 16, 16, 1) for name in ("q", "k", "v", "out"))
    assert operands.refusal(DESCRIPTOR, dataclasses.replace(PROBLEM.spec, head_dim_qk=16, head_dim_v=16)) is None


@pytest.mark.parametrize(("words", "rows"), [("", (2, 6, 13)), ("varlen", (6, 23)), ("fp8 varlen", (6, 23))])
def test_outputs_of_packed_sequences_and_of_fp8(words: str, rows: tuple[int, ...]) -> None:
    problem = parse_problem(f"b=2 hq=6 hkv=2 sq=13 sk=7 d=64 dv=32 lse {words}")
    q, _, _ = random_inputs(problem, device="cpu", seed=0)
    out, lse = allocate_outputs(q, problem.spec)
    assert lse is not None
    assert (tuple(out.shape), out.dtype) == ((*q.shape[:-1], 32), torch.bfloat16)
    assert (tuple(lse.shape), lse.dtype) == (rows, torch.float32)
