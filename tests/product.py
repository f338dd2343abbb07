"""Random calls from the whole product of what attention can be asked, each replayed by its seed.

    PYTHONPATH=tests python -c "import product; product.replay(17, 'cpu')"

draws the call with that seed again, runs it and says what it was. Masks and functions are drawn as text, so that a
failure can be written down.
"""

from __future__ import annotations

import dataclasses
import math
import random
import typing
from unittest import mock

import torch

from flashgen.codegen import TritonForwardConfig, render
from flashgen.codegen.constraints import check_config
from flashgen.compile import compile_job, compile_kernel
from flashgen.launch import Operands, bind_forward, detect_target, forward_table, interpret_forward
from flashgen.measure import API_LENGTHS, accuracy_error, poisoned_empty, random_extras, random_inputs
from flashgen.measure.entries import batch_entries
from flashgen.spec import AttentionSpec, DType, Extras, Mask, Problem, Shape, parse_mask
from flashgen.spec.mods import parse_mod
from flashgen.target import named_target

Where = typing.Literal["cpu", "cuda"]
Memory = typing.Literal["dense", "transposed", "sliced", "one-head", "one-entry"]
Tensors = tuple[torch.Tensor, torch.Tensor, torch.Tensor]

# The configs are legal there.
TARGET = named_target("sm_90")

_MASK_MODS = (
    "mask_mod('return (q_idx - kv_idx) // 3 == h')",
    "mask_mod('return (q_idx * 7 + kv_idx * 3 + b) % 5 != 0')",
    "mask_mod('return t[b, q_idx] < u[kv_idx]', t='float32[b,q_idx]', u='float32[kv_idx]')",
    "mask_mod('return keep[h, kv_idx] | (q_idx == kv_idx)', keep='bool[h,kv_idx]')",
    "mask_mod('return size[b] > kv_idx - q_idx', size='int32[b]')",
    "mask_mod('return where(t[kv_idx - q_idx] > 0.0, q_idx % 2 == 0, kv_idx % 3 != h)', t='float16[any]')",
)
_SCORE_MODS = (
    "score_mod('return score * 2.0 + w[h]', w='float32[h]')",
    "score_mod('return score + r[h, q_idx - kv_idx]', r='bfloat16[h,any]')",
    "score_mod('return where(kv_idx % 3 == b, score - 1.0, score)')",
    "score_mod('return tanh(score / 4.0) * 4.0')",
    "score_mod('return where(keep[kv_idx], score, -float(\"inf\"))', keep='bool[kv_idx]')",
    "score_mod('return score - 0.125 * abs(q_idx - kv_idx)')",
)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Draw:
    """One call of a kernel, at several lengths.

    Attributes:
        seed: what it was drawn from, and its tensors are.
        where: what it was drawn for: small lengths for the interpreter on a `cpu`, the API's on `cuda`.
        spec: what is computed.
        config: how; legal for the spec, and able to read the tensors' strides.
        shapes: at which sizes.
        memory: how q, k and v lie in memory.
    """

    seed: int
    where: Where
    spec: AttentionSpec
    config: TritonForwardConfig
    shapes: tuple[Shape, ...]
    memory: tuple[Memory, Memory, Memory]

    @property
    def problems(self) -> tuple[Problem, ...]:
        return tuple(Problem(spec=self.spec, shape=shape) for shape in self.shapes)

    def told(self, problem: Problem) -> str:
        """Return what the call was, and how to make it again."""
        line = f"""PYTHONPATH=tests python -c "import product; product.replay({self.seed}, '{self.where}')\""""
        return (
            f"draw {self.seed}: {problem}\n{self.config}\nmemory of q, k, v: {', '.join(self.memory)}\nreplay: {line}"
        )


def draw(seed: int, where: Where) -> Draw:
    """Return the call with that seed."""
    rng = random.Random(f"{seed} {where}")
    spec = draw_spec(rng, where)
    memory = draw_memory(rng, spec)
    config = _config(rng, spec, memory, where)
    shapes = tuple(draw_shape(rng, spec, where, lengths) for lengths in draw_lengths(rng, where))
    return Draw(seed=seed, where=where, spec=spec, config=config, shapes=shapes, memory=memory)


def _one_of(rng: random.Random, **weights: float) -> str:
    return rng.choices(list(weights), list(weights.values()))[0]


def draw_spec(rng: random.Random, where: Where) -> AttentionSpec:
    """Return a spec of the forward phase."""
    dtype = DType(_one_of(rng, fp16=3, bf16=3, fp32=2, tf32=1, fp8=2))
    head_dim_qk = _head_dim(rng, dtype, where)
    bias = typing.cast("typing.Literal['none']", _one_of(rng, none=6, input=1, fp32=1, bool=1))
    return AttentionSpec(
        dtype=dtype,
        head_dim_qk=head_dim_qk,
        head_dim_v=head_dim_qk if rng.random() < 0.6 else _head_dim(rng, dtype, where),
        mask=_mask(rng, 80 if where == "cpu" else 1000),
        score_mod=parse_mod(rng.choice(_SCORE_MODS)) if rng.random() < 0.25 else None,
        softcap=rng.random() < 0.2,
        bias=bias,
        bias_aligned=bias == "none" or rng.random() < 0.5,
        alibi=rng.random() < 0.2,
        sinks=rng.random() < 0.2,
        dropout=rng.random() < 0.2,
        varlen=rng.random() < 0.25,
        seqused=_one_of(rng, none=6, q=1, k=1, qk=1).replace("none", ""),
        descale=dtype is DType.FP8 and rng.random() < 0.7,
        lse=rng.random() < 0.6,
    )


def _head_dim(rng: random.Random, dtype: DType, where: Where) -> int:
    if rng.random() < 0.03:
        return 512
    if rng.random() < 0.5:
        return rng.choice((16, 32, 64, 64, 80, 96, 128, 128, 192, 256))
    step = 16 if dtype is DType.FP8 else 8
    return rng.randrange(16, 129 if where == "cpu" else 257, step)


def _mask(rng: random.Random, most: int) -> Mask:
    """Return a mask with numbers up to about `most`: a leaf, or up to three of them composed."""
    text = _leaf(rng, most)
    for _ in range(rng.choices((0, 1, 2), (6, 3, 1))[0]):
        other = _leaf(rng, most)
        text = f"({text}){rng.choice('&&|')}{rng.choice(('', '', '~'))}({other})"
    return parse_mask(f"~({text})" if rng.random() < 0.05 else text)


def _leaf(rng: random.Random, most: int) -> str:
    def number(least: int = 0) -> int:
        # As many small ones as large ones.
        return max(least, int(math.exp(rng.uniform(0, math.log(most + 1)))) - 1)

    window = (number() if rng.random() < 0.8 else -1, number() if rng.random() < 0.5 else rng.choice((-1, 0)))
    kinds = (
        ("full", 2),
        ("causal", 5),
        ("causal(align=top_left)", 2),
        (f"sliding_window({window[0]},{window[1]})", 5),
        (f"prefix_lm({number()})", 2),
        (f"chunked({number(1)})", 2),
        (f"dilated_window({number()},{number()},{rng.randint(1, 5)})", 1),
        (f"global_tokens({number()})", 1),
        (rng.choice(("document", "document(batched)")), 3),
        (rng.choice(_MASK_MODS), 3),
    )
    return rng.choices([text for text, _ in kinds], [weight for _, weight in kinds])[0]


def draw_memory(rng: random.Random, spec: AttentionSpec) -> tuple[Memory, Memory, Memory]:
    """Return how q, k and v lie in memory."""

    def one(*words: Memory) -> Memory:
        return rng.choice(("dense", *words))

    same = one("dense", "transposed", "sliced")
    if rng.random() < 0.5:
        return same, same, same
    shared: tuple[Memory, ...] = ("one-head",) if spec.varlen else ("one-head", "one-entry")
    key_value = one("transposed", "sliced", *shared)
    return one("transposed", "sliced"), key_value, key_value if rng.random() < 0.5 else one("transposed", *shared)


def _config(rng: random.Random, spec: AttentionSpec, memory: tuple[Memory, ...], where: Where) -> TritonForwardConfig:
    expanded = any(word in ("one-head", "one-entry") for word in memory)
    blocks = (16, 32, 64) if where == "cpu" else (16, 32, 64, 128)
    for _ in range(1000):
        config = TritonForwardConfig(
            block_m=rng.choice(blocks),
            block_n=rng.choice(blocks),
            num_warps=rng.choice((1, 2, 4, 8)),
            num_stages=rng.choice((1, 2, 3)),
            loads="pointer" if expanded else rng.choice(("pointer", "descriptor")),
            head_group=rng.choice((1, 2, 3, 16)),
            head_tiles=rng.choice((1, 2)),
            loops=rng.choice(("split", "single")),
        )
        if where == "cuda" and _compiles_for_long(config, spec):
            continue
        if not check_config(config, spec, TARGET):
            return config
    raise AssertionError(f"no config was found legal for {spec}")


def _compiles_for_long(config: TritonForwardConfig, spec: AttentionSpec) -> bool:
    """Return whether a thread has thousands of products to unroll, as float32's are."""
    products = config.block_m * config.block_n * (spec.head_dim_qk + spec.head_dim_v) // (32 * config.num_warps)
    return spec.dtype is DType.FP32 and products > 1024


def draw_lengths(rng: random.Random, where: Where) -> list[tuple[int, int]]:
    """Return pairs of seqlen_q and seqlen_k: a small one for the interpreter, the API's and others for a GPU."""
    if where == "cpu":
        longest = rng.choice((5, 33, 80))
        return [(rng.randint(1, longest), rng.randint(1, longest))]
    pairs = [*rng.sample(API_LENGTHS[:-1], 3), (rng.randint(1, 700), rng.randint(1, 700))]
    return [*pairs, API_LENGTHS[-1]] if rng.random() < 0.03 else pairs


def draw_shape(rng: random.Random, spec: AttentionSpec, where: Where, lengths: tuple[int, int]) -> Shape:
    """Return a shape of these lengths that is not too large to be judged quickly."""
    group, nheads_kv, batch = rng.choice((1, 1, 2, 3, 6, 7)), rng.choice((1, 2)), rng.choice((1, 2, 3))
    if max(lengths) > 2000:
        nheads_kv, batch, group = 1, 1, min(group, 2)
    elif where == "cpu" and batch * nheads_kv * group * lengths[0] * lengths[1] > 20000:
        nheads_kv, batch, group = 1, min(batch, 2), min(group, 2)
    elif where == "cpu" and batch * nheads_kv * group > 14:
        batch = 1
    return Shape(batch=batch, seqlen_q=lengths[0], seqlen_k=lengths[1], nheads_q=group * nheads_kv, nheads_kv=nheads_kv)


def tensors_of(drawn: Draw, problem: Problem, device: Where) -> tuple[Tensors, Extras]:
    """Return q, k and v as drawn, NaN in every row that the call does not use, and the extras."""
    return spoilt_inputs(problem, drawn.memory, device, drawn.seed)


def spoilt_inputs(
    problem: Problem, memory: tuple[Memory, Memory, Memory], device: Where, seed: int
) -> tuple[Tensors, Extras]:
    """Return q, k and v, NaN in every row that the call does not use, and the extras."""
    dense = random_inputs(problem, device=device, seed=seed)
    extras = random_extras(problem, device=device, seed=seed)
    q, k, v = (laid_out(t, how) for t, how in zip(dense, memory, strict=True))
    shape = problem.shape
    entries = batch_entries(problem.spec, extras, batch=shape.batch, seqlen_q=shape.seqlen_q, seqlen_k=shape.seqlen_k)
    # What is shared by all entries cannot be spoilt for one.
    spoilt = [t for t, how in zip((k, v), memory[1:], strict=True) if how != "one-entry"]
    for entry in entries:
        _entry_rows(q, entry.b, entry.rows_q, problem.spec)[..., entry.seqlen_q :, :] = _nan(q)
        for tensor in spoilt:
            _entry_rows(tensor, entry.b, entry.rows_k, problem.spec)[..., entry.seqlen_k :, :] = _nan(tensor)
    return (q, k, v), extras


def _entry_rows(tensor: torch.Tensor, b: int, rows: slice, spec: AttentionSpec) -> torch.Tensor:
    entry = tensor[rows].transpose(0, 1) if spec.varlen else tensor[b]
    return entry[:1] if entry.stride(0) == 0 else entry


def _nan(like: torch.Tensor) -> torch.Tensor:
    return torch.full((), math.nan, device=like.device).to(like.dtype)


def laid_out(tensor: torch.Tensor, how: Memory) -> torch.Tensor:
    """Return the numbers of a [batch, heads, seqlen, head_dim] or [tokens, heads, head_dim] tensor in other memory."""
    heads = 1
    rows = 2 if tensor.dim() == 4 else 0
    if how == "transposed":
        return tensor.transpose(heads, rows).contiguous().transpose(heads, rows)
    if how == "one-head":
        return tensor[:, :1].expand_as(tensor)
    if how == "one-entry":
        return tensor[:1].expand_as(tensor)
    if how == "dense":
        return tensor
    # Inside a tensor of NaN: rows after the last, columns on both sides, every second head.
    sizes = list(tensor.shape)
    sizes[rows] += 40
    sizes[heads] *= 2
    sizes[-1] += 32
    whole = torch.full(sizes, math.nan, device=tensor.device).to(tensor.dtype)
    view = whole.narrow(rows, 0, tensor.shape[rows])[:, ::2][..., 16:-16]
    view.copy_(tensor)
    return view


def run_interpreted(drawn: Draw, problem: Problem) -> str:
    """Run a call in the interpreter; return what is wrong with its result, empty if nothing is."""
    (q, k, v), extras = tensors_of(drawn, problem, "cpu")
    with mock.patch("flashgen.launch.interpreter.allocate_outputs", _poisoned):
        out, lse = interpret_forward(q, k, v, problem=problem, config=drawn.config, extras=extras)
    return accuracy_error(out, lse, q, k, v, spec=problem.spec, extras=extras).reason


def _poisoned(q: torch.Tensor, spec: AttentionSpec) -> tuple[torch.Tensor, torch.Tensor | None]:
    rows = (q.shape[1], q.shape[0]) if spec.varlen else tuple(q.shape[:3])
    out = poisoned_empty((*q.shape[:-1], spec.head_dim_v), getattr(torch, spec.dtype.out.torch_name), q.device)
    return out, poisoned_empty(rows, torch.float32, q.device) if spec.lse else None


def run_on_gpu(drawn: Draw, problem: Problem) -> str:
    """Run a call on the current GPU; return what is wrong with its result, empty if nothing is."""
    spec, config = problem.spec, drawn.config
    (q, k, v), extras = tensors_of(drawn, problem, "cuda")
    out, lse = _poisoned(q, spec)
    if drawn.seed % 2:
        # Out as the caller of a "bshd" layout has it.
        out = laid_out(out, "transposed")
    tensors = {"q": q, "k": k, "v": v, "out": out} | ({"lse": lse} if lse is not None else {})
    refusal = Operands.of(tensors).refusal(config, spec)
    assert refusal is None, refusal
    target = detect_target(torch.device("cuda", torch.cuda.current_device()))
    compiled = compile_kernel(render(spec, config), spec.structure(), config, target)
    bind_forward(problem, config, compiled, extras, tensors)()
    return accuracy_error(out, lse, q, k, v, spec=spec, extras=extras).reason


def prepare(seed: int) -> str:
    """Compile what a call needs on the current GPU into Triton's disk cache; return what went wrong, or nothing."""
    drawn = draw(seed, "cuda")
    device = torch.device("cuda", torch.cuda.current_device())
    try:
        compile_job(drawn.spec.structure(), drawn.config, detect_target(device))
        for problem in drawn.problems if not drawn.spec.mask.by_formula else ():
            extras = random_extras(problem, device="cuda", seed=seed)
            forward_table(problem, drawn.config, extras, device)
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    return ""


def replay(seed: int, where: Where) -> None:
    """Run the call with that seed and print what it is and how it went."""
    drawn = draw(seed, where)
    for problem in drawn.problems:
        reason = run_interpreted(drawn, problem) if where == "cpu" else run_on_gpu(drawn, problem)
        print(drawn.told(problem), reason or "ok", sep="\n")
